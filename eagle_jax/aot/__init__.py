"""Does it fit, and what would it cost? Training and decoding compiled for accelerators not at hand.

libtpu compiles for a TPU topology on any x86 machine (`pip install 'eagle-jax[tpu]'`), JAX's CUDA
plugin for NVIDIA GPUs (`pip install 'eagle-jax[cuda]'`); nothing runs, no weights exist.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from eagle_jax import settings
from eagle_jax.config import DraftConfig, NextToken, TrainConfig, TransformerConfig
from eagle_jax.decode.program import Program, capacity
from eagle_jax.layout import Layout

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class AotConfig:
    """What is compiled, and for which machine.

    Attributes:
        topology: of the slice, as libtpu names it: "v5e:2x4", "v5p:2x2x2", "v6e:2x4", ...; of GPUs
            in one host kind and number: "h100:1", "h200:2".
        target: architecture of the target.
        draft: of the draft, if the method has one.
        method: how it decodes (`eagle_jax.decode`).
        tensor, expert: mesh of decoding; other devices hold copies and rows of their own.
        batch_size: rows decoded together.
        prompt: tokens of the prompt, a power of two.
        new_tokens: longest answer.
        quantize, quantize_drafts: "int8" stores the matrices of the target or of the draft in eight
            bits, as `eagle_jax.load` does; None as bfloat16.
        train: a training run whose step is compiled too; of its data only `sequence_length` and
            `batch_size` are read.
    """

    topology: str
    target: TransformerConfig
    draft: DraftConfig | None = None
    method: Any = None
    tensor: int = 1
    expert: int = 1
    batch_size: int = 1
    prompt: int = 1024
    new_tokens: int = 1024
    quantize: Literal["int8"] | None = None
    quantize_drafts: Literal["int8"] | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        settings.check(self)
        for name in ("tensor", "expert", "batch_size", "prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.method is None and self.train is None:
            raise ValueError("method=None: give a method, or a training run in `train`")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device by its data sheet: memory in GiB, GB/s from it, bfloat16 TFLOP/s."""

    memory: float
    bandwidth: float
    tflops: float


CHIPS = {
    "TPU v4": Chip(32, 1228, 275),
    "TPU v5 lite": Chip(16, 819, 197),
    "TPU v5": Chip(95, 2765, 459),
    "TPU v6 lite": Chip(32, 1640, 918),
    "NVIDIA H100 80GB HBM3": Chip(79.6, 3350, 989),
    "NVIDIA H200": Chip(140.4, 4800, 989),
}
# GPUs as XLA's target_config describes them: name, bytes of memory and a second, by kind.
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 85_520_000_000, 3_352_320_000_000),
    "h200": ("NVIDIA H200", 150_750_000_000, 4_814_000_000_000),
}
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""

# How programs speak to the host.
_HOST = re.compile(
    r"\b(infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback|MoveToHost|MoveToDevice"
)
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)
# What costs a GPU nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred)\[([0-9,]*)\]")


def devices(topology: str) -> list[Any]:
    """The devices of a topology, of which there need be none.

    Raises:
        ValueError: libtpu or JAX's CUDA plugin is not installed, or there is no such topology.
    """
    if topology.partition(":")[0] in _GPUS:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={topology!r}: libtpu is not installed; pip install 'eagle-jax[tpu]'"
        )
    # There is no TPU to describe or to lock: libtpu need not look for it, nor be alone.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # libtpu has its own
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology={topology!r}: {said}; e.g. v5e:2x4, v5p:2x2x2, h100:2"
        ) from error


def _gpus(topology: str) -> list[Any]:
    kind, _, number = topology.partition(":")
    if number not in map(str, range(1, 9)):
        raise ValueError(f"topology={topology!r}: give 1 to 8 GPUs, as in {kind}:2")
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(_installed(plugin) for plugin in plugins):
        raise ValueError(
            f"topology={topology!r}: JAX's CUDA plugin is not installed; pip install "
            "'eagle-jax[cuda]'"
        )
    # There is no driver either, whose version the plugin would compare.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    name, memory, bandwidth = _GPUS[kind]
    target = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth)
    try:
        found = topologies.get_topology_desc(
            kind, platform="cuda", target_config=target, topology=f"1x1x{number}"
        )
    except Exception as error:  # the plugin has its own
        raise ValueError(f"topology={topology!r}: {str(error).strip().splitlines()[0]}") from error
    return list(found.devices)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even what it lies in
        return False


def compile_all(config: AotConfig) -> Iterator[dict[str, Any]]:
    """Compiles each program and reports it.

    Yields:
        Rows as `describe` makes them.

    Raises:
        ValueError: a size that the mesh does not divide; or the compiler refuses a program, as it
            does one that does not fit the chip's memory.
    """
    where = devices(config.topology)
    if config.method is not None:
        yield from _decoding(config, where)
    if config.train is not None:
        yield from _training(config, config.train, where)


def _decoding(config: AotConfig, where: list[Any]) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from eagle_jax import sharding
    from eagle_jax.decode import Vanilla, engine
    from eagle_jax.decode.sampling import Sampling, SamplingParams, Vocabulary
    from eagle_jax.drafters import registry
    from eagle_jax.models import Transformer, kernels
    from eagle_jax.params import Draft, Params, layout_for_decoding

    mesh = sharding.make_mesh(tensor=config.tensor, expert=config.expert, devices=where)
    with kernels.tracing_for(where[0]):
        layout = layout_for_decoding(jnp.dtype(jnp.bfloat16), config.quantize)
    target, draft = config.target, config.draft
    sharding.check_tensor(mesh, [target] if draft is None else [target, draft])
    drafts = {}
    if draft is not None:
        own = dataclasses.replace(layout, quantize=config.quantize_drafts)
        weights = _weights(mesh, registry.by_config(draft).module_class(), draft, own)
        drafts[draft.kind] = Draft(weights, draft, own)
    params = Params(_weights(mesh, Transformer, target, layout), drafts, target, layout)
    b = config.batch_size
    whole = sharding.replicated(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    rows = [SamplingParams(temperature=1.0)] * b
    drawn = jax.tree.map(
        lambda x: array(x.shape, x.dtype), Sampling.of(rows, Vocabulary(target.vocab_size))
    )
    for name, method in (("vanilla", Vanilla()), (type(config.method).__name__, config.method)):
        slots = capacity(config.prompt, config.new_tokens, method.depth)
        program = Program.of(params, method, slots)
        arrays = program.weights(params)

        def on_mesh(function: Callable[..., Any], program: Any = program) -> Callable[..., Any]:
            def traced(*args: Any) -> Any:
                with (
                    sharding.using(mesh),
                    kernels.tracing_for(where[0]),
                    kernels.decoding(),
                ):
                    return function(program, *args)

            return traced

        rows = (array((b, config.prompt)), *[array((b,))] * 2, array((b,), jnp.uint32))
        lowered = jax.jit(on_mesh(engine.prefill)).lower(arrays, *rows)
        compiled, seconds = _compile(lowered)
        yield describe(f"{name}: prefill", compiled, seconds, where[0].device_kind)
        state = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            lowered.out_info,
            compiled.output_shardings,
        )
        once = jax.jit(on_mesh(engine.one_round), donate_argnums=1).lower(arrays, state, drawn)
        compiled, seconds = _compile(once)
        yield describe(f"{name}: one round", compiled, seconds, where[0].device_kind)
        loop = jax.jit(on_mesh(engine.decode), donate_argnums=1)
        compiled, seconds = _compile(loop.lower(arrays, state, drawn, array(()), array(())))
        # What a loop costs depends on how often it runs; the compiler counts its body once.
        row = describe(f"{name}: loop", compiled, seconds, where[0].device_kind)
        yield row | dict.fromkeys(("gflop", "gbytes", "milliseconds", "floor"))


def _weights(mesh: Any, cls: Any, config: Any, layout: Layout) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from eagle_jax import sharding
    from eagle_jax.models import param_shapes
    from eagle_jax.models.quantize import SCALE

    shapes = param_shapes(cls, config, layout)
    places = sharding.weight_shardings(mesh, shapes, stored=False)

    def one(name: str, x: Any) -> jax.ShapeDtypeStruct:
        kept = jnp.issubdtype(x.dtype, jnp.integer) or name.endswith(f".kernel{SCALE}")
        dtype = x.dtype if kept else jnp.bfloat16
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=places[name])

    return {name: one(name, x) for name, x in shapes.items()}


def _training(config: AotConfig, run: TrainConfig, where: list[Any]) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eagle_jax import sharding
    from eagle_jax.models import Transformer, param_shapes
    from eagle_jax.train import loop, objectives

    if not isinstance(run.objective, NextToken) and run.objective.features:
        raise ValueError(
            f"train.objective.features={run.objective.features!r}: only training with the target "
            "in every step is compiled here; leave it empty"
        )
    mesh = sharding.make_mesh(run.fsdp, tensor=run.tensor, expert=run.expert, devices=where)
    sharding.check_batch(mesh, run.data.batch_size)
    target = config.target
    shapes = param_shapes(Transformer, target)
    places = sharding.weight_shardings(mesh, shapes)
    frozen = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(run.compute_dtype), sharding=places[name])
        for name, x in shapes.items()
    }

    def vocabulary(draft: Any, data: Any) -> tuple[np.ndarray, None]:
        del data  # which tokens they are changes no program
        return np.zeros(draft.draft_vocab_size, np.int32), None

    objective = objectives.assemble(run, target, frozen, vocabulary)
    trainer = loop.assemble(run, objective, mesh, frozen)
    shape, rows = (run.data.batch_size, run.data.sequence_length), sharding.batch_sharding(mesh)
    dtypes = dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, dtype in {**dtypes, "loss_mask": jnp.float32}.items()
    }
    compiled, seconds = _compile(trainer.step.lower(trainer.abstract, frozen, batch))
    name = f"{type(run.objective).__name__}: training step"
    row = describe(name, compiled, seconds, where[0].device_kind)
    # Of the whole step on all chips, as training counts it.
    flops = objective.flops_per_token(shape[1]) * math.prod(shape)
    yield row | {"gflop_counted": flops / mesh.size / 1e9}


def _compile(lowered: Any) -> tuple[Any, float]:
    import jax

    began = time.perf_counter()
    try:
        return lowered.compile(), time.perf_counter() - began
    except jax.errors.JaxRuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"the compiler refused: {' '.join(lines[:2])[:300]}") from error


def describe(name: str, compiled: Any, seconds: float, kind: str) -> dict[str, Any]:
    """One program's figures, per chip.

    Returns:
        program; arguments, temporaries, code, total in GiB, and total as a share of the chip's
        memory; gflop and gbytes (moved, as the compiler counts), its estimate in milliseconds, and
        a floor in milliseconds: arguments read once, or the arithmetic, at the data sheet's rate
        (None where there is none); collectives by kind as (number, MiB of results); launches of
        kernels (of a program on GPUs that has no loop); host: what crosses to the host (all None if
        the program cannot be read); compile: seconds.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = _text(compiled)
    arguments = memory.argument_size_in_bytes
    # Outputs that take the place of an argument need no memory of their own.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + new + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    estimate = cost.get("optimal_seconds", -1.0)
    counted = "flops" in cost  # not by XLA's compiler for GPUs
    gflop, chip = cost.get("flops", 0.0) / 1e9, CHIPS.get(kind)
    floor = None
    if chip is not None:
        floor = max(gflop / chip.tflops, arguments / 1e6 / chip.bandwidth)
    return {
        "program": name,
        "arguments": arguments / GIB,
        "temporaries": (memory.temp_size_in_bytes + new) / GIB,
        "code": memory.generated_code_size_in_bytes / GIB,
        "total": total / GIB,
        "share": None if chip is None else total / GIB / chip.memory,
        "gflop": gflop if counted else None,
        "gbytes": cost.get("bytes accessed", 0.0) / 1e9 if counted else None,
        "milliseconds": 1e3 * estimate if estimate > 0 else None,
        "floor": floor,
        "collectives": None if text is None else collectives(text),
        "launches": None if text is None or not kind.startswith("NVIDIA") else launches(text),
        "host": None
        if text is None
        else sorted({match.group(0).strip("(") for match in _HOST.finditer(text)}),
        "compile": seconds,
    }


def _text(compiled: Any) -> str | None:
    """The compiled program, or None where libtpu cannot write it down (some large programs)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Kind -> how many there are in a compiled program, and MiB of their results."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for match in _COLLECTIVE.finditer(text):
        found[match["kind"]].append(_bytes(match["result"]) / 2**20)
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}


def launches(text: str) -> int | None:
    """Kernels and copies of a compiled GPU program, from its entry; None where that has a loop."""
    entry = text[text.rindex("\nENTRY ") :]
    kinds = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", entry, re.MULTILINE)
    if "while" in kinds:
        return None
    return sum(kind not in _FREE and not kind.endswith("-done") for kind in kinds)


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, sizes in _ARRAY.findall(shapes):
        bits = int(re.sub(r"[a-z]+", "", dtype) or 8)
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total
