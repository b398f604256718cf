"""The README's Python example runs as it stands, in a fresh interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_first_example_runs() -> None:
    """Catches names that only exist where something else has imported them."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    environment = {key: value for key, value in os.environ.items() if "PROMOTION" not in key}
    done = subprocess.run(
        [sys.executable, "-c", example], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 1
