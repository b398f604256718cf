"""Token recycling: the matrix round by round against a plain one, and what is drafted from it."""

import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.decode import Recycling, Vanilla, chain, executables, generate, static_tree
from eagle_jax.decode.method import Method
from eagle_jax.decode.methods.recycling import store
from eagle_jax.decode.program import Program
from eagle_jax.testing import tiny_params

SETTINGS: dict[str, dict] = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
}
TREE = static_tree([[0], [2], [1], [0, 1], [2, 0], [2, 3], [0, 1, 0], [2, 3, 2], [2, 3, 2, 0]])
WIDTH = 4


class Plain:
    """Token recycling of one row in numpy; every node is scored as a sequence of its own."""

    def __init__(self, pair: reference.Pair, prompt, rule: reference.Rule, coupled: bool) -> None:
        vocab = pair.target["embed_tokens.embedding"].shape[0]
        self.pair, self.rule, self.coupled = pair, rule, coupled and rule.temperature > 0
        self.text = list(prompt)
        self.matrix = np.zeros((vocab, WIDTH), int)
        self.logits = np.zeros((vocab, WIDTH))
        self.repeats = 0

    def children(self, token: int, position: int) -> list[int]:
        """Candidates for `position` after `token`, best first."""
        found = self.matrix[token]
        if self.coupled:
            noise = reference.gumbel(self.rule.seed, position, len(self.matrix))[found]
            scores = self.logits[token] / self.rule.temperature + noise
            found = found[np.argsort(-scores, kind="stable")]
        return found.tolist()

    def round(self) -> list[int]:
        """One round; returns the tokens of the tree, node by node."""
        words: dict[tuple[int, ...], list[int]] = {(): []}
        for path in TREE.paths:
            above = words[path[:-1]]
            before = [*self.text, *above]
            words[path] = [*above, self.children(before[-1], len(before))[path[-1]]]

        targets, rows = {}, []
        for path in [(), *TREE.paths]:
            before = [*self.text, *words[path]]
            logits = reference.target(self.pair, before)[1][-1]
            rows.append((before[-1], logits))
            scores = reference.scores(logits, len(before), self.rule)
            targets[tuple(words[path])] = int(np.argmax(scores))
        drafted = [token for token, _ in rows]
        self.repeats += len(drafted) - len(set(drafted))
        for token, logits in rows:  # in order: the last one stays
            best = np.argsort(-logits, kind="stable")[:WIDTH]
            self.matrix[token], self.logits[token] = best, logits[best]

        accepted: tuple[int, ...] = ()
        while accepted in targets:
            accepted = (*accepted, targets[accepted])
        self.text += accepted
        return drafted


@pytest.mark.parametrize(
    ("name", "coupled"), [("greedy", True), ("plain", True), ("top_p", True), ("plain", False)]
)
def test_matrix_equals_a_plain_one_round_by_round(name: str, coupled: bool) -> None:
    """Catches stale rows, nodes left out, the first of equal tokens kept instead of the last,
    children of another node, and noise of another position."""
    pair, rounds = decoding.random_pair(), 6
    method = decoding.Recording(Recycling(TREE, WIDTH, coupled))
    wide = reference.Pair.of(pair)
    plain = [
        Plain(wide, prompt, reference.Rule(seed=seed, **SETTINGS[name]), coupled)
        for prompt, seed in zip(decoding.PROMPTS, decoding.SEEDS, strict=True)
    ]
    program, clock = Program.of(pair, method, 256), executables.Clock()
    prompts, limits = [np.array(prompt) for prompt in decoding.PROMPTS], [200] * 4
    bare = pair.with_draft(None)
    state = executables.start(program, bare, prompts, limits, decoding.SEEDS, clock)
    for _ in range(rounds):
        state = executables.advance(
            program, bare, state, decoding.sampling(**SETTINGS[name]), clock, 1
        )
        recorded = jax.device_get(state.method)
        for row, expected in enumerate(plain):
            drafted = expected.round()
            assert recorded.tokens[row].tolist() == drafted
            text = np.asarray(state.tokens)[row, : int(state.length[row])]
            assert text.tolist() == expected.text
            assert recorded.inner.tokens[row].tolist() == expected.matrix.tolist()
            if coupled:
                gap = np.abs(recorded.inner.logits[row] - expected.logits)
                assert gap.max() < 1e-3
    assert all(row.repeats > rounds for row in plain)  # duplicates did occur
    assert sum(len(row.text) for row in plain) > sum(map(len, decoding.PROMPTS)) + 4 * rounds


def test_equal_tokens_keep_the_last_node() -> None:
    """Catches a scatter whose winner among equal indices is left to the device, by hand."""
    matrix = jnp.zeros((2, 5, 2), jnp.int32)
    tokens = jnp.array([[3, 1, 3, 3], [0, 0, 4, 1]], jnp.int32)
    values = jnp.arange(1, 17, dtype=jnp.int32).reshape(2, 4, 2)
    assert store(matrix, tokens, values).tolist() == [
        [[0, 0], [3, 4], [0, 0], [7, 8], [0, 0]],
        [[11, 12], [15, 16], [0, 0], [0, 0], [13, 14]],
    ]


def run(method: Method, **options):
    pair = decoding.random_pair()
    options = {"seed": decoding.SEEDS, "max_new_tokens": decoding.NEW} | options
    return generate(pair, decoding.PROMPTS, method=method, **options)


@functools.cache
def vanilla(name: str) -> list[list[int]]:
    return decoding.lists(run(Vanilla(), **SETTINGS[name]).tokens)


@pytest.mark.parametrize("method", [Recycling(), Recycling(TREE, WIDTH, coupled=False)])
@pytest.mark.parametrize("name", SETTINGS)
def test_text_equals_vanilla(name: str, method: Recycling) -> None:
    """Catches siblings of one token, as an empty matrix has them, that confuse acceptance."""
    assert decoding.lists(run(method, **SETTINGS[name]).tokens) == vanilla(name)


def test_loops_are_found() -> None:
    """Catches a tree that is never accepted."""
    target = tiny_params(decoding.target_config(), seed=3, scale=6.0)  # soon repeats itself
    out = generate(target, decoding.PROMPTS, method=Recycling(), max_new_tokens=100)
    plain = generate(target, decoding.PROMPTS, method=Vanilla(), max_new_tokens=100)
    assert decoding.lists(out.tokens) == decoding.lists(plain.tokens)
    assert out.statistics.tau > 3


def test_coupling_follows_the_draw() -> None:
    """Catches noise that is looked up for other tokens, or for another depth: lossless, useless."""
    taus = [
        run(Recycling(chain(3), 8, c), **SETTINGS["plain"]).statistics.tau for c in (True, False)
    ]
    assert taus[0] > taus[1]


def test_default_tree_is_within_the_width() -> None:
    """Catches a default that fails its own check."""
    method = Recycling()
    method.check(decoding.random_pair())
    assert 40 <= method.nodes <= 81 and method.depth <= 6


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Recycling(width=0), "width=0: must be a whole number from 1 to 11"),
        (Recycling(width=12), "width=12: must be a whole number from 1 to 11"),
        (Recycling(static_tree([[3]]), width=3), "tree rank 3: width=3 keeps fewer; raise width"),
        (Recycling(static_tree([])), "no drafted node"),
    ],
)
def test_impossible_settings_are_named(method: Recycling, message: str) -> None:
    """Catches settings that fail inside a trace."""
    with pytest.raises(ValueError, match=message):
        run(method)
