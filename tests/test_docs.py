"""README.md and docs/: every Python block runs, and every command and file that they name exists.

The blocks marked `python` of a page run in order, in one namespace, as one program in a fresh
interpreter. Its working directory is empty but for links to the files of the checkout that pages
read, so a page may write files. Blocks that only show something carry another mark: `sh` for
commands, `text` for output and sketches, `json` for files.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = {"python", "sh", "text", "json"}
_BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
# Commands whose options the pages may give; the words before the first option are asked for help.
_PROGRAM = re.compile(r"(?:python -m eagle_jax(?:\.[\w.]+)?|eagle-jax(?: \w+)?|python \w+/\w+\.py)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, mark: str) -> list[tuple[int, str]]:
    """First line (from 0) and text of every block of `page` with this mark."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        first = text.count("\n", 0, match.start(3))
        if match[2].split(" ")[0] == mark:
            found.append((first, textwrap.dedent(match[3])))
    return found


def program(page: Path) -> str:
    """All Python blocks, each on the lines that it has in the page, so that errors name them."""
    lines: list[str] = []
    for first, code in blocks(page, "python"):
        lines += [""] * (first - len(lines))
        lines += code.splitlines()
    return "\n".join(lines) + "\n"


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_every_python_block_runs(page: Path, tmp_path: Path) -> None:
    """Catches examples that are older than the library, and names that only exist where something
    else has imported them."""
    script = tmp_path / f"{page.stem}_page.py"
    script.write_text(program(page), encoding="utf-8")
    (tmp_path / "eagle_jax").mkdir()
    for directory in ("configs", "train", "eagle_jax/pretrained"):
        (tmp_path / directory).symlink_to(ROOT / directory)
    # The tests' strict promotion is for the library, not for a reader's own code.
    environment = {key: value for key, value in os.environ.items() if "PROMOTION" not in key}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")  # nobody's tuning
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, f"{name(page)}:\n{done.stderr[-4000:]}"
    if page == README:
        assert float(done.stdout.splitlines()[-1]) > 1, "README's last example prints the τ"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_known_mark(page: Path) -> None:
    """Catches a block whose mark is misspelt, which would never run."""
    text = page.read_text(encoding="utf-8")
    marks = [match[2].split(" ")[0] for match in _BLOCK.finditer(text)]
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(marks)
    assert set(marks) <= MARKS


def commands() -> list[tuple[str, str, tuple[str, ...]]]:
    """Page, program and options of every command of this project that a page gives."""
    found = []
    for page in PAGES:
        for _, text in blocks(page, "sh"):
            for line in text.replace("\\\n", " ").splitlines():
                match = _PROGRAM.match(line.removeprefix("sbatch ").strip())
                if match:
                    words = shlex.split(line, comments=True)
                    options = tuple(word.split("=")[0] for word in words if word.startswith("--"))
                    found.append((name(page), match[0], options))
    return found


@functools.cache
def usage(command: str) -> str:
    words = shlex.split(command.replace("eagle-jax", "python -m eagle_jax"))
    words[0] = sys.executable
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [*words, "--help"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, f"{command} --help:\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("command", sorted({command for _, command, _ in commands()}))
def test_every_command_has_the_options_that_the_pages_give_it(command: str) -> None:
    for page, given, options in commands():
        if given == command:
            for option in options:
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", usage(command)), (
                    f"{page}: {command} has no option {option}"
                )


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    """mkdocs checks those of docs/."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing


def test_every_file_that_a_page_names_exists() -> None:
    """Catches a page that still speaks of a file that was moved."""
    places = "|".join(("benchmarks", "configs", "decode", "docs", "eagle_jax", "tests", "train"))
    named = re.compile(
        rf"(?<![\w/.-])(?:{places})/[\w./-]*\w\.(?:py|sh|yaml|sbatch|ipynb|md|jsonl(?:\.gz)?)\b"
    )
    missing = {
        (name(page), path)
        for page in PAGES
        if page.name != "log.md"  # the log tells what was, too
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    }
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
