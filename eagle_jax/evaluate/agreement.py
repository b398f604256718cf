"""Measures how well a quantised target agrees with the unquantised one.

    python -m eagle_jax.evaluate.agreement --model tiny --quantize int8

The unquantised target answers every prompt greedily. Then both targets read the same prompts and
answers (teacher forcing), and their distributions are compared at every token of an answer. Both
targets must fit into memory together. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax import cli
from eagle_jax.checks import check_whole
from eagle_jax.decode import executables, generate
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.evaluate import tasks
from eagle_jax.models import Transformer, bind
from eagle_jax.models.quantize import QUANTIZATIONS
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Params, load


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of a model with a reference over the same positions.

    Attributes:
        answers, positions: number of answers and of positions compared.
        top1: share of positions where both have the same most likely token.
        kl: mean of KL(reference || model), in nats.
        kl_99: 99th percentile of the KL, in nats.
        cross_entropy, reference_cross_entropy: mean over the answers' tokens under the model and
            under the reference, in nats.
    """

    answers: int
    positions: int
    top1: float
    kl: float
    kl_99: float
    cross_entropy: float
    reference_cross_entropy: float


def compare(reference: Params, model: Params, texts: Sequence[tuple[list[int], int]]) -> Agreement:
    """Compares two targets with the same vocabulary on token ids.

    Args:
        reference, model: the two targets.
        texts: token ids of prompt and answer together, and the length of the prompt.
    """
    rows: list[np.ndarray] = []
    for ids, prompt in texts:
        width = bucket_prompt(len(ids))
        tokens = jnp.zeros((1, width), jnp.int32).at[0, : len(ids)].set(jnp.array(ids, jnp.int32))
        ours, theirs = (_logits(params, tokens) for params in (model, reference))
        measured = _measures(ours[0], theirs[0], jnp.roll(tokens[0], -1))
        rows.append(np.asarray(measured)[prompt - 1 : len(ids) - 1])
    same, kl, entropy, reference_entropy = np.concatenate(rows).astype(np.float64).T
    return Agreement(
        answers=len(rows),
        positions=len(same),
        top1=float(same.mean()),
        kl=float(kl.mean()),
        kl_99=float(np.quantile(kl, 0.99)),
        cross_entropy=float(entropy.mean()),
        reference_cross_entropy=float(reference_entropy.mean()),
    )


def _logits(params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
    exact = params.dtype == jnp.float32
    with jax.default_matmul_precision("highest" if exact else "default"):
        return _forward(params.target_config, params.layout, params.target, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, layout, params, tokens) -> jax.Array:
    model = bind(Transformer, config, params, layout)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    mask = packed_mask(jnp.zeros(tokens.shape, jnp.int32))
    return model.logits(model(tokens, positions, mask).features)


@jax.jit
def _measures(
    ours: Float[Array, "t v"], theirs: Float[Array, "t v"], following: Int[Array, " t"]
) -> Float[Array, "t 4"]:
    """Returns for every position: same top token, KL, and both cross-entropies of the next token.

    Columns are 1 or 0, KL(theirs || ours), and the cross-entropies under `ours` and `theirs`.
    """
    q, p = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    same = (jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1)).astype(jnp.float32)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    own, other = (-jnp.take_along_axis(x, following[:, None], axis=-1)[:, 0] for x in (q, p))
    return jnp.stack([same, kl, own, other], axis=-1)


def answers(params: Params, prompts: Sequence[str], new: int) -> list[tuple[list[int], int]]:
    """Returns vanilla's greedy answers: token ids of prompt and answer, and the prompt's length.

    Raises:
        ValueError: the model has no tokenizer, or a prompt does not fit the context.
    """
    if params.tokenizer is None:
        raise ValueError("model: has no tokenizer; prompts are text")
    check_whole("max_new_tokens", new)
    out = []
    for prompt in prompts:
        ids = list(params.tokenizer.chat([{"role": "user", "content": prompt}]))
        answer = generate(params, ids, method="vanilla", max_new_tokens=new).tokens
        out.append((ids + np.asarray(answer).tolist(), len(ids)))
    return out


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m eagle_jax.evaluate.agreement",
        description="Agreement of a quantised target with the same target as it was.",
    )
    out.add_argument("--model", default="tiny", help="shipped pair or directory (default: tiny)")
    out.add_argument("--quantize", choices=QUANTIZATIONS, help="default: not, to compare dtypes")
    dtypes = ("float32", "bfloat16")
    out.add_argument("--dtype", choices=dtypes, help="of its arithmetic; default: by device")
    out.add_argument("--reference", choices=dtypes, help="that of the other; default: the same")
    out.add_argument("--tasks", nargs="+", default=["own"], help="as of eagle_jax.evaluate")
    out.add_argument("--data", default="", metavar="DIR", help="directory of question files")
    out.add_argument("--limit", type=int, default=0, metavar="N", help="questions of each task")
    out.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    return out


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    args = parser().parse_args(argv)
    questions = tasks.read_tasks(args.tasks, args.data, args.limit)
    prompts = [question.turns[0] for asked in questions.values() for question in asked]
    reference = load(args.model, dtype=args.reference or args.dtype)
    model = load(args.model, dtype=args.dtype, quantize=args.quantize)
    found = compare(reference, model, answers(reference, prompts, args.max_new_tokens))
    said = {
        "model": args.model,
        "quantize": model.quantize,
        "dtype": str(model.dtype),
        "reference": str(reference.dtype),
        "device": executables.device_name(),
    }
    print(json.dumps(said | dataclasses.asdict(found)))


if __name__ == "__main__":
    cli.run(main)
