"""Slow NumPy models that see one conversation at a time, and packed batches of conversations."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from eagle_jax.config import TransformerConfig

VOCAB = 9


def lively(params, seed):
    """Parameters of these shapes that neither die out nor explode, biases and scales included."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        spread = shape[0] ** -0.5 if name.endswith("kernel") else 1.0
        return spread * rng.normal(size=shape) + name.endswith("scale")

    return {name: jnp.asarray(draw(name, x.shape), jnp.float32) for name, x in params.items()}


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def turn(x, theta):
    """Rotary embedding of [n, heads, e] by complex multiplication; row i has position i."""
    n, _, e = x.shape
    angle = np.outer(np.arange(n), theta ** (-np.arange(e // 2) / (e // 2)))
    z = (x[..., : e // 2] + 1j * x[..., e // 2 :]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def decoder_layer(p, prefix, config, x, input_norm):
    def w(name):
        return np.asarray(p[f"{prefix}.{name}"], np.float64)

    n, eps = len(x), config.rms_norm_eps
    y = norm(x, w("input_layernorm.scale"), eps) if input_norm else x
    q, k, v = ((y @ w(f"self_attn.{s}_proj.kernel")).reshape(n, -1, config.head_dim) for s in "qkv")
    q, k = turn(q, config.rope_theta), turn(k, config.rope_theta)
    mixed = np.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        for i in range(n):
            scores = k[: i + 1, shared] @ q[i, head] / np.sqrt(config.head_dim)
            mixed[i, head] = softmax(scores) @ v[: i + 1, shared]
    x = x + mixed.reshape(n, -1) @ w("self_attn.o_proj.kernel")
    y = norm(x, w("post_attention_layernorm.scale"), eps)
    gate = y @ w("mlp.gate_proj.kernel")
    hidden = gate / (1 + np.exp(-gate)) * (y @ w("mlp.up_proj.kernel"))
    return x + hidden @ w("mlp.down_proj.kernel")


def target_residuals(p, config: TransformerConfig, tokens):
    """What enters each layer, and what leaves the last."""
    residuals = [np.asarray(p["embed_tokens.embedding"], np.float64)[tokens]]
    for layer in range(config.num_hidden_layers):
        x = decoder_layer(p, f"layers.{layer}", config, residuals[-1], input_norm=True)
        residuals.append(x)
    return residuals


def target_features(p, config: TransformerConfig, tokens):
    x = target_residuals(p, config, tokens)[-1]
    return norm(x, np.asarray(p["norm.scale"], np.float64), config.rms_norm_eps)


def conversations(seed=0, lengths=(9, 2, 14, 1, 3, 12)):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, VOCAB, n), rng.random(n) < 0.6) for n in lengths]


def packed(rows, length=24):
    """Rows of conversations, side by side, with padding at the end."""
    shape = (len(rows), length)
    names = ("tokens", "positions", "segment_ids")
    batch: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
    batch["loss_mask"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, (tokens, mask) in enumerate(row, start=1):
            here = np.s_[b, at : at + len(tokens)]
            batch["tokens"][here], batch["loss_mask"][here] = tokens, mask
            batch["positions"][here] = np.arange(len(tokens))
            batch["segment_ids"][here] = segment
            at += len(tokens)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def three_rows(talks):
    return packed([talks[:2] + talks[4:5], talks[2:4], talks[5:]])
