"""The server's model with the number of its version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal.base.errors import UsageError
from shoal.tensor.types import Vector


class Versions:
    """The newest model [dim], and which version of which store it is.

    Version 0 is the initial model. `origin` names the store that counts: a server that lost its
    store begins a new one, and works that began from a model of the old one mean nothing to it.

    >>> import torch
    >>> versions = Versions(torch.zeros(2), origin=7)
    >>> versions.advance(torch.ones(2))
    >>> versions.version, versions.staleness(7, 0)
    (1, 1)
    """

    def __init__(self, params: Vector, origin: int, version: int = 0) -> None:
        self.params = params
        self.origin = origin
        self.version = version

    def knows(self, origin: int, version: int) -> bool:
        """Whether there has been such a version."""
        return origin == self.origin and 0 <= version <= self.version

    def staleness(self, origin: int, version: int) -> int:
        """How many versions have been made since then; UsageError for one that never was."""
        if not self.knows(origin, version):
            raise UsageError(
                f"versions: version {version} of store {origin}; there are 0 to {self.version} of "
                f"store {self.origin} (pull a model, and push with its version)"
            )
        return self.version - version

    def advance(self, params: Vector) -> None:
        """The next version."""
        if params.shape != self.params.shape:
            raise UsageError(
                f"versions: a model of shape {tuple(params.shape)}; need "
                f"{tuple(self.params.shape)} (give the whole vector)"
            )
        self.params = params
        self.version += 1

    def items(self) -> dict[str, Any]:
        """What the durable store must hold; `load` is the inverse."""
        count = self.version.to_bytes(8, "little") + self.origin.to_bytes(8, "little")
        return {"version": count, "params": self.params}

    @classmethod
    def load(cls, stored: Callable[[str], Any], place: Callable[[Vector], Vector]) -> Versions:
        """From a store's `get`; `place` puts the model where it belongs (see `Workload.there`)."""
        count = stored("version")
        numbers = (int.from_bytes(count[i : i + 8], "little") for i in (8, 0))
        return cls(place(stored("params")), *numbers)
