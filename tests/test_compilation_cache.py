"""Compiled programs are kept between starts: where, how many, and never at the user's cost."""

import json
import os
import subprocess
import sys
import time
import zlib

import pytest

from eagle_jax import compilation_cache

ASK = """
import sys, jax
{before}
from eagle_jax import compilation_cache
found = compilation_cache.enable()
print(found, jax.config.jax_compilation_cache_dir)
"""


def enabled(before="", **env):
    """What `enable` returns in a process of its own, and JAX's directory then."""
    around = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    around |= {"JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(before=before)],
        capture_output=True,
        text=True,
        env=around,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_users_cache(tmp_path) -> None:
    ours = str(tmp_path / "eagle_jax" / "xla" / compilation_cache._machine())
    assert enabled(XDG_CACHE_HOME=str(tmp_path)) == [ours, ours]
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    assert enabled(**home)[0].startswith(str(tmp_path / ".cache" / "eagle_jax" / "xla"))


def test_settings_of_the_user_win(tmp_path) -> None:
    xdg = {"XDG_CACHE_HOME": str(tmp_path)}
    assert enabled(**xdg, JAX_COMPILATION_CACHE_DIR="/x") == ["None", "/x"]
    update = "jax.config.update('jax_compilation_cache_dir', '/y')"
    assert enabled(update, **xdg) == ["None", "/y"]
    assert enabled("jax.config.update('jax_enable_compilation_cache', False)", **xdg)[0] == "None"
    for word in ("off", "OFF", "0"):
        assert enabled(**xdg, EAGLE_JAX_COMPILATION_CACHE=word) == ["None", "None"]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "eagle_jax").write_text("a file, not a directory")
    assert enabled(XDG_CACHE_HOME=str(tmp_path)) == ["None", "None"]


def generate(cache, **env):
    """The real command: its JSON and the CPU seconds that it took."""
    around = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    around |= {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": "", **env}
    command = [sys.executable, "-m", "eagle_jax", "generate", "hi", "--max-new-tokens", "8"]
    before = os.times()
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=around, timeout=300
    )
    after = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    seconds = after.children_user + after.children_system
    return json.loads(done.stdout), seconds - before.children_user - before.children_system


def test_the_second_start(tmp_path) -> None:
    """It does not compile: at most 4 s of CPU, where the first takes more. Cut entries heal."""
    first, cold = generate(tmp_path)
    second, warm = generate(tmp_path)
    assert second["text"] == first["text"] and second["rounds"] == first["rounds"]
    entries = sorted(tmp_path.rglob("*-cache"))
    assert entries and warm < cold and warm < 4.0
    # As a full disk leaves it. JAX alone would compile this program at every start from now on.
    entries[0].write_bytes(entries[0].read_bytes()[:1000])
    assert generate(tmp_path)[0]["text"] == first["text"]
    assert sorted(tmp_path.rglob("*-cache")) == entries
    assert not any(compilation_cache._cut(path.read_bytes()) for path in entries)


def entry(folder, name, size, age):
    path = folder / f"{name}-cache"
    path.write_bytes(zlib.compress(os.urandom(size)))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_bounded(tmp_path) -> None:
    """The entries that were not used for longest go, whatever machine they are of."""
    for name in "ab":
        (tmp_path / name).mkdir()
    old = entry(tmp_path / "a", "old", 1000, 300)
    middle = entry(tmp_path / "b", "middle", 1000, 200)
    young = entry(tmp_path / "a", "young", 1000, 100)
    other = tmp_path / "a" / "notes"
    other.write_bytes(bytes(10_000))
    compilation_cache.prune(tmp_path, max_bytes=2500)
    assert [path.exists() for path in (old, middle, young, other)] == [False, True, True, True]


def test_cut_entries(tmp_path) -> None:
    """Looked at once, when they are new."""
    good, cut, empty = (entry(tmp_path, name, 1000, 0) for name in ("good", "cut", "empty"))
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    compilation_cache.prune(tmp_path)
    assert [path.exists() for path in (good, cut, empty)] == [True, False, False]
    late = entry(tmp_path, "late", 1000, 3600)
    late.write_bytes(late.read_bytes()[:-1])
    os.utime(late, (1, 1))
    compilation_cache.prune(tmp_path)
    assert late.exists()


@pytest.mark.parametrize("data", [b"anything", zlib.compress(b"x") + b"more"])
def test_unknown_formats_stay(data) -> None:
    assert not compilation_cache._cut(data)


def test_several_processes(tmp_path) -> None:
    """Two first starts at once: the same text, whole entries, nothing said."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    code += "import test_compilation_cache as t; print(t.generate(sys.argv[1])[0]['text'])"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    (one, err), (two, more) = (process.communicate(timeout=300) for process in both)
    assert one == two != "" and err == more == ""
    assert not any(compilation_cache._cut(path.read_bytes()) for path in tmp_path.rglob("*-cache"))
