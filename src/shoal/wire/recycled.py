"""Memory for long frames that is used again when nobody holds it any more.

Fresh pages cost the kernel as much as receiving the bytes that go into them, and an allocator gives
pieces of a megabyte back to the kernel at once.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEAST_BYTES = 1 << 16
"""Shorter pieces come from the allocator, which keeps those itself."""
MOST_BYTES = 1 << 27
"""Idle memory that is kept, in all."""
_STEP_BYTES = 1 << 16


class Recycled:
    """Pieces of memory by size. A piece is free again once the array that `take` gave, and all
    views of it, are gone; whoever drops the last one may be in any thread.

    >>> recycled = Recycled()
    >>> first = recycled.take(100_000)
    >>> place = first.__array_interface__["data"]
    >>> del first
    >>> recycled.take(100_100).__array_interface__["data"] == place
    True
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.idle_bytes = 0
        self._most_bytes = most_bytes
        self._free: dict[int, list[np.ndarray]] = {}
        # Re-entrant: a piece may be freed by the garbage collector in the middle of `take`.
        self._lock = threading.RLock()

    def take(self, size: int) -> np.ndarray:
        """uint8 [size] or a little more, with any content; untouched if it is new."""
        import numpy as np  # a process that only looks after others need not load it

        size = -(-size // _STEP_BYTES) * _STEP_BYTES
        with self._lock:
            free = self._free.get(size)
            if free:
                memory = free.pop()
                self.idle_bytes -= size
            else:
                memory = np.empty(size, dtype=np.uint8)
        # An array of its own for every use: it lives as long as anything that refers to it.
        lease = memory.view()
        weakref.finalize(lease, self._give, memory).atexit = False
        return lease

    def _give(self, memory: np.ndarray) -> None:
        size = memory.nbytes
        with self._lock:
            if self.idle_bytes + size > self._most_bytes:
                # What is of other sizes was needed longer ago.
                self._free = {kept: free for kept, free in self._free.items() if kept == size}
                self.idle_bytes = size * len(self._free.get(size, ()))
                if self.idle_bytes + size > self._most_bytes:
                    return
            self._free.setdefault(size, []).append(memory)
            self.idle_bytes += size
