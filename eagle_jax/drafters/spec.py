"""What a drafter is: one `DrafterSpec` names the parts of one folder."""

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
"""An object, or where it is defined: "package.module:name". A string is imported on first use, so
that naming a drafter imports neither JAX nor Flax."""


@functools.cache
def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def resolve(reference: Reference) -> Any:
    """The object that a reference stands for."""
    return _imported(reference) if isinstance(reference, str) else reference


@dataclasses.dataclass(frozen=True)
class DrafterSpec:
    """Names everything that the library needs to know of one kind of draft.

    Only `kind`, `config` and `module` are required. A drafter that is trained has `objectives` and
    `build`; one that decodes has `methods`.

    Attributes:
        kind: the name of the kind: a directory in a native checkpoint, a key of `Params.drafts`.
        config: the architecture's configuration, a frozen dataclass. It has the class attribute
            `kind` and the field `vocab_size`. Three more fields are known by their names:
            `draft_vocab_size` (with it the module has a table `d2t`), `aux_layers` (residual
            streams of the target that the draft reads) and `hidden_size` (the target's width).
        module: `module(config, layout, rngs=...)`, a Flax NNX module. The `Layout` says how its
            arrays lie in memory; parts of `eagle_jax.models` take it, and a module without them
            may ignore it. `features(output)`, if the module has it, chooses what decoding keeps of
            the target's pass over the prompt.
        files: the subclass of `DraftFiles` that reads and writes its checkpoints. By default they
            have this library's own layout.
        objectives: classes of training settings, each with `draft`, `target` and `features`.
        build: `build(config, target_config, target, vocabulary)` returns the training objective
            (`eagle_jax.train.objectives.Objective`) of a `TrainConfig` with one of `objectives`.
        methods: decoding methods by name: functions without arguments that return the default.
        tuning: the subclass of `DraftTuning` that finds the fastest settings. By default only the
            default methods are considered.
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
        """The class of the architecture's configuration."""
        return resolve(self.config)

    def module_class(self) -> Callable[..., Any]:
        """The Flax module."""
        return resolve(self.module)

    def objective_classes(self) -> tuple[type[Any], ...]:
        """The classes of training settings."""
        return tuple(resolve(reference) for reference in self.objectives)

    def config_classes(self) -> tuple[type[Any], ...]:
        """All classes of its configuration: the architecture's and those of training."""
        return (self.config_class(), *self.objective_classes())

    def checkpoint(self) -> DraftFiles:
        """What reads and writes the files of this kind."""
        return resolve(self.files)(self)

    def tuner(self) -> DraftTuning:
        """What calibrates and predicts the methods of this kind."""
        return resolve(self.tuning)(self)
