"""Kernels of our own in the loop: every method still gives vanilla's text. Interpreted on CPUs."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import pytest

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    Lookahead,
    Medusa,
    Speculative,
    executables,
    generate,
    static_tree,
)
from eagle_jax.layout import Layout
from eagle_jax.models import Transformer, cast, kernels, quantize
from eagle_jax.models.kernels import device
from eagle_jax.params import Draft, Params
from eagle_jax.testing import (
    random_draft,
    random_params,
    tiny_draft,
    tiny_eagle3,
    tiny_medusa,
    tiny_target,
)

VOCAB, NEW = 64, 20
PROMPTS = [[7], [3, 9, 11], [i * i % VOCAB for i in range(17)]]
TREE = static_tree([[0], [1], [0, 0], [0, 1]])
METHODS = {
    "eagle": Eagle(TREE),
    "eagle2": Eagle(DynamicTree(depth=3, k=4, drafted=10)),
    "eagle3": Eagle(DynamicTree(depth=3, k=4, drafted=10), head="eagle3"),
    "medusa": Medusa(TREE),
    "speculative": Speculative(3),  # its draft is the target: every draft is right
    "lookahead": Lookahead(ngram=3, window=4, guesses=2),
}


LAYOUT = Layout(gate_up_fused=True, qkv_fused=True)


@functools.cache
def pair() -> Params:
    """In bfloat16 and in decoding's layout, of sizes that the kernels take."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    config = tiny_target(VOCAB, **sizes)
    configs = tiny_draft(config), tiny_eagle3(config, head_dim=16), tiny_medusa(config)
    target = cast(random_params(Transformer, config, 3, layout=LAYOUT), jnp.bfloat16)
    drafts = {own.kind: random_draft(own, 4, layout=LAYOUT) for own in configs}
    drafts = {
        kind: Draft(cast(draft.params, jnp.bfloat16), draft.config, LAYOUT)
        for kind, draft in drafts.items()
    }
    drafts[config.kind] = Draft(target, config, LAYOUT)
    return Params(target, drafts, config, LAYOUT)


def small_drafts() -> Params:
    """The same target; int8 drafts, EAGLE-1's with the head's columns of all tokens."""
    drafts = dict(pair().drafts)
    head = {"lm_head.kernel": pair().target["lm_head.kernel"], "d2t": jnp.zeros(VOCAB, jnp.int32)}
    eagle = drafts["eagle"]
    config: Any = eagle.config
    config = dataclasses.replace(config, draft_vocab_size=VOCAB)
    drafts["eagle"] = Draft({**eagle.params, **head}, config, LAYOUT)
    layout = dataclasses.replace(LAYOUT, quantize="int8")
    for kind, draft in drafts.items():
        drafts[kind] = Draft(quantize.quantize_params(draft.params), draft.config, layout)
    return dataclasses.replace(pair(), drafts=drafts)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(device, "INTERPRET", True)
    executables.forget()
    yield
    executables.forget()  # other tests have their own programs


@functools.cache
def vanilla(temperature: float) -> list[list[int]]:
    return texts(pair(), "vanilla", temperature)


def texts(params: Params, method, temperature: float) -> list[list[int]]:
    return [
        list(
            generate(
                params,
                prompt,
                method=method,
                max_new_tokens=NEW,
                temperature=temperature,
                seed=37,  # of 30 the one whose tokens win by most: rounding must not decide
                ignore_eos=True,
            ).tokens
        )
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_texts(monkeypatch, name: str, temperature: float) -> None:
    """Catches a cache that holds something else than the text that was committed."""
    used = set()
    for module, at in (
        (kernels.skinny_matmul, "product"),
        (kernels.norm, "add"),
        (kernels.rotary, "split"),
        (kernels.attention, "attend"),
        (kernels.commit, "commit"),
    ):
        own = getattr(module, at)
        monkeypatch.setattr(
            module, at, lambda *a, own=own, at=at, **k: used.add(at) or own(*a, **k)
        )
    assert texts(pair(), METHODS[name], temperature) == vanilla(temperature)
    few = name == "speculative"  # rows, of which attention splits the product itself
    assert used == {"product", "add", "attend", "commit"} | (set() if few else {"split"})


@pytest.mark.parametrize("name", ["eagle2", "eagle3", "medusa", "speculative"])
def test_small_drafts(monkeypatch, name: str) -> None:
    """Catches a draft in eight bits that gets XLA's products where there are kernels."""
    seen = []
    own = kernels.skinny_matmul.product

    def product(x, kernel, scale=None, **more):
        seen.append((x.dtype, kernel.dtype))
        return own(x, kernel, scale, **more)

    monkeypatch.setattr(kernels.skinny_matmul, "product", product)
    assert texts(small_drafts(), METHODS[name], 1.0) == vanilla(1.0)
    assert (jnp.bfloat16, jnp.int8) in seen and (jnp.bfloat16, jnp.bfloat16) in seen


def test_a_right_draft_is_accepted() -> None:
    answer = generate(
        pair(), PROMPTS[2], method=Speculative(3), max_new_tokens=NEW, temperature=0.0,
        ignore_eos=True,
    )  # fmt: skip
    assert sum(answer.statistics.rounds) <= NEW // 4 + 2
