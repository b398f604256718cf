"""The target against transformers (torch) and against the numpy reference; cache and tree masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.checkpoint import hf
from eagle_jax.config import TransformerConfig
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models import cache as caches
from eagle_jax.models.matmul import matmul
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Params
from eagle_jax.testing import tiny_target

LENGTH = 12
PLAIN = tiny_target(rope_theta=500.0, rms_norm_eps=1e-3)  # head_dim 10, hidden / heads 8
CONFIGS = {
    "llama": PLAIN,
    "llama_tied": dataclasses.replace(PLAIN, tie_word_embeddings=True),
    "qwen2": dataclasses.replace(PLAIN, attention_bias=True, head_dim=8),
}


def random_params(config: TransformerConfig) -> dict[str, jax.Array]:
    """Random also where initial values are 0 or 1, so that a forgotten bias or scale shows."""
    rng = np.random.default_rng(7)
    return {
        name: jnp.asarray(rng.normal(size=x.shape) * 0.3 + name.endswith("scale"), jnp.float32)
        for name, x in init_params(Transformer, config, 0).items()
    }


def run(config, params, tokens, positions, mask, **cached):
    def apply(params, tokens, positions, mask, cached):
        module = bind(Transformer, config, params)
        output = module(tokens, positions, mask, **cached)
        return output, module.logits(output.features)

    return jax.jit(apply)(params, tokens, positions, mask, cached)


def random_tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 61, (rows, LENGTH))


def causal_pass(config, params, tokens):
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    return run(config, params, jnp.asarray(tokens), positions, packed_mask(jnp.zeros((b, t), int)))


def close(got, expected) -> None:
    expected = np.asarray(expected)
    assert abs(np.asarray(got) - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path) -> None:
    """Catches a wrong rotary layout, head grouping, norm, bias or transposed weight."""
    import torch
    from transformers import AutoModelForCausalLM

    config, params = CONFIGS[name], random_params(CONFIGS[name])
    hf.save_target(tmp_path, config, params, "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == ("Qwen2ForCausalLM" if name == "qwen2" else "LlamaForCausalLM")
    tokens = random_tokens(2)
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens), output_hidden_states=True)
    output, logits = causal_pass(config, params, tokens)
    close(logits, theirs.logits.numpy())
    close(output.features, theirs.hidden_states[-1].numpy())
    close(output.residuals[1], theirs.hidden_states[1].numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_agrees(name: str) -> None:
    """The numpy reference, on which the tests of decoding rest, is itself checked here."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    tokens = random_tokens(1)
    output, logits = causal_pass(config, params, tokens)
    pair = reference.Pair.of(Params(params, {}, config))
    features, expected = reference.target(pair, tokens[0].tolist())
    close(logits[0], expected)
    close(output.features[0], features)


def garbage_cache(block: caches.Cache, lengths: list[int]) -> caches.Cache:
    """A cache of 16 slots that holds `lengths` tokens of each row, and garbage behind them."""
    filled = jax.tree.map(lambda x: jnp.full((*x.shape[:2], 16, x.shape[3]), 1e3), block)
    for row, length in enumerate(lengths):
        filled = jax.tree.map(
            lambda old, new, row=row, length=length: old.at[row, :, :length].set(
                new[row, :, :length]
            ),
            filled,
            block,
        )
    return filled


def test_cached_prefix_and_fresh_block_equal_one_pass() -> None:
    """Catches off-by-one lengths, a mask that shows unused slots, one length for all rows."""
    config, params = PLAIN, random_params(PLAIN)
    tokens, lengths, fresh = random_tokens(3), [4, 0, 8], 4
    whole, logits = causal_pass(config, params, tokens)
    take = np.array(lengths)[:, None] + np.arange(fresh)[None]
    _, got = run(
        config,
        params,
        jnp.asarray(np.take_along_axis(tokens, take, 1)),
        jnp.asarray(take),
        packed_mask(jnp.zeros((3, fresh), int)),
        cache=garbage_cache(whole.block, lengths),
        lengths=jnp.array(lengths),
    )
    close(got, np.take_along_axis(np.asarray(logits), take[:, :, None], 1))


def test_tree_block_equals_its_paths_run_as_sequences() -> None:
    """Catches a sibling or an uncle that leaks in, and positions counted by node, not by depth."""
    config, params = PLAIN, random_params(PLAIN)
    tokens, lengths = random_tokens(2), [5, 3]
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 1, 3, 5]]  # of node 0, 1, ...
    nodes = np.array([[7, 8, 8, 9, 9, 10], [1, 60, 2, 2, 60, 1]])  # equal tokens on purpose
    mask = np.array([[u in path for u in range(6)] for path in paths])
    depth = np.array([len(path) - 1 for path in paths])
    whole, _ = causal_pass(config, params, tokens)
    output, got = run(
        config,
        params,
        jnp.asarray(nodes),
        jnp.asarray(np.array(lengths)[:, None] + depth[None]),
        jnp.broadcast_to(jnp.asarray(mask)[None], (2, 6, 6)),
        cache=garbage_cache(whole.block, lengths),
        lengths=jnp.array(lengths),
    )
    pair = reference.Pair.of(Params(params, {}, config))
    for row, length in enumerate(lengths):
        for node, path in enumerate(paths):
            text = [*tokens[row, :length], *nodes[row, path]]
            features, logits = reference.target(pair, text)
            close(got[row, node], logits[-1])
            close(output.features[row, node], features[-1])


def test_packed_sequences_do_not_see_each_other() -> None:
    """Catches segments that leak, which only shows as a worse model."""
    config, params = PLAIN, random_params(PLAIN)
    tokens = random_tokens(1)
    segments = jnp.array([[1] * 5 + [2] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    _, got = run(config, params, jnp.asarray(tokens), positions, packed_mask(segments))
    pair = reference.Pair.of(Params(params, {}, config))
    close(got[0, :5], reference.target(pair, tokens[0, :5].tolist())[1])
    close(got[0, 5:], reference.target(pair, tokens[0, 5:].tolist())[1])


def test_initial_parameters_are_those_of_the_checkpoint_format() -> None:
    """Catches a module renamed away from the names that files have."""
    for config in CONFIGS.values():
        found = {name: x.shape for name, x in init_params(Transformer, config, 0).items()}
        assert found == hf.shapes(config)


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (1, 2, 6)])
def test_one_row_is_padded_to_two_on_gpus(shape, monkeypatch) -> None:
    """Catches another product, shape or dtype; other numbers of rows are left alone."""
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, (6, 5))))
    plain = matmul(x, kernel, jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    padded = matmul(x, kernel, jnp.float32)
    assert padded.shape == plain.shape == (*shape[:-1], 5) and padded.dtype == plain.dtype
    np.testing.assert_allclose(padded, plain, rtol=1e-6, atol=1e-6)
    assert ("concatenate" in str(jax.make_jaxpr(matmul)(x, kernel))) == (np.size(x) == 6)
