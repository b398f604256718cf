"""Slow models and decoders in plain numpy and float64, written from the papers, not from the code.

No cache, no batch, no padding: every token is computed from the whole sequence before it, every
node of a tree along its own path. What the library computes is compared with this.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """A target and its drafts in float64, built from any object shaped like `Params`.

    `drafts` maps a kind to its arrays and its configuration.
    """

    target: Mapping[str, Array]
    target_config: Any
    drafts: Mapping[str, tuple[Mapping[str, Array], Any]]

    @classmethod
    def of(cls, params) -> Pair:
        def wide(arrays) -> dict[str, Array]:
            pairs = ((name, np.asarray(x)) for name, x in arrays.items())
            return {name: x if x.dtype.kind == "i" else x.astype(np.float64) for name, x in pairs}

        drafts = {kind: (wide(d.params), d.config) for kind, d in (params.drafts or {}).items()}
        return cls(wide(params.target), params.target_config, drafts)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def frequencies(config) -> Array:
    """Rotary frequencies [e/2], in radians per position."""
    half = config.head_dim // 2
    speeds = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None:
        return np.array(speeds)
    if scaling.rope_type == "linear":
        return np.array([speed / scaling.factor for speed in speeds])
    assert scaling.rope_type == "llama3"
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    scaled = []
    for speed in speeds:
        turns = scaling.original_max_position_embeddings * speed / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(kept * speed + (1 - kept) * speed / scaling.factor)
    return np.array(scaled)


def rotate(x: Array, positions: Array, speeds: Array) -> Array:
    """Rotary embedding of one head [t, e]: coordinate pairs (i, i + e/2) as complex numbers."""
    half = x.shape[-1] // 2
    turn = positions[:, None] * speeds
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * turn)
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(p: Mapping[str, Array], name: str, config, y: Array) -> Array:
    """Causal self-attention over a whole sequence [t, any width], head by head."""

    def linear(which: str) -> Array:
        return y @ p[f"{name}.{which}_proj.kernel"] + p.get(f"{name}.{which}_proj.bias", 0.0)

    t, e = len(y), config.head_dim
    positions, speeds = np.arange(t), frequencies(config)
    query, key, value = (linear(which) for which in "qkv")
    future = np.triu(np.ones((t, t), bool), 1)
    mixed = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        q = rotate(query[:, head * e : (head + 1) * e], positions, speeds)
        k = rotate(key[:, group * e : (group + 1) * e], positions, speeds)
        scores = np.where(future, -np.inf, q @ k.T / np.sqrt(e))
        mixed.append(softmax(scores) @ value[:, group * e : (group + 1) * e])
    return np.concatenate(mixed, axis=-1) @ p[f"{name}.o_proj.kernel"]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def mlp(p: Mapping[str, Array], name: str, y: Array) -> Array:
    gate, up = y @ p[f"{name}.gate_proj.kernel"], y @ p[f"{name}.up_proj.kernel"]
    return (silu(gate) * up) @ p[f"{name}.down_proj.kernel"]


def layer(p: Mapping[str, Array], name: str, config, x: Array, *, input_norm: bool) -> Array:
    """One decoder layer over a whole sequence [t, d]."""
    eps = config.rms_norm_eps
    y = rms_norm(x, p[f"{name}.input_layernorm.scale"], eps) if input_norm else x
    x = x + attention(p, f"{name}.self_attn", config, y)
    y = rms_norm(x, p[f"{name}.post_attention_layernorm.scale"], eps)
    return x + mlp(p, f"{name}.mlp", y)


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def head(pair: Pair, features: Array) -> Array:
    if "lm_head.kernel" in pair.target:
        return features @ pair.target["lm_head.kernel"]
    return features @ pair.target["embed_tokens.embedding"].T


def residuals(pair: Pair, tokens: Sequence[int]) -> list[Array]:
    """The residual stream [t, d] that enters each layer, and the one that leaves the last."""
    streams = [pair.target["embed_tokens.embedding"][list(tokens)]]
    for i in range(pair.target_config.num_hidden_layers):
        x = layer(pair.target, f"layers.{i}", pair.target_config, streams[-1], input_norm=True)
        streams.append(x)
    return streams


def target(pair: Pair, tokens: Sequence[int]) -> tuple[Array, Array]:
    """Features [t, d] (after the final norm) and logits [t, v] of a whole sequence."""
    last = residuals(pair, tokens)[-1]
    features = rms_norm(last, pair.target["norm.scale"], pair.target_config.rms_norm_eps)
    return features, head(pair, features)


def embedded(pair: Pair, p: Mapping[str, Array], tokens: Sequence[int]) -> Array:
    """Embeddings [t, d] that a draft reads: its own if it has some, or the target's."""
    name = "embed_tokens.embedding"
    return p.get(name, pair.target[name])[list(tokens)]


def draft(pair: Pair, features: Array, tokens: Sequence[int]) -> Array:
    """EAGLE-1 over the pairs (features[i], tokens[i]) at position i; `tokens` is one step ahead."""
    p, config = pair.drafts["eagle"]
    both = np.concatenate([embedded(pair, p, tokens), features], axis=-1)
    x = both @ p["fc.kernel"] + p.get("fc.bias", 0.0)
    return layer(p, "layers.0", config, x, input_norm=False)


def fused(pair: Pair, streams: Sequence[Array]) -> Array:
    """EAGLE-3's states [t, d] at positions that the target has seen, from its residual streams."""
    p, config = pair.drafts["eagle3"]
    parts = [streams[i] for i in config.aux_layers]
    if config.fc_norm:
        scales = [p[f"fc_norm.{i}.scale"] for i in range(len(parts))]
        eps = config.rms_norm_eps
        parts = [rms_norm(part, scale, eps) for part, scale in zip(parts, scales, strict=True)]
    return np.concatenate(parts, axis=-1) @ p["fc.kernel"]


def draft3(pair: Pair, states: Array, tokens: Sequence[int]) -> tuple[Array, Array]:
    """EAGLE-3 over the pairs (states[i], tokens[i]): the states that the next step reads, and
    logits [t, v] over the target's vocabulary, -inf where the draft's lacks a token."""
    p, config = pair.drafts["eagle3"]
    eps = config.rms_norm_eps
    words = rms_norm(embedded(pair, p, tokens), p["midlayer.input_layernorm.scale"], eps)
    past = rms_norm(states, p["midlayer.hidden_norm.scale"], eps)
    both = np.concatenate([words, past], axis=-1)
    x = states + attention(p, "midlayer.self_attn", config, both)
    y = rms_norm(x, p["midlayer.post_attention_layernorm.scale"], eps)
    x = x + mlp(p, "midlayer.mlp", y)
    normed = rms_norm(x, p["norm.scale"], eps)
    known = normed @ p["lm_head.kernel"]
    logits = np.full((len(x), config.vocab_size), -np.inf)
    for entry, offset in enumerate(p["d2t"]):
        logits[:, entry + offset] = known[:, entry]
    return (normed if config.norm_output else x), logits


def medusa(pair: Pair, features: Array) -> list[Array]:
    """Logits [t, v] of every Medusa head."""
    p, config = pair.drafts["medusa"]
    scored = []
    for i in range(config.num_heads):
        x = features
        for j in range(config.num_layers):
            name = f"heads.{i}.blocks.{j}.linear"
            x = x + silu(x @ p[f"{name}.kernel"] + p[f"{name}.bias"])
        if config.tie_lm_head:
            scored.append(head(pair, x @ p[f"heads.{i}.lm_proj.kernel"]))
        else:
            scored.append(x @ p[f"heads.{i}.lm_head.kernel"])
    return scored


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


def filtered(
    row: Any, text: Sequence[int], prompt: int, logits: Array, eos: Sequence[int] = ()
) -> Array:
    """One distribution after one text under the library's `SamplingParams`, filter by filter."""
    out = logits.astype(np.float64)
    for token, bias in dict(row.logit_bias).items():
        out[token] += bias
    if row.allowed_token_ids is not None:
        out[[i for i in range(len(out)) if i not in row.allowed_token_ids]] = -np.inf
    for *before, last in row.bad_words:
        if len(text) >= len(before) and list(text[len(text) - len(before) :]) == before:
            out[last] = -np.inf
    if len(text) - prompt < row.min_tokens:
        out[[*([] if row.ignore_eos else eos), *row.stop_token_ids]] = -np.inf
    for token in set(text):
        factor = row.repetition_penalty
        out[token] *= factor if out[token] < 0 else 1 / factor
    for token in set(text[prompt:]):
        out[token] -= row.presence_penalty
        out[token] -= row.frequency_penalty * text[prompt:].count(token)
    if row.temperature:
        out = process(out, Rule(row.temperature, row.top_k, row.top_p))
        if row.min_p:
            out[out < out.max() + math.log(row.min_p)] = -np.inf
    return out


def scores(
    logits: Array, position: int, rule: Rule, *, noisy: bool = True, confidence: float = 1.0
) -> Array:
    """What the token at `position` is the argmax of; a draft's logits may count for more."""
    if rule.temperature == 0 or not noisy:
        return logits
    return process(logits, rule) * confidence + gumbel(rule.seed, position, len(logits))


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


# Logits [v] of the next token, given the tokens drafted so far below the committed text.
Drafter = Callable[[Path], Array]


def drafter(pair: Pair, kind: str, tokens: Sequence[int]) -> Drafter:
    """What a draft of `kind` thinks, after the committed `tokens`: two or more, one for "model".

    EAGLE's are run again over all committed pairs, which hold the target's own features, and then
    over the drafted tokens, one by one, on their own states.
    """
    if kind == "model":
        small = Pair(*pair.drafts["model"], {})
        return functools.cache(lambda words: target(small, [*tokens, *words])[1][-1])
    if kind == "medusa":
        heads = medusa(pair, target(pair, tokens)[0][-2:-1])
        return lambda words: heads[len(words)][0]
    eagle3 = kind == "eagle3"
    real = (fused(pair, residuals(pair, tokens)) if eagle3 else target(pair, tokens)[0])[:-1]

    @functools.cache
    def run(words: Path) -> tuple[Array, Array]:
        """State after the last of `words`, and what it says comes next."""
        states = np.array([*real, *(run(words[:i])[0] for i in range(len(words)))])
        if eagle3:
            after, logits = draft3(pair, states, [*tokens[1:], *words])
        else:
            after = draft(pair, states, [*tokens[1:], *words])
            logits = head(pair, after)
        return after[-1], logits[-1]

    return lambda words: run(words)[1]


def draft_tree(
    think: Drafter,
    length: int,
    paths: Sequence[Path],
    rule: Rule,
    *,
    coupled: bool = True,
    confidence: float = 1.0,
) -> list[int]:
    """Drafted token of every rank path, after `length` committed tokens."""
    found: dict[Path, int] = {}
    for path in paths:
        above = tuple(found[path[:i]] for i in range(1, len(path)))
        at = length + len(above)
        said = scores(think(above), at, rule, noisy=coupled, confidence=confidence)
        found[path] = ranked(said, think(above))[path[-1]]
    return [found[path] for path in paths]


def ranked(said: Array, logits: Array) -> list[int]:
    """Tokens, the best first, equals in order; those that the draft does not know (logit -inf) come
    after those that a filter excludes."""
    return sorted(range(len(said)), key=lambda token: (-said[token], np.isneginf(logits[token])))


def dynamic_tree(
    think: Drafter,
    length: int,
    tree,
    rule: Rule,
    *,
    coupled: bool = True,
    confidence: float = 1.0,
    sharpness: float = 1.0,
) -> tuple[list[int], list[int]]:
    """EAGLE-2's tree after `length` committed tokens: tokens and parents of all nodes but the root.

    One candidate after the other, each with the words above it; scores are Python's floats, and
    what is equal goes by age.
    """
    noisy = coupled and rule.temperature > 0

    def children(words: Path) -> list[tuple[float, int]]:
        said = scores(think(words), length + len(words), rule, noisy=noisy, confidence=confidence)
        said = said * (sharpness if noisy else 1.0)
        whole = math.log(sum(math.exp(x - max(said)) for x in said))
        best = ranked(said, think(words))[: tree.k]
        return [(float(said[token] - max(said)) - whole, token) for token in best]

    pool: list[tuple[float, int, Path]] = []  # score, parent (index + 1), words down to it
    frontier: list[tuple[float, int, Path]] = [(0.0, 0, ())]
    for _ in range(tree.depth):
        born = len(pool)
        for score, place, words in frontier:
            pool += [(score + gain, place, (*words, token)) for gain, token in children(words)]
        best = sorted(range(born, len(pool)), key=lambda i: (-pool[i][0], i))[: tree.k]
        frontier = [(pool[i][0], i + 1, pool[i][2]) for i in best]
    chosen = best_first([score for score, _, _ in pool], [up for _, up, _ in pool], tree.drafted)
    parents = [0 if pool[i][1] == 0 else chosen.index(pool[i][1] - 1) + 1 for i in chosen]
    return [pool[i][2][-1] for i in chosen], parents


def best_first(scores: Sequence[float], parents: Sequence[int], count: int) -> list[int]:
    """Candidates of a tree that grows from the root, always by the best one within reach.

    Args:
        scores: of every candidate.
        parents: index + 1 of each candidate's parent, 0 for the root.
        count: how many to take; of equal ones the lowest index.
    """
    below: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        below.setdefault(parent, []).append(i)
    waiting = [(-scores[i], i) for i in below.get(0, [])]
    heapq.heapify(waiting)
    chosen = []
    while len(chosen) < count:
        _, best = heapq.heappop(waiting)
        chosen.append(best)
        for child in below.get(best + 1, []):
            heapq.heappush(waiting, (-scores[child], child))
    return sorted(chosen)


def lookup(tokens: Sequence[int], longest: int, shortest: int, count: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix that has one; as if the
    text from there on repeated itself. Empty without one."""
    words = list(tokens)
    for n in range(longest, shortest - 1, -1):
        for start in range(len(words) - 1, n - 1, -1):
            if words[start - n : start] == words[-n:]:
                return [words[start + i % (len(words) - start)] for i in range(count)]
    return []


def own_gumbel(seed: int, position: int, vocab: int) -> Array:
    """Noise of a draft that must not know the target's."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    return np.asarray(jax.random.gumbel(jax.random.fold_in(key, 1), (vocab,)), np.float64)


def uniform(seed: int, position: int) -> float:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return float(jax.random.uniform(jax.random.fold_in(key, 2)))


def rejection(
    p: Sequence[Array], q: Sequence[Array], drafted: Sequence[int], length: int, seed: int
) -> list[int]:
    """Speculative sampling, one token after the other: the tokens of a round.

    Args:
        p: the target's distribution at each drafted token and after the last, one more than `q`.
        q: what each drafted token was drawn from.
        drafted: the tokens.
        length: position of the first.
        seed: of the coins, and of the token that is drawn in the end.
    """
    emitted = []
    for i, token in enumerate(drafted):
        if uniform(seed, length + i) >= p[i][token] / q[i][token]:
            rest = np.maximum(p[i] - q[i], 0)
            break
        emitted.append(token)
    else:
        i, rest = len(drafted), p[len(drafted)]
    with np.errstate(divide="ignore"):
        last = np.argmax(np.log(rest) + gumbel(seed, length + i, len(rest)))
    return [*emitted, int(last)]


def accept(children: Callable[[int], list[int]], tokens, targets) -> list[int]:
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
