"""`exact=True`: in bfloat16 every method computes the very same numbers for a text."""

import dataclasses
import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import load
from eagle_jax.decode import Eagle, chain, engine, executables, generate, session, stream
from eagle_jax.decode.program import State
from eagle_jax.decode.session import check_method, make_program
from eagle_jax.models import attention, bind, cast, init_params
from eagle_jax.models.cache import empty, write
from eagle_jax.models.transformer import Transformer, packed_mask
from eagle_jax.params import Draft, Params
from eagle_jax.testing import tiny_target

NEW = 48
# Texts begin before, at and behind the border between two spans, and all cross one.
PROMPTS = [list(np.random.default_rng(n).integers(0, decoding.VOCAB, n)) for n in (1, 31, 33, 60)]
WINDOWED = {"sliding_window": 9, "attn_logit_softcapping": 20.0}


METHODS = ["eagle gaps", "eagle2", "eagle3", "eagle lookup", "medusa", "lookahead", "prompt lookup"]
ROWS = 24


@pytest.fixture(autouse=True, scope="module")
def fewer_rows():
    """The largest tree here has 16 nodes."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (engine, session):
            patched.setattr(module, "EXACT_ROWS", ROWS)
        yield


@functools.cache
def pair(windowed: bool = False) -> Params:
    """The trained pair in bfloat16, whose drafts are right often enough to fill trees."""
    trained = decoding.trained_pair()
    config = dataclasses.replace(trained.target_config, **(WINDOWED if windowed else {}))
    drafts = {
        kind: Draft(cast(draft.params, jnp.bfloat16), draft.config)
        for kind, draft in trained.drafts.items()
    }
    target = cast(trained.target, jnp.bfloat16)
    return dataclasses.replace(trained, target=target, target_config=config, drafts=drafts)


def decoded(method, exact: bool, windowed: bool = False) -> State:
    method = check_method(pair(windowed), method, len(PROMPTS), 1.0, exact)
    settings = decoding.sampling(1.0)
    params, clock = pair(windowed).with_draft(method.draft), executables.Clock()
    program = make_program(params, method, max(map(len, PROMPTS)), NEW, exact=exact)
    limits = [len(prompt) + NEW for prompt in PROMPTS]
    prompts = [np.array(prompt) for prompt in PROMPTS]
    state = executables.start(program, params, prompts, limits, decoding.SEEDS, clock)
    return executables.advance(program, params, state, settings, clock)


def committed(state: State) -> list[list[bytes]]:
    """The bits of what the cache holds of each text."""
    return [
        [np.asarray(x[row, :, : length - 1]).tobytes() for x in jax.tree.leaves(state.cache)]
        for row, length in enumerate(np.asarray(state.length))
    ]


@functools.cache
def vanilla(exact: bool, windowed: bool = False) -> State:
    return decoded("vanilla", exact, windowed)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_computes_the_same_bits(name: str) -> None:
    """Catches a shape, an order of summation or a fusion that depends on the method."""
    state = decoded(decoding.METHODS[name], exact=True)
    np.testing.assert_array_equal(state.tokens[:, : 60 + NEW], vanilla(True).tokens[:, : 60 + NEW])
    assert committed(state) == committed(vanilla(True))
    assert state.rounds.sum() < vanilla(True).rounds.sum()


def test_streams_too() -> None:
    """Catches a stream whose pieces are decoded by other programs."""
    params = load("tiny", dtype="bfloat16")
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "exact": True}
    texts = {
        generate(params, "Tell me a story.", method=method, **options).text
        for method in ("vanilla", "eagle")
    }
    parts = list(stream(params, "Tell me a story.", method="eagle", **options))
    assert texts == {"".join(part.text for part in parts)} and len(parts) > 1


def test_windows_and_softcaps_too() -> None:
    state = decoded(decoding.METHODS["eagle2"], True, windowed=True)
    assert committed(state) == committed(vanilla(True, windowed=True))


def test_otherwise_bits_differ() -> None:
    """Or the tests above would show nothing."""
    assert committed(decoded(decoding.METHODS["eagle2"], False)) != committed(vanilla(False))


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("length", [1, 31, 33, 70])
def test_attention_is_the_same_function(length: int, changes: dict) -> None:
    """In float32 the aligned kernel gives what the fast one gives, wherever the spans end."""
    config = tiny_target(**changes)
    params = init_params(Transformer, config, 0)
    tree = chain(5)
    b, t, slots = 2, tree.nodes, 96
    rng = np.random.default_rng(length)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (b, length + t)))
    steps = jnp.broadcast_to(jnp.arange(length)[None], (b, length))
    shape = tree.shape(b)

    @functools.partial(jax.jit, static_argnames="kernel")
    def run(params, kernel):
        module = bind(Transformer, config, params)
        mask = packed_mask(jnp.zeros((b, length), int))
        block = module(tokens[:, :length], steps, mask).block
        cache = empty(len(block), b, config.num_key_value_heads, slots, 10, jnp.dtype("float32"))
        cache = write(cache, block, jnp.zeros(b, int))
        lengths = jnp.full(b, length)
        at = length + shape.depth
        return module(
            tokens[:, length:], at, shape.ancestors, cache=cache, lengths=lengths, kernel=kernel
        ).features

    params = {
        name: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype) if x.ndim > 1 else x
        for name, x in params.items()
    }
    np.testing.assert_allclose(run(params, "aligned"), run(params, "xla"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [attention.SPAN, ROWS])
def test_what_is_too_large_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="exact=True: passes have 24 nodes to depth 31, "):
        generate(pair(), [1, 2], method=Eagle(chain(depth)), max_new_tokens=4, exact=True)
