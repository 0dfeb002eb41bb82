"""The rota of slow tests: each turn begins elsewhere, and none takes much longer than allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "slow_tests.py"
TESTS = """
import time
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_slow(number):
    time.sleep({seconds})
    assert number != {bad}

def test_quick():
    raise AssertionError("not a slow one")

@pytest.mark.slow
@pytest.mark.gpu
def test_gpu():
    raise AssertionError("needs a device")
"""


def turn(
    folder: Path, number: int, limit_s: float, bad: int = -1, seconds: float = 0.0
) -> tuple[int, list[int], str]:
    """(exit code, which tests ran, the last line)."""
    (folder / "test_some.py").write_text(TESTS.format(bad=bad, seconds=seconds))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: x\n    gpu: x\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--turn", str(number), "--limit", str(limit_s), str(folder)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    ran = [int(line[-2]) for line in lines if line.startswith(f"turn {number}: test_some")]
    return done.returncode, ran, lines[-1]


def test_all_have_their_turn(tmp_path: Path) -> None:
    code, ran, last = turn(tmp_path, 10, limit_s=60.0)
    assert (code, ran) == (0, [4, 5, 0, 1, 2, 3])
    assert last == "turn 10: 6 slow tests run, 0 left for other turns (60 s a turn)"


def test_the_time_is_limited_and_a_failure_is_told(tmp_path: Path) -> None:
    code, ran, last = turn(tmp_path, 3, limit_s=0.5, bad=4, seconds=0.3)
    assert code == 1
    assert ran == [3, 4]
    assert "2 slow tests run, 4 left" in last
    assert turn(tmp_path, 5, limit_s=0.1, bad=4, seconds=0.2)[:2] == (0, [5])
