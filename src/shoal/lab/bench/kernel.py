"""The event kernel: deliveries per second on one core, without any learning.

100 peers stand in a circle; each one sends to the next and waits for its predecessor, over and
over. SimPy does the same with a process for each peer, once as the shortest program that does it
(the process waits the latency and puts into the receiver's store itself), once as SimPy's manual
writes cables (a process for each message). The bare loop pushes and pops a heap, and calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from heapq import heappop, heappush
from importlib.util import find_spec
from typing import Any

from shoal.base.limits import DEFAULT
from shoal.engine.event.simulation import EventSettings, Simulation, simulate
from shoal.engine.executor import Local
from shoal.kernel.peer import Peer
from shoal.lab.bench._row import Note, Row, missing
from shoal.lab.bench._timing import alternate
from shoal.wire.message import message
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.network import Network

PEERS = 100
LATENCY_S = 0.01


@message
class Token:
    """What goes round on plain links; like an object in SimPy's store, it has no tag."""

    turn: int


@message(tag=("turn",))
class Tagged:
    """What goes round elsewhere: whether it is lost depends on its turn."""

    turn: int


@dataclass(frozen=True)
class Circle:
    """Send to the next peer, wait for the last one; a lost token is given up at its deadline."""

    turns: int
    peers: int
    patience_s: float = math.inf
    watch: Callable[[], None] | None = None
    kind: type = Token

    async def run(self, peer: Peer) -> None:
        to, forever = (peer.id + 1) % self.peers, self.patience_s == math.inf
        for turn in range(self.turns):
            await peer.send(to, self.kind(turn))  # type: ignore[arg-type]
            deadline = math.inf if forever else peer.now() + self.patience_s
            await peer.recv(self.kind, deadline=deadline)
            if self.watch is not None:
                self.watch()


def plain(turns: int) -> Any:
    """Constant latency; the trace digest is always on."""
    return simulate(Circle(turns, PEERS), Network(PEERS, links=Links(latency_s=LATENCY_S)))


def full(turns: int) -> Any:
    """Shared bandwidth, jitter, keyed loss, deadlines, and a fault list that is looked at."""
    links = Links(
        latency_s=LATENCY_S, latency_spread=0.3, jitter_s=0.001, uplink_bytes_per_s=1e6,
        downlink_bytes_per_s=1e6, loss=0.001,
    )  # fmt: skip
    faults = (Crash(who=(0,), at=LATENCY_S * turns * 1e3),)
    return simulate(
        Circle(turns, PEERS, 0.5, kind=Tagged), Network(PEERS, links=links, faults=faults),
        settings=EventSettings(horizon_s=LATENCY_S * turns * 100),
    )  # fmt: skip


def largest_heap(turns: int) -> int:
    """The most entries that the heap held, looked at after every delivery."""
    largest = 0
    network = Network(PEERS, links=Links(latency_s=LATENCY_S))

    def watch() -> None:
        nonlocal largest
        largest = max(largest, len(simulation.heap))

    simulation = Simulation(
        Circle(turns, PEERS, 10.0, watch), network, seed=0, settings=EventSettings(),
        observer=None, executor=Local(), limits=DEFAULT,
    )  # fmt: skip
    simulation.run()
    return largest


def bare_heap(turns: int) -> int:
    """A heap of (time, sequence, function, argument): no simulator can do less."""
    heap: list[tuple[int, int, Callable[[int], None], int]] = []
    delivered = sequence = 0
    latency = int(LATENCY_S * 1e9)
    total = turns * PEERS

    def deliver(peer: int) -> None:
        nonlocal delivered, sequence
        delivered += 1
        if delivered + len(heap) < total:
            sequence += 1
            heappush(heap, (now + latency, sequence, deliver, (peer + 1) % PEERS))

    for peer in range(PEERS):
        sequence += 1
        heappush(heap, (latency, sequence, deliver, peer))
    while heap:
        now, _, function, peer = heappop(heap)
        function(peer)
    return delivered


def simpy_short(turns: int) -> None:
    """A process per peer: wait a timeout, put into the next store, get from the own one."""
    import simpy

    world = simpy.Environment()
    stores = [simpy.Store(world) for _ in range(PEERS)]

    def peer(number: int) -> Generator[Any, Any, None]:
        own, following = stores[number], stores[(number + 1) % PEERS]
        for turn in range(turns):
            yield world.timeout(LATENCY_S)
            following.put(turn)
            yield own.get()

    for number in range(PEERS):
        world.process(peer(number))
    world.run()


def simpy_cables(turns: int) -> None:
    """A process per message, as in the manual's example of a cable."""
    import simpy

    world = simpy.Environment()
    stores = [simpy.Store(world) for _ in range(PEERS)]

    def carry(store: Any, turn: int) -> Generator[Any, Any, None]:
        yield world.timeout(LATENCY_S)
        store.put(turn)

    def peer(number: int) -> Generator[Any, Any, None]:
        own, following = stores[number], stores[(number + 1) % PEERS]
        for turn in range(turns):
            world.process(carry(following, turn))
            yield own.get()

    for number in range(PEERS):
        world.process(peer(number))
    world.run()


def measure(tiny: bool, note: Note) -> Generator[Row]:
    turns = 20 if tiny else 1_500
    delivered: dict[str, int] = {}

    def counting(name: str, run: Callable[[int], Any]) -> Callable[[], None]:
        def call() -> None:
            delivered[name] = run(turns).messages_delivered

        return call

    contestants: dict[str, Callable[[], object]] = {
        "plain": counting("plain", plain),
        "full": counting("full", full),
        "bare": lambda: bare_heap(turns),
    }
    simpy = find_spec("simpy") is not None
    if simpy:
        contestants["simpy"] = lambda: simpy_short(turns)
        contestants["cables"] = lambda: simpy_cables(turns)
    times = alternate(contestants, 1 if tiny else 5, note)
    rates = {
        name: delivered.get(name, turns * PEERS) / seconds.cpu for name, seconds in times.items()
    }
    unit = "deliveries/s"
    yield Row.of("kernel: plain links, digest on", rates["plain"], unit, bound=">= 200000")
    yield Row.of(
        "kernel: bandwidth, loss, deadlines, faults", rates["full"], unit, bound=">= 100000"
    )
    against = "kernel: plain links against SimPy"
    if simpy:
        yield Row.of(
            against, rates["plain"], unit, against=("SimPy, one process", rates["simpy"]),
            bound=">= 1.5",
        )  # fmt: skip
        yield Row.of(
            "kernel: plain links against SimPy's cables", rates["plain"], unit,
            against=("SimPy, a process per message", rates["cables"]),
        )  # fmt: skip
    else:
        yield missing(against, "SimPy is not installed (pip install 'shoal[dev]')", ">= 1.5")
    yield Row.of(
        "kernel: plain links against a bare heap", rates["plain"], unit,
        against=("heapq loop", rates["bare"]),
    )  # fmt: skip
    deliveries = 2_000 if tiny else 300_000
    note(f"the heap over {deliveries:,} deliveries")
    yield Row.of(
        f"kernel: largest heap over {deliveries:,} deliveries with 10 s deadlines",
        largest_heap(deliveries // PEERS), "entries",
        against=("twice the live waits + 1,000", 2 * PEERS + 1_000), bound="<= 1",
    )  # fmt: skip
