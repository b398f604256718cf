"""A model directory for programs: random pair, bytes for a vocabulary, answers of every length."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

import tiny_run

from eagle_jax.checkpoint import hf
from eagle_jax.testing import tiny_params, tiny_target

ROOT = Path(__file__).parent.parent


def write(folder: Path, seed: int = 3) -> Path:
    """Writes `target/`, with its tokenizer, and `draft/`; weights keep all their bits."""
    pair = tiny_params(tiny_target(tiny_run.write_tokenizer(folder / "target")), seed)
    assert pair.draft is not None and pair.draft_config is not None
    hf.save_target(folder / "target", pair.target_config, pair.target, "float32")
    hf.save_draft(folder / "draft", pair.draft_config, pair.draft, "float32")
    return folder


def run_program(path: str, *arguments: str, stdin: str = "") -> str:
    """Runs a program of the repository in this process; returns what it printed.

    Here its compiled functions are shared with other tests, and it obeys the tests' strict rules.
    """
    file = ROOT / path
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(file), *arguments]),
        mock.patch.object(sys, "path", [str(file.parent), *sys.path]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
    ):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{path} ended with {end.code}: {out.getvalue()}"
    return out.getvalue()
