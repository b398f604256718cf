"""Continuous batching: requests come and go, every answer stays what it is alone."""

import dataclasses
import queue
import re
import threading
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.decode import Eagle, Vanilla, chain, engine, generate
from eagle_jax.decode.batcher import Batcher, Piece, method_for
from eagle_jax.decode.method import Method
from eagle_jax.decode.sampling import sampling
from eagle_jax.params import Params

ROWS = 3
METHOD = Eagle(chain(3))
# Three batches of three: ragged prompts and answers, one of which is a single token.
PROMPTS = [np.array(p, np.int32) for p in [*decoding.PROMPTS, [9, 9, 2], [5], [4] * 30, [8, 1]]]
PROMPTS.append(np.arange(40, dtype=np.int32) * 7 % decoding.VOCAB)
NEW = [20, 3, 11, 1, 20, 7, 15, 20, 2]
SEEDS = [*decoding.SEEDS, 4, 3, 2, 1, 0]
# Of the method, temperature matters to what it drafts, not to how its state is put into a row.
CASES = [
    ("vanilla", 0.0),
    ("eagle chain", 0.0),
    ("eagle chain", 1.0),
    ("eagle2", 1.0),
    ("eagle3", 0.0),
    ("eagle lookup", 1.0),
    ("medusa", 1.0),
    ("speculative", 0.0),
    ("lookahead", 1.0),
    ("prompt lookup", 0.0),
    ("recycling", 1.0),
]


def make(params: Params | None = None, **options: Any) -> Batcher:
    defaults: dict[str, Any] = {
        "method": METHOD,
        "rows": ROWS,
        "max_prompt": 100,
        "max_new_tokens": decoding.NEW,
        "chunk": 2,
    }
    return Batcher(params or decoding.trained_pair(), **(defaults | options))


def submit(batcher: Batcher, which: range) -> list[int]:
    return [batcher.submit(PROMPTS[i], seed=SEEDS[i], max_new_tokens=NEW[i]) for i in which]


def joined(pieces: list[Piece]) -> dict[int, tuple[list[int], int]]:
    """Tokens and rounds of every request; it ends with its last piece and with no other."""
    out: dict[int, tuple[list[int], int]] = {}
    ended: set[int] = set()
    for piece in pieces:
        assert piece.request not in ended and len(piece.tokens)
        ended |= {piece.request} if piece.finish else set()
        before = out.get(piece.request, ([], 0))[0]
        out[piece.request] = [*before, *piece.tokens.tolist()], piece.rounds
    assert ended == set(out)
    return out


def make_program(method: Method) -> tuple[engine.Program, Params]:
    """What `make` decodes with."""
    params = decoding.trained_pair().only(method.draft)
    draft = None if method.draft is None else params.drafts[method.draft].config
    slots = engine.capacity(128, decoding.NEW, method.depth)
    return engine.Program(method, params.target_config, draft, slots, ()), params


def alone(method: Method, temperature: float) -> list[tuple[list[int], int]]:
    """Tokens and rounds of every request, in batches of which no row is ever replaced."""
    program, params = make_program(method)
    out, clock = [], engine.Clock()
    for first in range(0, len(PROMPTS), ROWS):
        rows = slice(first, first + ROWS)
        prompts = PROMPTS[rows]
        limits = [len(p) + n for p, n in zip(prompts, NEW[rows], strict=True)]
        state = engine.start(program, params, prompts, limits, SEEDS[rows], clock)
        state = engine.advance(program, params, state, sampling(temperature), clock)
        for row, prompt in enumerate(prompts):
            text = np.asarray(state.tokens)[row, len(prompt) : int(state.length[row])]
            out.append((text.tolist(), int(state.rounds[row])))
    return out


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_every_request_is_decoded_as_if_alone(name: str, temperature: float) -> None:
    """Catches state of the row's last request, of a neighbour or of padding in a new one.

    A wrong state of the method changes no text, only how many rounds it takes: those count too.
    """
    method = decoding.METHODS[name]
    batcher = make(method=method, temperature=temperature)
    ids = submit(batcher, range(2))  # fewer than rows
    pieces = batcher.step()
    ids += submit(batcher, range(2, 7))  # more
    pieces += batcher.step() + batcher.step()
    ids += submit(batcher, range(7, 9))
    pieces += batcher.run()
    got = joined(pieces)
    assert [got[i] for i in ids] == alone(method, temperature)
    assert [len(got[i][0]) for i in ids] == NEW
    assert batcher.step() == []


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_a_replaced_row_is_as_if_new(name: str) -> None:
    """Catches what the rounds of short answers would not tell: every array of the state counts."""
    (program, params), clock = make_program(decoding.METHODS[name]), engine.Clock()
    temperature = dict(CASES)[name]  # the program is compiled already
    limits = [len(p) + n for p, n in zip(PROMPTS, NEW, strict=True)]
    old, new = (
        engine.start(program, params, PROMPTS[rows], limits[rows], SEEDS[rows], clock)
        for rows in (slice(0, 3), slice(3, 6))
    )
    old = engine.advance(program, params, old, sampling(temperature), clock, 2)
    before = jax.device_get(old)
    args = ([PROMPTS[4]], [limits[4]], [SEEDS[4]], clock)
    after = engine.replace_rows(program, params, old, [1], *args)
    leaves = zip(*map(jax.tree.leaves, (before, new, after)), strict=True)
    for was, wanted, got in jax.device_get(list(leaves)):
        np.testing.assert_array_equal(got[[0, 2]], was[[0, 2]])
        np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_texts_are_those_of_generate() -> None:
    """Catches an end token printed or passed, another cache size, prompts of several buckets and
    prefills that are not full."""
    pair = decoding.lettered_pair()
    batcher = make(pair, temperature=1.0, prefill_rows=2, max_prompt=200)
    long = np.arange(150, dtype=np.int32) % decoding.VOCAB
    prompts = ["cab", "k", "jjj", long, "abcdefg", long[:140], "fade"]
    ids = [batcher.submit(p, seed=3 + i) for i, p in enumerate(prompts)]
    texts, finish = dict.fromkeys(ids, ""), {}
    pieces = list(batcher.run())
    for piece in pieces:
        assert piece.text is not None
        texts[piece.request] += piece.text
        finish[piece.request] = piece.finish
    got = joined(pieces)
    for i, prompt in enumerate(prompts):
        whole = generate(
            pair, prompt, method=METHOD, max_new_tokens=20, temperature=1.0, seed=3 + i
        )
        assert got[ids[i]] == (whole.tokens.tolist(), whole.statistics.rounds[0])
        assert texts[ids[i]] == whole.text
        assert finish[ids[i]] == ("stop" if whole.tokens[-1] == 10 else "length")
    assert set(finish.values()) == {"stop", "length"}


def test_end_tokens_can_be_ignored() -> None:
    batcher = make(decoding.lettered_pair(), method="vanilla", temperature=1.0, ignore_eos=True)
    batcher.submit("cab", seed=3)
    pieces = list(batcher.run())
    assert len(joined(pieces)[0][0]) == 20 and pieces[-1].finish == "length"
    assert any(10 in piece.tokens for piece in pieces)


def test_the_context_ends_an_answer() -> None:
    """Catches a limit beyond the context, and `max_prompt` beyond it."""
    batcher = make(method="vanilla", rows=1, max_prompt=10**6, max_new_tokens=50)
    prompt = np.ones(250, np.int32)
    batcher.submit(prompt)
    whole = generate(decoding.trained_pair(), prompt, method="vanilla", max_new_tokens=50)
    assert joined(list(batcher.run()))[0][0] == whole.tokens.tolist()
    assert len(whole.tokens) == 6


def test_requests_may_come_while_others_are_decoded() -> None:
    """Catches a loop over pieces that ends with the requests it began with, and lost requests of
    other threads."""
    batcher = make(temperature=1.0)
    ids, pieces = submit(batcher, range(4)), []
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.extend(submit(batcher, range(5, 9))))
    for piece in batcher.run():
        pieces.append(piece)
        if len(pieces) == 1:
            thread.start()
        if piece.request == ids[0] and piece.finish:
            ids += submit(batcher, range(4, 5))
            thread.join()
    got = joined(pieces)
    assert [got[i] for i in ids + others] == alone(METHOD, 1.0)


def test_a_steady_state_compiles_nothing() -> None:
    """Catches a program per row, per number of new prompts or per chunk, and helpers outside of
    programs: any of them halts every request for seconds."""
    shapes: dict[str, Any] = {
        "params": decoding.lettered_pair(),
        "max_prompt": 200,
        "prefill_rows": 2,
    }
    batcher = make(**shapes, temperature=0.7)
    batcher.warm_up()
    with decoding.compilations() as seen:
        ids = submit(batcher, range(9))
        pieces = batcher.step()
        ids += [batcher.submit(np.ones(180, np.int32), seed=9)]  # of another bucket
        assert batcher.cancel(ids[0]) and batcher.cancel(ids[8])
        pieces += batcher.run()
        kept = joined([piece for piece in pieces if piece.request != ids[0]])
        assert set(kept) == set(ids) - {ids[0], ids[8]}
        # Nor does a second batcher of the same shapes, with other values.
        other = make(**shapes, temperature=1.3, chunk=5)
        submit(other, range(5))
        list(other.run())
        assert seen == []


def test_a_new_row_is_written_in_place() -> None:
    """Catches a copy of the whole cache for every prompt."""
    batcher = make(method="prompt_lookup", rows=5)  # programs of its own
    batcher.warm_up()
    leaves = jax.tree.leaves(batcher._state)
    size = sum(x.nbytes for x in leaves)
    inserting, decoding_ = engine.executables()[-2:]
    for executable in (inserting, decoding_):
        assert executable.memory_analysis().alias_size_in_bytes >= size
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(batcher._state.cache)]
    submit(batcher, range(6))
    list(batcher.run())
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(batcher._state.cache)]
    assert before == after and all(x.is_deleted() for x in leaves)


def test_a_cancelled_request_makes_room() -> None:
    """Catches a row that is never free again, pieces of the dead, and a changed neighbour."""
    expected = alone(METHOD, 0.0)
    batcher = make()
    ids = submit(batcher, range(5))
    first = batcher.step()
    assert {piece.request for piece in first} == set(ids[:3])
    assert batcher.cancel(ids[0]) and batcher.cancel(ids[4])  # in a row; in the queue
    assert not batcher.cancel(ids[0]) and not batcher.cancel(99)
    assert batcher.statistics().waiting == 1
    ids += submit(batcher, range(6, 7))
    rest = list(batcher.run())
    got = joined([piece for piece in first if piece.request != ids[0]] + rest)
    assert got == {ids[i]: expected[j] for i, j in ((1, 1), (2, 2), (3, 3), (5, 6))}
    assert not batcher.cancel(ids[2])  # finished


def test_a_batch_whose_requests_are_all_cancelled_is_idle() -> None:
    batcher = make()
    (request,) = submit(batcher, range(1))
    batcher.step()
    assert batcher.cancel(request)
    assert list(batcher.run()) == batcher.step() == []
    statistics = batcher.statistics()
    assert (statistics.occupied, statistics.waiting, statistics.finished) == (0, 0, 0)
    assert bool(jnp.all(batcher._state.done))


def test_the_queue_is_bounded() -> None:
    """Catches a server that takes prompts until its memory is full."""
    batcher = make(waiting=2)
    submit(batcher, range(2))
    with pytest.raises(queue.Full, match="waiting=2: the queue is full; try again"):
        submit(batcher, range(1))
    batcher.step()
    submit(batcher, range(2, 4))
    assert len({piece.request for piece in batcher.run()}) == 4


def test_rows_do_not_wait_for_each_other() -> None:
    """A chunk ends where an answer does, as long as prompts wait; the last one ends with all."""
    batcher = make(method="vanilla", chunk=100)
    for new in (3, 5, 9, 6, 3):
        batcher.submit([1, 2], max_new_tokens=new)
    seen = []
    while pieces := batcher.step():
        seen.append({piece.request: len(piece.tokens) for piece in pieces})
    assert seen == [{0: 3, 1: 3, 2: 3}, {3: 2, 1: 2, 2: 2}, {3: 4, 4: 3, 2: 4}]
    statistics = batcher.statistics()
    assert (statistics.passes, statistics.rounds, statistics.new_tokens) == (9, 26, 26)
    assert statistics.finished == 5 and statistics.tau == 1
    assert statistics.occupancy == pytest.approx(26 / 27)


def test_a_chunk_is_no_longer_than_asked() -> None:
    batcher = make(method="vanilla", chunk=4)
    batcher.submit([1, 2], max_new_tokens=10)
    assert [len(piece.tokens) for piece in batcher.run()] == [4, 4, 2]


@dataclasses.dataclass(frozen=True)
class Unbatched(Vanilla):
    """Its state has no rows."""

    def init(self, models, prompt, slots) -> jax.Array:  # pyright: ignore
        return jnp.zeros((4, prompt.tokens.shape[0]))


def test_a_state_without_leading_rows_is_refused() -> None:
    """Catches a state that is broadcast over all rows, or left to the last request."""
    batcher = make(method=Unbatched())
    batcher.submit([1])
    said = "method Unbatched: its state has a leaf (4, 3) for 3 rows, (4, 1) for 1; let every leaf"
    with pytest.raises(ValueError, match=re.escape(said)):
        batcher.step()


TABLE: dict[int, str | Method] = {1: Eagle(chain(5)), 3: METHOD, 8: "vanilla"}


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [(1, TABLE[1]), (2, TABLE[1]), (3, METHOD), (7, METHOD), (8, "vanilla"), (99, "vanilla")],
)
def test_the_method_follows_from_the_batch_size(rows: int, chosen: str | Method) -> None:
    assert method_for(TABLE, rows) == chosen


def test_a_table_serves_for_a_method() -> None:
    assert make(method=TABLE).method == METHOD


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "rows=0: must be a whole number above 0"),
        ({"chunk": 1.5}, "chunk=1.5: must be a whole number above 0"),
        ({"max_prompt": -1}, "max_prompt=-1: must be a whole number above 0"),
        ({"waiting": True}, "waiting=True: must be a whole number above 0"),
        ({"prefill_rows": 3}, "prefill_rows=3: with rows=3, use at most 2"),
        ({"prefill_rows": 2, "rows": 1}, "prefill_rows=2: with rows=1, use at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number above 0"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or a positive number"),
        ({"method": "eagel"}, "method='eagel': unknown; use one of vanilla, eagle"),
        ({"method": {4: "vanilla"}}, "a table for batch sizes [4], and rows=3; add one for 1"),
        ({"method": {0: "vanilla"}}, "batch size=0: must be a whole number above 0"),
    ],
)
def test_errors(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        make(**options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([], {}, "prompt=[]: empty"),
        ([1] * 101, {}, "prompt: 101 tokens, and this batcher takes max_prompt=100; shorten it"),
        ([11], {}, "prompt: token id 11 is outside the vocabulary 0..10"),
        ([[1], [2]], {}, "prompt=[[1], [2]]: must be text, messages, or integer token ids"),
        ("hello", {}, "prompt: text needs a tokenizer"),
        ([1], {"max_new_tokens": 21}, "max_new_tokens=21: this batcher allows 20; ask for less"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number above 0"),
        ([1], {"seed": -1}, "seed=-1: must be at least 0 and below 2**32"),
    ],
)
def test_errors_of_a_request(prompt, options: dict, said: str) -> None:
    """A bad request is told at once, and costs the others nothing."""
    batcher = make()
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        batcher.submit(prompt, **options)
    assert "\n" not in str(info.value)
    assert batcher.step() == []
