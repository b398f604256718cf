"""A model directory for programs: random target and drafts, answers of every length.

Its vocabulary is the bytes and a few special tokens.
"""

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


def write(folder: Path, seed: int = 3, **changes: int) -> Path:
    """Writes `target/`, with its tokenizer, and a draft of every kind; weights keep all bits."""
    target = tiny_target(tiny_run.write_tokenizer(folder / "target"), **changes)
    models = tiny_params(target, seed)
    hf.save_target(folder / "target", models.target_config, models.target, "float32")
    for kind, draft in models.drafts.items():
        hf.save_draft(folder / kind, draft.config, draft.params, "float32")
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
