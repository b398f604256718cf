"""generate and stream: arguments, errors, text, statistics."""

import dataclasses
import re

import decoding
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.decode import Eagle, chain, generate, session, stream
from eagle_jax.models import cast
from eagle_jax.params import Params
from eagle_jax.testing import random_draft, tiny_eagle3, tiny_params

METHOD = Eagle(chain(3))


@pytest.fixture(scope="module")
def with_text() -> Params:
    return decoding.lettered_pair()


def run(params: Params, prompt, **options):
    return generate(params, prompt, **{"method": METHOD, "max_new_tokens": 20} | options)


def test_text_ends_at_the_end_token_which_counts_but_is_not_shown(with_text: Params) -> None:
    """Catches an end token printed, dropped from the ids, or generated past."""
    out = run(with_text, "cab", temperature=1.0, seed=3)
    rule = reference.Rule(temperature=1.0, seed=3)
    free = reference.generate(reference.Pair.of(with_text), [2, 0, 1], 20, rule)
    assert 10 in free[:-1]  # else this seed shows nothing
    end = free.index(10)
    assert out.tokens.tolist() == free[: end + 1]
    assert out.text == "".join(decoding.LETTERS[i] for i in out.tokens[:-1])
    assert out.statistics.new_tokens == (end + 1,)


@pytest.mark.parametrize("rounds_per_chunk", [1, 3])
@pytest.mark.parametrize("seed", [3, 11])
def test_streamed_pieces_join_to_the_whole(
    with_text: Params, rounds_per_chunk: int, seed: int
) -> None:
    """Catches tokens repeated or lost at a chunk's border."""
    options = {"method": METHOD, "max_new_tokens": 20, "temperature": 1.0, "seed": seed}
    whole = generate(with_text, "cab", **options)
    pieces = list(stream(with_text, "cab", rounds_per_chunk=rounds_per_chunk, **options))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole.tokens.tolist()
    assert len(pieces) == -(-whole.statistics.rounds[0] // rounds_per_chunk)
    last = pieces[-1].statistics
    for field in ("new_tokens", "rounds", "tau", "accepted_per_depth"):
        assert getattr(last, field) == getattr(whole.statistics, field)


def test_a_stream_knows_its_errors_before_the_first_piece(with_text: Params) -> None:
    """Catches errors that a generator hides until somebody iterates."""
    with pytest.raises(ValueError, match="rounds_per_chunk=0: must be a whole number above 0"):
        stream(with_text, "cab", rounds_per_chunk=0)
    with pytest.raises(ValueError, match="stream takes one prompt"):
        stream(decoding.trained_pair(), decoding.PROMPTS, method=METHOD, max_new_tokens=20)


def test_statistics_agree_with_the_tokens() -> None:
    """Catches rounds counted for finished rows, tau over one row, shares over another total."""
    out = run(decoding.trained_pair(), decoding.PROMPTS, temperature=1.0, seed=decoding.SEEDS)
    stats, total = out.statistics, sum(out.statistics.rounds)
    assert stats.new_tokens == tuple(map(len, out.tokens)) == (20,) * 4
    assert len(set(stats.rounds)) > 1  # rows differ
    assert stats.tau == pytest.approx(80 / total)
    drafted = sum(stats.accepted_per_depth) * total
    assert 80 - total - 1e-6 <= drafted <= 80 - total + 4 + 1e-6  # each row may end without bonus
    assert list(stats.accepted_per_depth) == sorted(stats.accepted_per_depth, reverse=True)
    assert stats.tokens_per_second == pytest.approx(80 / stats.decode_seconds)
    assert "\n" not in stats.json()


def test_statistics_of_a_known_course() -> None:
    """Two drafted tokens right, the third wrong: 3 tokens a round, 20 = 6 x 3 + 2."""
    method = decoding.Clairvoyant((True, True, False))
    stats = run(decoding.trained_pair(), decoding.PROMPTS, method=method).statistics
    assert stats.rounds == (7,) * 4
    assert stats.tau == pytest.approx(20 / 7)
    assert stats.accepted_per_depth == pytest.approx((1.0, 1.0, 0.0))


def test_one_prompt_and_a_batch_differ_in_form_only() -> None:
    """Catches the row index of default seeds: row i takes seed + i."""
    pair = decoding.trained_pair()
    batch = run(pair, decoding.PROMPTS, temperature=1.0, seed=4)
    named = run(pair, decoding.PROMPTS, temperature=1.0, seed=[4, 5, 6, 7])
    assert decoding.lists(batch.tokens) == decoding.lists(named.tokens)
    one = run(pair, np.array(decoding.PROMPTS[2]), temperature=1.0, seed=6)
    assert one.tokens.tolist() == batch.tokens[2].tolist()
    assert one.text is None and batch.text is None


@pytest.mark.parametrize("new", [1, 2, 5, 19])
def test_longest_answer_is_exact(new: int) -> None:
    """Catches an answer rounded up to whole rounds, and one that depends on its limit."""
    pair = decoding.trained_pair()
    options = {"temperature": 1.0, "seed": decoding.SEEDS}
    whole = run(pair, decoding.PROMPTS, **options)
    short = run(pair, decoding.PROMPTS, max_new_tokens=new, **options)
    assert decoding.lists(short.tokens) == [row[:new] for row in decoding.lists(whole.tokens)]


def test_the_context_ends_the_answer() -> None:
    """Catches positions beyond what the model was trained for."""
    pair = decoding.trained_pair()
    config = dataclasses.replace(pair.target_config, max_position_embeddings=20)
    small = dataclasses.replace(pair, target_config=config)
    whole, cut = (run(params, decoding.PROMPTS) for params in (pair, small))
    assert [len(row) for row in cut.tokens] == [19, 18, 15, 3]
    for row, (long, short) in enumerate(zip(whole.tokens, cut.tokens, strict=True)):
        assert long[: len(short)].tolist() == short.tolist(), row


@pytest.mark.parametrize(
    "name", ["eagle2", "eagle3", "eagle lookup", "medusa", "speculative", "lookahead", "recycling"]
)
def test_bfloat16_parameters_work(name: str) -> None:
    """Catches a float32 constant that strict promotion refuses, or a cache of another dtype."""
    pair = decoding.trained_pair()
    drafts = {
        kind: dataclasses.replace(draft, params=cast(draft.params, jnp.bfloat16))
        for kind, draft in pair.drafts.items()
    }
    half = dataclasses.replace(pair, target=cast(pair.target, jnp.bfloat16), drafts=drafts)
    out = run(half, decoding.PROMPTS, method=decoding.METHODS[name], temperature=1.0)
    assert [len(row) for row in out.tokens] == [20] * 4
    assert all(0 <= token < decoding.VOCAB for row in out.tokens for token in row)
    assert out.statistics.tau > 1.2


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([], {}, "prompt=[]: empty"),
        ([[1], []], {}, "prompt=[]: empty"),
        ("", {}, "prompt='': empty"),
        ([0] * 256, {}, "prompt: 256 tokens leave no room in the context of 256; shorten it"),
        ([3, 11], {}, "prompt: token id 11 is outside the vocabulary 0..10"),
        ([3, -1], {}, "prompt: token id -1 is outside the vocabulary 0..10"),
        (np.array([0.5, 1.0]), {}, "must be text, messages, or integer token ids"),
        ("hello", {}, "prompt: text needs a tokenizer, and params has none; give token ids"),
        ([1], {"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or a positive number"),
        ([1], {"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ([1], {"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ([1], {"top_k": -2}, "top_k=-2: must be 0 (off) or a positive whole number"),
        ([1], {"method": "eagel"}, "method='eagel': unknown; use one of vanilla, eagle"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number above 0"),
        ([1], {"seed": [1, 2]}, "seed=[1, 2]: 2 seeds for 1 rows; give one per row"),
        ([1], {"seed": -1}, "seed=-1: must be at least 0 and below 2**32"),
        ([[1], [2]], {"seed": 2**32 - 1}, "seed=4294967296: must be at least 0"),
    ],
)
def test_errors(prompt, options: dict, said: str) -> None:
    """Each message is one line that names the argument, its value and what to do."""
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        generate(decoding.random_pair(), prompt, **options)
    assert "\n" not in str(info.value)


def test_end_tokens_can_be_ignored(with_text: Params) -> None:
    """Catches a measurement that stops early."""
    out = run(with_text, decoding.PROMPTS, method="vanilla", temperature=1.0, ignore_eos=True)
    assert out.statistics.new_tokens == (20,) * 4
    assert any(10 in row[:-1].tolist() for row in out.tokens)


def test_a_missing_draft_is_an_error() -> None:
    alone = dataclasses.replace(decoding.random_pair(), drafts={})
    with pytest.raises(ValueError, match="kind 'eagle', and params has none; .* draft="):
        generate(alone, [1], method="eagle")


def test_an_unknown_option_is_an_error() -> None:
    """Catches options swallowed by **options."""
    with pytest.raises(TypeError, match="temprature"):
        generate(decoding.random_pair(), [1], **{"temprature": 1.0})  # type: ignore[arg-type]


def test_a_draft_for_another_target_is_told(with_text: Params, recwarn, monkeypatch) -> None:
    """Catches a draft that was never one for this target and only makes decoding slow; this one is
    also narrower than the target, with an embedding of its own."""
    params = tiny_params()
    config = tiny_eagle3(params.target_config, hidden_size=16, target_hidden_size=32)
    params = dataclasses.replace(params, drafts={"eagle3": random_draft(config, 1)})
    monkeypatch.setattr(session, "_FIRST_ROUNDS", 2)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    plain = generate(params, [3, 1, 4], method="vanilla", **options)
    assert 1.05 < run(with_text, "cab", temperature=1.0, seed=3).statistics.tau  # a trained draft
    assert not recwarn.list
    with pytest.warns(UserWarning, match="acceptance length 1.0.*'eagle3' draft one for this"):
        out = generate(params, [3, 1, 4], method=Eagle(chain(1), head="eagle3"), **options)
    assert out.tokens.tolist() == plain.tokens.tolist()
