"""Several processes: how they find each other, and who speaks.

Every process runs the same program on the same arguments; arrays span all of their devices. Files
and the console belong to the first process.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

_FLAGS = ("coordinator", "processes", "process")
# Any of these says that a launcher started several of us (jax.distributed knows what they mean).
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all commands have in common."""
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
    """Meets the other processes, if the arguments say that there are any; before any JAX work.

    Args:
        arguments: with those of `add_arguments`.
        preemptible: JAX's runtime hears SIGTERM, and the program asks it (`train.preemption`).
            Otherwise SIGTERM ends the program as it always does.

    Raises:
        ValueError: arguments that don't fit together, or the others don't come.
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
    # All is said: JAX would only cut devices to SLURM's one a process, or ask Kubernetes' API.
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
    """Whether this process writes files and prints."""
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Arrays that span processes, whole, in every one of them."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def raise_together(error: ValueError | None, what: str) -> None:
    """Raises the first process's error in every process, so that none waits for the others.

    Args:
        error: of the first process, or None; other processes pass None.
        what: begins the message that the other processes raise.
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
