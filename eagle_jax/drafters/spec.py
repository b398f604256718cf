"""`DrafterSpec`, the definition of a drafter: it names the parts of one folder."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle_jax.drafters.files import DraftFiles
    from eagle_jax.tune.drafts import DraftTuning

Reference = Any
"""An object, or a string that says where it is defined, "package.module:name". The string is
imported on first use, so that naming a drafter imports neither JAX nor Flax."""


@functools.cache
def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def resolve(reference: Reference) -> Any:
    """Returns the object that a reference names."""
    return _imported(reference) if isinstance(reference, str) else reference


@dataclasses.dataclass(frozen=True)
class DrafterSpec:
    """The parts of one kind of draft, by name.

    Only `kind`, `config` and `module` are required. A drafter that can be trained has `objectives`
    and `build`; a drafter that can decode has `methods`.

    Attributes:
        kind: name of the kind. It is a directory in a native checkpoint and a key of
            `Params.drafts`.
        config: class of the architecture's configuration, a frozen dataclass with the class
            attribute `kind` and the field `vocab_size`. Three optional fields have a fixed
            meaning: `draft_vocab_size` (the module then has a table `d2t`), `aux_layers` (residual
            streams of the target that the draft reads) and `hidden_size` (the target's width).
        module: class of the Flax NNX module, called as `module(config, layout, rngs=...)`. The
            `Layout` says how arrays lie in memory; pass it to parts from `eagle_jax.models`, or
            ignore it. The optional method `features(output)` selects what the draft reads of the
            target's output.
        files: the subclass of `DraftFiles` that reads and writes its checkpoints; by default the
            one for this library's own layout.
        objectives: classes of training settings, each with `draft`, `target` and `features`.
        build: `build(config, target_config, target, vocabulary)` returns the training objective
            (`eagle_jax.train.objectives.Objective`) of a `TrainConfig` with one of `objectives`.
        methods: decoding methods by name; each is a function without arguments that returns the
            method with its default settings.
        tuning: the subclass of `DraftTuning` that finds the fastest settings. The default one tries
            only the default methods.
    """

    kind: str
    config: Reference
    module: Reference
    files: Reference = "eagle_jax.drafters.files:DraftFiles"
    objectives: tuple[Reference, ...] = ()
    build: Reference | None = None
    methods: Mapping[str, Reference] = dataclasses.field(default_factory=dict)
    tuning: Reference = "eagle_jax.tune.drafts:DraftTuning"

    def config_class(self) -> type[Any]:
        """Returns the class of the architecture's configuration."""
        return resolve(self.config)

    def module_class(self) -> Callable[..., Any]:
        """Returns the class of the Flax module."""
        return resolve(self.module)

    def objective_classes(self) -> tuple[type[Any], ...]:
        """Returns the classes of training settings."""
        return tuple(resolve(reference) for reference in self.objectives)

    def config_classes(self) -> tuple[type[Any], ...]:
        """Returns all configuration classes: the architecture's and those of training."""
        return (self.config_class(), *self.objective_classes())

    def checkpoint(self) -> DraftFiles:
        """Returns the object that reads and writes files of this kind."""
        return resolve(self.files)(self)

    def tuner(self) -> DraftTuning:
        """Returns the object that calibrates this kind's methods and predicts their speed."""
        return resolve(self.tuning)(self)
