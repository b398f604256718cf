"""Builds the jitted functions of a training run over the mesh: its step and its evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from eagle_jax import sharding
from eagle_jax.config import OptimConfig, TrainConfig
from eagle_jax.models import cast
from eagle_jax.train import objectives
from eagle_jax.train.objectives import Batch, Objective
from eagle_jax.types import ParamDict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a training step updates; its leaves are arrays, or their shapes.

    Attributes:
        step: number of finished steps.
        params: trained weights, float32.
        optimizer: optax's state.
    """

    step: Any
    params: Mapping[str, Any]
    optimizer: Any


def schedule(config: OptimConfig) -> optax.Schedule:
    """Returns the learning rate as a function of the number of finished steps.

    Warm-up is linear and starts just above zero, because a step at rate zero has no effect. The
    last step has `final_fraction` of the peak rate.
    """
    peak, after = config.learning_rate, max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after, config.final_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.final_fraction, after)
    else:
        main = optax.constant_schedule(peak)
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
        main = optax.join_schedules([warmup, main], [config.warmup_steps])
    return lambda count: main(count + 1)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns AdamW with the configured clipping, and weight decay on matrices only."""
    steps = []
    if config.clip_value is not None:
        steps.append(optax.clip(config.clip_value))
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    adamw = optax.adamw(
        schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
    )
    return optax.chain(*steps, adamw)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run, and the shardings of their arrays.

    Attributes:
        config: the run's configuration.
        objective: the objective to train.
        mesh: the device mesh.
        frozen: the objective's frozen weights, in the compute dtype.
        abstract: shapes and shardings of the state.
        step: (state, frozen, batch) -> (state, metrics); the given state is donated.
        evaluate: (params, frozen, batch) -> sums.
    """

    config: TrainConfig
    objective: Objective
    mesh: Mesh
    frozen: Mapping[str, Any]
    abstract: TrainState
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]

    def init(self) -> TrainState:
        """Returns the state before the first step, on the devices."""
        # Goes through the host, where every process has the same values: a mesh may span processes.
        state = jax.device_get(_init(self.config, self.objective, self.objective.frozen()))
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.abstract))

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Returns the global batch on the devices; `batch` holds the rows of this process.

        Raises:
            ValueError: a token is outside the model's vocabulary (a lookup would clip it).
        """
        check_tokens(self.config, self.objective.vocab_size, batch)
        place, rows = sharding.batch_sharding(self.mesh), self.config.data.batch_size
        return {
            name: jax.make_array_from_process_local_data(place, own, (rows, *own.shape[1:]))
            for name, own in batch.items()
        }


def check_tokens(config: TrainConfig, vocab_size: int, batch: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a token lies outside the vocabulary."""
    largest = int(batch["tokens"].max())
    if largest >= vocab_size:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r}: gave token {largest}, but the "
            f"model has vocab_size={vocab_size}; use the model's own tokenizer"
        )


def _init(config: TrainConfig, objective: Objective, frozen: Mapping[str, Any]) -> TrainState:
    params: Any = objective.init(config.seed, frozen)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config.optim).init(params))


def build(config: TrainConfig, objective: Objective, devices: Any = None) -> Trainer:
    """Builds the mesh, the shardings and the jitted functions of a run.

    Raises:
        ValueError: the mesh axes do not divide the devices or the batch, or the attention kernel
            cannot run.
    """
    mesh = sharding.make_mesh(
        config.fsdp, tensor=config.tensor, expert=config.expert, devices=devices
    )
    sharding.check_batch(mesh, config.data.batch_size)
    check_attention(config, mesh)
    dtype = jnp.dtype(config.compute_dtype)
    frozen = {name: np.asarray(x).astype(dtype) for name, x in objective.frozen().items()}
    frozen = jax.device_put(frozen, sharding.weight_shardings(mesh, frozen))
    return assemble(config, objective, mesh, frozen)


def assemble(
    config: TrainConfig, objective: Objective, mesh: Mesh, frozen: Mapping[str, Any]
) -> Trainer:
    """Builds the jitted functions; `frozen` holds arrays on the mesh, or shapes with shardings."""
    dtype = jnp.dtype(config.compute_dtype)
    shapes = jax.eval_shape(functools.partial(_init, config, objective), frozen)
    places = sharding.weight_shardings(mesh, shapes)
    frozen_places = jax.tree.map(lambda x: x.sharding, frozen)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def gather(params: ParamDict) -> ParamDict:
        # The forward pass splits the batch over an fsdp group, so each device needs whole weights.
        params = cast(params, dtype)
        used = sharding.weight_shardings(mesh, params, stored=False)
        return jax.lax.with_sharding_constraint(params, used)

    def loss(params: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None):
        with sharding.using(mesh):
            return objective.loss(gather(params), gather(frozen), batch, key)

    transform, rate = optimizer(config.optim), schedule(config.optim)

    def step(state: TrainState, frozen: ParamDict, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient, sums = jax.grad(loss, has_aux=True)(state.params, frozen, batch, key)
        # optax mixes dtypes (a float decay to an int32 count), which strict promotion rejects.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = transform.update(gradient, state.optimizer, state.params)
            values = objectives.means(sums) | {
                "count": sums["count"],
                "gradient_norm": optax.tree.norm(gradient),
                "learning_rate": jnp.asarray(rate(state.step)),
            }
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, moments), values

    def evaluate(params: ParamDict, frozen: ParamDict, batch: Batch) -> dict[str, jax.Array]:
        return loss(params, frozen, batch, None)[1]

    return Trainer(
        config,
        objective,
        mesh,
        frozen,
        jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places
        ),
        jax.jit(
            step,
            in_shardings=(places, frozen_places, rows),
            out_shardings=(places, whole),
            donate_argnums=0,
        ),
        jax.jit(evaluate, in_shardings=(places.params, frozen_places, rows), out_shardings=whole),
    )


def check_attention(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError if the attention kernel cannot run on the mesh."""
    if config.attention != "cudnn":
        return
    platform = mesh.devices.flat[0].platform
    if platform != "gpu" or config.compute_dtype != "bfloat16":
        raise ValueError(
            f"attention='cudnn': needs a GPU and compute_dtype='bfloat16', have {platform} and "
            f"{config.compute_dtype!r}; use attention='xla'"
        )
