"""Memory that stays with the process while an engine runs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Names and defaults of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_BYTES, _DEFAULT_MMAPS = 128 << 10, 65_536
_NEVER_TRIM = (1 << 31) - 1

_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Freed blocks are used again inside, and go back to the system afterwards.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed. A temporary of that
    size, such as the parameters of a thousand peers, then costs a page fault for each 4 KiB: seven
    times what it takes to add two such vectors. The setting is the whole process's and changes no
    number; where there is another allocator nothing happens.
    """
    global _users
    allocator = _glibc()
    if allocator is None:
        yield
        return
    _users += 1
    allocator.mallopt(_MMAP_MAX, 0)
    allocator.mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            allocator.mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
            allocator.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
            allocator.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    known = hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim")
    return library if known else None
