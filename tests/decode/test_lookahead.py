"""Lookahead decoding: mask, pool and whole rounds against plain Python."""

import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.decode import Lookahead, Vanilla, executables, generate
from eagle_jax.decode.method import Method
from eagle_jax.decode.methods.lookahead import Pool, insert
from eagle_jax.decode.program import Program
from eagle_jax.testing import tiny_params

SETTINGS: dict[str, dict] = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
}
Grams = dict[int, list[tuple[int, ...]]]


@pytest.mark.parametrize(
    ("w", "n", "g"), [(7, 5, 7), (15, 5, 15), (4, 3, 2), (5, 2, 3), (1, 4, 2), (1, 2, 1), (2, 7, 1)]
)
def test_tree_is_the_papers_mask(w: int, n: int, g: int) -> None:
    """Catches slots that see another column or guess, and a depth that is not their position."""
    method = Lookahead(ngram=n, window=w, guesses=g)
    tree = method._shape(2)
    t = (n - 1) * (w + g)
    assert method.nodes == t == tree.parents.shape[1]
    mask, depth = np.zeros((t, t), bool), np.zeros(t, int)
    for row in range(n - 1):
        for column in range(w):
            slot = row * w + column
            depth[slot] = row + column
            mask[slot, : column + 1] = True  # the trajectory up to this column
            for above in range(1, row + 1):
                mask[slot, above * w + column] = True
    for guess in range(g):
        for j in range(n - 1):
            first = (n - 1) * (w + guess)
            depth[first + j] = 1 + j
            mask[first + j, 0] = True
            mask[first + j, first : first + j + 1] = True
    for row in range(2):
        assert np.array_equal(tree.ancestors[row], mask)
        assert np.array_equal(tree.depth[row], depth)
        for node, parent in enumerate(np.asarray(tree.parents[row])[1:], 1):
            assert depth[parent] == depth[node] - 1 and mask[node, parent]
    assert method.depth == depth.max()


def add(pool: Grams, key: int, gram: tuple[int, ...], room: int) -> None:
    """The pool's rule, gram by gram."""
    kept = pool.setdefault(key, [])
    if gram in kept:
        kept.remove(gram)
    elif len(kept) == room:
        kept.pop(0)
    kept.append(gram)


def content(pool: Pool, row: int) -> Grams:
    grams, count = np.asarray(pool.grams)[row], np.asarray(pool.count)[row]
    return {
        key: [tuple(gram) for gram in grams[key, :n].tolist()] for key, n in enumerate(count) if n
    }


@pytest.mark.parametrize("room", [1, 3, 5])
@pytest.mark.parametrize("letters", [2, 3])
def test_pool_equals_a_dictionary(room: int, letters: int) -> None:
    """Catches repeated keys and grams of one insertion that overwrite each other, a repeated gram
    that keeps its place, and the newest dropped instead of the oldest."""
    rng = np.random.default_rng(room)
    b, vocab, many, m = 2, 4, 6, 3
    pool = Pool(jnp.zeros((b, vocab, room, m), jnp.int32), jnp.zeros((b, vocab), jnp.int32))
    expected: list[Grams] = [{} for _ in range(b)]
    step = jax.jit(jax.vmap(insert))
    full = 0
    for _ in range(150):
        keys = rng.integers(0, vocab, (b, many)).astype(np.int32)
        grams = rng.integers(0, letters, (b, many, m)).astype(np.int32)
        valid = rng.random((b, many)) < 0.6
        pool = step(pool, keys, grams, valid)
        for row in range(b):
            for key, gram, good in zip(keys[row], grams[row], valid[row], strict=True):
                if good:
                    add(expected[row], int(key), tuple(gram.tolist()), room)
            assert content(pool, row) == expected[row]
            full += sum(len(kept) == room for kept in expected[row].values())
    assert full > 500


class Plain:
    """Lookahead of one row in plain Python; every node is scored as a sequence of its own."""

    def __init__(self, pair, method: Lookahead, prompt, window, rule: reference.Rule) -> None:
        self.pair, self.method, self.rule = pair, method, rule
        self.text, self.window = list(prompt), [list(row) for row in window]
        self.pool: Grams = {}
        self.seen = 0

    def read_text(self) -> None:
        """Pool the n-grams that the text has completed."""
        n = self.method.ngram
        for end in range(max(self.seen, n - 1), len(self.text)):
            gram = self.text[end - n + 1 : end + 1]
            add(self.pool, gram[0], tuple(gram[1:]), self.method.guesses)
        self.seen = len(self.text)

    def scores(self, after: list[int]) -> np.ndarray:
        return reference.target(self.pair, [*self.text, *after])[1][-1]

    def draw(self, after: list[int]) -> int:
        """The target's token after the text and `after`."""
        position = len(self.text) + len(after)
        return int(np.argmax(reference.scores(self.scores(after), position, self.rule)))

    def round(self) -> list[int]:
        """One round; returns the tokens of the tree, node by node."""
        n, w = self.method.ngram, self.method.window
        if self.method.prompt_pool:
            self.read_text()
        root, window = self.text[-1], self.window
        window[0][0] = root
        guesses = list(self.pool.get(root, []))
        guesses += [(0,) * (n - 1)] * (self.method.guesses - len(guesses))

        def column(c: int) -> list[int]:
            return window[0][1 : c + 1] + [window[r][c] for r in range(1, n - 1)]

        known = {tuple(window[0][1 : c + 1]) for c in range(w)}
        known |= {
            tuple(window[0][1 : c + 1] + [window[i][c] for i in range(1, r + 1)])
            for c in range(w)
            for r in range(n - 1)
        }
        known |= {gram[:j] for gram in guesses for j in range(n)}
        if self.method.coupled:
            new = [self.draw(column(c)) for c in range(w)]
        else:
            new = [int(np.argmax(self.scores(column(c)))) for c in range(w)]
        drafted = [token for row in window for token in row]
        drafted += [token for gram in guesses for token in gram]

        accepted: list[int] = []
        while tuple(accepted) in known:
            accepted.append(self.draw(accepted))
        rows = [*window, new]
        for c in range(w):
            gram = tuple(row[c] for row in rows[1:])
            add(self.pool, window[0][c], gram, self.method.guesses)
        self.window = [list(row) for row in rows[1:]]
        self.text += accepted
        return drafted


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("greedy", Lookahead(ngram=4, window=4, guesses=3)),
        ("greedy", Lookahead(ngram=2, window=3, guesses=2, prompt_pool=False)),
        ("top_p", Lookahead(ngram=3, window=4, guesses=2)),
        ("plain", Lookahead(ngram=3, window=3, guesses=2, prompt_pool=False, coupled=False)),
    ],
)
def test_rounds_equal_plain_lookahead(name: str, method: Lookahead) -> None:
    """Catches a window that shifts to the wrong side or mixes columns, n-grams under another key,
    text that is pooled twice or never, and guesses of another token than the root."""
    pair, rounds = decoding.random_pair(), 7
    program = Program.of(pair, decoding.Recording(method), 256)
    prompts, limits, clock = [np.array(p) for p in decoding.PROMPTS], [200] * 4, executables.Clock()
    bare = pair.with_draft(None)
    state = executables.start(program, bare, prompts, limits, decoding.SEEDS, clock)
    windows = np.asarray(state.method.inner.window)
    wide = reference.Pair.of(pair)
    plain = [
        Plain(wide, method, prompt, window, reference.Rule(seed=seed, **SETTINGS[name]))
        for prompt, seed, window in zip(decoding.PROMPTS, decoding.SEEDS, windows, strict=True)
    ]
    for prompt, window in zip(decoding.PROMPTS, windows, strict=True):
        assert set(window.flat) <= set(prompt)
    assert len(set(windows[3].flat)) > 1  # from all over the prompt
    for _ in range(rounds):
        state = executables.advance(
            program, bare, state, decoding.sampling(**SETTINGS[name]), clock, 1
        )
        recorded = jax.device_get(state.method)
        for row, expected in enumerate(plain):
            assert recorded.tokens[row].tolist() == expected.round()
            text = np.asarray(state.tokens)[row, : int(state.length[row])]
            assert text.tolist() == expected.text
            assert recorded.inner.window[row].tolist() == expected.window
            assert content(recorded.inner.pool, row) == expected.pool
    assert sum(len(row.text) for row in plain) > sum(map(len, decoding.PROMPTS)) + 4 * rounds


@pytest.mark.parametrize("prompt_pool", [True, False])
def test_long_prompts_are_pooled(prompt_pool: bool) -> None:
    """Catches n-grams lost where the prompt is cut into pieces, and those of the padding."""
    method, pair = (
        Lookahead(ngram=4, window=2, guesses=3, prompt_pool=prompt_pool),
        decoding.random_pair(),
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, decoding.VOCAB, length) for length in (200, 129, 3, 4)]
    program = Program.of(pair, method, 512)
    seeds, clock = decoding.SEEDS, executables.Clock()
    state = executables.start(program, pair.with_draft(None), prompts, [240] * 4, seeds, clock)
    for row, prompt in enumerate(prompts):
        expected = Plain(None, method, prompt.tolist(), [], reference.Rule())
        if prompt_pool:
            expected.read_text()
        assert content(state.method.pool, row) == expected.pool
        assert np.asarray(state.method.window)[row].min() > 0  # no padding


def run(method: Method, **options):
    pair = decoding.random_pair()
    options = {"seed": decoding.SEEDS, "max_new_tokens": decoding.NEW} | options
    return generate(pair, decoding.PROMPTS, method=method, **options)


@functools.cache
def vanilla(name: str) -> list[list[int]]:
    return decoding.lists(run(Vanilla(), **SETTINGS[name]).tokens)


@pytest.mark.parametrize(
    "method",
    [Lookahead(), Lookahead(2, 1, 1), Lookahead(3, 6, 2, prompt_pool=False, coupled=False)],
    ids=["default", "smallest", "plain"],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_text_equals_vanilla(name: str, method: Lookahead) -> None:
    """Catches window slots accepted on a path that is not theirs, or past the noise drawn."""
    assert decoding.lists(run(method, **SETTINGS[name]).tokens) == vanilla(name)


def test_loops_are_found() -> None:
    """Catches guesses that are never accepted, a lost bonus token, and a window out of step."""
    target = tiny_params(decoding.target_config(), seed=3, scale=6.0)  # soon repeats itself
    plain = generate(target, decoding.PROMPTS, method=Vanilla(), max_new_tokens=100)

    def tau(method: Lookahead) -> tuple[float, tuple[float, ...]]:
        out = generate(target, decoding.PROMPTS, method=method, max_new_tokens=100)
        assert decoding.lists(out.tokens) == decoding.lists(plain.tokens)
        return out.statistics.tau, out.statistics.accepted_per_depth

    assert tau(Lookahead(prompt_pool=False))[0] > 3
    # All guess tokens and the bonus: more than N-1 tokens a round, though the window is no deeper.
    assert tau(Lookahead(ngram=3, window=1, guesses=4))[0] > 2.3
    # The trajectory, deeper than any guess.
    assert tau(Lookahead(ngram=3, window=7, guesses=1))[1][3] > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ngram": 1}, "ngram=1: must be a whole number of at least 2"),
        ({"window": 0}, "window=0: must be a whole number above 0"),
        ({"guesses": "7"}, "guesses='7': must be a whole number above 0"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    """Catches settings that fail inside a trace."""
    with pytest.raises(ValueError, match=message):
        Lookahead(**settings)
