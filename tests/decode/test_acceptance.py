"""Acceptance rules against naive ones: random trees, duplicate siblings, ties, exact laws."""

import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eagle_jax.decode.acceptance import Exact, Rejection, Typical, walk
from eagle_jax.decode.method import Accepted, Context, Rule
from eagle_jax.decode.sampling import (
    Sampling,
    draft_noise,
    perturb,
    position_noise,
    process,
)
from eagle_jax.decode.tree import Proposal, Shape, chain

ROWS, NODES, VOCAB = 3, 9, 5


def drawn(rows: int, *args) -> Sampling:
    return decoding.sampling(*args, rows=rows, vocab=VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def judge(
    rule: Rule, proposal: Proposal, logits, targets, seeds, length, settings: Sampling
) -> Accepted:
    """A rule's verdict, in the context of rows of these seeds and lengths."""
    b, t, vocab = logits.shape
    longest = NODES if t == NODES else t
    noise = None if settings.greedy else position_noise(seeds, length, longest, vocab)
    nothing = jnp.zeros((b, 1), jnp.int32)
    context = Context(nothing, length, seeds, noise, settings, longest)
    return rule(proposal, process(logits, settings), targets, context)


def exact(tokens, shape: Shape, targets, longest: int) -> Accepted:
    """`Exact`, which reads nothing but these."""
    zeros = jnp.zeros(tokens.shape[0], jnp.int32)
    logits = jnp.full((*tokens.shape, VOCAB), jnp.nan)
    context = Context(tokens, zeros, zeros.astype(jnp.uint32), None, drawn(len(tokens)), longest)
    return Exact()(Proposal(tokens, shape), logits, targets, context)


jitted = jax.jit(exact, static_argnums=3)


def stacked(rows: list[list[int]]) -> Shape:
    """The shapes of trees given by their parents."""
    lines = [[ancestors(parents, node) for node in range(len(parents))] for parents in rows]
    return Shape(
        jnp.array(rows),
        jnp.array([[len(line) - 1 for line in tree] for tree in lines]),
        jnp.array([[[u in line for u in range(len(tree))] for line in tree] for tree in lines]),
    )


@st.composite
def trees(draw) -> tuple[list[int], list[int], list[int]]:
    """Parents, tokens and targets of one tree; two or three tokens, so that much matches."""
    parents = [0] + [draw(st.integers(0, i - 1)) for i in range(1, NODES)]
    token = st.integers(0, draw(st.integers(0, 2)))
    tokens = draw(st.lists(token, min_size=NODES, max_size=NODES))
    targets = draw(st.lists(token, min_size=NODES, max_size=NODES))
    return parents, tokens, targets


def ancestors(parents: list[int], node: int) -> set[int]:
    return {node} if node == 0 else {node} | ancestors(parents, parents[node])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(trees(), min_size=ROWS, max_size=ROWS))
def test_equals_the_recursive_walk(rows: list[tuple[list[int], list[int], list[int]]]) -> None:
    """Catches a match without its parent's match, a greedy first sibling that ends early, rows
    mixed up, and an emitted token taken from the drafted instead of the target's."""
    shape = stacked([parents for parents, _, _ in rows])
    tokens, targets = (jnp.array([row[i] for row in rows]) for i in (1, 2))
    got = jitted(tokens, shape, targets, NODES)
    for row, (parents, words, wanted) in enumerate(rows):

        def children(node: int, parents=parents) -> list[int]:
            return [c for c in range(1, NODES) if parents[c] == node]

        path = reference.accept(children, np.array(words), np.array(wanted))
        assert int(got.count[row]) == len(path) - 1
        assert got.path[row].tolist() == path + [0] * (NODES - len(path))
        assert got.emitted[row, : len(path)].tolist() == [wanted[node] for node in path]


def test_a_tree_of_one_node_emits_the_targets_token() -> None:
    """Catches vanilla decoding broken by its own rule: the root never has to match anything."""
    zeros = jnp.zeros((2, 1), jnp.int32)
    shape = Shape(zeros, zeros, jnp.ones((2, 1, 1), bool))
    got = jitted(jnp.array([[4], [5]]), shape, jnp.array([[7], [5]]), 1)
    assert got.count.tolist() == [0, 0] and got.emitted.tolist() == [[7], [5]]


def test_the_longest_of_duplicate_siblings_wins() -> None:
    """Catches the walk that stops at the first matching child: its twin leads further."""
    shape = Shape(
        jnp.array([[0, 0, 0, 2]]),
        jnp.array([[0, 1, 1, 2]]),
        jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], bool),
    )
    got = jitted(jnp.array([[0, 6, 6, 8]]), shape, jnp.array([[6, 8, 8, 3]]), 3)
    assert got.count.tolist() == [2]
    assert got.path.tolist() == [[0, 2, 3]] and got.emitted.tolist() == [[6, 8, 3]]


verdicts = st.lists(st.booleans(), min_size=NODES, max_size=NODES)
likings = st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=NODES, max_size=NODES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(trees(), verdicts, likings), min_size=ROWS, max_size=ROWS))
def test_the_preferred_of_the_deepest_paths_wins(rows) -> None:
    """Catches a liked but shorter path, a liked path with a rejected node, ties that go elsewhere
    than to the lowest index, and a root that has to be kept."""
    shape = stacked([parents for (parents, _, _), _, _ in rows])
    kept, liked = (jnp.array([row[i] for row in rows]) for i in (1, 2))
    targets = jnp.zeros((ROWS, NODES), jnp.int32)
    got = jitted_walk(Proposal(targets, shape), kept, targets, NODES, liked)
    for row, ((parents, _, _), good, liking) in enumerate(rows):
        alive = [n for n in range(NODES) if all(good[u] for u in ancestors(parents, n) - {0})]
        best = min(alive, key=lambda n: (-len(ancestors(parents, n)), -liking[n], n))
        path = sorted(ancestors(parents, best))
        assert got.path[row].tolist() == path + [0] * (NODES - len(path))
        assert int(got.count[row]) == len(path) - 1


jitted_walk = jax.jit(walk, static_argnums=3)


def scored_trees(rows: int, seed: int):
    """Random trees with random tokens and logits, peaked here and flat there."""
    rng = np.random.default_rng(seed)
    parents = [[0] + [int(rng.integers(0, i)) for i in range(1, NODES)] for _ in range(rows)]
    tokens = rng.integers(0, VOCAB, (rows, NODES)).astype(np.int32)
    logits = rng.normal(size=(rows, NODES, VOCAB)) * rng.choice([0.3, 1, 3], (rows, NODES, 1))
    targets = rng.integers(0, VOCAB, (rows, NODES)).astype(np.int32)
    return parents, tokens, logits.astype(np.float32), targets


def typical(parents, tokens, logits, targets, rule: Typical, drawn: reference.Rule) -> list[int]:
    """Medusa's rule, path by path: the tokens that a round emits."""
    best: tuple[int, float, int] | None = None
    for node in range(len(parents)):
        line = sorted(ancestors(parents, node))
        likelihood = 0.0
        for above, child in zip(line, line[1:], strict=False):
            probs = reference.softmax(reference.process(logits[above].astype(float), drawn))
            entropy = -sum(float(p) * np.log(p) for p in probs if p > 0)
            chance = float(probs[tokens[child]])
            if not chance > min(rule.epsilon, rule.delta * np.exp(-entropy)):
                break
            likelihood += np.log(chance)
        else:
            if best is None or (-len(line), -likelihood) < best[:2]:
                best = (-len(line), -likelihood, node)
    assert best is not None
    line = sorted(ancestors(parents, best[2]))
    return [*(int(tokens[node]) for node in line[1:]), int(targets[line[-1]])]


@pytest.mark.parametrize("options", [(1.0,), (0.7, 3), (1.0, 0, 0.8)], ids=str)
@pytest.mark.parametrize("rule", [Typical(), Typical(epsilon=0.3, delta=0.6)], ids=str)
def test_typical_equals_the_naive_rule(rule: Typical, options: tuple) -> None:
    """Catches the entropy of the child in place of its parent, raw probabilities, a shorter path
    that is likelier, the target's token emitted for a drafted one, and NaN likelihoods: somewhere
    in the tree a filter excludes a token."""
    rows = 400
    parents, tokens, logits, targets = scored_trees(rows, seed=1)
    proposal = Proposal(jnp.asarray(tokens), stacked(parents))
    zeros = jnp.zeros(rows, jnp.int32)
    arrays = (jnp.asarray(logits), jnp.asarray(targets), zeros.astype(jnp.uint32), zeros)
    got = judge(rule, proposal, *arrays, drawn(rows, *options))
    law, longer = reference.Rule(*options), 0
    for row in range(rows):
        expected = typical(parents[row], tokens[row], logits[row], targets[row], rule, law)
        count = int(got.count[row])
        assert got.emitted[row, : count + 1].tolist() == expected, row
        longer += count > 1
    assert longer > rows / 8


def test_greedy_rules_are_exact() -> None:
    """Catches a division by temperature 0, and a published rule that leaves the argmax."""
    parents, tokens, logits, _ = scored_trees(60, seed=2)
    zeros = jnp.zeros(60, jnp.int32)
    chained = stacked([[0, *range(NODES - 1)]] * 60)
    targets = jnp.asarray(logits.argmax(axis=-1).astype(np.int32))
    arrays = (jnp.asarray(logits), targets, zeros.astype(jnp.uint32), zeros, drawn(60))
    for rule, shape in ((Typical(), stacked(parents)), (Rejection(), chained)):
        proposal = Proposal(jnp.asarray(tokens), shape)
        got, wanted = judge(rule, proposal, *arrays), judge(Exact(), proposal, *arrays)
        for name in ("path", "count", "emitted"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


LENGTH, DEPTH = 7, 2  # of the committed text, and of the chain


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a target and a draft after every pair of drafted tokens: [depth, x1, x2, v]; those
    at the root are the same for all x1, x2, those after x1 for all x2."""
    rng = np.random.default_rng(4)
    p = 1.5 * rng.normal(size=(DEPTH + 1, VOCAB, VOCAB, VOCAB))
    p[0], p[1] = p[0, 0, 0], p[1, :, :1]
    q = p + rng.normal(size=p.shape)
    q[0], q[1] = q[0, 0, 0], q[1, :, :1]
    return p.astype(np.float32), q.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def speculate(rows: int, settings: Sampling) -> tuple[Proposal, jax.Array, Accepted]:
    """One round of speculative sampling for `rows` seeds."""
    p, q = map(jnp.asarray, tables())
    seeds, length = jnp.arange(rows, dtype=jnp.uint32), jnp.full(rows, LENGTH)
    own = draft_noise(seeds, length, DEPTH, VOCAB)
    zeros = jnp.zeros(rows, jnp.int32)
    first = jnp.argmax(perturb(q[0][zeros, zeros], own[:, 0], settings), axis=-1)
    after = q[1][first, zeros]
    second = jnp.argmax(perturb(after, own[:, 1], settings), axis=-1)
    tokens = jnp.stack([zeros, first, second], axis=1).astype(jnp.int32)
    drawn = jnp.stack([jnp.zeros_like(after), q[0][zeros, zeros], after], axis=1)
    proposal = Proposal(tokens, chain(DEPTH).shape(rows), drawn)
    logits = jnp.stack([p[depth][first, second] for depth in range(DEPTH + 1)], axis=1)
    noise = position_noise(seeds, length, DEPTH + 1, VOCAB)
    targets = jnp.argmax(perturb(logits, noise, settings), axis=-1).astype(jnp.int32)
    return proposal, logits, judge(Rejection(), proposal, logits, targets, seeds, length, settings)


RULE = reference.Rule(temperature=1.2, top_k=4)


def test_rejection_equals_the_sequential_rule() -> None:
    """Catches q of the wrong node, coins or noise of the wrong position, raw distributions, the
    residual of another depth, and a bonus token after a full chain that is not the target's."""
    rows = 600
    proposal, logits, got = speculate(rows, drawn(rows, RULE.temperature, RULE.top_k))
    assert proposal.logits is not None
    tokens, p, q = (np.asarray(x) for x in (proposal.tokens, logits, proposal.logits))
    for row in range(rows):

        def law(scores) -> list[np.ndarray]:
            return [reference.softmax(reference.process(x.astype(float), RULE)) for x in scores]

        expected = reference.rejection(
            law(p[row]), law(q[row, 1:]), tokens[row, 1:].tolist(), LENGTH, seed=row
        )
        count = int(got.count[row])
        assert got.emitted[row, : count + 1].tolist() == expected, row
        assert got.path[row].tolist() == [i if i <= count else 0 for i in range(DEPTH + 1)]


def test_rejection_follows_the_targets_law() -> None:
    """Catches coins, draft noise and residual noise that know of each other, which no row alone
    shows: every emitted token has the target's distribution given those before it, and the first
    is accepted with probability sum(min(p, q))."""
    rows = 40000
    _, _, got = speculate(rows, drawn(rows, RULE.temperature, RULE.top_k))
    count, emitted = np.asarray(got.count), np.asarray(got.emitted)
    p, q = tables()

    def law(logits) -> np.ndarray:
        return reference.softmax(reference.process(logits.astype(float), RULE))

    def check(tokens: np.ndarray, probs: np.ndarray) -> None:
        seen = np.bincount(tokens, minlength=VOCAB)
        assert not seen[probs == 0].any()
        if len(tokens) > 400:
            some = probs > 0
            assert stats.chisquare(seen[some], len(tokens) * probs[some]).pvalue > 1e-4

    check(emitted[:, 0], law(p[0, 0, 0]))
    for x in range(VOCAB):
        check(emitted[(count > 0) & (emitted[:, 0] == x), 1], law(p[1, x, 0]))
        for y in range(VOCAB):
            both = (count > 1) & (emitted[:, 0] == x) & (emitted[:, 1] == y)
            check(emitted[both, 2], law(p[2, x, y]))
    share = np.minimum(law(p[0, 0, 0]), law(q[0, 0, 0])).sum()
    assert 0.3 < share < 0.9
    np.testing.assert_allclose(np.mean(count > 0), share, atol=4 * 0.5 / np.sqrt(rows))
