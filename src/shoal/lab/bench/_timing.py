"""Timing side by side: contestants take turns, and the median of each is what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench._row import Note


@dataclass(frozen=True)
class Seconds:
    """Medians of one contestant."""

    cpu: float
    wall: float


def alternate(
    contestants: Mapping[str, Callable[[], object]], repeats: int, note: Note, per: int = 1
) -> dict[str, Seconds]:
    """Seconds of each contestant divided by `per`, after one run that does not count.

    Whatever else slows the machine down for a while slows all of them down.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, contestant in contestants.items():
            note(f"{name}, {turn} of {repeats}")
            watch = Stopwatch()
            contestant()
            if turn:
                times[name].append((watch.cpu_s / per, watch.wall_s / per))
    return {
        name: Seconds(median(cpu for cpu, _ in pairs), median(wall for _, wall in pairs))
        for name, pairs in times.items()
    }


def product_rate(repeats: int = 20) -> float:
    """Floating-point operations per CPU second of a large matrix product: what a core can do."""
    import torch

    size = 512
    a, b = torch.rand(2, size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch()
        for _ in range(4):
            torch.mm(a, b, out=out)
        best = min(best, watch.cpu_s / 4)
    return 2.0 * size**3 / best


def copy_rate(size_bytes: int, repeats: int = 20) -> float:
    """Bytes read and written per CPU second by a copy of this many."""
    import torch

    a = torch.zeros(max(1, size_bytes // 4))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch()
        for _ in range(4):
            out.copy_(a)
        best = min(best, watch.cpu_s / 4)
    return 2.0 * a.nbytes / best


def read_rate(size_bytes: int, repeats: int = 20) -> float:
    """Bytes read per CPU second by a sum over this many."""
    import torch

    a = torch.zeros(max(1, size_bytes // 4))
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch()
        a.sum()
        best = min(best, watch.cpu_s)
    return a.nbytes / best
