"""The training loop: one jitted step, batches read ahead, metrics fetched late.

The host does not wait for the step it has just launched: a thread puts the next batches on the
devices, and metrics are fetched one step later. The host waits only for checkpoints and validation.
A run that was killed and started again computes exactly the numbers of an uninterrupted run: a
checkpoint holds weights, optimizer state and the matching data position, and noise is keyed by the
step.
"""

from __future__ import annotations

import collections
import contextlib
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
import numpy as np

from eagle_jax import distributed, hardware, outputs, sharding
from eagle_jax.config import TrainConfig
from eagle_jax.train import data, divergence, metrics, objectives, offline
from eagle_jax.train.checks import check_config
from eagle_jax.train.objectives import Batch
from eagle_jax.train.preemption import Preemption
from eagle_jax.train.trainer import Trainer, TrainState, build

_CHECKPOINTS, _EXPORT = "checkpoints", "export"
_LAG = 1  # steps in flight when the host fetches metrics
_AHEAD = 3  # batches read ahead


@contextlib.contextmanager
def read_ahead(
    iterator: Any, put: Callable[[Any], Any], batches: int, depth: int = _AHEAD
) -> Iterator[Iterator[tuple[Any, Any]]]:
    """Yields an iterator of (batch on the devices, data state after it), filled by a thread.

    Each data state belongs to its batch, so a restart reads those batches again that were read
    ahead but not trained on.
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
        except BaseException as error:  # the consumer raises it
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
    """Trains as `config` says, from the newest checkpoint in its `output_dir` if there is one.

    Args:
        config: the run's configuration.
        restart: delete the output of an earlier run in `output_dir` and start from step 0.
        dry_run: build and compile everything, but train nothing and write nothing to `output_dir`.

    Returns:
        The result, JSON-serialisable; see `_result`.

    Raises:
        ValueError: a field is wrong, the run in `output_dir` has another configuration, none of
            its checkpoints can be read, training diverged, or the disk is full.
        SystemExit: SIGTERM (status 143) or Ctrl-C (130) stopped the run; the current step is saved.
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
        if not features:  # tokens are small enough to stay on the devices; features are not
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
    """Trains from the newest checkpoint in `output`; returns last step, report and export path."""
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
        if preemption.signal:  # closing the checkpoints has flushed everything to the disk
            name = signal.Signals(preemption.signal).name
            _say(f"{output}: {name}: step {step} is saved; the same command goes on from there")
            raise SystemExit(128 + preemption.signal)
        if distributed.first():
            metrics.plot(output / metrics.TRACE, output / metrics.CURVE)
        exported = _export(trainer, state.params, output)
    return step, report, exported


def _prepare(config: TrainConfig) -> None:
    """Lets the first process prepare the text for all processes, which share its disk."""
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
    """Runs steps `start + 1 .. optim.steps`, with validations and checkpoints when due.

    Returns the state and its step, which is below `optim.steps` if a signal stopped the run.
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
            checkpoints.wait(0)  # raises if a save failed, as on a full disk
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
    # Fetching each result first keeps only one batch at a time on the devices.
    sums = [
        jax.device_get(trainer.evaluate(state.params, trainer.frozen, batch)) for batch in batches
    ]
    total = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *sums)
    total["count"] = max(total["count"], 1.0)
    return {name: float(value) for name, value in objectives.means(total).items()}


def _clear(output: Path) -> None:
    """Deletes the files of an earlier run from `output`, and no other files."""
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
    """Exports the weights; an earlier export is replaced only when the new one is complete."""
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
    """Returns the result of a finished run.

    `tokens` counts all positions up to `step`, padding included. `tokens_per_second` and `mfu`
    cover the training steps since this start, without compilation, validation and checkpoints;
    they are None if this start trained no step.
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
    """Compiles one step for a real batch; returns parameter counts, memory and FLOPs."""
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
