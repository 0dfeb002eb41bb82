"""Wall and CPU seconds of a stretch of code. Readings are reported; no number depends on one."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs from construction; `wall_s` and `cpu_s` (this process, all threads) at any time.

    wall_s, cpu_s: what an earlier process spent on the same.
    """

    def __init__(self, wall_s: float = 0.0, cpu_s: float = 0.0) -> None:
        self._wall = time.perf_counter() - wall_s
        self._cpu = time.process_time() - cpu_s

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._cpu
