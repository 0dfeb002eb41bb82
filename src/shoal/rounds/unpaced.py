"""A round-based strategy without common rounds, for `event` and `live`: nobody waits for anybody.

Each peer takes a turn once per period, on its own clock: local work, a message to every neighbour,
then the combination of what has come in since its last turn, and `apply`. A message is used once,
and of two from one neighbour that of the later turn. Whoever is slow, lost or dead is missing from
what the others combine, and costs them no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import Leaving, UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.rounds import method as phases
from shoal.rounds.exchange import Hop
from shoal.rounds.method import Method
from shoal.rounds.strategy import Strategy
from shoal.rounds.transform import Payload
from shoal.rounds.workload import Workload
from shoal.tensor.types import Mask, Vector
from shoal.wire.message import Packed, message

TYPICAL_FLOPS_PER_S = 1e8
"""Without a period of its own, a turn is as frequent as a machine of this speed can take four."""


@message(checked=True)
class News:
    """What a peer has to say in a turn. weight: None when the strategy gives none. Checked,
    since what was damaged must not be averaged."""

    turn: int
    payload: Packed
    weight: float | None
    extra: dict[str, Tensor]


@dataclass(frozen=True)
class Nobody:
    """An exchange that joins nobody: who hears whom is up to messages, not to rounds."""

    peers: int

    @property
    def hub(self) -> None:
        return None

    def active(self, round: int, seed: int) -> Mask:
        """Everybody works in every turn."""
        return torch.ones(self.peers, dtype=torch.bool, device="cpu")

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """No waves."""
        return ()


@dataclass(frozen=True, eq=False)
class Unpaced:
    """A strategy in turns of `period_s` (0 = four times a typical turn's work, at least 0.2 s).

    A run of `rounds` lasts that many periods; a slow peer takes fewer turns. Mixing weights of a
    topology belong to rounds in which everybody is heard and are not used: rows count by the
    weights that parcels carry, or equally. Turns of a strategy are numbered like rounds. Each turn
    records "used": how many news went into it, and in the label `news` whose, of which turn.
    """

    strategy: Strategy
    period_s: float = 0.0
    method: Method | None = field(default=None, repr=False)
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.period_s >= 0:
            raise UsageError(f"Unpaced: period_s={self.period_s}; need 0 or more")

    def bind(self, workload: Workload) -> Unpaced:
        """The same with its task; a horizon in turns, or in seconds."""
        rounds = workload.rounds
        if rounds is None and not self.period_s:
            raise UsageError("Unpaced: neither rounds nor period_s is set (set one of them)")
        if rounds is None:
            assert workload.seconds is not None
            rounds = max(1, int(workload.seconds / self.period_s))
        method = Method(
            self.strategy, workload.task, Nobody(workload.task.peers), workload.aggregator,
            workload.transform, rounds, self.period_s or 1.0, workload.seed,
            report_every=workload.report_every, independent=workload.independent,
        )  # fmt: skip
        if not self.period_s:
            length = 4.0 * max(method.work_cost.flops / TYPICAL_FLOPS_PER_S, 0.05)
            method = replace(method, round_s=length)
        return replace(self, method=method, seconds=workload.seconds)

    async def run(self, peer: Peer) -> None:
        assert self.method is not None
        own = _Own(self.method, peer)
        end_s = self.method.rounds * self.method.round_s
        end_s = end_s if self.seconds is None else min(end_s, self.seconds)
        try:
            async with peer.tasks() as group:
                listening = group.start(_listen(peer, own, end_s))
                await _turns(peer, own, end_s)
                listening.cancel()
        except Leaving:
            return


async def _listen(peer: Peer, own: _Own, end_s: float) -> None:
    """Keep the latest news of each neighbour; what a newer one has overtaken is of no use."""
    last: dict[int, int] = {}
    while (heard := await peer.recv(News, deadline=end_s)) is not None:
        told, source = heard.message, int(heard.source)
        if told.turn > last.get(source, -1):
            own.news[source], last[source] = told, told.turn


async def _turns(peer: Peer, own: _Own, end_s: float) -> None:
    method = own.method
    # A random phase keeps periods from marching in step; it is a draw, so it is repeatable.
    start = method.round_s * peer.uniform("phase")
    turn = max(own.turn, int(peer.now() / method.round_s))
    while turn < method.rounds and peer.now() < end_s:
        await peer.sleep_until(start + turn * method.round_s)
        # Who could not keep up leaves out the turns that it has missed.
        turn = max(turn, int((peer.now() - start) / method.round_s))
        if turn >= method.rounds:
            break
        peer.enter_round(turn)
        key = method.keys(turn)[peer.id]
        own.state, own.codec, payload, sent, weight, extra = await peer.compute(
            phases.work, own.state, own.codec, own.shard, key, static=(method, turn),
            cost=method.work_cost,
        )  # fmt: skip
        given = None if weight is None else float(weight)
        news = News(turn, Packed(payload), given, dict(extra))
        for neighbor in peer.neighbors:
            await peer.send(PeerId(neighbor), news)
        used = " ".join(f"{p}.{own.news[p].turn}" for p in peer.neighbors if p in own.news)
        heard = own.heard(payload, weight, extra, peer.neighbors)
        own.state, own.params = await peer.compute(
            phases.conclude, own.state, sent, *heard, sent, own.shard, key, static=(method, turn),
            cost=method.combine_cost(len(heard[0])),
        )  # fmt: skip
        if method.reports(turn):
            peer.record("params", own.params)
            for name, value in phases.report(own.state, method).items():
                peer.record(name, float(value))
        turn += 1
        stored = phases.freeze((own.state, own.codec))
        await peer.store.commit({**stored, "turn": turn.to_bytes(8, "little")})
        peer.record("used", len(used.split()), news=used)
    peer.record("params", own.params)


class _Own:
    """What one peer keeps between turns."""

    def __init__(self, method: Method, peer: Peer) -> None:
        self.method = method
        self.shard = method.shard(peer.id)
        initial = method.start(peer.id)
        self.state = method.strategy.init(initial)
        self.codec = method.transform.init(initial)
        self.news: dict[int, News] = {}
        done = peer.store.get("turn")
        self.turn = 0 if done is None else int.from_bytes(done, "little")
        if done is not None:
            self.state, self.codec = phases.thaw((self.state, self.codec), peer.store.get)
        self.params: Vector = method.strategy.params(self.state)

    def heard(
        self, payload: Payload, weight: Tensor | None, extra: Mapping[str, Tensor],
        neighbors: Sequence[PeerId],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Arguments of `phases.conclude`: a slot per neighbour, and the news are used up."""
        news, self.news = self.news, {}
        slots = [news.get(int(neighbor)) for neighbor in neighbors]
        device = self.params.device
        payloads = tuple(payload if each is None else self._open(each) for each in slots)
        mask = torch.tensor([True, *(each is not None for each in slots)], device=device)
        taught = None
        if weight is not None:
            rows = [float(weight), *(0.0 if s is None else float(s.weight or 0.0) for s in slots)]
            taught = torch.tensor(rows, dtype=torch.float64, device=device)
        silent = {name: torch.zeros_like(value) for name, value in extra.items()}
        extras = (dict(extra), *(silent if each is None else each.extra for each in slots))
        return payloads, mask, None, taught, extras if extra else ()

    def _open(self, news: News) -> Payload:
        content = news.payload.content
        if isinstance(content, bytes | bytearray | memoryview):
            return self.method.transform.unpack(content)
        return content  # type: ignore[return-value]
