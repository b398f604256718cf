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

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Rejection,
    SamplingParams,
    Speculative,
    Typical,
    Vanilla,
    executables,
    generate,
    static_tree,
)
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Method, Rule
from eagle_jax.decode.program import Program
from eagle_jax.decode.sampling import position_noise, value
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


@pytest.mark.parametrize("method", decoding.METHODS)
@pytest.mark.parametrize("name", ["greedy", "top_p"])
def test_every_method_equals_vanilla(name: str, method: str) -> None:
    """Catches whatever a method's state, tree or cache could do to the text."""
    out = run(decoding.random_pair(), decoding.METHODS[method], **SETTINGS[name])
    assert decoding.lists(out.tokens) == vanilla(name)


@pytest.mark.parametrize("method", [n for n, m in decoding.METHODS.items() if m.draft is not None])
@pytest.mark.parametrize("name", ["greedy", "top_p"])
def test_a_broken_draft_changes_nothing(name: str, method: str) -> None:
    """Catches scores that are not numbers and reach the text, or an index out of the tree."""
    out = run(DRAFTS["nan"](), decoding.METHODS[method], **SETTINGS[name])
    assert decoding.lists(out.tokens) == vanilla(name)


@pytest.mark.parametrize("method", decoding.METHODS.values(), ids=decoding.METHODS)
def test_rows_do_not_know_their_neighbours(method: Method) -> None:
    """Catches noise, lengths, cache slots or a method's state shared across the batch."""
    pair = decoding.trained_pair()
    whole = run(pair, method, **SETTINGS["top_p"])
    order = [2, 0, 3, 1]
    shuffled = [[values[i] for i in order] for values in (decoding.PROMPTS, decoding.SEEDS)]
    turned = run(pair, method, *shuffled, **SETTINGS["top_p"])
    assert decoding.lists(turned.tokens) == [whole.tokens[i].tolist() for i in order]
    assert turned.statistics.rounds == tuple(whole.statistics.rounds[i] for i in order)


def test_a_row_of_a_batch_is_a_run_of_its_own() -> None:
    """Catches a shape that depends on the batch."""
    pair, method = decoding.trained_pair(), Eagle(TREE)
    whole = run(pair, method, **SETTINGS["top_p"])
    for row, (prompt, seed) in enumerate(zip(decoding.PROMPTS, decoding.SEEDS, strict=True)):
        alone = run(pair, method, [prompt], [seed], **SETTINGS["top_p"])
        assert alone.tokens[0].tolist() == whole.tokens[row].tolist()
        assert alone.statistics.rounds == whole.statistics.rounds[row : row + 1]


# The law of whole answers: 3 tokens, 3 positions, 27 answers.
ROWS, CALLS, PROMPT = 4096, 2, [0, 2, 1]
RULE = reference.Rule(temperature=1.3, top_p=0.9)
SMALL_TREE = static_tree([[0], [1], [0, 0]])


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of three tokens as they are: thousands of padded rows take time and memory."""
    monkeypatch.setattr(executables, "bucket_prompt", lambda length: length)


@functools.cache
def small_pair() -> Params:
    config = tiny_target(3, hidden_size=16, intermediate_size=24, head_dim=6)
    return tiny_params(config, seed=5, scale=14.0)


@functools.cache
def exact_law() -> dict[tuple[int, ...], float]:
    return reference.answer_law(reference.Pair.of(small_pair()), PROMPT, 3, RULE)


# With the prompt, three texts of three tokens: much repeats, and min-p excludes some answers.
PENALISED = SamplingParams(
    temperature=1.3, min_p=0.1, repetition_penalty=1.3, frequency_penalty=0.7, logit_bias={1: 0.5}
)


@functools.cache
def penalised_law() -> dict[tuple[int, ...], float]:
    """Exact probability of every answer under `PENALISED`."""
    pair, law = reference.Pair.of(small_pair()), {(): 1.0}
    for _ in range(3):
        longer = {}
        for answer, mass in law.items():
            text = [*PROMPT, *answer]
            logits = reference.target(pair, text)[1][-1]
            probs = reference.softmax(
                reference.filtered(PENALISED, text, len(PROMPT), logits, eos=())
            )
            longer |= {(*answer, token): mass * float(p) for token, p in enumerate(probs)}
        law = longer
    return law


def draw(
    method: Method, slots: int = 12, row: SamplingParams | None = None
) -> collections.Counter[tuple[int, ...]]:
    """Answers of `ROWS * CALLS` seeds, counted."""
    pair, clock = small_pair(), executables.Clock()
    program = Program.of(pair, method, slots)
    row = row or SamplingParams(temperature=RULE.temperature, top_p=RULE.top_p)
    settings = decoding.arrays([row] * ROWS, [len(PROMPT)] * ROWS, vocab=3)
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for call in range(CALLS):
        seeds = list(range(call * ROWS, (call + 1) * ROWS))
        prompts = [np.array(PROMPT)] * ROWS
        state = executables.start(program, pair, prompts, [6] * ROWS, seeds, clock)
        state = executables.advance(program, pair, state, settings, clock)
        counts.update(map(tuple, np.asarray(state.tokens)[:, 3:6].tolist()))
    return counts


def p_value(
    counts: collections.Counter[tuple[int, ...]], law: dict[tuple[int, ...], float] | None = None
) -> float:
    """Of Pearson's chi-square over all possible answers; 0 if an impossible one was seen."""
    possible = {answer: mass for answer, mass in (law or exact_law()).items() if mass > 0}
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


LAW = {
    "vanilla": Vanilla(),
    "eagle": Eagle(SMALL_TREE),
    "eagle2": Eagle(DynamicTree(2, 2, 4)),
    "eagle3": Eagle(DynamicTree(2, 2, 4), head="eagle3"),
    "eagle plain": Eagle(SMALL_TREE, coupled=False),
    "eagle lookup": EagleLookup(Eagle(SMALL_TREE), PromptLookup(2, 1, 2, truncate=True)),
    "medusa": Medusa(SMALL_TREE),
    "speculative": Speculative(2),
    "speculative rejection": Speculative(2, rule=Rejection()),
    "lookahead": Lookahead(3, 2, 2),
    "lookahead plain": Lookahead(3, 2, 2, coupled=False),
    "prompt lookup": PromptLookup(2, 1, 2),
    "recycling": Recycling(SMALL_TREE, width=2),
}


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("method", LAW.values(), ids=LAW)
def test_answers_follow_the_exact_law(method: Method) -> None:
    """Catches whatever equality with vanilla cannot: a law that both share and that is wrong."""
    assert p_value(draw(method)) > 1e-3


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", ["vanilla", "eagle", "eagle2", "speculative rejection"])
def test_penalised_answers_follow_the_exact_law(name: str) -> None:
    """Catches a penalty of another path, or min-p of raw logits, that vanilla shares."""
    law = penalised_law()
    assert sum(law.values()) == pytest.approx(1.0) and min(law.values()) == 0
    assert p_value(draw(LAW[name], row=PENALISED), law) > 1e-3
    assert p_value(draw(LAW[name]), law) < 1e-9  # the two laws are told apart


# The three classic bugs, each seeded into every kind of method that can have it.


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", ["vanilla", "eagle", "eagle3", "lookahead", "recycling"])
def test_reused_noise_would_be_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power of the test above: one noise for all positions, right at every single one."""

    def reused(seeds, first, count, vocab):
        noise = position_noise(seeds, jnp.zeros_like(first), 1, vocab)
        return jnp.broadcast_to(noise, (noise.shape[0], count, vocab))

    monkeypatch.setattr(value, "position_noise", reused)
    assert p_value(draw(LAW[name], slots=14)) < 1e-9


@dataclasses.dataclass(frozen=True)
class Lenient(Exact):
    """The draft's best token is taken in place of the one after it in the vocabulary."""

    def __call__(self, proposal, logits, targets, context):
        best = proposal.tokens[:, 1]
        root = jnp.where(targets[:, 0] == (best + 1) % 3, best, targets[:, 0])
        return super().__call__(proposal, logits, targets.at[:, 0].set(root), context)


@dataclasses.dataclass(frozen=True)
class Unprocessed(Exact):
    """After a round without a rejection the bonus token ignores temperature and top-p."""

    def __call__(self, proposal, logits, targets, context):
        accepted = super().__call__(proposal, logits, targets, context)
        assert context.noise is not None
        noise = jnp.take_along_axis(context.noise, proposal.shape.depth[:, :, None], axis=1)
        # Rules see processed logits: the temperature is undone, and what top-p excluded comes back.
        kept = jnp.isfinite(logits)
        least = jnp.min(jnp.where(kept, logits, jnp.inf), axis=-1, keepdims=True)
        raw = jnp.where(kept, logits, least) * RULE.temperature
        raw = jnp.argmax(raw + noise, axis=-1).astype(jnp.int32)
        leaf = ~jnp.any(
            (proposal.shape.parents[:, None, 1:] == jnp.arange(targets.shape[1])[None, :, None]),
            axis=2,
        )
        spoilt = jnp.where(leaf, raw, targets)
        emitted = jnp.take_along_axis(spoilt, accepted.path, axis=1)
        step = jnp.arange(emitted.shape[1])[None]
        emitted = jnp.where(step == accepted.count[:, None], emitted, accepted.emitted)
        return dataclasses.replace(accepted, emitted=emitted)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Any method under a rule that is not its own."""

    inner: Method
    rule: Rule

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def depth(self) -> int:
        return self.inner.depth

    @property
    def draft(self) -> str | None:
        return self.inner.draft

    def check(self, params):
        self.inner.check(params)

    def init(self, models, prompt, slots):
        return self.inner.init(models, prompt, slots)

    def propose(self, models, context, state):
        return self.inner.propose(models, context, state)

    def update(self, models, state, verified):
        return self.inner.update(models, state, verified)


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", ["eagle plain", "medusa", "prompt lookup", "lookahead", "eagle2"])
def test_lenient_acceptance_would_be_rejected(name: str) -> None:
    """The power again: a drafted token taken where the target wanted another."""
    assert p_value(draw(Broken(LAW[name], Lenient()))) < 1e-9


@pytest.mark.usefixtures("unpadded")
@pytest.mark.parametrize("name", ["eagle", "eagle plain", "eagle2", "eagle3"])
def test_an_unprocessed_bonus_token_would_be_rejected(name: str) -> None:
    """The power again: the bug that published EAGLE code had until 2025."""
    assert p_value(draw(Broken(LAW[name], Unprocessed()))) < 1e-9


@pytest.mark.usefixtures("unpadded")
def test_typical_acceptance_is_lossy() -> None:
    """Catches a lossy rule that is not labelled so: its answers fail the same test."""
    method = Medusa(SMALL_TREE, coupled=False, rule=Typical())
    assert not method.rule.lossless
    assert p_value(draw(method)) < 1e-9
