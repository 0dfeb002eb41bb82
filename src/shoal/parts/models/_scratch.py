"""Memory that is used again by every pass.

Fresh memory costs a page fault per 4 KB at first touch, which is more than the arithmetic on it:
reusing it made a training step of a small convolutional network twice as fast.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KEEP_BYTES = 64 << 20
"""A thread keeps at most this much between passes; larger blocks go back to the system."""

_ALIGN_BYTES = 64


class Scratch:
    """A stack of tensors on one block of memory; everything on it is void after the pass.

    Only the CPU needs it: other devices have caching allocators of their own.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._peak = 0

    def empty(self, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor with the dtype and device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        start = self._used
        self._used += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        self._peak = max(self._peak, self._used)
        if self._used > self._block.numel():
            return like.new_empty(shape)
        return self._block[start : start + size].view(like.dtype).view(shape)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """What is taken inside is free again afterwards."""
        mark = self._used
        try:
            yield
        finally:
            self._used = mark

    def _finish(self) -> None:
        if self._block.numel() < self._peak <= KEEP_BYTES:
            # The first pass of a kind ran on fresh memory and has told how much it takes.
            self._block = torch.empty(self._peak, dtype=torch.uint8)


_local = threading.local()


@contextmanager
def scratch() -> Iterator[Scratch]:
    """This thread's memory for one pass; a pass inside a pass gets memory of its own."""
    pool: list[Scratch] = getattr(_local, "pool", None) or []
    _local.pool = pool
    memory = pool.pop() if pool else Scratch()
    try:
        with memory.borrowed():
            yield memory
    finally:
        memory._finish()
        pool.append(memory)
