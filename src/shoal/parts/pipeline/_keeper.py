"""Checkpoints of one part in its peer's own store: the last two, for when nothing else is left."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.kernel.peer import Peer
from shoal.parts.pipeline.base import StageState
from shoal.tensor import tree


class Keeper:
    """Keeps a part's state after every `every` updates (0 = never)."""

    def __init__(self, peer: Peer, every: int) -> None:
        self._peer = peer
        self._every = every

    def kept(self) -> tuple[int, ...]:
        """Versions that are there, newest first; the first state of all follows from its key."""
        if not self._every:
            return ()
        found = (self._peer.store.get(f"kept/{place}/head") for place in (0, 1))
        versions = {0} | {int(head[0]) for head in found if head is not None}
        return tuple(sorted(versions, reverse=True))

    async def keep(self, version: int, state: StageState) -> None:
        """Commit a state if it is time."""
        if not self._every or version % self._every:
            return
        place = version // self._every % 2
        leaves, _ = tree.flatten(state.optimizer)
        numbers = [float(version), state.scale, state.square]
        head = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        items = {f"kept/{place}/{i}": leaf for i, leaf in enumerate(leaves)}
        await self._peer.store.commit(
            {f"kept/{place}/head": head, f"kept/{place}/params": state.params, **items}
        )

    def load(self, version: int, begun: StageState) -> StageState | None:
        """The state of a version, None when it is not there; begun: the first state of all."""
        if version == 0:
            return begun
        store, place = self._peer.store, version // self._every % 2
        head = store.get(f"kept/{place}/head")
        if head is None or int(head[0]) != version:
            return None
        leaves, structure = tree.flatten(begun.optimizer)
        found = [store.get(f"kept/{place}/{i}") for i in range(len(leaves))]
        return replace(
            begun, params=store.get(f"kept/{place}/params"),
            optimizer=tree.unflatten(structure, found), scale=float(head[1]),
            square=float(head[2]),
        )  # fmt: skip
