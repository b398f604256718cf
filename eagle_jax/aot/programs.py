"""Compiles the programs of decoding and of training for absent devices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from eagle_jax.aot.config import AotConfig
from eagle_jax.aot.report import describe
from eagle_jax.aot.topology import devices
from eagle_jax.config import NextToken, TrainConfig
from eagle_jax.decode.program import Program, capacity
from eagle_jax.layout import PLAIN, Layout


def compile_all(config: AotConfig) -> Iterator[dict[str, Any]]:
    """Compiles each program and reports it.

    Yields:
        The figures of each program, as `describe` returns them.

    Raises:
        ValueError: the mesh does not divide a size, or the compiler rejects a program, for example
            because it does not fit into the chip's memory.
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
    from eagle_jax.params import Draft, Params
    from eagle_jax.placement import layout_for_decoding

    mesh = sharding.make_mesh(tensor=config.tensor, expert=config.expert, devices=where)
    with kernels.tracing_for(where[0]):
        layout = layout_for_decoding(jnp.dtype(jnp.bfloat16), config.quantize)
    target, draft = config.target, config.draft
    sharding.check_tensor(mesh, [target] if draft is None else [target, draft])
    drafts = {}
    if draft is not None:
        own = dataclasses.replace(layout, quantize=config.quantize_drafts)
        weights = abstract_weights(mesh, registry.by_config(draft).module_class(), draft, own)
        drafts[draft.kind] = Draft(weights, draft, own)
    params = Params(abstract_weights(mesh, Transformer, target, layout), drafts, target, layout)
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
        # The compiler counts a loop's body once, though it runs an unknown number of times.
        row = describe(f"{name}: loop", compiled, seconds, where[0].device_kind)
        yield row | dict.fromkeys(("gflop", "gbytes", "milliseconds", "floor"))


def abstract_weights(mesh: Any, cls: Any, config: Any, layout: Layout = PLAIN) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of a module's weights, in bfloat16 or int8."""
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
    from eagle_jax.train import objectives
    from eagle_jax.train.trainer import assemble

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
        del data  # the choice of tokens does not affect compilation
        return np.zeros(draft.draft_vocab_size, np.int32), None

    objective = objectives.assemble(run, target, frozen, vocabulary)
    trainer = assemble(run, objective, mesh, frozen)
    shape, rows = (run.data.batch_size, run.data.sequence_length), sharding.batch_sharding(mesh)
    dtypes = dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, dtype in {**dtypes, "loss_mask": jnp.float32}.items()
    }
    compiled, seconds = _compile(trainer.step.lower(trainer.abstract, frozen, batch))
    name = f"{type(run.objective).__name__}: training step"
    row = describe(name, compiled, seconds, where[0].device_kind)
    # FLOPs of the whole step on all chips, as training counts them.
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
