"""Kills a training run again and again: `python kill_loop.py FOLDER KILLS`.

FOLDER receives `whole`, a run left alone, and `killed`, one that is killed with SIGKILL at random
moments and started again KILLS times before it may finish. Prints a JSON line per start.

Every start is a fork of one process that has imported everything but has not touched a device:
imports take longer than the steps.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path

import grain  # noqa: F401
import matplotlib.figure  # noqa: F401
import tensorboardX  # noqa: F401
import tensorflow_datasets  # noqa: F401
import tiny_run

from eagle_jax.checkpoint.train_state import Checkpoints
from eagle_jax.config import NextToken, TrainConfig
from eagle_jax.train import loop, metrics

STEPS, EVERY = 120, 3


def configure(folder: Path, name: str) -> TrainConfig:
    config = tiny_run.target_run(
        folder, output_dir=str(folder / name), steps=STEPS, checkpoint_every=EVERY, eval_every=0
    )
    assert isinstance(config.objective, NextToken)
    model = dataclasses.replace(config.objective.model, num_hidden_layers=1)  # traced each time
    return dataclasses.replace(config, objective=NextToken(model))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(chance: random.Random, output: str) -> str:
    """Have this process killed: at a file operation, soon after a step, or soon after a save."""
    kind = chance.choice(["file", "step", "save"])
    if kind == "file":
        left = chance.randrange(1, 150)

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            del event
            if any(isinstance(x, (str, Path)) and str(x).startswith(output) for x in arguments):
                left -= 1
                if left == 0:
                    die()

        sys.addaudithook(count)
        return f"at file operation {left}"
    owner, name, most = (metrics.Report, "step", 9) if kind == "step" else (Checkpoints, "save", 2)
    left, delay = chance.randint(1, most), chance.uniform(0.0, 0.05)
    how = f"{1000 * delay:.0f} ms after {kind} {left}"
    original = getattr(owner, name)

    def called(*arguments):
        nonlocal left
        original(*arguments)
        left -= 1
        if left == 0:
            threading.Timer(delay, die).start()

    setattr(owner, name, called)
    return how


def record(method: str, text, log: Path) -> None:
    """Have each call of a method of `Checkpoints` leave a line that survives a kill."""
    original = getattr(Checkpoints, method)

    def called(self, *arguments):
        result = original(self, *arguments)
        with log.open("a") as file:
            file.write(f"{text(result, *arguments)}\n")
        return result

    setattr(Checkpoints, method, called)


def start(folder: Path, name: str, seed: int | None) -> dict:
    """One start in a process of its own; what is known of it afterwards."""
    log, saved = folder / "log", (folder / name).glob("checkpoints/*")
    newest = max((int(x.name) for x in saved if x.name.isdecimal()), default=0)
    log.write_text("never\n")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (folder / "stderr").open("w") as file:
                os.dup2(file.fileno(), 2)
            if seed is not None:
                log.write_text(arm(random.Random(seed), str(folder / name)) + "\n")
            record("restore", lambda found, *_: found[0] if found else 0, log)
            record("save", lambda _, step, *__: step, log)
            loop.run(configure(folder, name))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    how, *steps = log.read_text().splitlines()
    return {
        "killed": how,
        "status": os.waitstatus_to_exitcode(status),
        "newest": newest,  # checkpoint before the start
        "steps": [int(x) for x in steps],  # where it resumed, and the saves that it began
    }


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(start(folder, "whole", None)), flush=True)
    for seed in [*range(kills), None]:
        print(json.dumps(start(folder, "killed", seed)), flush=True)


if __name__ == "__main__":
    main()
