"""Finding benches, and running each in a process of its own."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.base.errors import ShoalError, UsageError
from shoal.lab.bench._row import Note, Row
from shoal.lab.values import near

_FOLDER = Path(__file__).parent

# One thread: with two, anything else on a core makes times swing by a factor. It must be set
# before the first import of torch, hence in the environment of a new process.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class BenchFailed(ShoalError):
    """A bench's process ended with an error."""


def names() -> tuple[str, ...]:
    """Every bench, by what it is called on the command line (`_` becomes `-`)."""
    found = (module.name for module in pkgutil.iter_modules([str(_FOLDER)]))
    return tuple(sorted(n.replace("_", "-") for n in found if not n.startswith("_")))


def title(name: str) -> str:
    """The first line of a bench's docstring, without importing it."""
    text = (_FOLDER / f"{_known(name)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or name).splitlines()[0]


def find(name: str) -> Any:
    """A bench's module, imported."""
    return importlib.import_module(f"shoal.lab.bench.{_known(name)}")


def _known(name: str) -> str:
    if name not in names():
        raise UsageError(f"no bench {name!r}; {near(name, names())}")
    return name.replace("-", "_")


def run(name: str, *, tiny: bool = False, note: Note | None = None) -> Iterator[Row]:
    """The rows of a bench as they are measured, from a new process with one thread.

    BenchFailed when that process breaks down, with the end of what it wrote to stderr.
    """
    _known(name)
    command = [sys.executable, "-m", "shoal.lab.bench", name, *(["--tiny"] if tiny else [])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **_ENVIRONMENT},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "note" in said:
                    if note is not None:
                        note(said["note"])
                else:
                    yield Row(**said)
            trouble = process.stderr.read()
        finally:
            # A caller that stops early must not leave a bench running.
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        raise BenchFailed(f"bench {name} broke down:\n{trouble.strip()[-2000:]}")
