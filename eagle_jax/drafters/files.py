"""`DraftFiles`: how drafts of one kind lie on a disk, and what `load` makes of them.

The methods here are this library's own layout, which serves any drafter: `config.json` has the
fields of the configuration and the kind under `KIND`, `model.safetensors` the weights by their
Flax names (a `kernel` is called `weight` and transposed, as everywhere on disk). A drafter with a
published layout overrides what differs.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from eagle_jax.checkpoint import config_json, files
from eagle_jax.checkpoint.files import Arrays, LazyTensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.checkpoint.names import Shape, module_shapes, renamed_leaf
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters import draft_vocabulary
from eagle_jax.drafters.spec import DrafterSpec

KIND = "eagle_jax_drafter"
"""Key of the kind, in `config.json` of this library's own layout."""

EMBEDDING = "embed_tokens.weight"
"""A copy of the target's embedding, in some published heads."""

NATIVE = "native"
"""The layout of drafts beside their target: the official one, for this library as its reader."""

Embedding = Literal["none", "kept", "written", "required"]
"""What a layout wants of the target's embedding: nothing; a copy that the source has, as long as
the target is not there to compare it with; a copy wherever one can be had; a copy, or an error."""


@dataclasses.dataclass(frozen=True)
class ExportTarget:
    """What an export says about the draft's target, as far as it is known.

    Attributes:
        config: of the target.
        embedding: its embedding matrix [v, d].
        name: the name or the path under which a serving stack finds it.
        architectures: as in its `config.json`.
    """

    config: TransformerConfig
    embedding: LazyTensor
    name: str = ""
    architectures: Sequence[str] = ()


class DraftFiles:
    """The files of one kind of draft.

    Attributes:
        spec: of the drafter.
        layouts: what `export` can write, of "official", "sglang" and "speculators"; all kinds can
            be written for this library itself (`NATIVE`).
        whole: the files are a whole model, which can be a target too.
        shortens: a draft vocabulary can be given to a trained draft (`with_vocabulary`).
        other_names: of files of weights, safetensors or torch's, beside the usual names.
        size_keys: keys of `config.json` with sizes that only this kind has, for descriptions.
        rotates: has a rotary embedding, whose keys `lacks` looks for.
    """

    layouts: ClassVar[tuple[str, ...]] = ("official",)
    whole: ClassVar[bool] = False
    shortens: ClassVar[bool] = False
    rotates: ClassVar[bool] = False
    other_names: ClassVar[tuple[str, ...]] = ()
    size_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: DrafterSpec) -> None:
        self.spec = spec

    # --- Reading and writing -------------------------------------------------------------------

    def recognises(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Whether a directory holds a draft of this kind.

        Args:
            settings: the keys of its `config.json`.
            names: of its tensors.
        """
        del names
        return settings.get(KIND) == self.spec.kind

    def shapes(self, config: Any) -> dict[str, Shape]:
        """The name and the shape of every array that the files hold, by its Flax name."""
        return module_shapes(self.spec.module_class(), config)

    def disk_name(self, config: Any, name: str) -> tuple[str, bool]:
        """The name on disk of a weight, and whether it is transposed there."""
        del config
        return renamed_leaf(name)

    def settings(self, config: Any, dtype: str, coverage: float | None = None) -> dict[str, Any]:
        """The content of `config.json`.

        Args:
            config: of the draft.
            dtype: of the weights on disk.
            coverage: share of the counted tokens that the draft vocabulary has, if it is known.
        """
        named = {"architectures": [self.spec.module_class().__name__], KIND: self.spec.kind}
        known = {} if coverage is None else {draft_vocabulary.COVERAGE: coverage}
        return named | dataclasses.asdict(config) | known | {"dtype": dtype, "torch_dtype": dtype}

    def tables(self, config: Any, params: Mapping[str, Any]) -> Arrays:
        """Arrays that are no weights, as the files have them: `d2t` as int64.

        Raises:
            ValueError: `d2t` leaves the vocabulary or repeats a token.
        """
        if draft_vocabulary.size_of(config) is None:
            return {}
        offsets = np.asarray(params["d2t"])
        draft_vocabulary.target_tokens("params", config, offsets)
        return {"d2t": offsets.astype(np.int64)}

    def read(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        tensors: LazyTensors,
        target: TransformerConfig | None,
    ) -> tuple[Any, LazyTensors]:
        """Configuration and arrays, by their Flax names.

        Args:
            directory: of the draft, for messages.
            settings: the keys of `config.json`.
            tensors: by their names on disk; none has been read.
            target: the draft's target, if it is known.

        Raises:
            ValueError: a key or a tensor is missing, unexpected or wrong.
        """
        del target
        cls, tensors = self.spec.config_class(), dict(tensors)
        config = config_json.build(directory, cls, lambda: _fields(cls, settings))
        found = draft_vocabulary.pop_tables(tensors)
        params = files.arrays(directory, config, tensors)
        if draft_vocabulary.size_of(config) is not None:
            params["d2t"] = draft_vocabulary.checked_offsets(directory, config, *found)
        return config, params

    # --- Beside a target -----------------------------------------------------------------------

    def check_fit(self, target: TransformerConfig, config: Any) -> None:
        """Checks that a draft was made for targets of this size.

        Raises:
            ValueError: names the first field that does not fit, with both values.
        """
        for name, draft in self.sizes(config).items():
            if getattr(target, name) != draft:
                raise ValueError(
                    f"{name}: the target has {getattr(target, name)}, the draft {draft}; give a "
                    "draft that was trained for this target"
                )
        streams = getattr(config, "aux_layers", ())
        if max(streams, default=0) > target.num_hidden_layers:
            raise ValueError(
                f"aux_layers: the target has {target.num_hidden_layers} layers, the draft reads "
                f"{streams}; give a draft that was trained for this target"
            )

    def sizes(self, config: Any) -> dict[str, int]:
        """What the target's configuration must have, by field."""
        sizes = {name: getattr(config, name, None) for name in ("hidden_size", "vocab_size")}
        return {name: size for name, size in sizes.items() if size is not None}

    def shares_embedding(self, config: Any) -> bool:
        """Whether an embedding in the files is only a copy of the target's."""
        del config
        return False

    def for_decoding(
        self,
        config: Any,
        params: Mapping[str, LazyTensor],
        target_config: TransformerConfig,
        target: Mapping[str, LazyTensor],
        *,
        untied: bool,
        quantised: bool,
    ) -> tuple[Any, Mapping[str, LazyTensor]]:
        """Configuration and parameters as the module has them when it decodes.

        Args:
            config: the draft's configuration, as it was read.
            params: its parameters, as they were read.
            target_config: the target's configuration.
            target: the target's parameters, as they were read.
            untied: heads are matrices of their own, which multiply faster on CPUs.
            quantised: the draft's matrices are going to be stored in eight bits.
        """
        del target_config, target, untied, quantised
        return config, params

    # --- Export and description ----------------------------------------------------------------

    def with_vocabulary(
        self, config: Any, params: Mapping[str, Any], offsets: np.ndarray
    ) -> tuple[Any, Mapping[str, Any]]:
        """The same draft over a part of the target's tokens; of kinds that can be shortened."""
        raise ValueError(f"draft: kind {self.spec.kind!r} takes no draft vocabulary; train one")

    def as_layout(
        self, config: Any, params: Mapping[str, Any], layout: str
    ) -> tuple[Any, Mapping[str, Any]]:
        """The same draft as a layout can say it.

        Raises:
            ValueError: the layout cannot.
        """
        del layout
        return config, params

    def export_settings(
        self, config: Any, layout: str, dtype: str, target: ExportTarget | None
    ) -> dict[str, Any]:
        """`config.json` in a layout."""
        del layout, target
        return self.settings(config, dtype)

    def export_tensors(
        self, config: Any, params: Mapping[str, Any], layout: str, dtype: str
    ) -> dict[str, Any]:
        """All tensors by their names in a layout, tables included."""
        del layout
        return {**files.disk_tensors(config, params, dtype), **self.tables(config, params)}

    def export_files(self, layout: str) -> tuple[str, ...]:
        """The names of the files of weights that a layout's readers look for.

        All of them hold the same tensors; those that end in ".bin" are torch's, the others
        safetensors.
        """
        del layout
        return ("model.safetensors",)

    def embedding(self, config: Any, layout: str) -> Embedding:
        """What a layout wants of the target's embedding."""
        del config, layout
        return "none"

    def unsaid(self, config: Any, target: TransformerConfig | None) -> list[str]:
        """Features of a draft that its authors' code does not know, in their own layout."""
        del config, target
        return []

    def describe(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `convert --inspect` says of a draft of this kind beside its sizes."""
        size = draft_vocabulary.size_of(config)
        if size is None:
            return {}
        coverage = settings.get(draft_vocabulary.COVERAGE)
        known = isinstance(coverage, int | float)
        said = f"{coverage:.2%}" if known else "not recorded" if coverage is None else coverage
        share = size / config.vocab_size
        return {
            "draft vocabulary": f"{size} of {config.vocab_size} tokens ({share:.1%})",
            "coverage of the training text": said,
        }

    def lacks(
        self, directory: Path, settings: Mapping[str, Any], names: Sequence[str]
    ) -> list[str]:
        """What others write and a directory has not; a default or the target stands in for it."""
        del directory, names
        keys = {
            "rope_theta": "rope_theta (the default of its model_type is taken)",
            "max_position_embeddings": "max_position_embeddings (serving stacks take 2048)",
        }
        if not self.rotates:
            return []
        if "rope_parameters" in settings:
            del keys["rope_theta"]
        return [said for key, said in keys.items() if key not in settings]


def _fields(cls: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields among the keys of a JSON file."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in settings:
            values[field.name] = _revived(settings[field.name], hints[field.name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"has no {field.name}; add it")
    return values


def _revived(value: Any, hint: Any) -> Any:
    """A JSON value as the type of a field: lists are tuples, objects are nested dataclasses."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for choice in typing.get_args(hint) if union else (hint,):
            if dataclasses.is_dataclass(choice):
                return choice(**_fields(typing.cast(Any, choice), value))
    return value
