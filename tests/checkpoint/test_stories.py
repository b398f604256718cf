"""A real model: a Llama of 260 thousand parameters, trained on short stories, in llama2.c's format.

It is not part of this repository: `EAGLE_JAX_STORIES` names the directory that has
`stories260K.bin` and `tok512.bin`.
"""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

import eagle_jax
from eagle_jax import convert
from eagle_jax.checkpoint import hf
from eagle_jax.config import TransformerConfig
from eagle_jax.decode import PromptLookup, generate

PLACE = Path(
    os.environ.get("EAGLE_JAX_STORIES")
    or Path(__file__).parents[3] / "shared" / "data" / "weights_stories260K"
)
pytestmark = pytest.mark.skipif(
    not (PLACE / "stories260K.bin").is_file(),
    reason=f"no stories260K.bin in {PLACE}; set EAGLE_JAX_STORIES to its directory",
)
BOS, NEW = 1, 240
WORDS = "day girl little named park play She He was to the and They saw big happy said mom".split()


def read() -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes and arrays of the file: 7 numbers, then float32 arrays, all layers of a kind together;
    the output head is the embedding."""
    data = (PLACE / "stories260K.bin").read_bytes()
    names = ("d", "f", "layers", "heads", "kv", "vocab", "context")
    size: dict[str, int] = dict(zip(names, struct.unpack("<7i", data[:28]), strict=True))
    d, f, n = size["d"], size["f"], size["layers"]
    k = size["kv"] * d // size["heads"]
    shapes = {"embedding": (size["vocab"], d), "norm1": (n, d), "q": (n, d, d), "k": (n, k, d)}
    shapes |= {"v": (n, k, d), "o": (n, d, d), "norm2": (n, d)}
    shapes |= {"gate": (n, f, d), "down": (n, d, f), "up": (n, f, d), "norm": (d,)}
    arrays, start = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, "<f4", count, start).reshape(shape)
        start += 4 * count
    # What is left are two tables of rotary angles, [context, e / 2] each.
    assert len(data) - start == 2 * 4 * size["context"] * d // size["heads"] // 2
    return size, arrays


def pieces() -> list[bytes]:
    """What each token stands for: after one number, per token a score, a length and its bytes."""
    data, start, found = (PLACE / "tok512.bin").read_bytes(), 4, []
    while start < len(data):
        _, length = struct.unpack_from("<fi", data, start)
        found.append(data[start + 8 : start + 8 + length])
        start += 8 + length
    return found


def text(tokens) -> str:
    """Up to the next story; a piece such as <0x0A> is a byte."""
    known, out = pieces(), b""
    for token in tokens:
        if token == BOS:
            break
        piece = known[token]
        byte = piece.startswith(b"<0x") and len(piece) == 6
        out += bytes([int(piece[3:5], 16)]) if byte else piece
    return out.decode().strip()


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def plain_logits(size, p, tokens) -> np.ndarray:
    """Of what follows each token, as llama2.c has it: rotary pairs are neighbours (2i, 2i + 1)."""
    heads, t = size["heads"], len(tokens)
    e = size["d"] // heads
    angles = np.outer(np.arange(t), 10000.0 ** (-np.arange(0, e, 2) / e))

    def turn(x):
        z = x[:, 0::2] + 1j * x[:, 1::2]
        z = z * np.exp(1j * angles)
        return np.stack([z.real, z.imag], axis=-1).reshape(t, e)

    x = p["embedding"][tokens].astype(np.float64)
    for i in range(size["layers"]):
        y = norm(x, p["norm1"][i])
        q, k, v = (y @ p[name][i].T for name in "qkv")
        mixed = []
        for head in range(heads):
            own, shared = (slice(e * h, e * h + e) for h in (head, head * size["kv"] // heads))
            scores = turn(q[:, own]) @ turn(k[:, shared]).T / np.sqrt(e)
            scores[np.triu_indices(t, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(mixed, axis=-1) @ p["o"][i].T
        y = norm(x, p["norm2"][i])
        gate = y @ p["gate"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["up"][i].T)) @ p["down"][i].T
    return norm(x, p["norm"]) @ p["embedding"].T


def directory(path: Path) -> Path:
    """The model as a Hugging Face directory, whose rotary pairs are (i, i + e / 2)."""
    size, p = read()
    e = size["d"] // size["heads"]
    config = TransformerConfig(
        vocab_size=size["vocab"],
        hidden_size=size["d"],
        intermediate_size=size["f"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        head_dim=e,
        max_position_embeddings=size["context"],
        tie_word_embeddings=True,
    )

    def halves(kernel):
        rows = kernel.reshape(-1, e // 2, 2, size["d"])
        return rows.transpose(0, 2, 1, 3).reshape(kernel.shape)

    params = {"embed_tokens.embedding": p["embedding"], "norm.scale": p["norm"]}
    for i in range(size["layers"]):
        layer, at = f"layers.{i}.", f"layers.{i}.self_attn."
        params |= {f"{layer}input_layernorm.scale": p["norm1"][i]}
        params |= {f"{layer}post_attention_layernorm.scale": p["norm2"][i]}
        params |= {f"{at}{n}_proj.kernel": halves(p[n][i]).T for n in "qk"}
        params |= {f"{at}{n}_proj.kernel": p[n][i].T for n in "vo"}
        params |= {f"{layer}mlp.{n}_proj.kernel": p[n][i].T for n in ("gate", "up", "down")}
    hf.save_target(path, config, params, "float32", bos_token_id=BOS)
    return path


def test_a_real_model_tells_a_story(tmp_path):
    """Catches arithmetic that is right for random weights only, and a format read wrongly: the
    answer would be no English, or another one than the plain implementation's."""
    convert.convert(directory(tmp_path / "hf"), tmp_path / "native", "native")
    params = eagle_jax.load(tmp_path / "native")
    told = generate(params, [BOS], method="vanilla", max_new_tokens=NEW)
    story = text(told.tokens.tolist())
    print(story)
    assert story.startswith("Once upon a time, there was a little")
    assert sum(word in story.replace(".", " ").split() for word in WORDS) > len(WORDS) // 2

    method = PromptLookup()
    copied = generate(params, [BOS], method=method, max_new_tokens=NEW)
    np.testing.assert_array_equal(copied.tokens, told.tokens)
    print(f"prompt lookup: {copied.statistics.tau:.2f} tokens a round")
    assert copied.statistics.tau > 1

    # If each token is the best after those before it, then this is the greedy answer.
    logits = plain_logits(*read(), [BOS, *told.tokens[:-1].tolist()])
    np.testing.assert_array_equal(told.tokens, logits.argmax(-1))
