"""Tests on every Python that eagle-jax supports, where it is installed.

    nox                              # everything
    nox -s tests-3.13 -- -k tree     # one Python; what follows -- goes to pytest
    nox -s lint docs

A Python that is not installed is reported and skipped. uv makes the environments where it is there.
"""

import nox

nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Runs the tests; compiling for TPUs needs libtpu, which only `make test` installs."""
    session.install("-e", ".[test]")
    options = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    session.run("python", "-m", "pytest", *options, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Checks format, lint and types."""
    session.install("-e", ".[test]")
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the site; a broken link is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")
