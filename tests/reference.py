"""Slow models and decoders in plain numpy and float64, written from the papers, not from the code.

No cache, no batch, no padding: every token is computed from the whole sequence before it, every
node of a tree along its own path. What the library computes is compared with this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

Array = np.ndarray
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are drawn: the library's public arguments, and the row's seed."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and a draft in float64, built from any object shaped like `Params`."""

    target: Mapping[str, Array]
    draft: Mapping[str, Array]
    target_config: object
    draft_config: object

    @classmethod
    def of(cls, params) -> Pair:
        def wide(arrays) -> dict[str, Array]:
            return {name: np.asarray(x, np.float64) for name, x in arrays.items()}

        return cls(
            wide(params.target),
            wide(params.draft or {}),
            params.target_config,
            params.draft_config,
        )


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary embedding of one head [t, e]: coordinate pairs (i, i + e/2) as complex numbers."""
    half = x.shape[-1] // 2
    turn = positions[:, None] * theta ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * turn)
    return np.concatenate([z.real, z.imag], axis=-1)


def layer(p: Mapping[str, Array], name: str, config, x: Array, *, input_norm: bool) -> Array:
    """One decoder layer over a whole sequence [t, d], causal, head by head."""

    def linear(module: str, y: Array) -> Array:
        return y @ p[f"{name}.{module}.kernel"] + p.get(f"{name}.{module}.bias", 0.0)

    t, e = len(x), config.head_dim
    positions = np.arange(t)
    y = rms_norm(x, p[f"{name}.input_layernorm.scale"], config.rms_norm_eps) if input_norm else x
    query, key, value = (linear(f"self_attn.{which}_proj", y) for which in "qkv")
    future = np.triu(np.ones((t, t), bool), 1)
    mixed = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        q = rotate(query[:, head * e : (head + 1) * e], positions, config.rope_theta)
        k = rotate(key[:, group * e : (group + 1) * e], positions, config.rope_theta)
        scores = np.where(future, -np.inf, q @ k.T / np.sqrt(e))
        mixed.append(softmax(scores) @ value[:, group * e : (group + 1) * e])
    x = x + linear("self_attn.o_proj", np.concatenate(mixed, axis=-1))
    y = rms_norm(x, p[f"{name}.post_attention_layernorm.scale"], config.rms_norm_eps)
    gate = linear("mlp.gate_proj", y)
    return x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", y))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def head(pair: Pair, features: Array) -> Array:
    if "lm_head.kernel" in pair.target:
        return features @ pair.target["lm_head.kernel"]
    return features @ pair.target["embed_tokens.embedding"].T


def target(pair: Pair, tokens: Sequence[int]) -> tuple[Array, Array]:
    """Features [t, d] (after the final norm) and logits [t, v] of a whole sequence."""
    config, p = pair.target_config, pair.target
    x = p["embed_tokens.embedding"][list(tokens)]
    for i in range(config.num_hidden_layers):  # pyright: ignore[reportAttributeAccessIssue]
        x = layer(p, f"layers.{i}", config, x, input_norm=True)
    features = rms_norm(x, p["norm.scale"], config.rms_norm_eps)  # pyright: ignore[reportAttributeAccessIssue]
    return features, head(pair, features)


def draft(pair: Pair, features: Array, tokens: Sequence[int]) -> Array:
    """EAGLE-1 over the pairs (features[i], tokens[i]) at position i; `tokens` is one step ahead."""
    p = pair.draft
    both = np.concatenate([pair.target["embed_tokens.embedding"][list(tokens)], features], axis=-1)
    x = both @ p["fc.kernel"] + p.get("fc.bias", 0.0)
    return layer(p, "layers.0", pair.draft_config, x, input_norm=False)


def gumbel(seed: int, position: int, vocab: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return np.asarray(jax.random.gumbel(key, (vocab,)), np.float64)


def process(logits: Array, rule: Rule) -> Array:
    """Temperature, top-k, top-p of one distribution [v]; what ties with the last one stays."""
    scaled = logits / rule.temperature
    order = sorted(scaled, reverse=True)
    if rule.top_k:
        floor = order[min(rule.top_k, len(order)) - 1]
        scaled = np.array([x if x >= floor else -np.inf for x in scaled])
        order = sorted(scaled, reverse=True)
    if rule.top_p < 1:
        mass, floor = 0.0, order[0]
        for x, probability in zip(order, softmax(np.array(order)), strict=True):
            if mass >= rule.top_p:
                break
            mass, floor = mass + probability, x
        scaled = np.array([x if x >= floor else -np.inf for x in scaled])
    return scaled


def scores(logits: Array, position: int, rule: Rule, *, noisy: bool = True) -> Array:
    """What the token at `position` is the argmax of."""
    if rule.temperature == 0 or not noisy:
        return logits
    return process(logits, rule) + gumbel(rule.seed, position, len(logits))


def generate(
    pair: Pair, prompt: Sequence[int], count: int, rule: Rule, eos: Sequence[int] = ()
) -> list[int]:
    """The answer, token by token, each from a pass over everything before it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (
        len(tokens) == len(prompt) or tokens[-1] not in eos
    ):
        logits = target(pair, tokens)[1][-1]
        tokens.append(int(np.argmax(scores(logits, len(tokens), rule))))
    return tokens[len(prompt) :]


def draft_tree(
    pair: Pair, tokens: Sequence[int], paths: Sequence[Path], rule: Rule, *, coupled: bool = True
) -> dict[Path, int]:
    """Drafted token of every rank path, after the committed `tokens` (two or more).

    Each node runs the draft again over all committed pairs, which hold the target's own features,
    and then over its ancestors, which hold the draft's.
    """
    real = target(pair, tokens)[0][:-1]
    found: dict[Path, int] = {}
    predicted: dict[Path, Array] = {}
    for path in sorted({path[:-1] for path in paths}, key=len):
        above = [path[:i] for i in range(1, len(path) + 1)]
        features = np.array([*real, *(predicted[node[:-1]] for node in above)])
        words = [*tokens[1:], *(found[node] for node in above)]
        predicted[path] = draft(pair, features, words)[-1]
        rank = scores(head(pair, predicted[path]), len(tokens) + len(path), rule, noisy=coupled)
        order = np.argsort(-rank, kind="stable")
        found |= {child: int(order[child[-1]]) for child in paths if child[:-1] == path}
    return found


def accept(children: Callable[[int], list[int]], tokens: Array, targets: Array) -> list[int]:
    """The longest path from node 0 on which every child carries the target's token.

    Of equally long ones, the one that ends in the lowest node.
    """

    def walk(path: list[int]) -> list[list[int]]:
        good = [c for c in children(path[-1]) if tokens[c] == targets[path[-1]]]
        return [path] + [longer for c in good for longer in walk([*path, c])]

    return min(walk([0]), key=lambda path: (-len(path), path[-1]))


def answer_law(pair: Pair, prompt: Sequence[int], count: int, rule: Rule) -> dict[Path, float]:
    """Exact probability of every answer of `count` tokens."""
    law: dict[Path, float] = {(): 1.0}
    for _ in range(count):
        longer = {}
        for answer, mass in law.items():
            probs = softmax(process(target(pair, [*prompt, *answer])[1][-1], rule))
            longer |= {(*answer, token): mass * float(p) for token, p in enumerate(probs)}
        law = longer
    return law
