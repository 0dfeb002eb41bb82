"""What peers learn: real data sets, tasks made from a key, and tasks from a user's own module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.parts.tasks.base import ModuleTask, task_of

__all__ = ["ModuleTask", "task_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from shoal.parts.tasks import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
