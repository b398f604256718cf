"""Command line of training: `python -m eagle_jax.train --config configs/tiny/target.py`.

Starting the same command again resumes from the newest checkpoint in `output_dir`. Progress goes
to stderr; the last line of stdout is one JSON object with the result. The exit status is 0 when
training finished, 2 after an error (told in one line), 143 after SIGTERM and 130 after Ctrl-C. In
the last two cases the current step is saved, and the same command continues from it. Kubernetes
repeats the command with restartPolicy OnFailure; SLURM repeats it with sbatch --requeue when it
preempts a job (otherwise run `scontrol requeue` after a 143).
"""

from __future__ import annotations

import argparse
import json

from eagle_jax import cli, compilation_cache, distributed, settings
from eagle_jax.config import TrainConfig
from eagle_jax.train import run

_DESCRIPTION = """\
Train a target or a draft as a Python config file says.

Starting the same command again resumes from the newest checkpoint in `output_dir`. Progress goes to
standard error; the last line of standard output is one JSON object with the result.
"""

_EPILOG = """\
exit status
  0    finished
  2    an error, told in one line
  130  Ctrl-C, 143 SIGTERM: the step in flight was saved, the same command goes on from there

examples
  {prog} --config configs/tiny/eagle.py
  {prog} --config configs/tiny/eagle.py --set output_dir=runs/a --set optim.learning_rate=1e-3
  {prog} --config configs/tiny/eagle.py --dry-run
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_arguments(out, "a TrainConfig file")
    out.add_argument(
        "--restart", action="store_true", help="delete what output_dir holds of an earlier run"
    )
    out.add_argument(
        "--dry-run", action="store_true", help="build and compile everything, train nothing"
    )
    distributed.add_arguments(out)
    return out


def main(argv: list[str] | None = None, prog: str = "python -m eagle_jax.train") -> None:
    """Parses the command line, trains, and prints the result as one JSON line."""
    args = parser(prog).parse_args(argv)
    distributed.join(args, preemptible=True)
    compilation_cache.enable()
    config = settings.load(args.config, args.overrides, kind=TrainConfig)
    result = run(config, restart=args.restart, dry_run=args.dry_run)
    if distributed.first():
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
