"""Starting: `import shoal` and `shoal list`, each in a fresh process, the interpreter included."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench._row import Note, Row

_LOADED = "import sys, shoal; sys.exit('torch' in sys.modules)"


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    commands = {
        "import shoal": ([sys.executable, "-c", "import shoal"], "<= 0.3"),
        "shoal list": ([sys.executable, "-m", "shoal", "list"], "<= 0.5"),
    }
    repeats = 1 if tiny else 9
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, (command, _) in commands.items():
            note(f"{name}, {turn} of {repeats}")
            before, watch = _children_s(), Stopwatch()
            subprocess.run(command, check=True, capture_output=True)
            # The first run may still have to compile modules.
            if turn:
                times[name].append((_children_s() - before, watch.wall_s))
    for name, (_, bound) in commands.items():
        yield Row.of(f"{name}, CPU", median(cpu for cpu, _ in times[name]), "s", bound=bound)
        yield Row.of(f"{name}, wall", median(wall for _, wall in times[name]), "s", bound=bound)
    loads = subprocess.run([sys.executable, "-c", _LOADED], check=False).returncode
    yield Row.of("import shoal: loads torch (1 = yes)", float(loads), "", bound="<= 0")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
