"""`python -m eagle_jax COMMAND`, the same program as the console script `eagle-jax`."""

from __future__ import annotations

from typing import NoReturn

from eagle_jax import cli, commands


def main() -> NoReturn:
    """Runs the command that the process's arguments name, and exits with its status."""
    cli.run(commands.main)


if __name__ == "__main__":
    main()
