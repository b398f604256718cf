"""`DraftFiles`: the layout of a draft's files, and how they are read, written and exported.

The methods here implement this library's own layout, which works for every drafter: `config.json`
has the fields of the configuration and the kind under `KIND`, and `model.safetensors` has the
weights by their Flax names (a `kernel` is called `weight` and transposed, as everywhere on disk).
Drafters with a published layout override the methods that differ.
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
"""Name of the tensor with a copy of the target's embedding, in some published heads."""

NATIVE = "native"
"""The layout of drafts that are stored with their target: the official one, for this library."""

Embedding = Literal["none", "kept", "written", "required"]
"""Whether a layout has a copy of the target's embedding. "none": no copy. "kept": the source's
copy, unless the target is available for a comparison. "written": a copy if the source or the target
has the embedding. "required": as "written", and an error if neither has it."""


@dataclasses.dataclass(frozen=True)
class ExportTarget:
    """The draft's target, as far as an export needs it.

    Attributes:
        config: the target's configuration.
        embedding: its embedding matrix [v, d].
        name: the name or path under which a serving stack finds it.
        architectures: the list in its `config.json`.
    """

    config: TransformerConfig
    embedding: LazyTensor
    name: str = ""
    architectures: Sequence[str] = ()


class DraftFiles:
    """The files of one kind of draft.

    Attributes:
        spec: the drafter's spec.
        layouts: the layouts that `export` can write, out of "official", "sglang" and "speculators";
            all kinds can also be written for this library (`NATIVE`).
        whole: whether the files are a complete model, which can also be a target.
        shortens: whether a trained draft can be given a draft vocabulary (`with_vocabulary`).
        other_names: additional names of files of weights, in safetensors' or torch's format.
        size_keys: keys of `config.json` with sizes that only this kind has, for descriptions.
        rotates: whether the draft has a rotary embedding, whose keys `lacks` checks.
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
        """Returns whether a directory holds a draft of this kind.

        Args:
            settings: the content of its `config.json`.
            names: names of its tensors.
        """
        del names
        return settings.get(KIND) == self.spec.kind

    def shapes(self, config: Any) -> dict[str, Shape]:
        """Returns the shape of every stored array, by its Flax name."""
        return module_shapes(self.spec.module_class(), config)

    def disk_name(self, config: Any, name: str) -> tuple[str, bool]:
        """Returns a weight's name on disk, and whether it is transposed there."""
        del config
        return renamed_leaf(name)

    def settings(self, config: Any, dtype: str, coverage: float | None = None) -> dict[str, Any]:
        """Returns the content of `config.json`.

        Args:
            config: the draft's configuration.
            dtype: dtype of the weights on disk.
            coverage: share of counted tokens that the draft vocabulary contains, if it is known.
        """
        named = {"architectures": [self.spec.module_class().__name__], KIND: self.spec.kind}
        known = {} if coverage is None else {draft_vocabulary.COVERAGE: coverage}
        return named | dataclasses.asdict(config) | known | {"dtype": dtype, "torch_dtype": dtype}

    def tables(self, config: Any, params: Mapping[str, Any]) -> Arrays:
        """Returns the stored arrays that are not weights: `d2t` as int64, if there is one.

        Raises:
            ValueError: `d2t` repeats a token or maps an entry to one outside the vocabulary.
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
        """Returns the configuration, and the arrays by their Flax names.

        Args:
            directory: the draft's directory, for messages.
            settings: the content of `config.json`.
            tensors: tensors by their names on disk; none has been read yet.
            target: the configuration of the draft's target, if it is known.

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
            ValueError: a field does not fit; the message has its name and both values.
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
        """Returns the values that the target's configuration must have, by field."""
        sizes = {name: getattr(config, name, None) for name in ("hidden_size", "vocab_size")}
        return {name: size for name, size in sizes.items() if size is not None}

    def shares_embedding(self, config: Any) -> bool:
        """Returns whether an embedding in the files is only a copy of the target's."""
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
        """Returns the configuration and the parameters that the module uses for decoding.

        Args:
            config: the draft's configuration, as read from disk.
            params: its parameters, as read from disk.
            target_config: the target's configuration.
            target: the target's parameters, as read from disk.
            untied: whether heads are copied out of tied embeddings, which is faster on CPUs.
            quantised: whether the draft's matrices will be stored in eight bits.
        """
        del target_config, target, untied, quantised
        return config, params

    # --- Export and description ----------------------------------------------------------------

    def with_vocabulary(
        self, config: Any, params: Mapping[str, Any], offsets: np.ndarray
    ) -> tuple[Any, Mapping[str, Any]]:
        """Returns the same draft with a draft vocabulary; only for kinds with `shortens`."""
        raise ValueError(f"draft: kind {self.spec.kind!r} takes no draft vocabulary; train one")

    def as_layout(
        self, config: Any, params: Mapping[str, Any], layout: str
    ) -> tuple[Any, Mapping[str, Any]]:
        """Returns the same draft in a form that a layout can express.

        Raises:
            ValueError: the layout cannot express it.
        """
        del layout
        return config, params

    def export_settings(
        self, config: Any, layout: str, dtype: str, target: ExportTarget | None
    ) -> dict[str, Any]:
        """Returns the content of `config.json` in a layout."""
        del layout, target
        return self.settings(config, dtype)

    def export_tensors(
        self, config: Any, params: Mapping[str, Any], layout: str, dtype: str
    ) -> dict[str, Any]:
        """Returns all tensors, including tables, by their names in a layout."""
        del layout
        return {**files.disk_tensors(config, params, dtype), **self.tables(config, params)}

    def export_files(self, layout: str) -> tuple[str, ...]:
        """Returns the names of the weight files that readers of a layout open.

        All of them hold the same tensors. Names that end in ".bin" are files in torch's format, the
        others in safetensors.
        """
        del layout
        return ("model.safetensors",)

    def embedding(self, config: Any, layout: str) -> Embedding:
        """Returns whether a layout has a copy of the target's embedding."""
        del config, layout
        return "none"

    def unsaid(self, config: Any, target: TransformerConfig | None) -> list[str]:
        """Returns the features of a draft that the official code does not support."""
        del config, target
        return []

    def describe(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what `convert --inspect` prints about a draft of this kind besides its sizes."""
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
        """Returns the usual parts that a directory lacks; defaults or the target replace them."""
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
    """Returns the values of a dataclass's fields from the keys of a JSON object."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in settings:
            values[field.name] = _revived(settings[field.name], hints[field.name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"has no {field.name}; add it")
    return values


def _revived(value: Any, hint: Any) -> Any:
    """Converts a JSON value to a field's type: lists to tuples, objects to dataclasses."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for choice in typing.get_args(hint) if union else (hint,):
            if dataclasses.is_dataclass(choice):
                kind = typing.cast(Any, choice)
                return kind(**_fields(kind, value))
    return value
