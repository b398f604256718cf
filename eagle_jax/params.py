"""Params: the models that `generate(params, prompt)` receives, and how they are loaded."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from eagle_jax.checkpoint import files, hf, manifest
from eagle_jax.checkpoint import target as targets
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.checks import short
from eagle_jax.config import DraftConfig, TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.drafters.one_layer import own_embedding, same_matrix
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import quantize as quantisation
from eagle_jax.placement import draft_place, layout_for_decoding, place
from eagle_jax.sharding import check_tensor
from eagle_jax.text import Tokenizer
from eagle_jax.types import ParamDict

_SHIPPED = Path(__file__).parent / "pretrained"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """One draft.

    Attributes:
        params: its arrays by name.
        config: its architecture, whose `kind` says which draft it is.
        layout: how `params` lie in memory.
    """

    params: ParamDict
    config: DraftConfig = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True}, default=PLAIN)

    def __repr__(self) -> str:
        return f"Draft({self.config.kind} {_size(self.params)}{_stored(self.layout)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A target and its drafts: what `generate` takes, and a pytree whose leaves are the weights.

    Compiled programs take only arrays of it (`eagle_jax.decode.program.Weights`), so tokenizer and
    directory do not affect compilation. It can be pickled and deep-copied.

    Attributes:
        target: the target's arrays by name.
        drafts: by kind ("eagle", "eagle3", "medusa", "model", or a drafter of your own), at most
            one of each.
        target_config: the target's architecture.
        layout: how the target's arrays lie in memory; each draft has its own.
        tokenizer: the target's, or None for a model that takes token ids only.
        directory: where the model was loaded from, or None; its tuning is stored there.
    """

    target: ParamDict
    drafts: Mapping[str, Draft]
    target_config: TransformerConfig = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True}, default=PLAIN)
    tokenizer: Tokenizer | None = dataclasses.field(metadata={"static": True}, default=None)
    directory: Path | None = dataclasses.field(metadata={"static": True}, default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the target's arithmetic, and of its weights that are not quantised."""
        return self.target["embed_tokens.embedding"].dtype

    @property
    def quantize(self) -> str | None:
        """How the target's matrices are stored: "int8", or None for floats."""
        return self.layout.quantize

    @property
    def quantize_drafts(self) -> str | None:
        """How the drafts' matrices are stored, which `load` stores alike."""
        found = {draft.layout.quantize for draft in self.drafts.values()}
        return next(iter(found - {None}), None)

    def with_draft(self, kind: str | None) -> Params:
        """Returns a copy that has only the draft of this kind.

        None, or a kind that is missing, drops all drafts.
        """
        kept = {name: draft for name, draft in self.drafts.items() if name == kind}
        return dataclasses.replace(self, drafts=kept)

    def __repr__(self) -> str:
        name = self.target_config.model_type or "transformer"
        text = f"{name} {_size(self.target)} {self._dtypes()}{_stored(self.layout)}"
        drafts = [
            f"{kind} {_size(draft.params)}{_stored(draft.layout)}"
            for kind, draft in self.drafts.items()
        ]
        text += f", drafts: {', '.join(drafts)}" if drafts else ", no drafts"
        text += "" if self.directory is None else f"; from {shipped_name(self.directory)}"
        return f"Params({text})"

    def _dtypes(self) -> str:
        embedding = self.target.get("embed_tokens.embedding")  # while trees are mapped, of any kind
        return str(getattr(embedding, "dtype", "-"))


def _size(params: ParamDict) -> str:
    """The number of weights, in words: "21.1M"."""
    count = sum(getattr(array, "size", 0) for array in params.values())
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def _stored(layout: Layout) -> str:
    return "" if layout.quantize is None else f" {layout.quantize}"


def load(
    name_or_path: str | Path,
    *,
    draft: str | Path | Sequence[str | Path] | None = None,
    dtype: Any = None,
    sharding: Mesh | Sharding | None = None,
    quantize: str | None = None,
    quantize_drafts: str | None = None,
) -> Params:
    """Load a target, its tokenizer and its drafts.

    Weights go from their files to the devices one after the other: on the host there is no more
    at a time than the largest takes. Of files over 64 MiB that a manifest lists, only the size is
    compared with it; `python -m eagle_jax.convert --inspect` compares all bytes.

    Args:
        name_or_path: "tiny" (shipped with this package), a directory that holds `target/` and a
            directory per draft, or a Hugging Face directory: `config.json` and weights in
            safetensors files or in `pytorch_model.bin`, whole or in shards. Without a
            `tokenizer.json` the model only sees token ids.
        draft: directories of drafts, of any kind, in place of the target's own of that kind.
        dtype: of all parameters and so of the arithmetic; by default float32 on CPUs (where it is
            exact and fast) and bfloat16 elsewhere.
        sharding: where weights go: a mesh of `eagle_jax.sharding.make_mesh`, whose tensor and
            expert groups hold a part each (of a draft that they do not divide, all of it) and
            whose other groups share a batch's rows; or one
            sharding for all weights. By default whole to the default device.
        quantize: "int8" stores the matrices of the target's layers and its head in eight bits, with
            a scale for every output (`eagle_jax.models.quantize`). It is then another target, whose
            text every method keeps. Embeddings, norms and biases stay as they are; a head that is
            the embedding becomes a matrix of its own.
        quantize_drafts: the same of the drafts' matrices, EAGLE-1's copy of the target's head among
            them. No text depends on it: a level of the tree reads half the bytes, and a draft
            that rounds may guess a little worse.

    Raises:
        ValueError: unknown name, broken or incomplete files, files that differ from the
            directory's manifest, a draft that does not fit, has another tokenizer or cannot draft
            the end of an answer, two drafts of one kind.

    Warns:
        UserWarning: a draft's file has another embedding than the target.
    """
    check_path("model", name_or_path)
    given = _directories(draft)
    if sharding is not None and not isinstance(sharding, Mesh | Sharding):
        raise ValueError(
            f"sharding={short(sharding)}: give a mesh of eagle_jax.sharding.make_mesh, a "
            "jax.sharding.Sharding, or None"
        )
    quantization = quantisation.checked("quantize", quantize)
    of_drafts = quantisation.checked("quantize_drafts", quantize_drafts)
    root = find(name_or_path)
    target_dir = root / "target" if (root / "target").is_dir() else root
    on_cpu = jax.default_backend() == "cpu"
    dtype = _dtype(dtype if dtype is not None else ("float32" if on_cpu else "bfloat16"))

    replaced = {hf.kind(directory) for directory in given}
    parts = manifest.parts(root) or {}
    own = own_drafts(root)
    own = [path for path in own if parts.get(path.name, path.name) not in replaced]
    manifest.check(root, skip=[name for name, kind in parts.items() if kind in replaced])
    target_config, target = hf.open_target(target_dir)
    if isinstance(sharding, Mesh):
        check_tensor(sharding, [target_config])
    tokenizer = Tokenizer.load(target_dir) if (target_dir / "tokenizer.json").exists() else None
    drafts: dict[str, Draft] = {}
    for directories in (own, given):
        found = _open_drafts(directories, target_dir, (target_config, target), tokenizer)
        if directories is own and parts:
            manifest.check_kinds(root, {path.name: parts[path.name] for path in own}, found)
        for kind, (config, params) in found.items():
            config, params = (
                registry.by_config(config)
                .checkpoint()
                .for_decoding(
                    config,
                    params,
                    target_config,
                    target,
                    untied=on_cpu,
                    quantised=of_drafts is not None,
                )
            )
            layout = layout_for_decoding(dtype, of_drafts)
            placed = place(params, config, layout, dtype, draft_place(config, sharding))
            drafts[kind] = Draft(placed, config, layout)
    layout = layout_for_decoding(dtype, quantization)
    if on_cpu or quantization is not None:
        target_config, target = targets.untied(target_config, target)
    return Params(
        target=place(target, target_config, layout, dtype, sharding),
        drafts=drafts,
        target_config=target_config,
        layout=layout,
        tokenizer=tokenizer,
        directory=root.resolve(),
    )


def own_drafts(root: Path) -> list[Path]:
    """Directories beside `target/` that hold a draft; where there is a manifest, it lists them.

    Raises:
        ValueError: there is one that the manifest does not list.
    """
    if not (root / "target").is_dir():
        return []
    # By either file, so that a directory which lost the other is told and not passed over. Hidden
    # ones are no drafts: a killed conversion may have left one.
    names = ("config.json", "model.safetensors")
    found = {path.parent for name in names for path in root.glob(f"[!.]*/{name}")}
    found -= {root / "target"}
    listed = manifest.parts(root)
    if listed is None:
        return sorted(found)
    own = {root / name for name in listed if name != "target"}
    for directory in sorted(found - own):
        raise ValueError(
            f"{directory}: is not in {manifest.MANIFEST}; move it away and give it as draft=, or "
            f"delete {manifest.MANIFEST}"
        )
    return sorted(own)


def _directories(draft: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if draft is None:
        return []
    given: list[Any] = list(draft) if isinstance(draft, list | tuple) else [draft]
    for directory in given:
        check_path("draft", directory)
        if not Path(directory).expanduser().is_dir():
            raise ValueError(
                f"draft={str(directory)!r}: no such directory; give one with a draft's config.json "
                "and weights"
            )
    return [Path(directory).expanduser() for directory in given]


def check_path(field: str, value: Any) -> None:
    """Raises ValueError unless `value` can be the name of a directory."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError(f"{field}={short(value)}: give the name of a directory, as a string")


def _open_drafts(
    directories: Sequence[Path],
    target_dir: Path,
    opened: tuple[TransformerConfig, Mapping[str, LazyTensor]],
    tokenizer: Tokenizer | None,
) -> dict[str, tuple[DraftConfig, Mapping[str, LazyTensor]]]:
    """The draft of every directory, by kind; none of a kind twice."""
    target, weights = opened
    drafts, sources = {}, {}
    for directory in directories:
        config, params = hf.open_draft(directory, target)
        hf.check_fit(target, config, directory)
        check_tokenizers(target_dir, directory)
        _compare_embeddings(directory, config, weights["embed_tokens.embedding"])
        if config.kind in drafts:
            raise ValueError(
                f"{sources[config.kind]} and {directory}: both hold a draft of kind "
                f"{config.kind!r}; give one of each kind"
            )
        if tokenizer is not None and "d2t" in params:
            _check_vocabulary(directory, np.asarray(params["d2t"]), tokenizer)
        drafts[config.kind], sources[config.kind] = (config, params), directory
    return drafts


def _compare_embeddings(directory: Path, config: DraftConfig, embedding: LazyTensor) -> None:
    """Warns of a draft whose file has another embedding than the target; a few rows tell."""
    if registry.by_config(config).checkpoint().shares_embedding(config):
        own = own_embedding(files.read_tensors(directory))
        if own is not None and not same_matrix(own, embedding, sample=True):
            warnings.warn(
                f"{directory}: its embed_tokens.weight is not the target's, which is used; is the "
                "draft one for this target?",
                stacklevel=4,
            )


def _check_vocabulary(directory: Path, d2t: np.ndarray, tokenizer: Tokenizer) -> None:
    """An answer's end is in every answer: a draft that cannot propose it was built by mistake."""
    tokens = np.arange(len(d2t)) + d2t
    for token in tokenizer.eos_ids:
        if token not in tokens:
            name = tokenizer.decode([token], skip_special=False)
            raise ValueError(
                f"{directory}: the draft vocabulary lacks token {token} ({name}), which ends "
                "answers; give a draft whose vocabulary has it"
            )


def check_tokenizers(target: Path, draft: Path) -> None:
    """Checks that a draft's directory has the tokens of the target's, if it has a tokenizer.

    Raises:
        ValueError: names the first token that differs.
    """
    paths = [directory / "tokenizer.json" for directory in (target, draft)]
    if not all(path.is_file() for path in paths):
        return
    ours, theirs = map(_tokens, paths)
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ValueError(
                f"{paths[1]}: token {index} is {theirs.get(index)!r}, in the target's tokenizer "
                f"{ours.get(index)!r}; give a draft that was trained for this target"
            )


def _tokens(path: Path) -> dict[int, Any]:
    """What each id stands for, text unless the file is damaged."""
    content = files.read_json(path)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, Mapping):
            tokens = {int(index): token for token, index in vocabulary.items()}
        else:  # unigram: pairs of a token and its score, in order
            tokens = {index: entry[0] for index, entry in enumerate(vocabulary)}
        added = {int(entry["id"]): entry["content"] for entry in content.get("added_tokens", [])}
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: its vocabulary has a wrong type ({type(error).__name__}); download the file "
            "again"
        ) from error
    return tokens | added


def shipped() -> list[str]:
    """Names of the pairs that come with the package."""
    return sorted(path.name for path in _SHIPPED.iterdir() if (path / "target").is_dir())


def shipped_name(directory: Path) -> str:
    """What to call a model's directory: a shipped pair by its name."""
    return directory.name if directory.parent == _SHIPPED.resolve() else str(directory)


def _dtype(dtype: Any) -> jnp.dtype:
    if str(dtype) not in ("float32", "bfloat16", "float16"):
        try:
            dtype = jnp.dtype(dtype).name
        except (TypeError, ValueError):
            dtype = short(dtype)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: use float32, bfloat16 or float16")
    return jnp.dtype(dtype)


def find(name_or_path: str | Path) -> Path:
    """The directory of a model, given that or the name of a shipped pair.

    Raises:
        ValueError: there is none.
    """
    if not str(name_or_path):
        raise ValueError(f"model '': empty; give a directory or one of {', '.join(shipped())}")
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in shipped():
        return _SHIPPED / str(name_or_path)
    if not path.is_dir():
        raise ValueError(
            f"model {str(name_or_path)!r}: neither a directory nor a shipped pair "
            f"({', '.join(shipped())}); give a folder with config.json and model.safetensors"
        )
    return path
