"""Programs that run others."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from eagle_jax import jobs

ROOT = Path(__file__).parent.parent


def job(folder: Path, name: str, source: str) -> jobs.Job:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    return folder / f"{name}.log", [str(path)]


def test_in_turn_until_one_fails(tmp_path, capfd) -> None:
    """Catches a program that is begun after one that failed."""
    first = job(tmp_path, "first", "print('one')")
    second = job(tmp_path, "second", "import sys; sys.exit(7)")
    third = job(tmp_path, "third", "print('three')")
    jobs.run(first)
    with pytest.raises(SystemExit) as end:
        jobs.run(first, second, third)
    assert end.value.code == 7
    said = capfd.readouterr().out.splitlines()
    assert said.count("one") == 2 and "three" not in said and not list(tmp_path.glob("*.log"))
    jobs.run()


def test_at_once(tmp_path, capfd) -> None:
    """Catches programs that wait for each other, and a failure that is told before all ended."""
    meet = """
        import sys, time
        from pathlib import Path
        here, other = Path({0!r}), Path({1!r})
        here.touch()
        while not other.exists():
            time.sleep(0.01)
        print("progress", file=sys.stderr)
        sys.exit({2})
    """
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    made = [
        job(tmp_path, "good", meet.format(*places, 0)),
        job(tmp_path, "bad", meet.format(*places[::-1], 3)),
    ]
    with pytest.raises(SystemExit) as end:
        jobs.run(*made, together=True)
    assert end.value.code == 3
    assert f"{tmp_path}/bad.log: status 3; the file says why" in capfd.readouterr().err
    assert {log.read_text() for log, _ in made} == {"progress\n"}


@pytest.mark.parametrize("together", [False, True])
def test_a_signal_reaches_those_that_run(tmp_path, together: bool) -> None:
    """Catches trainings that go on alone, and then beside those of the next start."""
    saving = """
        import signal, sys, time
        from pathlib import Path
        def save(number, frame):
            Path({0!r}).write_text("saved")
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        Path({1!r}).touch()
        time.sleep(60)
    """
    names = ["a", "b"][: 1 + together]
    made = [
        job(tmp_path, name, saving.format(str(tmp_path / name), str(tmp_path / f"{name}.up")))
        for name in names
    ]
    source = (
        f"from pathlib import Path, PosixPath\nfrom eagle_jax import jobs\njobs.run(*{made!r}, "
    )
    main = job(tmp_path, "main", source + f"together={together})")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *main[1]], env=environment)
    while not all((tmp_path / f"{name}.up").exists() for name in names):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert all((tmp_path / name).read_text() == "saved" for name in names)
