"""`SamplingParams`: the settings that decide how the tokens of one answer are drawn.

Command-line options (`eagle_jax.decode.sampling.options`) and JSON are derived from the fields
below. To add a setting, add one field here, its name in `Settings`, and its
filter in `eagle_jax.decode.sampling.filters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from eagle_jax.decode.sampling import checks


def _field(default: Any, check: checks.Check, help: str) -> Any:
    """Returns a field with its default, its check and the help text of its option."""
    return dataclasses.field(default=default, metadata={"check": check, "help": help})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings that decide how the tokens of one answer are drawn; the default is greedy.

    Settings act on the target's logits in this order: `logit_bias`, `allowed_token_ids`,
    `bad_words`, `min_tokens`; the three penalties; `temperature`; `top_k`; `top_p`; `min_p`. They
    apply to every method in the same way, so in float32 a seed gives the same text with every
    method. Greedy decoding (temperature 0) takes the likeliest token after the penalties.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the smallest set of likeliest tokens with at least this probability; 1 is off.
        min_p: keep tokens with at least this share of the likeliest token's probability; 0 is off.
        repetition_penalty: for every token that occurs in the prompt or the answer, divides its
            logit if that is positive and multiplies it if that is negative; 1 is off.
        presence_penalty: subtracted from the logit of every token that occurs in the answer.
        frequency_penalty: subtracted from a token's logit once per occurrence in the answer.
        logit_bias: biases to add to the logits: a mapping from token id to bias, or pairs.
        allowed_token_ids: the only tokens that may be drawn; None allows all.
        bad_words: text that the answer must not contain: strings (excluded in the two forms that
            the tokenizer gives them, at the start of a text and after a blank) or sequences of
            token ids.
        min_tokens: minimum length of the answer in tokens; end tokens are excluded, and stop
            strings ignored, before it.
        stop: one or several strings at which the answer ends; its text excludes them. Special
            tokens have no text: use `stop_token_ids` for those.
        stop_token_ids: tokens that end the answer, besides the model's own end tokens.
        ignore_eos: if True, the model's own end tokens do not end the answer.
        seed: seed of the sampling noise; the same seed gives the same text.
        logprobs: number of alternatives to report at every position, with their log-probabilities
            and that of the answer's own token; None reports nothing. They come from the target's
            raw logits, before any of these settings.

    Raises:
        ValueError: a value has the wrong type or is out of range; one line.
    """

    temperature: float = _field(0.0, checks.temperature, "0 is greedy (default)")
    top_k: int = _field(
        0, checks.count(says="0 (off) or a positive whole number"), "keep the K likeliest; 0 is off"
    )
    top_p: float = _field(
        1.0,
        checks.between(checks.TINY, 1, "above 0 and at most 1 (1 is off)"),
        "keep the likeliest tokens with this probability together; 1 is off",
    )
    min_p: float = _field(
        0.0,
        checks.between(0, 1, "from 0 (off) to 1"),
        "keep tokens with this share of the likeliest one's probability; 0 is off",
    )
    repetition_penalty: float = _field(
        1.0,
        checks.between(1e-3, 1e3, "from 0.001 to 1000 (1 is off)"),
        "above 1 makes tokens of prompt and answer less likely; 1 is off",
    )
    presence_penalty: float = _field(
        0.0,
        checks.between(-1e3, 1e3, "from -1000 to 1000 (0 is off)"),
        "subtracted from the logits of tokens that the answer has",
    )
    frequency_penalty: float = _field(
        0.0,
        checks.between(-1e3, 1e3, "from -1000 to 1000 (0 is off)"),
        "subtracted for every time that the answer has the token",
    )
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = _field(
        (), checks.biases, "added to a token's logit, ID=VALUE; repeatable"
    )
    allowed_token_ids: Sequence[int] | None = _field(
        None,
        checks.optional(checks.some_token_ids),
        "the only tokens that may be drawn, ID,ID,...; repeatable",
    )
    bad_words: Sequence[str | Sequence[int]] = _field(
        (), checks.words, "what the answer must not contain; repeatable"
    )
    min_tokens: int = _field(0, checks.count(), "no end before the answer has so many tokens")
    stop: Sequence[str] = _field(
        (), checks.texts, "text at which the answer ends, itself left out; repeatable"
    )
    stop_token_ids: Sequence[int] = _field(
        (), checks.token_ids, "further tokens that end the answer, ID,ID,...; repeatable"
    )
    ignore_eos: bool = _field(
        False, checks.switch, "the model's own end tokens do not end the answer"
    )
    seed: int = _field(0, checks.seed, "same seed, same text, whatever the method")
    logprobs: int | None = _field(
        None,
        checks.optional(
            checks.count(checks.MOST_LOGPROBS, f"None, or a whole number 0..{checks.MOST_LOGPROBS}")
        ),
        f"report log-probabilities, with N alternatives (0..{checks.MOST_LOGPROBS})",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that differ from the defaults, as a JSON object."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, tuple):
                value = [list(x) if isinstance(x, tuple) else x for x in value]
            out[field.name] = value
        if "logit_bias" in out:
            out["logit_bias"] = {str(token): bias for token, bias in out["logit_bias"]}
        return out

    @classmethod
    def from_dict(cls, values: Any) -> SamplingParams:
        """Returns the settings of a JSON object, written by `to_dict` or by a user.

        Raises:
            ValueError: not an object, an unknown key, or a value of the wrong type; one line.
        """
        return cls().override(values)

    def override(self, values: Any) -> SamplingParams:
        """Returns a copy of these settings in which the fields of a JSON object replace their own.

        It raises the errors of `from_dict`.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"sampling={values!r}: must be an object of settings")
        for key in values:
            if key not in NAMES:
                raise ValueError(f"sampling: unknown setting {key!r}; use {', '.join(NAMES)}")
        return dataclasses.replace(self, **values)


NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


class Settings(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords; `seed` may be a list with one per row."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]
    allowed_token_ids: Iterable[int] | None
    bad_words: str | Iterable[str | Sequence[int]]
    min_tokens: int
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    seed: int | Sequence[int]
    logprobs: int | None


def rows_of(
    rows: int,
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    settings: Mapping[str, Any] | None = None,
) -> list[SamplingParams]:
    """Returns the settings of every row of a call.

    Args:
        rows: number of prompts.
        sampling: settings of all rows (row i then uses `seed + i`), or a list with one per row.
        settings: the fields as keywords, instead of `sampling`.

    Raises:
        ValueError: both are given, or the list does not have `rows` entries.
        TypeError: an unknown keyword.
    """
    settings = dict(settings or {})
    for name in settings:
        if name not in NAMES:
            raise TypeError(f"unexpected keyword argument {name!r}; settings: {', '.join(NAMES)}")
    if sampling is not None and settings:
        raise ValueError(
            f"sampling and {', '.join(settings)}: give SamplingParams or keywords, not both"
        )
    if sampling is not None and not isinstance(sampling, SamplingParams):
        found: list[Any] = list(sampling) if isinstance(sampling, Sequence) else [sampling]
        for value in found:
            if not isinstance(value, SamplingParams):
                raise ValueError(f"sampling={value!r}: give SamplingParams, or a list of them")
        if len(found) != rows:
            raise ValueError(f"sampling: {len(found)} settings for {rows} rows; give one per row")
        return found
    seed = settings.pop("seed", 0) if sampling is None else sampling.seed
    shared = SamplingParams(**settings) if sampling is None else sampling
    return [dataclasses.replace(shared, seed=value) for value in seeds_of(seed, rows)]


def seeds_of(seed: Any, rows: int) -> list[int]:
    """Returns one checked seed per row: the given list, or `seed + i` for row i."""
    if hasattr(seed, "__len__") and not isinstance(seed, str):
        seeds = list(seed)
        if len(seeds) != rows:
            raise ValueError(f"seed={seeds}: {len(seeds)} seeds for {rows} rows; give one per row")
        return [checks.seed("seed", value) for value in seeds]
    first = checks.seed("seed", seed)
    return [checks.seed("seed", first + row) for row in range(rows)]
