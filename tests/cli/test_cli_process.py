"""The console script as a process: exit codes, speed, no torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("catalogue")


def process(*arguments: str, module: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_list_is_fast_even_with_a_hundred_systems(catalogue: Path) -> None:
    text = (catalogue / "fakes" / "alpha.py").read_text()
    for index in range(100):
        more = text.replace('name="alpha"', f'name="alpha-{index}"')
        (catalogue / "fakes" / f"more_{index}.py").write_text(more)
    process("list")  # compiles what is not compiled yet
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = process("list", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    names = [json.loads(line)["name"] for line in found.stdout.splitlines()]
    assert found.returncode == 0
    assert {"alpha", "beta-x", "alpha-0", "alpha-99"} <= set(names)
    # CPU seconds, since other work on the machine stretches the wall clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_errors_and_closed_pipes(catalogue: Path) -> None:
    wrong = process("show", "alhpa")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("error: no system 'alhpa'; did you mean 'alpha'?")
    (catalogue / "fakes" / "broken.py").write_text("SYSTEM = 3\n")
    broken = process("list")
    assert broken.returncode == 2
    assert "broken.py:1: SYSTEM must be a literal System(...)" in broken.stderr
    (catalogue / "fakes" / "broken.py").unlink()
    # `list` goes without the option parser, and ends the same.
    for words in (["show", "alpha"], ["list"], ["list", "--json"], ["list", "--family", "fakes"]):
        reader, writer = os.pipe()
        os.close(reader)
        closed = subprocess.run(
            [sys.executable, "-m", "shoal", *words],
            stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        os.close(writer)
        assert (closed.returncode, closed.stderr) == (0, "")
