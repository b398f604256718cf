"""Methods as command-line options, such as `--method eagle --tree chain-3`.

`spell` and `parse` are inverse to each other, so that a method can be stored and read back.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
from collections.abc import Iterator
from typing import Any, NoReturn

from eagle_jax.decode.acceptance import Exact, Rejection, Typical
from eagle_jax.decode.method import Method
from eagle_jax.decode.registry import AUTO, METHODS, unknown
from eagle_jax.decode.tree import DynamicTree, StaticTree, named_tree, tree_name
from eagle_jax.settings import override

_RULES = {"exact": Exact, "rejection": Rejection, "typical": Typical}
_SHORT = 24  # longest tree name that a label shows, in characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select a method."""
    parser.add_argument(
        "--method",
        default="eagle",
        help=f"{', '.join(METHODS)} (default: eagle); auto: what eagle-jax tune found the fastest",
    )
    parser.add_argument(
        "--tree",
        help="of the method: mc_sim_7b_63, chain-N, dynamic-DEPTH-K-DRAFTED, or rank paths such "
        "as '0 1 00 01'",
    )
    parser.add_argument("--plain", action="store_true", help="draft without the noise coupling")
    parser.add_argument(
        "--rule",
        choices=tuple(_RULES),
        help="rejection: speculative sampling's own rule, same law, other texts; typical: "
        "Medusa's, LOSSY (default: exact)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a=b",
        help="another setting of the method, e.g. length=7 or ngram=4; repeatable",
    )


def method_of(args: argparse.Namespace) -> Any:
    """Returns the method of parsed options, or "auto".

    Raises:
        ValueError: an option is invalid for this method; one line.
    """
    if args.method == AUTO:
        if args.tree or args.plain or args.rule or args.set:
            raise ValueError("method='auto': has its settings from the tuning; give it no others")
        return AUTO
    if args.method not in METHODS:
        raise ValueError(unknown(args.method))
    method: Any = METHODS[args.method]()
    changes: dict[str, Any] = {}
    if args.tree:
        changes["tree"] = named_tree(args.tree)
    if args.plain:
        changes["coupled"] = False
    if args.rule:
        changes["rule"] = _RULES[args.rule]()
    inner = _drafter(method)
    own = [field.name for field in dataclasses.fields(inner) if field.init]
    for name in changes:
        if name not in own:
            raise ValueError(
                f"{name}: is no setting of method {args.method!r}, which has "
                f"{', '.join(own) or 'none'}{_elsewhere(name)}"
            )
    inner = dataclasses.replace(inner, **changes)
    wraps = _wrapped_field(method)
    method = dataclasses.replace(method, **{wraps: inner}) if wraps else inner
    return override(method, args.set)


def _elsewhere(name: str) -> str:
    """Returns a hint for error messages: the methods that have a setting."""
    found = [
        method
        for method, make in METHODS.items()
        if any(f.name == name and f.init for f in dataclasses.fields(_drafter(make())))
    ]
    return f"; these have it: {', '.join(found)}" if found else ""


def parse(text: str) -> Any:
    """Returns the method that the options in `text` describe.

    Raises:
        ValueError: they describe no method; one line.
    """
    parser = _Parser(add_help=False)
    add_arguments(parser)
    return method_of(parser.parse_args(shlex.split(text)))


@functools.lru_cache(maxsize=256)
def spell(method: Method) -> str:
    """Returns the options that describe `method`, or its `repr` if no options can."""
    found = []
    for name, make in METHODS.items():
        base = make()
        if type(base) is type(method):
            words = [f"--method {name}", *_words(base, method)]
            kinds = [type(getattr(_drafter(x), "tree", None)) for x in (base, method)]
            found.append((len(words), kinds[0] is not kinds[1], " ".join(words)))
    for _, _, text in sorted(found):
        try:
            if parse(text) == method:
                return text
        except ValueError:  # for example a tree without a name
            continue
    return repr(method)


def label(method: Method) -> str:
    """Returns a short `spell` for tables: without option names, large trees as node counts."""
    text = spell(method)
    if not text.startswith("--method "):
        return text
    words = shlex.split(text.removeprefix("--method "))
    tree = words[words.index("--tree") + 1] if "--tree" in words else ""
    if len(tree) > _SHORT:
        words = [f"{method.nodes} nodes" if word == tree else word for word in words]
    short = (word.removeprefix("--") for word in words if word not in ("--tree", "--set"))
    return " ".join(short)


def _wrapped_field(method: Any) -> str | None:
    """Returns the name of the field that holds the wrapped method, or None if there is none."""
    return getattr(type(method), "wraps", None)


def _drafter(method: Any) -> Any:
    """Returns the method to which `--tree` and `--plain` apply: the wrapped one, if any."""
    wraps = _wrapped_field(method)
    return getattr(method, wraps) if wraps else method


def _words(base: Any, method: Any) -> Iterator[str]:
    """Yields the options that turn `base` into `method`, which has the same type."""
    inner = _drafter(method)
    if hasattr(inner, "tree"):  # even for the default tree, which depends on the backend
        yield f"--tree {shlex.quote(tree_name(inner.tree))}"
    if getattr(_drafter(base), "coupled", False) and not inner.coupled:
        yield "--plain"
    if method.rule != base.rule:
        yield f"--rule {type(method.rule).__name__.lower()}"
    for key, value in _differing(base, method, ""):
        yield f"--set {shlex.quote(f'{key}={value}')}"


def _differing(base: Any, method: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(method):
        old, new = getattr(base, field.name), getattr(method, field.name)
        if old == new or not field.init or isinstance(new, StaticTree | DynamicTree):
            continue
        if isinstance(new, Method):
            yield from _differing(old, new, f"{prefix}{field.name}.")
        elif field.name not in ("coupled", "rule"):
            yield prefix + field.name, new


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"method: {message}")
