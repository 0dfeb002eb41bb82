"""Asynchronous learning as one peer program: a server and its clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shoal.base.errors import Leaving, UsageError, WireError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
from shoal.parts.asynchronous.local import Work, perform
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.rule import Rule
from shoal.parts.asynchronous.server import FAREWELLS, Server
from shoal.parts.asynchronous.worker import Worker
from shoal.rounds.workload import Workload
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops
from shoal.tensor.types import Vector
from shoal.wire.message import Packed


@dataclass(frozen=True)
class Terms:
    """How clients and their server deal with each other.

    server: which peer it is; its data is not used. patience_s: what was not answered is said again
    after that long; give_up_s: without any answer a client stops after that long, and a server to
    which no work and no new request comes after twice that (make it longer than the longest work
    and rest). ties: calls of the same moment are handled in the order of clients, not of messages.
    """

    server: int = 0
    patience_s: float = 5.0
    give_up_s: float = 120.0
    ties: bool = False

    def __post_init__(self) -> None:
        check_positive("terms", self, "patience_s", "give_up_s", finite=True)
        if self.server < 0:
            raise UsageError(f"terms: server={self.server}; need a peer's number")


class Pace(Protocol):
    """How long works take in virtual time; hashable settings. On real machines they take what they
    take."""

    def seconds(self, client: int, number: int, steps: int) -> float:
        """Of so many steps of a client's work `number`, on the median device."""
        ...


@dataclass(frozen=True)
class Even:
    """Every local step takes `step_s`, at every client."""

    step_s: float

    def seconds(self, client: int, number: int, steps: int) -> float:
        return self.step_s * steps


@dataclass(frozen=True, eq=False)
class Learning:
    """The program: peer `terms.server` keeps the model, all others are clients.

    rule: how works become versions; a run of `rounds` makes as many versions. work: what a client
    hands in; habits: when, and how many local steps. pace None: as many seconds as the device needs
    for the operations that are counted. A class with settings makes one in its `bind(workload)`.

    The server records "params" with every version that is to be reported, and for each version
    "applied" with the names of its works and how late each was, and "staleness", the mean of that;
    at its end how many works were `works_taken`, `works_applied`, ... (see `audit`). Clients end
    with the last model, too.

    >>> from shoal.parts import find
    >>> from shoal.parts.asynchronous.buffered import Buffered
    >>> from shoal.parts.asynchronous.local import Displacement
    >>> task = find("tasks", "digits")(peers=3, hidden=())
    >>> workload = Workload(task, find("aggregate", "mean")(),
    ...     find("transform", "identity")().bind(task.spec), 10, None, seed=0)
    >>> work = Displacement(find("optimise", "sgd")(lr=0.1))
    >>> Learning(workload, Buffered(size=2), work, Habits(low=5)).step_cost.flops > 0
    True
    """

    workload: Workload
    rule: Rule
    work: Work
    habits: Habits = field(default_factory=Habits)
    pace: Pace | None = None
    terms: Terms = field(default_factory=Terms)
    initial: Vector = field(init=False)
    step_cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        peers = self.workload.task.peers
        if peers < 2 or self.terms.server >= peers:
            raise UsageError(
                f"asynchronous learning: {peers} peers with server {self.terms.server}; need the "
                "server and at least one client (raise peers)"
            )
        object.__setattr__(self, "initial", self.workload.initial)
        object.__setattr__(self, "step_cost", self._step_cost())

    def clients(self, roster: Sequence[int]) -> tuple[int, ...]:
        """Everybody but the server, ascending."""
        return tuple(sorted(int(peer) for peer in roster if peer != self.terms.server))

    def cost(self, client: int, number: int, steps: int) -> Cost:
        """What a client's work takes."""
        if self.pace is not None:
            seconds = self.pace.seconds(client, number, steps)
            return Cost(seconds=seconds)
        return Cost(flops=steps * self.step_cost.flops)

    def opened(self, packed: Packed) -> Vector | None:
        """The vector of a work; None when it was damaged on its way."""
        transform, content = self.workload.transform, packed.content
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            return transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None

    @property
    def gives_up_s(self) -> float:
        """How long a run in which nothing is heard any more may still last."""
        terms = self.terms
        return 3.0 * terms.give_up_s + 4.0 * FAREWELLS * terms.patience_s

    async def run(self, peer: Peer) -> None:
        if peer.id != self.terms.server:
            await Worker(self, peer).run()
            return
        try:
            await Server(self, peer).run()
        except Leaving:
            return

    def _step_cost(self) -> Cost:
        """What one local step takes, counted at one client's shapes."""
        workload, device = self.workload, self.initial.device
        shard = workload.task.shard(0 if self.terms.server else 1)
        key = keyed.key_of(workload.seed, "cost", device=device)
        steps = torch.ones((), dtype=torch.int64, device=device)
        arguments: tuple[Any, ...] = (self.initial, shard, key, steps, workload.task, self.work)
        return Cost(flops=count_flops(perform, *arguments))
