"""Ctrl-C ends a program with one line and status 130, whatever it was doing."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise SystemExit(130)", 130, ""),
        ("raise SystemExit(2)", 2, "left in order\n"),
        ("pass", 0, "left in order\n"),
    ],
)
def test_only_an_interrupted_program_leaves_at_once(body, status, said):
    # What Python runs at its end, where jax crashes after an interrupted compilation.
    program = "import atexit, sys; from phase2_jax.interrupt import interruptible\n"
    program += "atexit.register(lambda: sys.stderr.write('left in order\\n'))\n"
    program += f"with interruptible():\n    print('written')\n    {body}"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (status, "written\n")
    assert result.stderr == said
