"""Checks of single sampling fields: each returns the value in its stored form, or raises.

Every check takes the field's name and the user's value. A `ValueError` is one line that names the
field, the value and the remedy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eagle_jax.checks import check_flag, short

TINY = 1e-30  # outside 1e-30 to 1e30, quotients and sums would leave the range of float32
MOST_LOGPROBS = 20
_LARGEST_INT = 2**31 - 1

Check = Callable[[str, Any], Any]


def number(name: str, value: Any) -> float:
    """Checks a real number and returns it as a float."""
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be a number")
    try:
        return float(value)
    except OverflowError as error:  # a whole number of more than 308 digits
        raise ValueError(f"{name}={short(value)}: must be a smaller number") from error


def between(low: float, high: float, says: str) -> Check:
    """Returns a check for numbers from `low` to `high`; its error message ends with `says`."""

    def check(name: str, value: Any) -> float:
        found = number(name, value)
        if not low <= found <= high:
            raise ValueError(f"{name}={value}: must be {says}")
        return found

    return check


def temperature(name: str, value: Any) -> float:
    """Checks a temperature: 0 (greedy) or positive."""
    found = number(name, value)
    if found != 0 and not TINY <= found <= 1 / TINY:
        raise ValueError(
            f"{name}={value}: must be 0 (greedy) or a positive number, {TINY} to {1 / TINY}"
        )
    return found


def count(most: int | None = None, says: str = "0 or a positive whole number") -> Check:
    """Returns a check for whole numbers from 0 to `most`."""

    def check(name: str, value: Any) -> int:
        found = number(name, value)
        if not 0 <= found < float("inf") or found != int(found) or (most and found > most):
            raise ValueError(f"{name}={value}: must be {says}")
        return min(int(found), _LARGEST_INT)

    return check


def seed(name: str, value: Any) -> int:
    """Checks a seed: a whole number from 0 to 2**32 - 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r}: give a whole number")
    found = operator.index(value)
    if not 0 <= found < 2**32:
        raise ValueError(f"{name}={found}: must be at least 0 and below 2**32")
    return found


def switch(name: str, value: Any) -> bool:
    """Checks a value that must be True or False."""
    check_flag(name, value)
    return value


def optional(check: Check) -> Check:
    """Returns a version of `check` that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Checks token ids and returns them sorted and without duplicates."""
    return tuple(sorted({_token_id(name, x) for x in _items(name, value, "token ids")}))


def some_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Checks token ids like `token_ids`, and that there is at least one."""
    found = token_ids(name, value)
    if not found:
        raise ValueError(f"{name}={value!r}: allows nothing; give at least one token id, or None")
    return found


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Checks one string or several, none of which may be empty."""
    found = (value,) if isinstance(value, str) else tuple(_items(name, value, "strings"))
    for text in found:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}={text!r}: must be a string of at least one character")
    return found


def words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Checks words, each of which is a string or a sequence of token ids."""
    found = (value,) if isinstance(value, str) else _items(name, value, "strings or token ids")
    out: list[str | tuple[int, ...]] = []
    for word in found:
        if isinstance(word, str):
            out += texts(name, word)
            continue
        ids = tuple(_token_id(name, x) for x in _items(name, word, "strings or token ids"))
        if not ids:
            raise ValueError(f"{name}={word!r}: an empty word; give at least one token id")
        out.append(ids)
    return tuple(out)


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Checks logit biases and returns pairs of a token id and its bias, sorted by id."""
    pairs = (
        value.items()
        if isinstance(value, Mapping)
        else _items(name, value, "pairs, or a mapping from token id to number")
    )
    out: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"{name}={pair!r}: must be a token id and a number")
        token, bias = pair
        # The keys of a JSON object are strings.
        is_key = isinstance(token, str) and token.isascii() and token.isdecimal()
        token = _token_id(name, int(token) if is_key else token)
        bias = number(name, bias)
        if not math.isfinite(bias) or abs(bias) > 1 / TINY:
            raise ValueError(f"{name}[{token}]={bias}: must be a finite number")
        if token in out:
            raise ValueError(f"{name}[{token}]: is given twice; give each token id once")
        out[token] = bias
    return tuple(sorted(out.items()))


def _items(name: str, value: Any, what: str) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r}: must be a list of {what}")
    return value


def _token_id(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: must be a token id, a whole number of 0 or more")
    try:
        found = operator.index(value)
    except TypeError as error:
        raise ValueError(
            f"{name}={value!r}: must be a token id, a whole number of 0 or more"
        ) from error
    if not 0 <= found <= _LARGEST_INT:
        raise ValueError(f"{name}={value!r}: must be a token id, a whole number of 0 or more")
    return found
