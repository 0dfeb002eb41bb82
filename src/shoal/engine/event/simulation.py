"""The event loop: integer nanoseconds, ties in order of creation, one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, Protocol

from torch import Tensor

from shoal.base.digest import TraceDigest
from shoal.base.errors import LimitReached, ShoalError, Stalled, UsageError
from shoal.base.ids import PeerId
from shoal.base.limits import DEFAULT, Limits
from shoal.base.stopwatch import Stopwatch
from shoal.base.units import FOREVER, to_ns, to_s
from shoal.engine.event.batching import Batcher
from shoal.engine.event.delivery import Delivery
from shoal.engine.executor import Executor, Local
from shoal.kernel.peer import Batching, Cost, Program
from shoal.kernel.runtime import Runtime
from shoal.kernel.tasks import drain
from shoal.kernel.waits import Ready, Wait
from shoal.tensor.tree import map_tree
from shoal.world.clock import Clock
from shoal.world.faults import Crash, Fault, Join, Leave, Round, Skew, Slow
from shoal.world.network import Network
from shoal.world.record import Happening, Row, Run


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
    return Simulation(
        programs, network, seed=seed, settings=settings or EventSettings(), observer=observer,
        executor=executor or Local(), limits=limits,
    ).run(progress)  # fmt: skip


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
        self.trace = TraceDigest()
        self.result = Run(engine="event", seed=seed, peers=network.peers, settings=asdict(settings))
        self.dropped = self.result.dropped
        self.rows = self.result.rows
        self.slow = [1.0] * network.peers
        self._program = programs if callable(programs) else lambda peer: programs
        self._observer = observer
        self._live_timers = 0
        self._dead_timers = 0
        self._clocks = [Clock() for _ in range(network.peers)]
        self._skewed = False
        self._stores: list[dict[str, Any]] = [{} for _ in range(network.peers)]
        self._params: dict[int, Tensor] = {}
        self._round = -1
        self._round_faults: dict[int, list[tuple[Callable[[Any], None], Any]]] = {}
        self._store_ns = to_ns(network.device.store_s)
        self._full = tuple(range(network.peers)) if network.topology is None else None
        self._error: tuple[Runtime, BaseException] | None = None
        self._running = 0
        self._to_come = 0
        self.faulty = bool(network.faults)
        self.delivery = Delivery(self, seed)
        self.transmit = self.delivery.transmit
        self.flush = self.delivery.flush
        self.batcher = Batcher(self, executor)
        roster = tuple(PeerId(peer) for peer in range(network.peers))
        self.runtimes = [Runtime(self, peer, roster, seed) for peer in roster]

    # The loop.

    def run(self, progress: Callable[[float, int], None] | None = None) -> Run:
        watch = Stopwatch()
        self._schedule(self.network.faults)
        absent = {p for f in self.network.faults if isinstance(f, Join) for p in f.who}
        for runtime in self.runtimes:
            if runtime.id not in absent:
                self._start(runtime)
        try:
            finished = self._loop(progress)
        finally:
            for runtime in self.runtimes:
                runtime.kill()
        return self._finish(watch, finished)

    def _loop(self, progress: Callable[[float, int], None] | None) -> bool:
        heap, ready, runtimes, trace = self.heap, self.ready, self.runtimes, self.trace
        horizon = to_ns(self.settings.horizon_s)
        limit, faulty, strict = self.settings.events, self.faulty, self.settings.strict
        received = self.delivery.bytes_received
        add, delivered, events = trace.add, 0, 0
        special = strict or self.delivery.corrupting
        try:
            while True:
                if ready:
                    drain(ready)
                    if self._error is not None:
                        self._raise()
                if not self._running and not self._to_come:
                    return True
                if not heap:
                    self._stalled()
                time_ns, _, action, a, b = heappop(heap)
                if time_ns > horizon:
                    return False
                self.now_ns = time_ns
                events += 1
                if action is None:
                    # A delivery: b to the runtime a.
                    source = b.source
                    if not a.alive or (
                        faulty
                        and b.incarnation != (runtimes[source].incarnation, a.incarnation)
                    ):
                        self.drop("dead")
                        continue
                    size = b.size_bytes
                    if special:
                        b = self.delivery.inspect(b)
                        if b is None:
                            continue
                    add(time_ns, source, a.id, b.key, size)
                    received[a.id] += size
                    delivered += 1
                    a.deliver(b)
                else:
                    action(a, b)
                if not events & 4095:
                    trace.flush()
                    if events > limit:
                        raise LimitReached(
                            f"{events} events at virtual time {to_s(time_ns):.3f} s; the limit is "
                            f"{limit} (raise `events`, or look for a loop that never waits)"
                        )
                    if progress is not None:
                        progress(to_s(time_ns), events)
        finally:
            self.result.messages_delivered += delivered
            self.result.events += events

    def _stalled(self) -> None:
        waiting = [r.id for r in self.runtimes if r.alive]
        raise Stalled(
            f"peers {waiting[:8]} wait at virtual time {to_s(self.now_ns):.3f} s and nothing is "
            "left that could wake them (give every wait a deadline)"
        )

    def _raise(self) -> None:
        assert self._error is not None
        runtime, error = self._error
        error.add_note(
            f"in the program of peer {runtime.id} at virtual time {to_s(self.now_ns):.6f} s, "
            f"seed {self.result.seed}"
        )
        raise error

    def _finish(self, watch: Stopwatch, finished: bool) -> Run:
        result = self.result
        result.finished = finished
        result.virtual_s = to_s(self.now_ns)
        result.trace_digest = self.trace.hexdigest()
        result.messages_sent = self.delivery.messages_sent
        result.bytes_sent = list(self.delivery.bytes_sent)
        result.bytes_received = list(self.delivery.bytes_received)
        result.bytes_by_kind = {
            kind.__name__: size for kind, size in self.delivery.bytes_by_kind.items()
        }
        result.flops = self.batcher.flops
        if self._observer is not None:
            result.rows.extend(self._observer.rows())
        result.final = dict(sorted(self._params.items()))
        result.wall_s, result.cpu_s = watch.wall_s, watch.cpu_s
        return result

    def at(self, time_ns: int, action: Callable[[Any, Any], None], a: Any = None, b: Any = None) -> None:
        """Call `action(a, b)` at a moment of the run."""
        heappush(self.heap, (time_ns, self.sequence(), action, a, b))

    # Host: time.

    def local_ns(self, runtime: Runtime) -> int:
        return self._clocks[runtime.id].local_ns(self.now_ns) if self._skewed else self.now_ns

    def set_timer(self, runtime: Runtime, local_ns: int, wait: Wait) -> None:
        if local_ns >= FOREVER:
            return
        at = self._clocks[runtime.id].run_ns(local_ns) if self._skewed else local_ns
        wait.timed = True
        self._live_timers += 1
        heappush(
            self.heap,
            (at if at > self.now_ns else self.now_ns, self.sequence(), self._fire, wait,
             (runtime, local_ns)),
        )  # fmt: skip

    def _fire(self, wait: Wait, owner: Any) -> None:
        if wait.done:
            self._dead_timers -= 1
        else:
            self._live_timers -= 1
            wait.expire()

    def timer_dropped(self) -> None:
        self._live_timers -= 1
        self._dead_timers = dead = self._dead_timers + 1
        # Dead timers stay in the heap until they are as many as the live ones and a thousand, so
        # that dropping one costs constant time on average and the heap stays bounded.
        if dead > self._live_timers + 1000:
            fire = self._fire
            self.heap[:] = [e for e in self.heap if e[2] != fire or not e[3].done]
            heapify(self.heap)
            self._dead_timers = 0

    # Host: work and memory.

    def compute(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        return self.batcher.submit(runtime, function, args, static, cost, batch)

    def commit(self, runtime: Runtime, items: Mapping[str, Any]) -> Wait:
        wait = Wait(self.ready)
        # A private copy: what is durable must not change with the program's tensors.
        frozen = {key: map_tree(Tensor.clone, v) if isinstance(v, Tensor) else v
                  for key, v in items.items()}  # fmt: skip
        self.at(self.now_ns + self._store_ns, self._committed, wait, (runtime, frozen))
        return wait

    def _committed(self, wait: Wait, what: Any) -> None:
        if not wait.done:
            runtime, items = what
            self._stores[runtime.id].update(items)
            wait.resolve(None)

    def stored(self, runtime: Runtime, key: str) -> Any:
        value = self._stores[runtime.id].get(key)
        return value.clone() if isinstance(value, Tensor) else value

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
            if self._observer is not None:
                self._observer.params(runtime.id, runtime.round, time_s, value)
            return
        self.rows.append(
            Row(name, float(value), time_s, runtime.round, runtime.id, tuple(sorted(labels.items())))
        )

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def failed(self, runtime: Runtime, error: BaseException) -> None:
        if isinstance(error, ShoalError):
            self.drop("handler failed")
        else:
            self._error = self._error or (runtime, error)

    def finished(self, runtime: Runtime, error: BaseException | None) -> None:
        self._running -= 1
        if error is not None and self._error is None:
            self._error = (runtime, error)

    # Faults.

    def _schedule(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            begin, end = self._actions(fault)
            for moment, action in ((fault.at, begin), (fault.until, end)):
                if moment is None or action is None:
                    continue
                # A restart or a join is still to come: the run must not end before it.
                reviving = isinstance(fault, Join) or (isinstance(fault, Crash) and action is end)
                if isinstance(moment, Round):
                    self._round_faults.setdefault(moment.round, []).append((action, fault))
                else:
                    self._to_come += reviving
                    self.at(to_ns(moment), self._apply, (action, reviving), fault)

    def _apply(self, what: Any, fault: Fault) -> None:
        action, reviving = what
        self._to_come -= reviving
        action(fault)

    def _actions(self, fault: Fault) -> tuple[Callable[[Any], None] | None, ...]:
        if isinstance(fault, Crash):
            return self._crash, self._restart
        if isinstance(fault, Join):
            return self._restart, None
        if isinstance(fault, Leave):
            return self._leave, None
        if isinstance(fault, Slow):
            return (lambda f: self._slow(f, f.factor)), (lambda f: self._slow(f, 1.0 / f.factor))
        if isinstance(fault, Skew):
            return self._skew, None
        return self.delivery.begin, self.delivery.end

    def note(self, what: str, peers: Sequence[int]) -> None:
        """Mark a moment on the report's time axis."""
        self.result.happenings.append(Happening(to_s(self.now_ns), what, tuple(peers)))

    def _start(self, runtime: Runtime) -> None:
        self._running += 1
        runtime.start(self._program(runtime.id))

    def _stop(self, runtime: Runtime) -> None:
        if runtime.alive:
            self._running -= 1
        runtime.kill()
        runtime.incarnation += 1
        self.batcher.forget(runtime.id)
        self.delivery.forget(runtime.id)

    def _crash(self, fault: Crash) -> None:
        self.note("crash", fault.who)
        for peer in fault.who:
            self._stop(self.runtimes[peer])
            if fault.store == "lost":
                self._stores[peer].clear()

    def _restart(self, fault: Fault) -> None:
        self.note("join" if isinstance(fault, Join) else "restart", fault.who)
        for peer in fault.who:
            runtime = self.runtimes[peer]
            if not runtime.alive:
                runtime.round = -1
                self._start(runtime)

    def _leave(self, fault: Leave) -> None:
        self.note("leave", fault.who)
        for peer in fault.who:
            runtime = self.runtimes[peer]
            runtime.leave()
            self.at(self.now_ns + to_ns(fault.grace_s), self._left, runtime, runtime.incarnation)

    def _left(self, runtime: Runtime, incarnation: int) -> None:
        if runtime.incarnation == incarnation and runtime.alive:
            self._stop(runtime)

    def _slow(self, fault: Slow, factor: float) -> None:
        self.note("slow" if factor == fault.factor else "slow ends", fault.who)
        for peer in fault.who:
            self.slow[peer] *= factor

    def _skew(self, fault: Skew) -> None:
        self.note("skew", fault.who)
        self._skewed = True
        for peer in fault.who:
            self._clocks[peer].skew(self.now_ns, round(fault.offset_s * 1e9), fault.drift)
        # Deadlines are times on the peer's clock, so its pending timers move.
        who, now = set(fault.who), self.now_ns
        moved = []
        for entry in self.heap:
            if entry[2] == self._fire and entry[4][0].id in who:
                runtime, local_ns = entry[4]
                at = max(now, self._clocks[runtime.id].run_ns(local_ns))
                entry = (at, *entry[1:])
            moved.append(entry)
        self.heap[:] = moved
        heapify(self.heap)

    def enter_round(self, runtime: Runtime, round: int) -> None:
        while self._round < round:
            self._round += 1
            for action, fault in self._round_faults.pop(self._round, ()):
                # After the running step: a peer must not be closed from inside its own code.
                self.at(self.now_ns, lambda a, b: a(b), action, fault)
