"""What peers learn: real data sets, tasks made from a key, and tasks from a user's own module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.parts.tasks._flow import Flow, Routing
    from shoal.parts.tasks._splits import Split, shards_of
    from shoal.parts.tasks.base import ModuleTask, task_of

_PLACES = {
    "Flow": "_flow", "ModuleTask": "base", "Routing": "_flow", "Split": "_splits",
    "shards_of": "_splits", "task_of": "base",
}  # fmt: skip
__all__ = ["Flow", "ModuleTask", "Routing", "Split", "shards_of", "task_of"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
