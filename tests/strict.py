"""Type checker behind jaxtyping's import hook: beartype, with ints accepted as floats (PEP 484)."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typecheck(function: Callable) -> Callable:
    """Checks any function but constructors: JAX rebuilds pytrees around stand-ins for arrays."""
    return function if function.__name__ == "__init__" else _check(function)
