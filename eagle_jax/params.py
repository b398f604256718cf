"""Params: the models that `generate(params, prompt)` receives, and how they are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.checkpoint import hf
from eagle_jax.config import DraftConfig, MedusaConfig, TransformerConfig
from eagle_jax.models.layers import fuse_mlp
from eagle_jax.text import Tokenizer
from eagle_jax.types import ParamDict

_SHIPPED = Path(__file__).parent / "pretrained"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """One draft: its parameters by name, and its architecture, whose `kind` says what it is."""

    params: ParamDict
    config: DraftConfig = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A target and the drafts that there are for it: a pytree of arrays with static configurations.

    Attributes:
        target: the target's parameters, by name.
        drafts: by kind: "eagle", "eagle3", "medusa", "model"; one of each at most.
        target_config: the target's architecture.
        tokenizer: the target's; none for models that only see token ids.
    """

    target: ParamDict
    drafts: Mapping[str, Draft]
    target_config: TransformerConfig = dataclasses.field(metadata={"static": True})
    tokenizer: Tokenizer | None = dataclasses.field(metadata={"static": True}, default=None)

    def only(self, kind: str | None) -> Params:
        """Without the drafts of other kinds, which would be arguments of a program for nothing."""
        kept = {name: draft for name, draft in self.drafts.items() if name == kind}
        return dataclasses.replace(self, drafts=kept)


def load(
    name_or_path: str | Path,
    *,
    draft: str | Path | Sequence[str | Path] | None = None,
    dtype: Any = None,
) -> Params:
    """Load a target, its tokenizer and its drafts.

    Args:
        name_or_path: "tiny" (shipped with this package), a directory that holds `target/` and a
            directory per draft, or a directory with `config.json` and `model.safetensors`.
        draft: directories of drafts, of any kind, in place of the target's own of that kind.
        dtype: of all parameters and so of the arithmetic; by default float32 on CPUs (where it is
            exact and fast) and bfloat16 elsewhere.

    Raises:
        ValueError: unknown name, broken or incomplete files, a draft that does not fit or cannot
            draft the end of an answer, two drafts of one kind.
    """
    root = _find(name_or_path)
    target_dir = root / "target" if (root / "target").is_dir() else root
    on_cpu = jax.default_backend() == "cpu"
    dtype = _dtype(dtype if dtype is not None else ("float32" if on_cpu else "bfloat16"))

    target_config, target = hf.load_target(target_dir)
    tokenizer = Tokenizer.load(target_dir) if (target_dir / "tokenizer.json").exists() else None
    drafts: dict[str, Draft] = {}
    for directories in (_own_drafts(root), _directories(draft)):
        found = _load_drafts(directories, target_config, tokenizer)
        drafts |= {kind: _prepare(*pair, dtype, on_cpu) for kind, pair in found.items()}
    target_config, target = _for_decoding(target_config, target, on_cpu)
    return Params(
        target=_place(target, dtype),
        drafts=drafts,
        target_config=target_config,
        tokenizer=tokenizer,
    )


def _own_drafts(root: Path) -> list[Path]:
    """Directories beside `target/` that hold a draft."""
    if not (root / "target").is_dir():
        return []
    # By either file, so that a directory which lost the other is told and not passed over.
    names = ("config.json", "model.safetensors")
    found = {path.parent for name in names for path in root.glob(f"*/{name}")}
    return sorted(found - {root / "target"})


def _directories(draft: str | Path | Sequence[str | Path] | None) -> list[Path]:
    given = [draft] if isinstance(draft, str | Path) else draft or []
    return [Path(directory).expanduser() for directory in given]


def _load_drafts(
    directories: Sequence[Path], target: TransformerConfig, tokenizer: Tokenizer | None
) -> dict[str, tuple[DraftConfig, dict[str, np.ndarray]]]:
    """The draft of every directory, by kind; none of a kind twice."""
    drafts, sources = {}, {}
    for directory in directories:
        config, params = hf.load_draft(directory, target)
        try:
            hf.check_fit(target, config)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        if config.kind in drafts:
            raise ValueError(
                f"{sources[config.kind]} and {directory}: both hold a draft of kind "
                f"{config.kind!r}; give one of each kind"
            )
        if tokenizer is not None and "d2t" in params:
            _check_vocabulary(directory, params["d2t"], tokenizer)
        drafts[config.kind], sources[config.kind] = (config, params), directory
    return drafts


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


def _prepare(
    config: DraftConfig, params: dict[str, np.ndarray], dtype: jnp.dtype, on_cpu: bool
) -> Draft:
    if isinstance(config, TransformerConfig):
        config, params = _for_decoding(config, params, on_cpu)
    elif not isinstance(config, MedusaConfig):
        config, params = dataclasses.replace(config, fused_mlp=True), fuse_mlp(params)
    return Draft(_place(params, dtype), config)


def _for_decoding(
    config: TransformerConfig, params: dict[str, np.ndarray], on_cpu: bool
) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """The same model laid out for speed."""
    if config.tie_word_embeddings and on_cpu:
        # A head stored [d, v] multiplies a few rows twice as fast there as the [v, d] embedding.
        head = np.ascontiguousarray(params["embed_tokens.embedding"].T)
        config = dataclasses.replace(config, tie_word_embeddings=False)
        params = params | {"lm_head.kernel": head}
    return dataclasses.replace(config, fused_mlp=True), fuse_mlp(params)


def shipped() -> list[str]:
    """Names of the pairs that come with the package."""
    return sorted(path.name for path in _SHIPPED.iterdir() if (path / "target").is_dir())


def _dtype(dtype: Any) -> jnp.dtype:
    if str(dtype) not in ("float32", "bfloat16", "float16"):
        try:
            dtype = jnp.dtype(dtype).name
        except TypeError:
            dtype = str(dtype)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: use float32, bfloat16 or float16")
    return jnp.dtype(dtype)


def _find(name_or_path: str | Path) -> Path:
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


def _place(params: dict[str, np.ndarray], dtype: jnp.dtype) -> ParamDict:
    def one(x: np.ndarray) -> jax.Array:
        table = np.issubdtype(x.dtype, np.integer)  # of token ids: no weights
        return jax.device_put(x if table else np.asarray(x).astype(dtype))

    return {name: one(x) for name, x in params.items()}
