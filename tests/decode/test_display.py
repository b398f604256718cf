"""Colours of drafted tokens, for notebooks and terminals, and the short texts of a REPL."""

import numpy as np
import pytest

import eagle_jax
from eagle_jax.decode import Statistics, display
from eagle_jax.text import StreamDecoder, Tokenizer

ON, OFF = display._ON, display._OFF


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = eagle_jax.load("tiny").tokenizer
    assert tokenizer is not None
    return tokenizer


def statistics(rows: int = 1) -> Statistics:
    return Statistics(
        new_tokens=(48,) * rows,
        rounds=(20,) * rows,
        tau=2.4,
        accepted_per_depth=(0.8, 0.6),
        compile_seconds=0.0,
        prefill_seconds=0.1,
        decode_seconds=1.0,
        tokens_per_second=48.0 * rows,
        device="cpu",
        method="--method eagle",
    )


def test_runs_follow_the_tokens(tokenizer) -> None:
    text = "one two three four"
    ids = tokenizer.encode(text)
    runs = display.Marks(tokenizer).runs(text, ids, [False] + [True] * (len(ids) - 1))
    first = tokenizer.decode(ids[:1])
    assert runs == [(first, False), (text.removeprefix(first), True)]
    assert display.Marks(tokenizer).runs(text, ids, [True] * len(ids)) == [(text, True)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_join_to_the_text(tokenizer, size) -> None:
    """Streamed in parts, with characters of several tokens, the text stays and so do the marks."""
    whole = "A naïve 猫 says: 🙂🙂 <b>tags</b>\n\nand more."
    ids = np.array(tokenizer.encode(whole))
    drafted = np.arange(len(ids)) % 3 > 0
    once = display.Marks(tokenizer).runs(whole, ids, drafted)
    marks, decoder, runs = display.Marks(tokenizer), StreamDecoder(tokenizer), []
    for i in range(0, len(ids), size):
        part = slice(i, i + size)
        runs += marks.runs(decoder.feed(ids[part].tolist()), ids[part], drafted[part])
    assert "".join(text for text, _ in runs) == "".join(text for text, _ in once) == whole
    letters = [[(c, flag) for text, flag in x for c in text] for x in (runs, once)]
    assert letters[0] == letters[1]


def test_text_that_is_held_back(tokenizer) -> None:
    """Where a stop string may begin, tokens come before their text."""
    ids = tokenizer.encode("one two")
    marks = display.Marks(tokenizer)
    assert marks.runs("", ids, [True] * len(ids)) == []
    assert marks.runs("one two", [], []) == [("one two", True)]


def test_an_incomplete_end(tokenizer) -> None:
    ids = tokenizer.encode("🙂")[:1]
    text = tokenizer.decode(ids)
    assert text == "\ufffd"
    assert display.Marks(tokenizer).runs(text, ids, [True]) == [(text, False)]


def test_a_flag_for_every_token(tokenizer) -> None:
    with pytest.raises(ValueError):
        display.Marks(tokenizer).runs("a", [1, 2], [True])


def test_ansi() -> None:
    runs = [("one", False), (" two\n\n three", True), ("\n", True), ("end", False)]
    assert display.ansi(runs) == f"one{ON} two{OFF}\n\n{ON} three{OFF}\nend"


def test_html_is_escaped(tokenizer) -> None:
    text = "a <script>alert(1)</script> & b"
    ids = tokenizer.encode(text)
    half = [i >= len(ids) // 2 for i in range(len(ids))]
    out = display.markup(tokenizer, text, ids, half, "τ < 3")
    assert "<script" not in out and "&lt;" in out and "&amp; b" in out and "τ &lt; 3" in out
    assert out.count("<span") == out.count("</span>") == 1
    plain = display.markup(tokenizer, text, ids, [False] * len(ids), "")
    assert "<span" not in plain


def test_captions_and_reprs() -> None:
    one = display.caption(statistics())
    assert one == "τ = 2.40 tokens a pass, 48.0 tokens/s, --method eagle, cpu"
    assert display.short_statistics(statistics()) == (
        "Statistics(48 tokens in 20 rounds, tau 2.40, 48.0 tokens/s, --method eagle, cpu)"
    )
    assert ", 64 rows, " in display.short_statistics(statistics(64))
    assert len(display.short_statistics(statistics(64))) < 120
    tokens = np.arange(48)
    short = display.short_generation("Hello", tokens, statistics())
    assert short == "Generation('Hello', tau 2.40, 48.0 tokens/s)"
    assert "48 tokens, tau" in display.short_generation(None, tokens, statistics())
    batch = display.short_generation(["x" * 999, "b"], [tokens, tokens], statistics(2))
    assert batch.startswith("Generation(2 answers, first 'xxx") and len(batch) < 140
    assert "2 answers, tau" in display.short_generation(None, [tokens, tokens], statistics(2))
