"""`Params`, the models that `generate(params, prompt)` takes, and `load`, which reads them."""

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
    """One draft: weights and architecture.

    Attributes:
        params: the draft's arrays by name.
        config: the draft's architecture; `config.kind` names the kind of draft.
        layout: how `params` are stored in memory.
    """

    params: ParamDict
    config: DraftConfig = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True}, default=PLAIN)

    def __repr__(self) -> str:
        return f"Draft({self.config.kind} {_size(self.params)}{_stored(self.layout)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A target and its drafts, the first argument of `generate`.

    It is a pytree whose leaves are the weights. Compiled programs take only its arrays
    (`eagle_jax.decode.program.Weights`), so the tokenizer and the directory do not affect
    compilation. It can be pickled and deep-copied.

    Attributes:
        target: the target's arrays by name.
        drafts: the drafts by kind ("eagle", "eagle3", "medusa", "model", or the name of a
            registered drafter), at most one of each kind.
        target_config: the target's architecture.
        layout: how the target's arrays are stored in memory; each draft has its own layout.
        tokenizer: the target's tokenizer, or None for a model that takes token ids only.
        directory: the directory that the model was loaded from, or None. `eagle-jax tune` stores
            its result there.
    """

    target: ParamDict
    drafts: Mapping[str, Draft]
    target_config: TransformerConfig = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True}, default=PLAIN)
    tokenizer: Tokenizer | None = dataclasses.field(metadata={"static": True}, default=None)
    directory: Path | None = dataclasses.field(metadata={"static": True}, default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the target's arithmetic and of its weights that are not quantised."""
        return self.target["embed_tokens.embedding"].dtype

    @property
    def quantize(self) -> str | None:
        """The quantisation of the target's matrices: "int8", or None for floats."""
        return self.layout.quantize

    @property
    def quantize_drafts(self) -> str | None:
        """The quantisation of the drafts' matrices, which `load` sets to the same for all."""
        found = {draft.layout.quantize for draft in self.drafts.values()}
        return next(iter(found - {None}), None)

    def with_draft(self, kind: str | None) -> Params:
        """Returns a copy with only the draft of this kind.

        The copy has no draft if `kind` is None or there is no draft of that kind.
        """
        kept = {name: draft for name, draft in self.drafts.items() if name == kind}
        return dataclasses.replace(self, drafts=kept)

    def __repr__(self) -> str:
        name = self.target_config.model_type or "transformer"
        # A copy of a tied embedding as head counts too: it is in memory.
        text = f"{name}, {_size(self.target)} weights in memory, {self._dtypes()}"
        text += _stored(self.layout)
        drafts = [
            f"{kind} {_size(draft.params)}{_stored(draft.layout)}"
            for kind, draft in self.drafts.items()
        ]
        text += f", drafts: {', '.join(drafts)}" if drafts else ", no drafts"
        text += "" if self.directory is None else f"; from {shipped_name(self.directory)}"
        return f"Params({text})"

    def _dtypes(self) -> str:
        embedding = self.target.get("embed_tokens.embedding")  # any object under jax.tree.map
        return str(getattr(embedding, "dtype", "-"))


def _size(params: ParamDict) -> str:
    """Returns the number of weights as text, for example "21.1M"."""
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
    """Loads a target, its tokenizer and its drafts, and returns them as `Params`.

    Weights are copied from their files to the devices one by one, so the host never holds more than
    the largest weight. If the directory has a manifest, the files are compared with it; files over
    64 MiB by size only (`eagle-jax convert --inspect` compares all bytes).

    Args:
        name_or_path: "tiny" (shipped with this package), a directory that holds `target/` and one
            directory per draft, or a Hugging Face directory: `config.json` and weights in
            safetensors files or in `pytorch_model.bin`, whole or sharded. Without a
            `tokenizer.json` the model takes token ids only.
        draft: one or more directories with drafts of any kind. Each replaces the model's own draft
            of the same kind.
        dtype: dtype of all parameters, and so of the arithmetic. The default is float32 on CPUs
            (where it is exact and fast) and bfloat16 elsewhere.
        sharding: where the weights are placed. With a mesh of `eagle_jax.sharding.make_mesh`,
            tensor and expert groups split the weights (a draft that they do not divide is
            replicated) and the other groups split the rows of a batch. A `jax.sharding.Sharding`
            applies to all weights. By default all weights go to the default device.
        quantize: "int8" stores the matrices of the target's layers and its head in eight bits, with
            one scale per output (`eagle_jax.models.quantize`). This changes the target; every
            method then reproduces the text of the quantised target. Embeddings, norms and biases
            are not quantised; a tied head becomes a separate matrix.
        quantize_drafts: "int8" does the same for the drafts' matrices, including EAGLE-1's copy of
            the target's head. The text does not depend on it: each draft step reads half the bytes,
            and acceptance may fall slightly.

    Raises:
        ValueError: the name is unknown, files are broken, incomplete or differ from the manifest,
            there are two drafts of one kind, or a draft does not fit the target, has another
            tokenizer or cannot draft the token that ends an answer.

    Warns:
        UserWarning: the embedding in a draft's file differs from the target's.
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
    """Returns the directories beside `target/` that hold a draft; a manifest must list them all.

    Raises:
        ValueError: the manifest does not list one of them.
    """
    if not (root / "target").is_dir():
        return []
    # Either file is enough, so that a directory which lost the other raises an error instead of
    # being skipped. Hidden directories are skipped: a killed conversion may have left one.
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
    """Raises ValueError unless `value` is a string or path that can name a directory."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError(f"{field}={short(value)}: give the name of a directory, as a string")


def _open_drafts(
    directories: Sequence[Path],
    target_dir: Path,
    opened: tuple[TransformerConfig, Mapping[str, LazyTensor]],
    tokenizer: Tokenizer | None,
) -> dict[str, tuple[DraftConfig, Mapping[str, LazyTensor]]]:
    """Returns the configuration and weights of each directory's draft, by kind.

    Raises:
        ValueError: a draft does not fit the target, or two drafts are of one kind.
    """
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
    """Warns if the embedding in a draft's file differs from the target's in a sample of rows."""
    if registry.by_config(config).checkpoint().shares_embedding(config):
        own = own_embedding(files.read_tensors(directory))
        if own is not None and not same_matrix(own, embedding, sample=True):
            warnings.warn(
                f"{directory}: its embed_tokens.weight is not the target's, which is used; is the "
                "draft one for this target?",
                stacklevel=4,
            )


def _check_vocabulary(directory: Path, d2t: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the draft vocabulary lacks an end token, which every answer needs."""
    tokens = np.arange(len(d2t)) + d2t
    for token in tokenizer.eos_ids:
        if token not in tokens:
            name = tokenizer.decode([token], skip_special=False)
            raise ValueError(
                f"{directory}: the draft vocabulary lacks token {token} ({name}), which ends "
                "answers; give a draft whose vocabulary has it"
            )


def check_tokenizers(target: Path, draft: Path) -> None:
    """Checks that two directories have the same tokens, if both have a tokenizer.

    Raises:
        ValueError: a token differs; the message names the first one.
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
    """Returns the token of each id; tokens are strings unless the file is damaged."""
    content = files.read_json(path)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, Mapping):
            tokens = {int(index): token for token, index in vocabulary.items()}
        else:  # unigram models list (token, score) pairs in the order of ids
            tokens = {index: entry[0] for index, entry in enumerate(vocabulary)}
        added = {int(entry["id"]): entry["content"] for entry in content.get("added_tokens", [])}
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: its vocabulary has a wrong type ({type(error).__name__}); download the file "
            "again"
        ) from error
    return tokens | added


def shipped() -> list[str]:
    """Returns the names of the models that are shipped with the package."""
    return sorted(path.name for path in _SHIPPED.iterdir() if (path / "target").is_dir())


def shipped_name(directory: Path) -> str:
    """Returns a model's directory as text; for a shipped model, its name."""
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
    """Returns the directory of a model, given the directory itself or the name of a shipped model.

    Raises:
        ValueError: there is no such directory or shipped model.
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
