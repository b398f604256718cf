"""Python config files and dotted overrides, checked by name and by type.

A config file is a Python file that defines `config = ...`, an instance of a dataclass of
`eagle_jax.config`; `load(path, ["optim.learning_rate=1e-3"])` reads it and applies overrides. A
misspelt key is an error that lists the valid ones.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from eagle_jax.checks import short

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, kind: str, example: str = "") -> None:
    """`--config PATH` and `--set a.b=c`: what `load` takes, as `config` and `overrides`.

    Args:
        parser: receives them.
        kind: of the file, for the help.
        example: fields that are often overridden.
    """
    parser.add_argument("--config", required=True, metavar="PATH", help=kind)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="override one field" + (f", e.g. {example}" if example else "") + "; repeatable",
    )


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[T],
) -> T:
    """Runs a Python config file and returns its `config`, overridden and checked.

    The file may import `eagle_jax.config` and the config files beside it.

    Args:
        path: a Python file that defines `config`.
        overrides: as in `override`.
        kind: the dataclass that `config` must be an instance of.

    Raises:
        ValueError: the file is missing or fails, or a key or a value is wrong; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a Python file that defines `config = ...`")
    names = _run(path)
    if "config" not in names:
        raise ValueError(f"{path}: defines no `config`; add `config = {kind.__name__}(...)`")
    config = names["config"]
    if not isinstance(config, kind):
        raise ValueError(
            f"{path}: `config` is of type {type(config).__name__}; "
            f"make it an instance of {kind.__name__}"
        )
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return override(config, overrides)


def override(config: T, overrides: Sequence[str]) -> T:
    """A copy of `config` with fields replaced.

    All replacements take effect together, so fields that constrain each other can change at once.

    Args:
        config: a configuration dataclass, possibly nested.
        overrides: `"key=value"` each, with a dotted key such as `optim.learning_rate`. The value is
            a Python literal, or else a plain string.

    Raises:
        ValueError: no `=`, an unknown key, or a value that does not fit the field; one line.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"set={item!r}: write it as key=value")
        _place(changes, config, key.strip(), text.strip())
    return _rebuild(config, changes)


def check(config: Any) -> None:
    """Checks the type of every field, recursively.

    Raises:
        ValueError: names the first field whose value does not fit its type.
    """
    _check(config, prefix="")


def _check(config: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        _fit(value, hints[name], prefix + name)
        if dataclasses.is_dataclass(value):
            _check(value, prefix=f"{prefix}{name}.")


def _place(changes: dict[str, Any], config: Any, key: str, text: str) -> None:
    """Parses one override and stores its value at the dotted `key` of nested `changes`."""
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents):
        _known(config, name, key)
        config = getattr(config, name)
        if not dataclasses.is_dataclass(config):
            field = ".".join(parents[: depth + 1])
            raise ValueError(f"{key}: {field} is {config!r} and has no fields; set {field} itself")
        changes = changes.setdefault(name, {})
    _known(config, leaf, key)
    if dataclasses.is_dataclass(value := getattr(config, leaf)):
        fields = ", ".join(f"{leaf}.{name}" for name in _names(value))
        remedy = f"set one of its fields: {fields}" if fields else "it has no settings"
        raise ValueError(f"{key}={text}: is {type(value).__name__}; {remedy}")
    changes[leaf] = _parse(text, typing.get_type_hints(type(config))[leaf], key)


def _known(config: Any, name: str, key: str) -> None:
    names = _names(config)
    if name not in names:
        raise ValueError(f"{key}: {_unknown(type(config).__name__, name, names)}")


def _names(config: Any) -> list[str]:
    """Fields that can be set."""
    return [field.name for field in dataclasses.fields(config) if field.init]


def _unknown(owner: str, name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{owner} has no field {name!r};{hint} valid: {', '.join(names) or 'none'}"


def _parse(text: str, hint: Any, key: str) -> Any:
    """`text` as a literal if that fits the field, else as it stands: 007 can name a directory."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _fit(text, hint, key)
    with contextlib.suppress(ValueError):
        return _fit(value, hint, key)
    try:
        return _fit(text, hint, key)
    except ValueError:
        return _fit(value, hint, key)  # its message shows the value as it was read


def _rebuild(config: T, changes: Mapping[str, Any]) -> T:
    nested = {
        name: _rebuild(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **nested)  # pyright: ignore[reportArgumentType]


def _fit(value: Any, hint: Any, key: str) -> Any:
    """`value` as a `hint` (int widens to float, list to tuple), or an error that names `key`."""
    try:
        return _convert(value, hint)
    except TypeError:
        raise ValueError(f"{key}={short(value)}: must be {_describe(hint)}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            with contextlib.suppress(TypeError):
                return _convert(value, argument)
    elif origin is tuple:
        if isinstance(value, tuple | list):
            return _convert_tuple(tuple(value), arguments)
    elif hint is float:
        # Not isfinite(), which fails for whole numbers beyond float's range.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise TypeError


def _convert_tuple(value: tuple, arguments: tuple) -> tuple:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise TypeError
    return tuple(_convert(item, hint) for item, hint in zip(value, arguments, strict=True))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if hint is types.NoneType:
        return "None"
    if hint is float:
        return "a finite number"
    if origin is tuple:
        return f"a tuple such as ({_describe(arguments[0])}, ...)"
    return hint.__name__


def _run(path: Path) -> dict[str, Any]:
    """The names that the file defines; whatever goes wrong in it becomes one line."""
    try:
        with _importing_from(path.parent.resolve()):
            return runpy.run_path(str(path))
    except SyntaxError as error:
        # Python names neither file nor line where the file holds a NUL byte.
        where = error.filename or path
        line = "" if error.lineno is None else f", line {error.lineno}"
        raise ValueError(f"{where}{line}: {error.msg or error}") from error
    except Exception as error:
        raise ValueError(f"{_where(error, path)}: {_explain(error)}") from error


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Makes the files of `folder` importable, and forgets them afterwards.

    Two folders may both have a `base.py`: without forgetting, the second would get the first's.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]


def _where(error: Exception, path: Path) -> str:
    """File and line of the innermost frame in the config's folder, where the user can act."""
    folder = path.parent.resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().parent == folder:
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)


def _explain(error: Exception) -> str:
    """The message; a misspelt keyword of a dataclass gets the valid names."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword.*?'(\w+)'", str(error))
    owner = _named(found[1]) if found else None
    if isinstance(error, TypeError) and found and dataclasses.is_dataclass(owner):
        names = [field.name for field in dataclasses.fields(owner)]
        return _unknown(found[1], found[2], names)
    message = " ".join(str(error).split())
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"


def _named(name: str) -> Any:
    """The configuration class of this name, of the library or of any drafter."""
    from eagle_jax.drafters import registry  # whose configurations import this module

    homes = [sys.modules.get(name) for name in ("eagle_jax.config", "eagle_jax.evaluate.config")]
    found = [getattr(home, name, None) for home in homes]
    for spec in registry.specs().values():
        found += [cls for cls in spec.config_classes() if cls.__name__ == name]
    return next(filter(None, found), None)
