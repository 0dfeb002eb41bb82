"""Wall and CPU seconds of a stretch of code. Readings are reported, never acted upon."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs from construction; `wall_s` and `cpu_s` (this process, all threads) at any time."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._cpu
