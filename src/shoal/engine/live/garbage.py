"""Garbage collections that do not hold up a process full of libraries."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from time import perf_counter
from typing import Any

_LONG_S = 0.02

_began_s = 0.0


def keep_collections_short() -> None:
    """Set everything that exists aside, and later what made a full collection take long.

    Python looks at all objects in a full collection, and the imports of torch alone leave a few
    hundred thousand: 0.16 s of work in which a peer neither hears nor answers, which is 0.7 s on a
    machine where four others want the core. What is set aside (`gc.freeze`) is freed as before when
    nothing refers to it; only cycles among it stay. For processes that are this library's own: the
    collector belongs to the whole process.
    """
    if _watch in gc.callbacks:
        return
    gc.collect()
    gc.freeze()
    gc.callbacks.append(_watch)


def _watch(phase: str, info: Mapping[str, Any]) -> None:
    """A library that is imported while peers run makes one full collection long, and no other."""
    global _began_s
    if info["generation"] < 2:
        return
    if phase == "start":
        _began_s = perf_counter()
    elif perf_counter() - _began_s > _LONG_S:
        gc.freeze()
