"""Measures a decode step in torch, in a process that baselines.py starts; imports no JAX.

The model is a Llama with random weights on the device: one row, one token per step. The program
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ModuleNotFoundError:
    sys.exit(f"error: torch is not installed for {sys.executable}; pip install torch")


def wait() -> None:
    """Waits until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- A plain decode step, as in gpt-fast -------------------------------------------------------


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Returns the RMSNorm of `x`, computed in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns `x` [1, h, 1, e] with rotary embedding, which rotates the two halves."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)


class Layer(nn.Module):
    """A decoder layer and its static cache."""

    keys: Tensor
    values: Tensor

    def __init__(self, c: SimpleNamespace, slots: int) -> None:
        super().__init__()
        self.c, width = c, c.head_dim
        self.heads, self.kv = c.num_attention_heads, c.num_key_value_heads
        d, qkv = c.hidden_size, (self.heads + 2 * self.kv) * width
        self.qkv = nn.Linear(d, qkv, bias=False)
        self.out = nn.Linear(self.heads * width, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, d, bias=False)
        self.norms = nn.Parameter(torch.ones(2, d))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, self.kv, slots, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        eps, width = self.c.rms_norm_eps, self.c.head_dim
        both = self.qkv(norm(x, self.norms[0], eps)).view(1, 1, -1, width).transpose(1, 2)
        q, k, v = both.split([self.heads, self.kv, self.kv], dim=1)
        self.keys[:, :, place] = rotate(k, cos, sin)
        self.values[:, :, place] = v
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            self.keys,
            self.values,
            attn_mask=mask,
            enable_gqa=self.heads != self.kv,
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(1, 1, -1))
        gate, up = self.gate_up(norm(x, self.norms[1], eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A Llama that maps a token and its position to the next token and position."""

    def __init__(self, c: SimpleNamespace, slots: int) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, slots) for _ in range(c.num_hidden_layers))
        self.scale = nn.Parameter(torch.ones(c.hidden_size))
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        half = torch.arange(c.head_dim // 2, dtype=torch.float32)
        self.frequency = c.rope_theta ** (-2 * half / c.head_dim)
        self.slots = torch.arange(slots)

    def forward(self, token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        angle = place.float() * self.frequency
        cos, sin = angle.cos(), angle.sin()
        mask = (self.slots <= place)[None, None, None]
        x = self.embed(token)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, place)
        logits = self.head(norm(x, self.scale, self.c.rms_norm_eps))
        return logits.argmax(-1), place + 1


def plain(c: SimpleNamespace, args: argparse.Namespace) -> Callable[[], float]:
    """Returns a function that measures the milliseconds of a step; compiled if `args` say so."""
    model = Model(c, args.cache)
    step: Callable = model
    if args.kind == "torch-compile":
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = True  # as gpt-fast sets it
        step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def run() -> float:
        token, place = torch.tensor([[1]]), torch.tensor([args.used])
        wait()
        begin = time.perf_counter()
        for _ in range(args.rounds):
            token, place = (x.clone() for x in step(token, place))  # the graph reuses its outputs
        wait()
        return 1e3 * (time.perf_counter() - begin) / args.rounds

    return run


# --- transformers ------------------------------------------------------------------------------


def transformers(c: SimpleNamespace, args: argparse.Namespace) -> Callable[[], float]:
    """Returns a function that measures the milliseconds between two tokens of `generate`."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError:
        sys.exit(f"error: transformers is not installed for {sys.executable}")
    names = [name for name in vars(c) if name != "rope_theta"]
    config = LlamaConfig(**{name: getattr(c, name) for name in names}, eos_token_id=None)
    model: Any = LlamaForCausalLM(config).eval()
    prompt = torch.randint(c.vocab_size, (1, args.used))
    times: list[float] = []

    def clock(ids: Tensor, scores: Tensor) -> Tensor:
        del ids
        wait()
        times.append(time.perf_counter())
        return scores

    # With a static cache, `generate` itself compiles, with CUDA graphs.
    static = {"cache_implementation": "static"} if args.kind == "transformers-static" else {}

    def run() -> float:
        times.clear()
        options = {"max_new_tokens": args.rounds + 2, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, logits_processor=[clock], **options, **static)
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return 1e3 * statistics.median(gaps)

    return run


KINDS = {
    "torch-compile": plain,
    "torch-eager": plain,
    "transformers-eager": transformers,
    "transformers-static": transformers,
}


def main() -> None:
    """Measures one kind of step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--config", required=True, help="sizes, a JSON object")
    for name in ("--cache", "--used", "--rounds", "--repeats"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    try:
        with torch.no_grad():
            run = KINDS[args.kind](SimpleNamespace(**json.loads(args.config)), args)
            for _ in range(3):  # compiles, records graphs
                run()
            ms = statistics.median(run() for _ in range(args.repeats))
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    result = {"ms": ms, "torch": torch.__version__, "device": device}
    if module := sys.modules.get("transformers"):
        result["transformers"] = module.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()
