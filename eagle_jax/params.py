"""Params: the models that `generate(params, prompt)` receives, and how they are loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.checkpoint import hf
from eagle_jax.config import EagleConfig, TransformerConfig
from eagle_jax.models.layers import fuse_mlp
from eagle_jax.text import Tokenizer
from eagle_jax.types import ParamDict

_SHIPPED = Path(__file__).parent / "pretrained"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A target and, if there is one, its draft: a pytree of arrays with static configurations.

    Attributes:
        target: the target's parameters, by name.
        draft: the draft's, or none.
        target_config, draft_config: their architectures.
        tokenizer: the target's; none for models that only see token ids.
    """

    target: ParamDict
    draft: ParamDict | None
    target_config: TransformerConfig = dataclasses.field(metadata={"static": True})
    draft_config: EagleConfig | None = dataclasses.field(metadata={"static": True})
    tokenizer: Tokenizer | None = dataclasses.field(metadata={"static": True}, default=None)


def load(name_or_path: str | Path, *, draft: str | Path | None = None, dtype: Any = None) -> Params:
    """Load a target, its tokenizer and its draft.

    Args:
        name_or_path: "tiny" (the pair shipped with this package), a directory that holds `target/`
            and optionally `draft/`, or a directory with `config.json` and `model.safetensors`.
        draft: a draft's directory, instead of the pair's own.
        dtype: of all parameters and so of the arithmetic; by default float32 on CPUs (where it is
            exact and fast) and bfloat16 elsewhere.

    Raises:
        ValueError: unknown name, broken or incomplete files, a draft that does not fit.
    """
    root = _find(name_or_path)
    target_dir = root / "target" if (root / "target").is_dir() else root
    draft_dir = Path(draft) if draft is not None else root / "draft"
    on_cpu = jax.default_backend() == "cpu"
    dtype = _dtype(dtype if dtype is not None else ("float32" if on_cpu else "bfloat16"))

    target_config, target = hf.load_target(target_dir)
    draft_config, draft_params = None, None
    if draft is not None or draft_dir.is_dir():
        draft_config, draft_params = hf.load_draft(draft_dir)
        hf.check_fit(target_config, draft_config)
    if target_config.tie_word_embeddings and on_cpu:
        # A head stored [d, v] multiplies a few rows twice as fast there as the [v, d] embedding.
        target_config = dataclasses.replace(target_config, tie_word_embeddings=False)
        target["lm_head.kernel"] = np.ascontiguousarray(target["embed_tokens.embedding"].T)
    target_config = dataclasses.replace(target_config, fused_mlp=True)
    if draft_config is not None:
        draft_config = dataclasses.replace(draft_config, fused_mlp=True)
    return Params(
        target=_place(fuse_mlp(target), dtype),
        draft=None if draft_params is None else _place(fuse_mlp(draft_params), dtype),
        target_config=target_config,
        draft_config=draft_config,
        tokenizer=Tokenizer.load(target_dir) if (target_dir / "tokenizer.json").exists() else None,
    )


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
    return {name: jax.device_put(np.asarray(x).astype(dtype)) for name, x in params.items()}
