"""The event loop: integer nanoseconds, ties in order of creation, one thread."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, Protocol

from torch import Tensor

from shoal.base.digest import TraceDigest
from shoal.base.errors import (
    LimitReached,
    PeerError,
    Stalled,
    UsageError,
    WireError,
)
from shoal.base.ids import PeerId
from shoal.base.limits import DEFAULT, Limits
from shoal.base.stopwatch import Stopwatch
from shoal.base.units import FOREVER, to_ns, to_s
from shoal.engine.event.batching import Batcher
from shoal.engine.event.datagrams import Datagrams
from shoal.engine.event.delivery import Delivery
from shoal.engine.event.outages import Outages
from shoal.engine.event.ways import Ways
from shoal.engine.executor import Executor, Local
from shoal.engine.traffic import Traffic
from shoal.kernel.datagrams import Endpoint, Socket
from shoal.kernel.peer import Batching, Cost, Program
from shoal.kernel.runtime import Runtime
from shoal.kernel.tasks import drain
from shoal.kernel.waits import Ready, Wait
from shoal.tensor.memory import kept_memory
from shoal.tensor.threads import one_thread
from shoal.world.clock import Clock
from shoal.world.faults import Skew
from shoal.world.network import Network
from shoal.world.record import Happening, Row, Run, digest_of

_BLOCK = 4096
"""Events between two looks at the limit, the trace's buffer and the progress callback."""

_SLACK = 1000
"""How many timers of ended waits the heap may hold, beside as many as there are live ones."""


@dataclass(frozen=True)
class EventSettings:
    """How the engine works, as opposed to what it simulates.

    batching: "lazy" runs equal pending computations of many peers as one; "off" is the bit-exact
    twin of `live`. strict: encode and decode every message and detect writes after send.
    horizon_s: virtual seconds after which the run ends. events: more than these is an error.
    batch_bytes: most argument bytes stacked into one call.
    """

    batching: str = "lazy"
    strict: bool = False
    horizon_s: float = float("inf")
    events: int = 1_000_000_000
    batch_bytes: int = 1 << 27

    def __post_init__(self) -> None:
        if self.batching not in ("lazy", "off"):
            raise UsageError(f"batching={self.batching!r}; need 'lazy' or 'off'")
        if not self.horizon_s > 0:
            raise UsageError(f"horizon_s={self.horizon_s}; need a positive number of seconds")
        for name in ("events", "batch_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; need at least 1")


class Observer(Protocol):
    """Sees what peers record under "params"; measures, but never answers."""

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None: ...

    def rows(self) -> list[Row]: ...


def simulate(
    programs: Program | Callable[[int], Program], network: Network, *, seed: int = 0,
    settings: EventSettings | None = None, observer: Observer | None = None,
    executor: Executor | None = None, limits: Limits = DEFAULT,
    progress: Callable[[float, int], None] | None = None,
) -> Run:  # fmt: skip
    """Run one program on every peer (or `programs(peer)` on each) until all are done.

    `progress(virtual_s, events)` is called every few thousand events. Errors that a program does
    not handle end the run and are raised here with the peer and the virtual time as a note.
    """
    with one_thread(), kept_memory(), _old_objects_apart():
        return Simulation(
            programs, network, seed=seed, settings=settings or EventSettings(), observer=observer,
            executor=executor or Local(), limits=limits,
        ).run(progress)  # fmt: skip


@contextmanager
def _old_objects_apart() -> Iterator[None]:
    """What is here already (torch alone is half a million objects) need not be searched for
    garbage every few rounds: that took a sixth of a run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Simulation:
    """One run; implements `kernel.host.Host`."""

    def __init__(
        self, programs: Program | Callable[[int], Program], network: Network, *, seed: int,
        settings: EventSettings, observer: Observer | None, executor: Executor, limits: Limits,
    ) -> None:  # fmt: skip
        self.network = network
        self.settings = settings
        self.limits = limits
        self.ready: Ready = deque()
        self.heap: list[tuple[int, int, Any, Any, Any]] = []
        self.sequence = count().__next__
        self.now_ns = 0
        self.halt = True
        """look whether the run is over or failed, before the next event"""
        self.trace = TraceDigest()
        self.result = Run(engine="event", seed=seed, peers=network.peers, settings=asdict(settings))
        self.dropped = self.result.dropped
        self.rows = self.result.rows
        self.slow = [1.0] * network.peers
        self._program = programs if callable(programs) else lambda peer: programs
        self._observer = observer
        self._sweep_at = _SLACK // 2
        self._timer = self._fire
        self._clocks = [Clock() for _ in range(network.peers)]
        self._skewed = False
        self._stores: list[dict[str, Any]] = [{} for _ in range(network.peers)]
        self._params: dict[int, Tensor] = {}
        self._traffic = Traffic()
        self._datagrams: Datagrams | None = None
        self._full = tuple(range(network.peers)) if network.topology is None else None
        self._error: tuple[Runtime, BaseException] | None = None
        self._running = 0
        self.faulty = bool(network.faults)
        self.outages = Outages(self, network.faults)
        self.delivery = Delivery(self, seed)
        self.ways = Ways(self)
        self.transmit = self.ways.transmit if self.ways.holding else self.delivery.transmit
        self.flush = self.delivery.flush
        self.batcher = Batcher(self, executor)
        roster = tuple(PeerId(peer) for peer in range(network.peers))
        self.runtimes = [Runtime(self, peer, roster, seed) for peer in roster]
        if self.ways.holding:
            self._datagrams = Datagrams(self, seed)

    # The loop.

    def run(self, progress: Callable[[float, int], None] | None = None) -> Run:
        watch = Stopwatch()
        try:
            self.outages.begin()
            for runtime in self.runtimes:
                if runtime.id not in self.outages.absent:
                    self.start(runtime)
            finished = self._loop(progress)
        finally:
            for runtime in self.runtimes:
                runtime.kill()
        return self._finish(watch, finished)

    def _loop(self, progress: Callable[[float, int], None] | None) -> bool:
        heap, ready, runtimes = self.heap, self.ready, self.runtimes
        horizon = to_ns(self.settings.horizon_s)
        faulty, delivery = self.faulty, self.delivery
        inspected = self.settings.strict or delivery.corrupting
        received, log = delivery.bytes_received, self.trace.extend
        delivered = events = 0
        look = min(_BLOCK, self.settings.events + 1)
        try:
            while True:
                if ready:
                    drain(ready)
                if self.halt and self._halted():
                    return True
                try:
                    time_ns, _, action, a, b = heappop(heap)
                except IndexError:
                    raise self._stalled() from None
                if time_ns > horizon:
                    heappush(heap, (time_ns, -1, action, a, b))
                    self.now_ns = horizon
                    return False
                self.now_ns = time_ns
                events += 1
                if action is not None:
                    action(a, b)
                else:
                    # A delivery: b to the runtime a.
                    source = b.source
                    if not a.alive or (
                        faulty and b.incarnation != runtimes[source].incarnation + a.incarnation
                    ):
                        self.drop("dead")
                    elif not inspected or (b := delivery.inspect(b, a.id)) is not None:
                        size, target = b.size_bytes, a.id
                        log((time_ns, source, target, b.key, size))
                        received[target] += size
                        delivered += 1
                        a.deliver(b)
                if events >= look:
                    look = min(events + max(_BLOCK, len(heap)), self.settings.events + 1)
                    self.trace.flush()
                    self._sweep()
                    self._within_limit(events)
                    if progress is not None:
                        progress(to_s(time_ns), events)
        finally:
            self.result.messages_delivered += delivered
            self.result.events += events

    def _halted(self) -> bool:
        """Whether the run is over; raises what a program raised."""
        self.halt = False
        if self._error is not None:
            runtime, error = self._error
            error.add_note(
                f"in the program of peer {runtime.id} at virtual time {to_s(self.now_ns):.6f} s, "
                f"seed {self.result.seed}"
            )
            raise error
        return not self._running and not self.outages.to_come

    def _within_limit(self, events: int) -> None:
        if events > self.settings.events:
            raise LimitReached(
                f"{events} events at virtual time {to_s(self.now_ns):.3f} s; the limit is "
                f"{self.settings.events} (raise `events`, or look for a loop that never waits)"
            )

    def _stalled(self) -> Stalled:
        waiting = [r.id for r in self.runtimes if r.alive]
        return Stalled(
            f"peers {waiting[:8]} wait at virtual time {to_s(self.now_ns):.3f} s and nothing is "
            "left that could wake them (give every wait a deadline)"
        )

    def _finish(self, watch: Stopwatch, finished: bool) -> Run:
        result, delivery = self.result, self.delivery
        result.finished = finished
        result.virtual_s = to_s(self.now_ns)
        result.trace_digest = self.trace.hexdigest()
        result.messages_sent = delivery.messages_sent
        result.messages_in_flight = delivery.in_flight(self.heap)
        result.bytes_sent = list(delivery.bytes_sent)
        result.bytes_received = list(delivery.bytes_received)
        result.bytes_by_kind = delivery.bytes_by_kind()
        result.flops = self.batcher.flops
        if self._observer is not None:
            result.rows.extend(self._observer.rows())
        result.rows.extend(self._traffic.rows())
        result.final = {peer: params.cpu() for peer, params in sorted(self._params.items())}
        result.state_digest = digest_of(result.final)
        result.wall_s, result.cpu_s = watch.wall_s, watch.cpu_s
        return result

    def at(
        self, time_ns: int, action: Callable[[Any, Any], None], a: Any = None, b: Any = None
    ) -> None:
        """Call `action(a, b)` at a moment of the run."""
        heappush(self.heap, (time_ns, self.sequence(), action, a, b))

    # Host: time.

    def local_ns(self, runtime: Runtime) -> int:
        return self._clocks[runtime.id].local_ns(self.now_ns) if self._skewed else self.now_ns

    def set_timer(self, runtime: Runtime, local_ns: int, wait: Wait) -> None:
        if local_ns >= FOREVER:
            return
        heap, now = self.heap, self.now_ns
        if len(heap) > self._sweep_at:
            self._sweep()
        at = self._clocks[runtime.id].run_ns(local_ns) if self._skewed else local_ns
        heappush(heap, (at if at > now else now, self.sequence(), self._timer, wait, local_ns))

    def _fire(self, wait: Wait, local_ns: int) -> None:
        if not wait.done:
            wait.expire()

    def timer_dropped(self) -> None:
        """Nothing to do: the heap is swept instead of told."""

    def _sweep(self) -> None:
        """Take the timers of waits that are done out of the heap.

        Called when the heap has grown by half since the last time, and every few thousand events,
        so that a timer costs constant time on average and the heap stays below twice the live
        waits plus `_SLACK`.
        """
        timer = self._timer
        self.heap[:] = [e for e in self.heap if e[2] is not timer or not e[3].done]
        heapify(self.heap)
        self._sweep_at = len(self.heap) * 3 // 2 + _SLACK // 2

    def skew(self, fault: Skew, begins: bool) -> None:
        """Change the clocks of peers; deadlines are times on them, so pending timers move."""
        self._skewed = True
        now = self.now_ns
        for peer in fault.who:
            change = self._clocks[peer].skew if begins else self._clocks[peer].right
            change(now, round(fault.offset_s * 1e9), fault.drift)
        who, timer = set(fault.who), self._timer
        for place, entry in enumerate(self.heap):
            wait = entry[3]
            if entry[2] is timer and not wait.done and wait.task.runtime.id in who:
                at = self._clocks[wait.task.runtime.id].run_ns(entry[4])
                self.heap[place] = (max(now, at), *entry[1:])
        heapify(self.heap)

    # Host: datagrams.

    @property
    def datagrams(self) -> Datagrams:
        if self._datagrams is None:
            self._datagrams = Datagrams(self, self.result.seed)
        return self._datagrams

    def bind(self, socket: Socket, port: int) -> Endpoint:
        return self.datagrams.bind(socket, port)

    def emit(self, socket: Socket, data: bytes, to: Endpoint) -> None:
        self.datagrams.emit(socket, data, to)

    def unbind(self, socket: Socket) -> None:
        self.datagrams.unbind(socket)

    def map_port(self, socket: Socket) -> Wait:
        return self.datagrams.map_port(socket)

    # Host: work and memory.

    def compute(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        return self.batcher.submit(runtime, function, args, static, cost, batch)

    def commit(self, runtime: Runtime, items: Mapping[str, Any]) -> Wait:
        wait = Wait(self.ready)
        # A private copy: what is durable must not change with the program's tensors.
        frozen = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in items.items()}
        seconds = self.network.device.store_seconds(runtime.id, self.slow[runtime.id])
        self.at(self.now_ns + to_ns(seconds), self._committed, wait, (runtime.id, frozen))
        return wait

    def _committed(self, wait: Wait, what: Any) -> None:
        if not wait.done:
            peer, items = what
            self._stores[peer].update(items)
            wait.resolve(None)

    def stored(self, runtime: Runtime, key: str) -> Any:
        value = self._stores[runtime.id].get(key)
        return value.clone() if isinstance(value, Tensor) else value

    def forget_store(self, peer: int) -> None:
        """A crash took the disk with it."""
        self._stores[peer].clear()

    def neighbors(self, runtime: Runtime) -> Sequence[int]:
        topology = self.network.topology
        if topology is None:
            assert self._full is not None
            return self._full[: runtime.id] + self._full[runtime.id + 1 :]
        return topology.neighbors(runtime.id, max(runtime.round, 0))

    # Host: reports.

    def record(self, runtime: Runtime, name: str, value: Any, labels: Mapping[str, str]) -> None:
        time_s = to_s(self.now_ns)
        if name == "params":
            self._params[runtime.id] = value
            self._traffic.note(runtime.round, time_s, self.delivery.bytes_sent)
            if self._observer is not None:
                self._observer.params(runtime.id, runtime.round, time_s, value)
            return
        pairs = tuple(sorted(labels.items()))
        self.rows.append(Row(name, float(value), time_s, runtime.round, runtime.id, pairs))

    def note(self, what: str, peers: Sequence[int]) -> None:
        """Mark a moment on the report's time axis."""
        self.result.happenings.append(Happening(to_s(self.now_ns), what, tuple(peers)))

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def failed(self, runtime: Runtime, error: BaseException) -> None:
        # What other peers or the wire did is to be expected; the rest is a fault of the program.
        if isinstance(error, (PeerError, WireError)):
            self.drop("handler failed")
        else:
            self.blame(runtime, error)

    def blame(self, runtime: Runtime, error: BaseException) -> None:
        """End the run with this error, unless another came first."""
        if self._error is None:
            self._error = (runtime, error)
        self.halt = True

    # Life of peers.

    def enter_round(self, runtime: Runtime, round: int) -> None:
        self.outages.entered(runtime.id, round)

    def finished(self, runtime: Runtime, error: BaseException | None) -> None:
        self._running -= 1
        self.halt = True
        if error is not None:
            self.blame(runtime, error)

    def start(self, runtime: Runtime, round: int = -1) -> None:
        """Begin an incarnation whose program has `round` behind it."""
        self._running += 1
        runtime.round = round
        runtime.start(self._program(runtime.id))

    def stop(self, runtime: Runtime) -> None:
        """End a live peer's incarnation; what is in flight from and to it is lost."""
        self._running -= 1
        self.halt = True
        runtime.kill()
        runtime.incarnation += 1
        self.batcher.forget(runtime.id)
        self.delivery.forget(runtime.id)
