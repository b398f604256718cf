"""The registry of all kinds of drafts: built-in, installed and registered ones.

An installed package adds a drafter through an entry point of the group `eagle_jax.drafters`, which
names a `DrafterSpec`:

    [project.entry-points."eagle_jax.drafters"]
    mine = "my_package.drafter:SPEC"

Code that is not installed calls `register(spec)` before the drafter is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from eagle_jax.drafters.spec import DrafterSpec, resolve

GROUP = "eagle_jax.drafters"
"""The group of entry points that add drafters."""

_BUILT_IN = ("eagle", "eagle3", "medusa", "model")
_LAST = "model"  # the kind of files that no other drafter recognises

_registered: dict[str, DrafterSpec] = {}


def register(spec: DrafterSpec) -> DrafterSpec:
    """Adds a drafter and returns its spec.

    Registering the same spec again changes nothing.

    Raises:
        ValueError: another drafter has the same kind, or a method with the same name.
    """
    known = specs()
    if known.get(spec.kind) != spec:
        _check_new(spec, known)
        _registered[spec.kind] = spec
    return spec


def specs() -> Mapping[str, DrafterSpec]:
    """Returns all drafters by kind: built-in, installed and registered ones."""
    return {**built_in(), **_installed(), **_registered}


def by_kind(kind: str) -> DrafterSpec:
    """Returns the drafter of a kind.

    Raises:
        ValueError: the kind is unknown; the message lists the known ones.
    """
    found = specs().get(kind)
    if found is None:
        raise ValueError(
            f"draft kind {kind!r}: unknown; use one of {', '.join(specs())}, or register its "
            "drafter (eagle_jax.drafters.register)"
        )
    return found


def by_config(config: Any) -> DrafterSpec:
    """Returns the drafter of an architecture's configuration ("model" for a target's).

    Raises:
        ValueError: its kind is unknown.
    """
    return by_kind(config.kind)


def by_objective(settings: Any) -> DrafterSpec:
    """Returns the drafter to which training settings belong.

    Raises:
        ValueError: no drafter has settings of this type.
    """
    found, known = None, []
    for spec in specs().values():
        known += [cls.__name__ for cls in spec.objective_classes()]
        if type(settings) in spec.objective_classes():
            found = spec
    if found is None:
        raise ValueError(
            f"objective: {type(settings).__name__} belongs to no drafter; use NextToken, "
            f"{', '.join(known)}, or register its drafter (eagle_jax.drafters.register)"
        )
    return found


def recognise(settings: Mapping[str, Any], names: Iterable[str]) -> DrafterSpec:
    """Returns the drafter that recognises the files of a draft.

    It asks the drafters from the newest registration to the oldest. If none recognises the files,
    they are taken for a "model".

    Args:
        settings: the content of `config.json`.
        names: names of the tensors on disk.
    """
    names = list(names)
    for spec in reversed(list(specs().values())):
        if spec.kind != _LAST and spec.checkpoint().recognises(settings, names):
            return spec
    return by_kind(_LAST)


def methods() -> dict[str, Any]:
    """Returns references to the default decoding methods of all drafters, by name."""
    return {name: method for spec in specs().values() for name, method in spec.methods.items()}


@functools.cache
def built_in() -> dict[str, DrafterSpec]:
    """Returns the drafters of this package."""
    return {kind: resolve(f"{__package__}.{kind}:SPEC") for kind in _BUILT_IN}


@functools.cache
def _installed() -> dict[str, DrafterSpec]:
    """Returns the drafters of entry points; it warns of those that fail and leaves them out."""
    found: dict[str, DrafterSpec] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            spec = entry.load()
            if not isinstance(spec, DrafterSpec):
                raise ValueError(f"is {type(spec).__name__}, not a DrafterSpec")
            _check_new(spec, {**built_in(), **found})
        except Exception as error:  # importing another package may raise anything
            warnings.warn(
                f"drafter {entry.name!r} ({entry.value}) is left out: {error}", stacklevel=2
            )
            continue
        found[spec.kind] = spec
    return found


def _check_new(spec: DrafterSpec, known: Mapping[str, DrafterSpec]) -> None:
    if spec.kind in known:
        raise ValueError(
            f"draft kind {spec.kind!r}: another drafter has this name; choose another one"
        )
    for other in known.values():
        for name in spec.methods.keys() & other.methods.keys():
            raise ValueError(
                f"method {name!r}: drafter {other.kind!r} has a method of this name; choose "
                "another one"
            )
