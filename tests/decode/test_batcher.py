"""Continuous batching: requests come and go, every answer stays what it is alone."""

import dataclasses
import queue
import re
import threading
import weakref
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.decode import Eagle, Vanilla, chain, executables, generate
from eagle_jax.decode.batching import schedule as stages
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import Program, State, capacity
from eagle_jax.decode.sampling.params import NAMES, SamplingParams
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
    settings = {name: options.pop(name) for name in NAMES if name in options}
    sampling = SamplingParams(**settings)
    return Batcher(params or decoding.trained_pair(), sampling=sampling, **(defaults | options))


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


def make_program(method: Method) -> tuple[Program, Params]:
    """What `make` decodes with."""
    params = decoding.trained_pair().with_draft(method.draft)
    slots = capacity(128, decoding.NEW, method.depth)
    return Program.of(params, method, slots), params


def alone(method: Method, temperature: float) -> list[tuple[list[int], int]]:
    """Tokens and rounds of every request, in batches of which no row is ever replaced."""
    program, params = make_program(method)
    out, clock = [], executables.Clock()
    for first in range(0, len(PROMPTS), ROWS):
        rows = slice(first, first + ROWS)
        prompts = PROMPTS[rows]
        limits = [len(p) + n for p, n in zip(prompts, NEW[rows], strict=True)]
        state = executables.start(program, params, prompts, limits, SEEDS[rows], clock)
        state = executables.advance(
            program, params, state, decoding.sampling(temperature, rows=ROWS), clock
        )
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
    (program, params), clock = make_program(decoding.METHODS[name]), executables.Clock()
    temperature = dict(CASES)[name]  # the program is compiled already
    limits = [len(p) + n for p, n in zip(PROMPTS, NEW, strict=True)]
    old, new = (
        executables.start(program, params, PROMPTS[rows], limits[rows], SEEDS[rows], clock)
        for rows in (slice(0, 3), slice(3, 6))
    )
    old = executables.advance(
        program, params, old, decoding.sampling(temperature, rows=ROWS), clock, 2
    )
    before = jax.device_get(old)
    args = ([PROMPTS[4]], [limits[4]], [SEEDS[4]], clock)
    after = executables.replace_rows(program, params, old, [1], *args)
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
    inserting, decoding_ = executables.executables()[-2:]
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


# --- Batch sizes -------------------------------------------------------------------------------

TABLE: dict[int, str | Method] = {1: decoding.METHODS["lookahead"], 2: "vanilla", 4: METHOD}
TABLES: list[dict[int, str | Method]] = [
    TABLE,
    {1: decoding.METHODS["eagle2"], 2: decoding.METHODS["recycling"], 3: "prompt_lookup"},
    {2: METHOD, 3: decoding.METHODS["medusa"], 4: METHOD},
]
LONG = 60


@pytest.fixture
def eager(monkeypatch) -> None:
    """Moves that are not worth it, so that short answers move often."""
    monkeypatch.setattr(stages, "MOVE", 1)


def busy(batcher: Batcher) -> tuple[list[int], list[Piece], list[int]]:
    """Eleven ragged requests in three waves: their numbers, all pieces, batch sizes by step."""
    ids: list[int] = []
    pieces: list[Piece] = []
    sizes: list[int] = []
    for wave, few in ((range(1), 4), (range(1, 7), 2), (range(7, 11), 0)):
        ids += [batcher.submit(asked(i)[0], **asked(i)[1]) for i in wave]
        while new := batcher.step():
            pieces += new
            statistics = batcher.statistics()
            sizes.append(statistics.rows)
            if statistics.rows <= few and statistics.occupied:
                break
    assert batcher.step() == []
    return ids, pieces, sizes


def asked(i: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A prompt, and what `submit` and `generate` take with it."""
    new = (LONG, 8, 40, 13, 22, 1, 35)[i % 7]
    return np.asarray(PROMPTS[i % 9]), {"seed": 90 + i, "max_new_tokens": new}


def by_vanilla(i: int, temperature: float) -> list[int]:
    prompt, options = asked(i)
    pair = decoding.trained_pair()
    found = generate(pair, prompt, method="vanilla", temperature=temperature, **options)
    return found.tokens.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("table", TABLES, ids=["lookahead-vanilla-eagle", "eagle2", "same method"])
def test_moves_change_no_text(table, temperature: float, eager) -> None:
    """Catches a moved request with other noise, limit or text, a lost or doubled token, a row that
    two requests have, and rounds or tokens that are counted twice or from zero again."""
    options = {"temperature": temperature, "max_new_tokens": LONG, "prefill_rows": 2}
    batcher = make(method=table, rows=4, **options)
    ids, pieces, sizes = busy(batcher)
    got = joined(pieces)
    assert [got[i][0] for i in ids] == [by_vanilla(i, temperature) for i in range(len(ids))]
    changes = [now - before for before, now in zip(sizes, sizes[1:], strict=False)]
    assert max(sizes) == 4 and min(sizes) == min(table)
    assert sum(change > 0 for change in changes) >= 2 <= sum(change < 0 for change in changes)
    statistics = batcher.statistics()
    assert statistics.moves >= 4 and statistics.finished == len(ids)
    assert statistics.rounds == sum(rounds for _, rounds in got.values())
    assert statistics.new_tokens == sum(len(tokens) for tokens, _ in got.values())
    assert statistics.tau == statistics.new_tokens / statistics.rounds
    assert 0.5 < statistics.occupancy <= 1
    assert all(0 < rounds <= len(tokens) for tokens, rounds in got.values())


def test_a_moved_request_is_drafted_for_as_before(eager) -> None:
    """Catches a draft that begins a moved request with the prompt alone, or a row too late: no
    text would tell, the rounds do."""
    options = {"max_new_tokens": LONG, "temperature": 1.0}
    still = joined(busy(make(method=METHOD, rows=4, **options))[1])
    batcher = make(method=dict.fromkeys((1, 2, 3, 4), METHOD), rows=4, **options)
    moved = joined(busy(batcher)[1])
    assert batcher.statistics().moves >= 4
    assert {i: tokens for i, (tokens, _) in moved.items()} == {
        i: tokens for i, (tokens, _) in still.items()
    }
    rounds = [sum(rounds for _, rounds in got.values()) for got in (still, moved)]
    assert abs(rounds[0] - rounds[1]) <= 2 and rounds[0] < 0.8 * batcher.statistics().new_tokens


def test_the_rule_of_moves() -> None:
    """Catches moves that cannot pay, one missed, and passes counted by another size's rows."""
    batcher = make(
        method=dict.fromkeys((1, 2, 4), "vanilla"), rows=4, max_new_tokens=LONG, chunk=LONG
    )
    assert batcher.statistics().rows == 4

    def until_idle() -> list[tuple[int, int]]:
        """Batch size and passes of every chunk."""
        out, passes = [], batcher.statistics().passes
        while batcher.step():
            statistics = batcher.statistics()
            out.append((statistics.rows, statistics.passes - passes))
            passes = statistics.passes
        return out

    for new in (10, 10, 22, 30):
        batcher.submit([1, 2], max_new_tokens=new)
    # Two are left after 10 passes: the last move must be 16 ago. Then neither has 16 tokens left.
    # One is left after 22: it has 8, which will do.
    assert until_idle() == [(4, 10), (4, 6), (4, 6), (1, 8)]
    statistics = batcher.statistics()
    assert (statistics.moves, statistics.passes, statistics.rounds) == (1, 30, 72)
    assert statistics.occupancy == 72 / (4 * 22 + 8)
    # An idle batch changes as it likes, and no further than it must.
    for new in (15, 2):
        batcher.submit([1, 2], max_new_tokens=new)
    assert until_idle() == [(2, 2), (2, 6), (2, 7)]  # 2 passes ago; then 7 tokens left
    # It grows at once, and a load that goes up and down does not move it again and again.
    batcher.submit([1, 2], max_new_tokens=LONG)
    batcher.submit([1, 2], max_new_tokens=LONG)
    for _ in range(3):
        batcher.submit([1, 2], max_new_tokens=1)
        batcher.step()
        assert (batcher.statistics().rows, batcher.statistics().moves) == (4, 1)
    assert until_idle() == [(4, 13), (2, 44)]


def test_a_growing_batch_takes_everybody_along() -> None:
    """Catches growth by one size at a time, growth before the rows are taken, and a table that is
    looked up once."""
    batcher = make(method=TABLE, rows=4, max_new_tokens=LONG)
    assert batcher.method == METHOD
    seen = []
    for requests in (1, 0, 1, 2):
        for _ in range(requests):
            batcher.submit([3, 4], max_new_tokens=LONG)
        batcher.step()
        seen.append((batcher.statistics().rows, batcher.method, batcher.statistics().moves))
    one, two = (decoding.METHODS[name] for name in ("lookahead", "vanilla"))
    assert seen == [(1, one, 0), (1, one, 0), (2, two, 1), (4, METHOD, 2)]
    batcher = make(method=TABLE, rows=4)
    batcher.submit([3, 4])
    batcher.step()
    submit(batcher, range(5))
    batcher.step()
    assert (batcher.method, batcher.statistics().moves) == (METHOD, 1)


@pytest.mark.parametrize("long", [1, 500])
def test_answers_longer_than_the_longest_prompt_move(long: int, eager) -> None:
    """Catches a prefill padded past the cache, and chunks that do not divide what they are of."""
    pair = decoding.trained_pair()
    config = dataclasses.replace(pair.target_config, max_position_embeddings=1024)
    pair = dataclasses.replace(pair, target_config=config)
    prompt, new = np.arange(long, dtype=np.int32) % decoding.VOCAB, 200
    batcher = make(
        pair,
        method={1: METHOD, 2: "vanilla"},
        rows=2,
        max_prompt=500,
        max_new_tokens=new,
        temperature=1.0,
    )
    assert {stage.program.slots for stage in batcher._stages} == {768}
    ids = [batcher.submit(prompt, seed=i, max_new_tokens=n) for i, n in enumerate((new, new - 40))]
    got = joined(list(batcher.run()))
    assert batcher.statistics().moves == 1 and batcher.method == METHOD
    options = {"method": "vanilla", "max_new_tokens": new, "temperature": 1.0}
    assert got[ids[0]][0] == generate(pair, prompt, seed=0, **options).tokens.tolist()


def test_moves_compile_nothing(eager) -> None:
    """Catches a program per move or per number of requests that move, and a batch that forgets who
    was in it when it was warmed up."""
    shapes: dict[str, Any] = {
        "params": decoding.lettered_pair(),
        "method": TABLE,
        "rows": 4,
        "max_prompt": 120,
        "prefill_rows": 2,
        "ignore_eos": True,
        "max_new_tokens": LONG,
    }
    batcher = make(**shapes)
    ids = [batcher.submit(asked(i)[0], **asked(i)[1]) for i in range(3)]
    pieces = batcher.step()
    batcher.warm_up()
    made = len(executables.executables())
    with decoding.compilations() as seen:
        pieces += batcher.run()
        assert {len(piece.tokens) > 0 for piece in pieces} == {True}
        other = make(**shapes)
        for prompt, new in ((120, 60), (100, 45), (110, 25), (90, 5)):
            other.submit(np.ones(prompt, np.int32), max_new_tokens=new)
        assert len(joined(list(other.run()))) == 4  # texts of more than 128 tokens move
        assert other.statistics().moves == 2
        assert seen == [] and len(executables.executables()) == made
    assert [joined(pieces)[i][0] for i in ids] == [by_vanilla(i, 0.0) for i in range(3)]


def test_an_idle_size_has_no_state(monkeypatch, eager) -> None:
    """Catches two batches in memory at once."""
    alive: list[weakref.ref] = []

    def watched(name: str) -> None:
        real = getattr(executables, name)

        def call(*args: Any) -> State:
            assert name != "vacant" or not any(ref() is not None for ref in alive)
            state = real(*args)
            alive[:] = [weakref.ref(x) for x in jax.tree.leaves(state.cache)]
            return state

        monkeypatch.setattr(executables, name, call)

    for name in ("vacant", "replace_rows", "advance"):
        watched(name)
    batcher = make(method=TABLE, rows=4)
    submit(batcher, range(4))
    list(batcher.run())
    batcher.warm_up()
    assert batcher.statistics().moves > 0


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_cancelled_around_a_move(when: str, monkeypatch, eager) -> None:
    """Catches a cancelled request that moves along for good, and one that gets a piece."""
    batcher = make(method=TABLE, rows=4, max_new_tokens=LONG)
    ids = [batcher.submit(asked(i)[0], **asked(i)[1]) for i in (0, 2)]
    pieces = batcher.step()
    assert batcher.statistics().rows == 2
    ids += [batcher.submit(asked(i)[0], **asked(i)[1]) for i in (3, 4, 6)]
    real = executables.vacant

    def vacant(*args: Any) -> State:
        if when == "during":
            thread = threading.Thread(target=lambda: batcher.cancel(ids[0]))
            thread.start()
            thread.join()
        return real(*args)

    monkeypatch.setattr(executables, "vacant", vacant)
    if when == "before":
        assert batcher.cancel(ids[0])
    pieces += (later := batcher.step())
    assert batcher.statistics().rows == 4
    if when == "after":
        assert batcher.cancel(ids[0])
    else:
        assert ids[0] not in {piece.request for piece in later}
    assert not batcher.cancel(ids[0])
    after = list(batcher.run())
    assert ids[0] not in {piece.request for piece in after}
    got = joined([piece for piece in pieces if piece.request != ids[0]] + after)
    assert {i: tokens for i, (tokens, _) in got.items()} == {
        ids[j]: by_vanilla(i, 0.0) for j, i in ((1, 2), (2, 3), (3, 4), (4, 6))
    }
    assert batcher.statistics().finished == 4 and not batcher.statistics().occupied


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (1, {1: TABLE[1]}),
        (2, {1: TABLE[1], 2: Vanilla()}),
        (3, {1: TABLE[1], 2: Vanilla(), 3: Vanilla()}),
        (9, {1: TABLE[1], 2: Vanilla(), 4: METHOD, 9: METHOD}),
    ],
)
def test_batch_sizes_of_a_table(rows: int, chosen: dict[int, Method]) -> None:
    """Catches sizes out of order, and `rows` with the method of a size above it."""
    table = dict(reversed(TABLE.items()))
    found = stages.methods(decoding.trained_pair(), table, rows, 0.0)
    assert list(found.items()) == list(chosen.items())
    assert stages.methods(decoding.trained_pair(), METHOD, rows, 0.0) == {rows: METHOD}


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
