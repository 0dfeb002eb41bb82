"""One intra-op thread, so that sums keep their order on every machine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "OMP_NUM_THREADS"
_lock = threading.Lock()
_inside = 0
_before: str | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, and with as many as before afterwards.

    With several, the order of a sum depends on how many cores there are, and threads that wait by
    spinning take the cores of whoever shares the machine. Work in parallel over peers instead (see
    `shoal.engine.executor`).

    It does not load torch. Where torch is loaded only inside, it begins with one thread, and goes
    on with one afterwards.

    >>> import torch
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    if "torch" not in sys.modules:
        _enter()
        try:
            yield
        finally:
            _leave()
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _enter() -> None:
    """Tell a torch that is loaded from here on; threads may be inside at the same time."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = os.environ.get(_VARIABLE)
            os.environ[_VARIABLE] = "1"
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside:
            return
        if _before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = _before
