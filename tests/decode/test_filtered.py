"""Every setting with every method: the text is vanilla's, alone and beside rows with others."""

import dataclasses
import functools
from typing import Any

import decoding
import jax
import numpy as np
import pytest
import reference

import eagle_jax
from eagle_jax.decode import (
    Batcher,
    Eagle,
    SamplingParams,
    Session,
    Vanilla,
    chain,
    executables,
    generate,
    stream,
)
from eagle_jax.decode.method import Method
from eagle_jax.decode.sampling import Sampling

HOT: dict[str, Any] = {"temperature": 1.0}
# The letters a to k are the ids 0 to 10; k ends an answer.
ALL: dict[str, Any] = {
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {3: 1.0, 7: -2.0},
    "allowed_token_ids": [0, 1, 2, 3, 5, 7, 8, 9, 10],
    "bad_words": ["ab", "d", [1, 1, 1]],
    "min_tokens": 6,
    "stop": ["ca", "hh"],
}
CASES: dict[str, dict[str, Any]] = {
    "min_p": {**HOT, "min_p": 0.15},
    "repetition": {"repetition_penalty": 1.6},
    "repetition, sampled": {**HOT, "repetition_penalty": 1.6},
    "presence": {"presence_penalty": 1.5},
    "presence, sampled": {**HOT, "presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "frequency, sampled": {**HOT, "frequency_penalty": -0.4},
    "bias": {"logit_bias": {4: 2.0, 6: -3.0}},
    "bias, sampled": {**HOT, "logit_bias": {4: 2.0, 6: -3.0}},
    "allowed": {"allowed_token_ids": [0, 2, 5, 8]},
    "allowed, sampled": {**HOT, "allowed_token_ids": [0, 2, 5, 8]},
    "bad words": {"bad_words": ["f", "gd", [5, 5]]},
    "bad words, sampled": {**HOT, "bad_words": ["f", "gd", [5, 5]]},
    "min tokens": {"min_tokens": 12, "stop_token_ids": [7]},
    "min tokens, sampled": {**HOT, "min_tokens": 12, "stop_token_ids": [7]},
    "stop": {"stop": ["fh", "gd"], "ignore_eos": True},
    "stop, sampled": {**HOT, "stop": ["e", "bb"], "min_tokens": 3},
    "all": ALL,
    "all, sampled": {**HOT, **ALL, "top_k": 8, "top_p": 0.95},
    "plain": {},
}
ROWS = [SamplingParams(**case, seed=40 + i) for i, case in enumerate(CASES.values())]
PROMPT = decoding.PROMPTS


def prompt(i: int) -> list[int]:
    return decoding.PROMPTS[i % 4]


Answer = tuple[list[int], str, str]


def batches(method: Method | str, rows: list[SamplingParams]) -> list[Answer]:
    """The answers to `ROWS`' settings, four rows of different settings at a time."""
    out: list[Answer] = []
    for first in range(0, len(rows), 4):
        four = rows[first : first + 4]
        found = generate(
            decoding.lettered_pair(),
            [prompt(i) for i in range(first, first + 4)],
            sampling=[*four, *[SamplingParams()] * (4 - len(four))],  # one program for all
            method=method,
            max_new_tokens=decoding.NEW,
        )
        answers = zip(decoding.lists(found.tokens), found.text, found.finish, strict=True)
        out += list(answers)[: len(four)]
    return out


@functools.cache
def vanilla() -> list[Answer]:
    return batches(Vanilla(), ROWS)


def test_vanilla_follows_every_setting() -> None:
    """Against a naive decoder in numpy. Catches a prompt's length, a position or a processor that
    all methods could have wrong alike."""
    pair = reference.Pair.of(decoding.trained_pair())
    for i, row in enumerate(ROWS):
        text = list(prompt(i))
        words = [[decoding.LETTERS.index(x) for x in w] if isinstance(w, str) else list(w)
                 for w in row.bad_words]  # fmt: skip
        plain = dataclasses.replace(row, bad_words=words)
        ends = {*([] if row.ignore_eos else [10]), *row.stop_token_ids}
        finish = "length"
        for _ in range(decoding.NEW):
            logits = reference.target(pair, text)[1][-1]
            scores = reference.filtered(plain, text, len(prompt(i)), logits, eos=(10,))
            if row.temperature:
                scores = scores + reference.gumbel(row.seed, len(text), decoding.VOCAB)
            text.append(int(np.argmax(scores)))
            answer = text[len(prompt(i)) :]
            said = "".join(decoding.LETTERS[x] for x in answer)
            stops = [s for s in row.stop if said.endswith(s) and len(answer) >= row.min_tokens]
            if text[-1] in ends or stops:
                finish = "stop"
                said = said[: len(said) - max(map(len, stops), default=0)]
                break
        assert vanilla()[i] == (answer, said.replace("k", ""), finish), row


@pytest.mark.parametrize("name", [name for name in decoding.METHODS if name != "vanilla"])
def test_every_method_equals_vanilla(name: str) -> None:
    """Greedy and sampled rows with different settings in one batch, and all batches by one
    program. Catches penalties along a path that is not the node's own."""
    method, wanted = decoding.METHODS[name], vanilla()
    batches(method, ROWS[:4])
    made = len(executables.executables())
    assert batches(method, ROWS) == wanted
    assert len(executables.executables()) == made


@pytest.mark.parametrize("name", ["vanilla", "eagle2", "eagle3 static", "lookahead"])
def test_greedy_batches_equal_rows_beside_sampled_ones(name: str) -> None:
    """Catches a greedy row that knows whether its neighbours sample."""
    greedy = [i for i, row in enumerate(ROWS) if row.temperature == 0]
    found: list[Answer] = []
    for first in range(0, 8, 4):
        four = greedy[first : first + 4]
        rows = [ROWS[i] for i in four]
        out = generate(decoding.lettered_pair(), [prompt(i) for i in four], sampling=rows,
                       method=decoding.METHODS[name], max_new_tokens=decoding.NEW)  # fmt: skip
        found += zip(decoding.lists(out.tokens), out.text, out.finish, strict=True)
    assert found == [vanilla()[i] for i in greedy[:8]]


def test_a_stream_is_the_whole_answer() -> None:
    """Catches text that is shown and then belongs to a stop string, and lost log-probabilities."""
    pair, method = decoding.lettered_pair(), Eagle(chain(3))
    for i, row in enumerate(ROWS):
        if not row.stop and i:
            continue
        row = dataclasses.replace(row, logprobs=2)
        options: dict[str, Any] = {
            "sampling": row,
            "method": method,
            "max_new_tokens": decoding.NEW,
        }
        whole = generate(pair, prompt(i), **options)
        assert (whole.tokens.tolist(), whole.text, whole.finish) == vanilla()[i]
        for rounds in (1, 3):
            parts = list(stream(pair, prompt(i), rounds_per_chunk=rounds, **options))
            assert "".join(part.text for part in parts) == whole.text
            assert [x for part in parts for x in part.tokens.tolist()] == whole.tokens.tolist()
            assert [x for part in parts for x in part.drafted] == whole.drafted.tolist()
            assert [x for part in parts for x in part.logprobs] == whole.logprobs
            last = parts[-1]
            assert last.finish == whole.finish and not any(p.finish for p in parts[:-1])
            for name in ("new_tokens", "rounds", "tau", "accepted_per_depth"):
                assert getattr(last.statistics, name) == getattr(whole.statistics, name), name


def test_statistics_count_what_is_kept() -> None:
    """Catches rounds behind a stop string that count."""
    pair = decoding.lettered_pair()
    options: dict[str, Any] = {
        "method": Eagle(chain(3)),
        "max_new_tokens": decoding.NEW,
        "ignore_eos": True,
    }
    whole = generate(pair, "cab", **options)
    text = whole.text
    stop = text[6:8]
    cut = generate(pair, "cab", stop=stop, **options)
    place = text.index(stop)
    assert (cut.text, cut.finish) == (text[:place], "stop")
    assert cut.tokens.tolist() == whole.tokens[: place + 2].tolist()
    assert cut.statistics.new_tokens == (place + 2,)
    ends = np.flatnonzero(~whole.drafted[: place + 2])
    rounds = len(ends) + bool(whole.drafted[place + 1])
    assert cut.statistics.rounds == (rounds,)
    assert cut.statistics.tau == (place + 2) / rounds
    options["method"] = "vanilla"
    assert cut == generate(pair, "cab", stop=stop, **options)
    assert cut != whole


def test_logprobs_and_drafted_tokens() -> None:
    """Catches log-probabilities of another node, of processed logits, or of the row before."""
    pair, rows = decoding.lettered_pair(), []
    for i, row in enumerate(ROWS[:4]):
        rows.append(dataclasses.replace(row, logprobs=[3, None, 0, 1][i]))
    wide = reference.Pair.of(decoding.trained_pair())
    found = generate(pair, PROMPT, sampling=rows, method=decoding.METHODS["eagle2"],
                     max_new_tokens=decoding.NEW)  # fmt: skip
    assert decoding.lists(found.tokens) == [answer[0] for answer in vanilla()[:4]]
    for row, wanted in enumerate(rows):
        if wanted.logprobs is None:
            assert found.logprobs[row] is None
            continue
        text = list(PROMPT[row])
        assert len(found.logprobs[row]) == len(found.tokens[row])
        for one, token in zip(found.logprobs[row], found.tokens[row].tolist(), strict=True):
            law = np.log(reference.softmax(reference.target(wide, text)[1][-1]))
            assert one.token == token and one.logprob == pytest.approx(law[token], abs=1e-4)
            best = np.argsort(-law)[: wanted.logprobs].tolist()
            assert [token for token, _ in one.top] == best
            assert [x for _, x in one.top] == pytest.approx(law[best].tolist(), abs=1e-4)
            text.append(token)
    drafted = sum(int(row.sum()) for row in found.drafted)
    statistics = found.statistics
    share = sum(statistics.accepted_per_depth) * sum(statistics.rounds)
    assert drafted == round(share) > 0
    assert not generate(pair, PROMPT, method="vanilla", max_new_tokens=5).drafted[0].any()


@pytest.mark.parametrize("name", ["eagle chain", "eagle2"])
def test_requests_with_settings_of_their_own(name: str) -> None:
    """Every request as if alone, and one program for all of them: the levels (greedy or not,
    filters or not) come and go, and each is compiled once."""
    pair = decoding.lettered_pair()
    batcher = Batcher(pair, method=decoding.METHODS[name], rows=3, max_prompt=100,
                      max_new_tokens=decoding.NEW, chunk=2)  # fmt: skip

    def answers() -> dict[int, Answer]:
        asked = {batcher.submit(prompt(i), row): i for i, row in enumerate(ROWS)}
        found: dict[int, list] = {number: [] for number in asked}
        for piece in batcher.run():
            assert piece.drafted is not None and len(piece.drafted) == len(piece.tokens)
            found[piece.request].append(piece)
        return {
            asked[number]: (
                [x for piece in pieces for x in piece.tokens.tolist()],
                "".join(piece.text or "" for piece in pieces),
                pieces[-1].finish,
            )
            for number, pieces in found.items()
        }

    wanted = vanilla()
    assert list(answers().values()) == wanted
    made = len(executables.executables())
    assert list(answers().values()) == wanted
    assert len(executables.executables()) == made
    program = batcher._stage.program
    loops = [key for key in executables._executables
             if key[0] is eagle_jax.decode.engine.decode and key[1] == program]  # fmt: skip
    assert len(loops) <= 4  # greedy or not, filters or not


def test_a_batcher_learns_to_report_logprobs() -> None:
    """Catches a request whose text changes, or is lost, when the batch goes on with other
    programs."""
    pair = decoding.lettered_pair()
    batcher = Batcher(pair, method=Eagle(chain(3)), rows=3, max_prompt=100,
                      max_new_tokens=decoding.NEW, chunk=2)  # fmt: skip
    ids = [batcher.submit(prompt(i), ROWS[i]) for i in range(2)]
    pieces = batcher.step()
    asked = dataclasses.replace(ROWS[2], logprobs=2)
    ids.append(batcher.submit(prompt(2), asked))
    pieces += batcher.run()
    for i, number in enumerate(ids):
        own = [piece for piece in pieces if piece.request == number]
        assert [x for piece in own for x in piece.tokens.tolist()] == vanilla()[i][0]
        said = [x for piece in own for x in piece.logprobs or ()]
        if i < 2:
            assert said == []
            continue
        alone = generate(pair, prompt(2), sampling=asked, method="vanilla",
                         max_new_tokens=decoding.NEW).logprobs  # fmt: skip
        assert [x.token for x in said] == [x.token for x in alone]
        for one, other in zip(said, alone, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_session_is_public() -> None:
    session = Session(decoding.lettered_pair(), "cab", SamplingParams(stop="jj"), max_new_tokens=8)
    while not session.finished():
        session.advance(1)
        session.read()
    whole = generate(decoding.lettered_pair(), "cab", stop="jj", max_new_tokens=8)
    assert session.result() == whole


def test_other_values_compile_nothing() -> None:
    """Catches a value that became static."""
    made = [
        decoding.arrays([row, SamplingParams(temperature=1.0)])
        for row in (SamplingParams(0.5, top_k=3, min_p=0.1), SamplingParams(frequency_penalty=2.0))
    ]
    count = 0

    @jax.jit
    def traced(sampling: Sampling):
        nonlocal count
        count += 1
        return sampling.temperature

    for sampling in made:
        traced(sampling)
    assert count == 1


PROMPTS = ["What is a prime number?", "Write a short story about a dog."]
PAIR = ["eagle", "eagle2", "eagle3", "prompt_lookup"]


@pytest.mark.parametrize("method", PAIR)
def test_the_shipped_pair(method: str) -> None:
    """Real tokens, a vocabulary of 8,000 and real penalties."""
    params = eagle_jax.load("tiny", dtype="float32")
    rows = [
        SamplingParams(repetition_penalty=1.3, min_tokens=10),
        SamplingParams(temperature=0.8, min_p=0.05, frequency_penalty=0.5, seed=3, stop="."),
    ]
    options: dict[str, Any] = {"sampling": rows, "max_new_tokens": 32}
    wanted = _shipped_vanilla()
    found = generate(params, PROMPTS, method=method, **options)
    assert found == wanted
    assert "." not in found.text[1]


@functools.cache
def _shipped_vanilla():
    rows = [
        SamplingParams(repetition_penalty=1.3, min_tokens=10),
        SamplingParams(temperature=0.8, min_p=0.05, frequency_penalty=0.5, seed=3, stop="."),
    ]
    params = eagle_jax.load("tiny", dtype="float32")
    return generate(params, PROMPTS, method="vanilla", sampling=rows, max_new_tokens=32)
