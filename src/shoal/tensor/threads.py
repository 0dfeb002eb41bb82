"""One intra-op thread, so that sums keep their order on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, and with as many as before afterwards.

    With several, the order of a sum depends on how many cores there are, and threads that wait by
    spinning take the cores of whoever shares the machine. Work in parallel over peers instead (see
    `shoal.engine.executor`).

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
