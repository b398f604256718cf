"""Checks of single values given by users; each raises a ValueError of one line.

Every message names the field, the value and what is allowed. NumPy's numbers count as numbers;
True and False do not.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises ValueError unless `value` is a whole number from `least` to `most`."""
    if _is_number(value, numbers.Integral) and least <= value and (most is None or value <= most):
        return
    if most is not None:
        allowed = f"from {least} to {most}"
    elif least == 1:
        allowed = "above 0"
    else:
        allowed = f"of at least {least}"
    raise ValueError(f"{name}={short(value)}: must be a whole number {allowed}")


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number from `least` to `most`.

    Args:
        name: name of the field, for the message.
        value: the value to check.
        least, most: the range, both ends included.
        above: exclude `least` from the range.
    """
    if _is_number(value, numbers.Real):
        inside = (least < value if above else least <= value) and value <= most
        if inside and abs(value) <= sys.float_info.max:  # isfinite() fails for huge whole numbers
            return
    if math.isinf(least):
        allowed = "that is finite" if math.isinf(most) else f"of at most {most}"
    elif math.isinf(most):
        allowed = f"above {least}" if above else f"of at least {least}"
    else:
        allowed = f"above {least} and at most {most}" if above else f"from {least} to {most}"
    raise ValueError(f"{name}={short(value)}: must be a number {allowed}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={short(value)}: must be True or False")


def short(value: Any, limit: int = 60) -> str:
    """Returns `repr(value)` on one line of at most `limit` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
