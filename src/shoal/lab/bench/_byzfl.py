"""ByzFL in a process of its own, with the interpreter of an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

import shoal
from shoal.lab.bench._run import BenchFailed
from shoal.tensor.types import Stack

PYTHON = "SHOAL_BYZFL_PYTHON"
REASON = (
    "ByzFL is not at hand (set SHOAL_BYZFL_PYTHON to the interpreter of an environment with byzfl "
    "0.0.11 and this torch)"
)

Stages = tuple[tuple[str, dict[str, Any]], ...]
"""ByzFL's classes and their settings, one after the other."""


def python() -> str | None:
    """An interpreter with ByzFL: the one that is named, or this one."""
    named = os.environ.get(PYTHON)
    return named or (sys.executable if find_spec("byzfl") else None)


class ByzFL:
    """A context in which ByzFL's rules can be called; rows and results go through files."""

    def __init__(self, python: str, folder: Path) -> None:
        self._folder = folder
        ours = str(Path(shoal.__file__).parents[1])
        self._process = subprocess.Popen(
            [python, "-m", "shoal.lab.bench._byzfl_peer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))),
                "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            },
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def load(self, rows: Stack) -> None:
        """The rows [n, dim] that are combined from now on."""
        file = self._folder / "rows.npy"
        np.save(file, rows.numpy())
        self._ask({"load": str(file)})

    def seconds(self, stages: Stages, calls: int, **more: Any) -> tuple[float, float]:
        """CPU seconds of one of these many calls, and how many of them a copy of the rows took."""
        said = self._ask({"run": stages, "calls": calls, **more})
        return said["cpu_s"], said["copying_s"]

    def result(self, stages: Stages, **more: Any) -> torch.Tensor:
        """What the rules make of the rows."""
        file = self._folder / "result.npy"
        self._ask({"run": stages, "calls": 1, "save": str(file), **more})
        return torch.from_numpy(np.load(file))

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # Why is on stderr.
        answer = process.stdout.readline()
        if not answer:
            trouble = process.stderr.read().strip()
            raise BenchFailed(f"byzfl: its process ended:\n{trouble[-2000:]}")
        return json.loads(answer)
