"""Prompts: conversion of text, chats or token ids to checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.params import Params
from eagle_jax.text import Tokenizer

Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Mapping[str, str]]
    | Sequence[Sequence[int]]
    | Sequence[Sequence[Mapping[str, str]]]
    | np.ndarray
    | jax.Array
)


def encode_all(params: Params, prompt: Prompt, raw: bool) -> tuple[list[np.ndarray], bool]:
    """Returns the token ids of every row, and whether `prompt` is a batch."""
    batched = is_batch(prompt)
    rows = list(prompt) if batched else [prompt]
    if not rows:
        raise ValueError("prompt=[]: empty batch; give at least one prompt")
    return [encode(params, row, raw) for row in rows], batched


def is_batch(prompt: Any) -> bool:
    """Returns whether `prompt` is a list of prompts rather than one."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, np.ndarray | jax.Array):
        return prompt.ndim > 1
    if not isinstance(prompt, Sequence):
        return False
    first = next(iter(prompt), None)
    return not isinstance(first, int | np.integer | Mapping) or isinstance(first, bool)


def encode(params: Params, prompt: Any, raw: bool) -> np.ndarray:
    """Returns the checked token ids of one prompt, [n] int32."""
    vocab, context = params.target_config.vocab_size, params.target_config.max_position_embeddings
    if not isinstance(prompt, str | Sequence | np.ndarray | jax.Array):
        raise ValueError(f"prompt={prompt!r}: give text, messages, or token ids")
    if isinstance(prompt, np.ndarray | jax.Array) and prompt.ndim != 1:
        raise ValueError(f"prompt: an array of {prompt.ndim} axes a row; give one axis of ids")
    if len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"prompt={prompt!r}: empty; give some text, messages, or token ids")
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping)):
        prompt = _tokenize(params.tokenizer, prompt, raw)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # ragged
        ids = np.empty(0, object)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt={str(prompt)[:60]}: must be text, messages, or integer token ids")
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise ValueError(f"prompt: token id {outside[0]} is outside the vocabulary 0..{vocab - 1}")
    if len(ids) >= context:
        raise ValueError(
            f"prompt: {len(ids)} tokens leave no room in the context of {context}; shorten it"
        )
    return ids.astype(np.int32)


def _tokenize(tokenizer: Tokenizer | None, prompt: str | Sequence[Any], raw: bool) -> list[int]:
    """Returns the ids of a text or a chat.

    Unless `raw`, a text becomes a user's message if the tokenizer has a chat template.
    """
    if tokenizer is None:
        raise ValueError("prompt: text needs a tokenizer, and params has none; give token ids")
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    if not raw and tokenizer.chat_template is not None:
        return tokenizer.chat([{"role": "user", "content": prompt}])
    if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError("prompt: holds a lone surrogate; give valid Unicode")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(prompt)
