"""Programs end with one line and the right status."""

import subprocess
import sys

import pytest

from eagle_jax import cli


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("size=0: give 1"), 2, "error: size=0: give 1\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "error: a: No such file\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv("EAGLE_JAX_DEBUG", raising=False)
    with pytest.raises(SystemExit) as info:
        cli.run(raising(error))
    assert info.value.code == status
    assert capsys.readouterr().err == line


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("EAGLE_JAX_DEBUG", "1")
    with pytest.raises(ValueError, match="x"):
        cli.run(raising(ValueError("x")))


def test_other_errors_are_bugs():
    with pytest.raises(TypeError):
        cli.run(raising(TypeError("x")))


@pytest.mark.parametrize(("result", "code"), [(None, None), (3, 3)])
def test_status(result, code):
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: result)
    assert info.value.code == code


def test_a_closed_pipe_is_quiet():
    program = "from eagle_jax import cli; cli.run(lambda: print('x' * 10**6))"
    shell = f'"{sys.executable}" -c "{program}" | head -c 1'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("x", "")
