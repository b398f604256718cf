"""Speculation never changes the text: not its tokens for a seed, not its law over seeds."""

import collections
import dataclasses
import functools
import itertools

import decoding
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scipy import stats

from eagle_jax.decode import Eagle, Vanilla, chain, engine, generate, static_tree
from eagle_jax.decode.accept import accept
from eagle_jax.decode.method import Method
from eagle_jax.decode.sampling import position_noise, sampling
from eagle_jax.params import Params
from eagle_jax.testing import tiny_params, tiny_target

SETTINGS: dict[str, dict] = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 1.3, "top_k": 4},
}
DRAFTS = {
    "trained": decoding.trained_pair,
    "random": decoding.random_pair,
    "zero": lambda: decoding.with_draft(decoding.trained_pair(), 0.0),
    "nan": lambda: decoding.with_draft(decoding.trained_pair(), float("nan")),
}
TREE = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def run(params: Params, method: Method, prompts=None, seeds=None, **options):
    prompts = decoding.PROMPTS if prompts is None else prompts
    options |= {"seed": decoding.SEEDS if seeds is None else seeds}
    return generate(params, prompts, method=method, max_new_tokens=decoding.NEW, **options)


@functools.cache
def vanilla(name: str) -> list[list[int]]:
    return decoding.lists(run(decoding.random_pair(), Vanilla(), **SETTINGS[name]).tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_vanilla_equals_the_reference(name: str) -> None:
    """Catches what all methods could share: noise off by one position, processors, prefill."""
    pair = reference.Pair.of(decoding.random_pair())
    for row, prompt in enumerate(decoding.PROMPTS):
        rule = reference.Rule(**SETTINGS[name], seed=decoding.SEEDS[row])
        assert vanilla(name)[row] == reference.generate(pair, prompt, decoding.NEW, rule)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_eagle_equals_vanilla_whatever_the_draft(name: str, draft: str) -> None:
    """Catches a rejected node left in the cache, and a draft that leaks into the text."""
    out = run(DRAFTS[draft](), Eagle(TREE), **SETTINGS[name])
    assert decoding.lists(out.tokens) == vanilla(name)
    assert out.statistics.tau > 1.3 or draft != "trained"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("greedy", (True, True, False)),
        ("greedy", (False, False)),
        ("top_p", (True, False, True)),
    ],
)
def test_adversaries_and_oracles_equal_vanilla(name: str, right: tuple[bool, ...]) -> None:
    """Catches acceptance below a wrong token, or of the least likely one at every step."""
    out = run(decoding.random_pair(), decoding.Clairvoyant(right), **SETTINGS[name])
    assert decoding.lists(out.tokens) == vanilla(name)
    per_round = next((i for i, good in enumerate(right) if not good), len(right)) + 1
    assert out.statistics.rounds == (-(-decoding.NEW // per_round),) * 4


TREES = {
    "chain": Eagle(chain(3)),
    "one level": Eagle(static_tree([[0], [1], [2], [3]]), coupled=False),
    "gaps": Eagle(static_tree([[2], [2, 1], [1], [2, 1, 3], [1, 0]]), coupled=False),
}


@pytest.mark.parametrize(
    ("tree", "name"),
    [("chain", "plain"), ("one level", "plain"), ("gaps", "plain"), ("gaps", "greedy")],
)
def test_any_tree_equals_vanilla(tree: str, name: str) -> None:
    """Catches code that knows the published tree: ranks without gaps, a best child everywhere."""
    out = run(decoding.trained_pair(), TREES[tree], **SETTINGS[name])
    assert decoding.lists(out.tokens) == vanilla(name)


def test_rows_do_not_know_their_neighbours() -> None:
    """Catches noise, lengths or cache slots shared across the batch."""
    pair, method = decoding.trained_pair(), Eagle(TREE)
    whole = run(pair, method, **SETTINGS["top_p"])
    for row, (prompt, seed) in enumerate(zip(decoding.PROMPTS, decoding.SEEDS, strict=True)):
        alone = run(pair, method, [prompt], [seed], **SETTINGS["top_p"])
        assert alone.tokens[0].tolist() == whole.tokens[row].tolist()
        assert alone.statistics.rounds == whole.statistics.rounds[row : row + 1]
    order = [2, 0, 3, 1]
    shuffled = [[values[i] for i in order] for values in (decoding.PROMPTS, decoding.SEEDS)]
    turned = run(pair, method, *shuffled, **SETTINGS["top_p"])
    assert decoding.lists(turned.tokens) == [whole.tokens[i].tolist() for i in order]


# The law of whole answers: 3 tokens, 3 positions, 27 answers.
ROWS, CALLS, PROMPT = 4096, 2, [0, 2, 1]
RULE = reference.Rule(temperature=1.3, top_p=0.9)
SMALL_TREE = static_tree([[0], [1], [0, 0]])


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of three tokens as they are: thousands of padded rows take time and memory."""
    monkeypatch.setattr(engine, "bucket_prompt", lambda length: length)


@functools.cache
def small_pair() -> Params:
    config = tiny_target(3, hidden_size=16, intermediate_size=24, head_dim=6)
    return tiny_params(config, seed=5, scale=14.0)


@functools.cache
def exact_law() -> dict[tuple[int, ...], float]:
    return reference.answer_law(reference.Pair.of(small_pair()), PROMPT, 3, RULE)


def draw(method: Method, slots: int = 12) -> collections.Counter[tuple[int, ...]]:
    """Answers of `ROWS * CALLS` seeds, counted."""
    pair, clock = small_pair(), engine.Clock()
    draft = pair.draft_config if method.needs_draft else None
    program = engine.Program(method, pair.target_config, draft, slots, ())
    settings = sampling(RULE.temperature, RULE.top_k, RULE.top_p)
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for call in range(CALLS):
        seeds = list(range(call * ROWS, (call + 1) * ROWS))
        prompts = [np.array(PROMPT)] * ROWS
        state = engine.start(program, pair, prompts, [6] * ROWS, seeds, clock)
        state = engine.advance(program, pair, state, settings, clock)
        counts.update(map(tuple, np.asarray(state.tokens)[:, 3:6].tolist()))
    return counts


def p_value(counts: collections.Counter[tuple[int, ...]]) -> float:
    """Of Pearson's chi-square over all possible answers; 0 if an impossible one was seen."""
    possible = {answer: mass for answer, mass in exact_law().items() if mass > 0}
    if not set(counts) <= set(possible):
        return 0.0
    expected = np.array(list(possible.values())) * ROWS * CALLS
    assert expected.min() > 5  # else chi-square is no chi-square
    return float(stats.chisquare([counts[answer] for answer in possible], expected).pvalue)


def test_the_law_is_worth_testing() -> None:
    """Some answers excluded, none certain, and the last token depends on the first."""
    law = exact_law()
    assert sum(law.values()) == pytest.approx(1.0)
    assert min(law.values()) == 0 and max(law.values()) < 0.5
    last = {}
    for first, middle in itertools.product(range(3), repeat=2):
        masses = np.array([law[first, middle, token] for token in range(3)])
        if masses.sum() > 0:
            last[first, middle] = masses / masses.sum()
    gaps = [
        abs(last[0, m] - last[f, m]).sum() / 2
        for f in (1, 2)
        for m in range(3)
        if (0, m) in last and (f, m) in last
    ]
    assert max(gaps) > 0.2


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("method", [Vanilla(), Eagle(SMALL_TREE)], ids=["vanilla", "eagle"])
def test_answers_follow_the_exact_law(method: Method) -> None:
    """Catches whatever equality with vanilla cannot: a law that both share and that is wrong."""
    assert p_value(draw(method)) > 1e-3


@pytest.mark.usefixtures("unpadded")
def test_reused_noise_would_be_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power of the test above: one noise for all positions, right at every single one."""

    def reused(seeds, first, count, vocab):
        noise = position_noise(seeds, jnp.zeros_like(first), 1, vocab)
        return jnp.broadcast_to(noise, (noise.shape[0], count, vocab))

    monkeypatch.setattr(engine, "position_noise", reused)
    assert p_value(draw(Vanilla(), slots=13)) < 1e-9


@pytest.mark.usefixtures("unpadded")
def test_lenient_acceptance_would_be_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power again: the draft's best token is taken in place of the target's token 0."""

    def lenient(tokens, shape, targets, longest):
        root = jnp.where(targets[:, 0] == 0, tokens[:, 1], targets[:, 0])
        return accept(tokens, shape, targets.at[:, 0].set(root), longest)

    monkeypatch.setattr(engine, "accept", lenient)
    method = dataclasses.replace(Eagle(SMALL_TREE), coupled=False)
    assert p_value(draw(method, slots=13)) < 1e-9
