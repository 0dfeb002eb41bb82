"""Byzantine peers of one run and what they know together.

With `Knowledge.OWN` an attacker works from its own vector, on any engine. With `Knowledge.ALL` it
acts once the round's last honest vector exists; that is possible in simulation only, where this
object is shared by the programs of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from shoal.base.units import to_ns
from shoal.kernel.runtime import Runtime
from shoal.kernel.waits import Wait
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.method import Method
from shoal.tensor import keyed
from shoal.tensor.types import Mask, Stack, Vector

FALLBACK = 0.1
"""With honest peers missing, an omniscient attack acts this part of a round before its deadline."""


@dataclass(frozen=True)
class Sides:
    """Who is who in one hop of one round: ids in ascending order."""

    honest: tuple[int, ...]
    byzantine: tuple[int, ...]


def craft(
    methods: Sequence[Method], round: int, hop: int, sides: Sequence[Sides], honest: Stack,
    own: Stack,
) -> Stack:  # fmt: skip
    """What the Byzantine peers send: [worlds, byzantine, dim] or [worlds, honest, byzantine, dim].

    One method and its sides for each world, all of one size; honest [worlds, honest, dim]; own
    [worlds, byzantine, dim]. The same for every engine.
    """
    attack = methods[0].attack
    assert attack is not None
    device = own.device
    names = [keyed.key_of(m.seed, "attack", round, hop) for m in methods]
    key = torch.stack(names).to(device, non_blocking=True)
    if attack.knowledge is Knowledge.OWN:
        # Each attacker sees itself alone: one world per attacker.
        own = own.unsqueeze(-2)
        ids = torch.tensor([side.byzantine for side in sides], device="cpu")
        ids = ids.to(device, non_blocking=True)
        return attack(View(own, own, round), keyed.fold(key.unsqueeze(-1), ids)).squeeze(-2)
    heard = torch.stack([in_hand(m, round, hop, s) for m, s in zip(methods, sides, strict=True)])
    heard = heard.to(device, non_blocking=True)

    def rule(candidate: Stack) -> Stack:
        return outcome(methods[0], honest, candidate, heard)

    return attack(View(honest, own, round, rule), key)


def in_hand(method: Method, round: int, hop: int, sides: Sides) -> Mask:
    """Whose vectors each honest peer will use, the own one first of all: bool [honest, n].

    Columns are the honest peers, then the Byzantine ones. Losses are not foreseen.
    """
    wave = method.waves(round)[hop]
    columns = {peer: place for place, peer in enumerate((*sides.honest, *sides.byzantine))}
    heard = torch.eye(len(sides.honest), len(columns), dtype=torch.bool, device="cpu")
    pairs = [
        (row, columns[source])
        for row, peer in enumerate(sides.honest)
        for source in wave.expected[peer]
        if source in columns
    ]
    if pairs:
        rows, places = zip(*pairs, strict=True)
        heard[list(rows), list(places)] = True
    return heard


def outcome(method: Method, honest: Stack, byzantine: Stack, heard: Mask) -> Stack:
    """What each honest peer would hold [..., honest, dim] if no message got lost.

    heard: bool [..., honest, honest + byzantine]. A rule that offers `everyone` is asked as if
    everybody heard everybody, which costs one evaluation in place of one per receiver, unless it
    works around the receiver's own vector and offers `among`.
    """
    count = honest.shape[-2]
    byzantine = byzantine.to(honest.dtype).expand(*honest.shape[:-2], *byzantine.shape[-2:])
    rows = torch.cat((honest, byzantine), -2)
    total = rows.shape[-2]
    mask = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    everyone = getattr(method.aggregator, "everyone", None)
    if getattr(method.aggregator, "centered", False) and hasattr(method.aggregator, "among"):
        whole = torch.eye(total, dtype=torch.bool, device=rows.device)
        whole = whole.expand(*heard.shape[:-2], total, total).clone()
        whole[..., :count, :] = heard
        return method.aggregator.among(rows, whole)[..., :count, :]  # type: ignore[attr-defined]
    if everyone is not None:
        return everyone(rows, mask)[..., :count, :]
    # Row i of `order` is receiver i's view: its own vector first.
    order = torch.tensor(
        [[i, *range(i), *range(i + 1, total)] for i in range(count)], device="cpu"
    ).to(rows.device, non_blocking=True)
    center = rows[..., :count, :]
    return method.aggregator(
        rows[..., order, :], mask=heard.take_along_dim(order.expand(heard.shape), -1),
        center=center,
    )  # fmt: skip


class Adversary:
    """Collects the vectors of a round and wakes the Byzantine peers when all are there."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._byzantine = set(method.byzantine)
        self._rounds: dict[tuple[int, int], _Collected] = {}

    @property
    def omniscient(self) -> bool:
        attack = self._method.attack
        return attack is not None and attack.knowledge is Knowledge.ALL

    def offer(self, round: int, hop: int, peer: int, vector: Vector) -> None:
        """A peer's honest vector of this hop now exists."""
        if self.omniscient:
            collected = self._of(round, hop)
            collected.vectors[peer] = vector
            if collected.vectors.keys() >= collected.awaited:
                for wait in collected.waits:
                    wait.resolve(None)

    async def craft(
        self, peer: Runtime, round: int, hop: int, own: Vector, receivers: Sequence[int]
    ) -> dict[int, Vector]:
        """What this Byzantine peer sends to each receiver."""
        method = self._method
        if not self.omniscient:
            index = method.byzantine.index(peer.id)
            stack = own.expand(len(method.byzantine), own.shape[-1])
            sides = [Sides((), method.byzantine)]
            vector = craft([method], round, hop, sides, stack[None, :0], stack[None])[0, index]
            return dict.fromkeys(receivers, vector)
        self.offer(round, hop, peer.id, own)
        collected = self._of(round, hop)
        hops = len(method.waves(round))
        latest = method.deadline(round, hop, hops) - FALLBACK * method.round_s / hops
        if not collected.vectors.keys() >= collected.awaited:
            wait = Wait(peer.ready)
            collected.waits.append(wait)
            peer.host.set_timer(peer, to_ns(latest), wait)
            await wait
        if collected.result is None:
            collected.result = collected.craft(method, round, hop, self._byzantine)
        return collected.vectors_for(peer.id, receivers, self._method)

    def _of(self, round: int, hop: int) -> _Collected:
        found = self._rounds.get((round, hop))
        if found is None:
            on = self._method.active(round).tolist()
            found = self._rounds[round, hop] = _Collected({p for p, a in enumerate(on) if a})
            for old in [k for k in self._rounds if k[0] < round - 4]:
                del self._rounds[old]
        return found


class _Collected:
    """One hop of one round."""

    def __init__(self, awaited: set[int]) -> None:
        self.awaited = awaited
        self.vectors: dict[int, Vector] = {}
        self.waits: list[Wait] = []
        self.result: Any = None
        self.order: list[int] = []
        self.honest: list[int] = []

    def craft(self, method: Method, round: int, hop: int, byzantine: set[int]) -> Stack:
        self.honest = sorted(p for p in self.vectors if p not in byzantine)
        self.order = sorted(p for p in self.vectors if p in byzantine)
        own = torch.stack([self.vectors[p] for p in self.order])
        if not self.honest:
            return own
        honest = torch.stack([self.vectors[p] for p in self.honest])
        sides = Sides(tuple(self.honest), tuple(self.order))
        return craft([method], round, hop, [sides], honest[None], own[None])[0]

    def vectors_for(self, peer: int, receivers: Sequence[int], method: Method) -> dict[int, Vector]:
        index = self.order.index(peer)
        if self.result.dim() == 2:
            return dict.fromkeys(receivers, cast("Vector", self.result[index]))
        # Equivocation: a row per honest receiver; other attackers get the own row's first.
        places = {p: i for i, p in enumerate(self.honest)}
        result: Stack = self.result
        return {r: result[places.get(r, 0), index] for r in receivers}
