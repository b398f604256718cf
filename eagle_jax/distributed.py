"""Several processes: how they connect, and which one writes.

Every process runs the same program with the same arguments, and arrays span the devices of all
processes. Only the first process writes files and prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

_FLAGS = ("coordinator", "processes", "process")
# A launcher that starts several processes sets one of these; jax.distributed interprets them.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe several processes."""
    group = parser.add_argument_group(
        "several processes", "start the same command in each; the first writes and prints"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the others that SLURM, Open MPI or a TPU slice (on GKE too) started",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, without those")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")


def join(arguments: argparse.Namespace, *, preemptible: bool = False) -> None:
    """Connects to the other processes if the arguments name any; call it before any use of JAX.

    Args:
        arguments: parsed options of `add_arguments`.
        preemptible: let JAX's runtime receive SIGTERM, so that the program can ask it
            (`train.preemption`). Otherwise SIGTERM ends the program as usual.

    Raises:
        ValueError: the arguments contradict each other, or the other processes do not connect.
    """
    given = {name: getattr(arguments, name) for name in _FLAGS}
    if all(value is None for value in given.values()) and not arguments.distributed:
        if any(int(os.environ.get(name, "1") or 1) > 1 for name in _LAUNCHERS):
            print(
                "warning: a launcher started several processes, and each works alone; add "
                "--distributed to have them work together",
                file=sys.stderr,
            )
        return
    if arguments.distributed:
        if extra := [f"--{name}" for name, value in given.items() if value is not None]:
            raise ValueError(f"--distributed: finds {', '.join(extra)} by itself; leave them out")
        _initialize(preemptible)
        return
    for name, value in given.items():
        if value is None:
            raise ValueError(f"--{name}: missing; give --coordinator, --processes and --process")
    count, index = given["processes"], given["process"]
    if not 0 <= index < count:
        raise ValueError(f"--process={index}: must be 0 to {count - 1}, below --processes={count}")
    # The arguments are complete. Automatic detection would only restrict a process to one device
    # under SLURM, or call Kubernetes' API.
    _initialize(
        preemptible,
        coordinator_address=given["coordinator"],
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
    )


def _initialize(preemptible: bool, **where: Any) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(**where)
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"processes: could not join: {said}") from error
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which is later


def first() -> bool:
    """Returns whether this is the first process, which writes files and prints."""
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until every process has called this function with the same name."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Returns arrays that span processes as whole host arrays, in every process."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def raise_together(error: ValueError | None, what: str) -> None:
    """Raises the first process's error in every process, so that none waits for the others.

    Args:
        error: the first process's error, or None; other processes pass None.
        what: beginning of the message that the other processes raise.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.bool_(error is not None)))
        if failed and error is None:
            raise ValueError(f"{what}: the first process cannot write there; see its message")
    if error is not None:
        raise error
