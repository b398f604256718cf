"""The training loop: one jitted step, batches read ahead, metrics fetched late.

The host never waits for the step it has just launched: a thread puts the next batches on the
devices, and metrics are fetched one step behind. It does wait where a checkpoint or a validation
is due. A run that is killed and started again continues with exactly the numbers it would have
had: a checkpoint holds weights, optimizer state and the data position that belongs to them, and
noise is keyed by the step.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from eagle_jax import distributed, hardware, outputs, sharding
from eagle_jax.config import OptimConfig, TrainConfig
from eagle_jax.models import cast
from eagle_jax.train import data, divergence, metrics, objectives, offline
from eagle_jax.train.checks import check_config
from eagle_jax.train.objectives import Batch, Objective
from eagle_jax.train.preemption import Preemption
from eagle_jax.types import ParamDict

_CHECKPOINTS, _EXPORT = "checkpoints", "export"
_LAG = 1  # steps in flight when the host fetches metrics
_AHEAD = 3  # batches read ahead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step turns into the next step's; its leaves are arrays, or their shapes.

    Attributes:
        step: steps done.
        params: trained weights, float32.
        optimizer: optax's state.
    """

    step: Any
    params: Mapping[str, Any]
    optimizer: Any


def schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate of the step after `count` steps; the last step has `final_fraction`.

    Linear from zero, which is not itself a step's rate: a first step without effect is wasted.
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
    """AdamW with the configured clipping; weight decay on matrices only."""
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
    """The compiled functions of a run, and where their arrays lie.

    Attributes:
        config: the run's.
        objective: what is trained.
        mesh: the devices.
        frozen: the objective's frozen weights, in the compute dtype.
        abstract: shapes and shardings of the state.
        step: (state, frozen, batch) -> (state, metrics); the state given is consumed.
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
        """The state before the first step, on the devices."""
        # Through the host, which every process has alike: devices may span processes.
        state = jax.device_get(_init(self.config, self.objective, self.objective.frozen()))
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.abstract))

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows as part of the global batch, on the devices.

        Raises:
            ValueError: a token outside the model's vocabulary (its embedding would be clipped).
        """
        check_tokens(self.config, self.objective.vocab_size, batch)
        place, rows = sharding.batch_sharding(self.mesh), self.config.data.batch_size
        return {
            name: jax.make_array_from_process_local_data(place, own, (rows, *own.shape[1:]))
            for name, own in batch.items()
        }


def check_tokens(config: TrainConfig, vocab_size: int, batch: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if a token lies outside the vocabulary."""
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
    """Mesh, shardings and jitted functions of a run.

    Raises:
        ValueError: batch, devices and fsdp do not divide, or the attention kernel cannot run.
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
    """The jitted functions, given the frozen weights on the mesh, or shapes with shardings."""
    dtype = jnp.dtype(config.compute_dtype)
    shapes = jax.eval_shape(functools.partial(_init, config, objective), frozen)
    places = sharding.weight_shardings(mesh, shapes)
    frozen_places = jax.tree.map(lambda x: x.sharding, frozen)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def gather(params: ParamDict) -> ParamDict:
        # Whole within an fsdp group, in the compute dtype: there a forward cuts the batch.
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
        # optax mixes dtypes (a float decay to an int32 count), which strict settings refuse.
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
    """Raise ValueError if the attention kernel cannot run."""
    if config.attention != "cudnn":
        return
    platform = mesh.devices.flat[0].platform
    if platform != "gpu" or config.compute_dtype != "bfloat16":
        raise ValueError(
            f"attention='cudnn': needs a GPU and compute_dtype='bfloat16', have {platform} and "
            f"{config.compute_dtype!r}; use attention='xla'"
        )


@contextlib.contextmanager
def read_ahead(
    iterator: Any, put: Callable[[Any], Any], batches: int, depth: int = _AHEAD
) -> Iterator[Iterator[tuple[Any, Any]]]:
    """Yields an iterator of (batch on the devices, data state after it), filled by a thread.

    The data state belongs to the batch it comes with: what has been read ahead and not trained on
    is read again after a restart.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def fill() -> None:
        try:
            for _ in range(batches):
                batch = put(next(iterator))
                if not offer((batch, iterator.get_state())):
                    return
        except BaseException as error:  # whatever it is, the consumer raises it
            offer(error)

    def take() -> Iterator[tuple[Any, Any]]:
        for _ in range(batches):
            item = ready.get()
            if isinstance(item, StopIteration):
                raise ValueError("data.train: ended before optim.steps; give more text")
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()


class _Late:
    """Metrics of launched steps, fetched `_LAG` steps behind so that the device never idles."""

    def __init__(self, report: metrics.Report, watch: divergence.Guard) -> None:
        self._report, self._guard = report, watch
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        for value in values.values():
            value.copy_to_host_async()
        self._waiting.append((step, values))
        while len(self._waiting) > _LAG:
            self._fetch()

    def drain(self) -> None:
        while self._waiting:
            self._fetch()

    def _fetch(self) -> None:
        step, arrays = self._waiting.popleft()
        values = {name: float(value) for name, value in sorted(arrays.items())}
        self._report.step(step, values)
        self._report.watch.start(step)  # after the first step, which compiles
        self._guard.check(step, values)


def run(config: TrainConfig, *, restart: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Train as `config` says, from the newest checkpoint in its `output_dir` if there is one.

    Args:
        config: the run.
        restart: delete what an earlier run left in `output_dir` and begin anew.
        dry_run: build and compile everything, write nothing into `output_dir`.

    Returns:
        The result, JSON-serialisable; see `_result`.

    Raises:
        ValueError: a field is wrong, the configuration is not that of the run in `output_dir`,
            none of its checkpoints can be read, training diverged, or the disk is full.
        SystemExit: stopped by SIGTERM (status 143) or Ctrl-C (130), with the step in flight saved.
    """
    check_config(config)
    began = time.perf_counter()
    _prepare(config)
    stored = offline.find(config)
    trainer = build(config, objectives.build(config))
    share = dict(
        zip(("shard_index", "shard_count"), sharding.batch_share(trainer.mesh), strict=True)
    )
    iterator = data.train_iterator(config.data, features=stored.get("train"), **share)
    if dry_run:
        return _dry_run(trainer, iterator)
    validation: Callable[[], Iterable[Batch]] = list
    if config.eval_every and config.data.validation:
        features = stored.get("validation")
        batches = data.validation_batches(
            config.data, config.eval_batches, features=features, **share
        )
        validation = functools.partial(map, trainer.put, batches)
        if not features:  # which are large, and read whenever they are due: tokens stay put
            validation = functools.partial(iter, list(validation()))
    output = Path(config.output_dir).expanduser()
    with outputs.claimed("output_dir", output):
        if distributed.first() and restart:
            _clear(output)
        distributed.wait_for_all("output_dir")
        step, report, exported = _run(trainer, iterator, validation, stored, output)
    return _result(trainer, step, report, exported, began)


def _run(
    trainer: Trainer,
    iterator: Any,
    validation: Callable[[], Iterable[Batch]],
    stored: Mapping[str, Any],
    output: Path,
) -> tuple[int, metrics.Report, Path]:
    """Trains from the newest checkpoint in `output` on, and exports; the last step, its report."""
    from eagle_jax.checkpoint.train_state import Checkpoints, telling_full_disk

    config, saved = trainer.config, output / _CHECKPOINTS
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract))
    with telling_full_disk(saved, config, size):
        opened = functools.partial(Checkpoints, saved, config, offline.contents(stored))
        with Preemption() as preemption, contextlib.closing(opened()) as points:
            found = points.restore(trainer.abstract)
            start, state, data_state = found or (0, trainer.init(), None)
            if found:
                iterator.set_state(data_state)
            if start >= config.optim.steps:
                _say(f"{output}: finished at step {start}; exporting again")
            elif start:
                _say(f"{output}: resuming after step {start}")
            report = _report(trainer, output, start)
            with contextlib.closing(report):
                state, step = _train(
                    trainer, state, start, iterator, validation, points, report, preemption
                )
        if preemption.signal:  # by now everything is on the disk
            name = signal.Signals(preemption.signal).name
            _say(f"{output}: {name}: step {step} is saved; the same command goes on from there")
            raise SystemExit(128 + preemption.signal)
        if distributed.first():
            metrics.plot(output / metrics.TRACE, output / metrics.CURVE)
        exported = _export(trainer, state.params, output)
    return step, report, exported


def _prepare(config: TrainConfig) -> None:
    """One process prepares the text, for all that share its disk."""
    if jax.process_count() > 1 and distributed.first():
        data.prepare(config.data.train, config.data)
        if config.eval_every and config.data.validation:
            data.prepare(config.data.validation, config.data, field="validation")
    distributed.wait_for_all("text")


def _train(
    trainer: Trainer,
    state: TrainState,
    start: int,
    iterator: Any,
    validation: Callable[[], Iterable[Batch]],
    checkpoints: Any,
    report: metrics.Report,
    preemption: Preemption,
) -> tuple[TrainState, int]:
    """Steps `start + 1 .. optim.steps`, with validations and checkpoints when due.

    Returns the state and its step, which is an earlier one if the run is to stop.
    """
    config, last, step = trainer.config, trainer.config.optim.steps, start
    validates = bool(config.eval_every and config.data.validation)
    late = _Late(report, divergence.Guard(config, report.directory, report.losses))
    with read_ahead(iterator, trainer.put, max(0, last - start)) as batches:
        for step, (batch, data_state) in enumerate(batches, start=start + 1):
            state, values = trainer.step(state, trainer.frozen, batch)
            late.push(step, values)
            validate = validates and (step % config.eval_every == 0 or step == last)
            stop = preemption.reached(step)
            save = stop or step % config.checkpoint_every == 0 or step == last
            checkpoints.wait(0)  # a save that failed, as on a full disk, ends the run now
            if not (validate or save):
                continue
            late.drain()
            report.watch.stop(step)
            if validate:
                report.validation(step, _validate(trainer, state, validation()))
            if save:
                report.sync()
                checkpoints.save(step, state, data_state)
            if stop:
                break
            report.watch.start(step)
    report.watch.stop(step)
    return state, step


def _validate(trainer: Trainer, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    # One batch at a time on the devices.
    sums = [
        jax.device_get(trainer.evaluate(state.params, trainer.frozen, batch)) for batch in batches
    ]
    total = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *sums)
    total["count"] = max(total["count"], 1.0)
    return {name: float(value) for name, value in objectives.means(total).items()}


def _clear(output: Path) -> None:
    """Delete what a run writes, and nothing else that may lie there."""
    for name in (_CHECKPOINTS, metrics.EVENTS, _EXPORT):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (metrics.TRACE, metrics.CURVE, divergence.BATCH):
        (output / name).unlink(missing_ok=True)


def _step_tokens(config: TrainConfig) -> int:
    return config.data.batch_size * config.data.sequence_length


def _report(trainer: Trainer, output: Path, start: int) -> metrics.Report:
    config, device = trainer.config, trainer.mesh.devices.flat[0]
    peak = config.peak_flops or hardware.peak_flops(device.device_kind)
    tokens = _step_tokens(config)
    flops = trainer.objective.flops_per_token(config.data.sequence_length) * tokens
    share = None if peak is None else flops / (peak * trainer.mesh.size)
    return metrics.Report(
        output, start, config.optim.steps, tokens, share, speaks=distributed.first()
    )


def _export(trainer: Trainer, params: Mapping[str, Any], output: Path) -> Path:
    """Write the weights beside the old export, then put them in its place."""
    config = trainer.config
    final, fresh, old = (output / f"{_EXPORT}{end}" for end in ("", ".new", ".old"))
    params = distributed.fetch(params)
    if not distributed.first():
        distributed.wait_for_all("export")
        return final
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tokenizer = Path(config.data.tokenizer).expanduser()
    trainer.objective.export(fresh, params, config.export_dtype, tokenizer)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    distributed.wait_for_all("export")
    return final


def _result(
    trainer: Trainer, step: int, report: metrics.Report, exported: Path, began: float
) -> dict[str, Any]:
    """What a run says at its end.

    `tokens` counts all positions up to `step`, padding included. `tokens_per_second` and `mfu` are
    of the training steps of this start, without compilation, validation and checkpoints; None if
    it had none.
    """
    last = report.last
    device = trainer.mesh.devices.flat[0]
    rates = report.rates(step)
    return {
        "steps": step,
        "tokens": step * _step_tokens(trainer.config),
        "seconds": round(time.perf_counter() - began, 3),
        "loss": last.get("loss"),
        "top1": last.get("top1"),
        "validation_loss": report.last_validation.get("loss"),
        "validation_top1": report.last_validation.get("top1"),
        "tokens_per_second": rates.get("tokens_per_second"),
        "mfu": rates.get("mfu"),
        "device": f"{trainer.mesh.size} x {device.device_kind}",
        "jax": jax.__version__,
        "export": str(exported),
    }


def _dry_run(trainer: Trainer, iterator: Any) -> dict[str, Any]:
    """Compile one step for a real batch; count parameters and memory."""
    batch = trainer.put(next(iterator))
    began = time.perf_counter()
    compiled = trainer.step.lower(trainer.abstract, trainer.frozen, batch).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "trained_parameters": sum(x.size for x in trainer.abstract.params.values()),
        "frozen_parameters": sum(x.size for x in trainer.frozen.values()),
        "tokens_per_step": _step_tokens(trainer.config),
        "flops_per_token": trainer.objective.flops_per_token(trainer.config.data.sequence_length),
        "compile_seconds": round(time.perf_counter() - began, 3),
        "device": f"{trainer.mesh.size} x {trainer.mesh.devices.flat[0].device_kind}",
    }
    if memory is not None:
        sizes["temporary_bytes_per_device"] = memory.temp_size_in_bytes
        sizes["state_bytes_per_device"] = memory.argument_size_in_bytes
    for name, value in sizes.items():
        _say(f"{name}: {value}")
    return sizes


def _say(text: str) -> None:
    if not distributed.first():
        return
    print(text, file=sys.stderr, flush=True)
