"""The peers of one process: the `Host` of their runtimes over an asyncio loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any

from shoal.base.errors import PeerError, WireError
from shoal.base.ids import PeerId
from shoal.base.stopwatch import Stopwatch
from shoal.base.units import to_s
from shoal.engine.live import control
from shoal.engine.live.compute import Compute
from shoal.engine.live.datagrams import Datagrams
from shoal.engine.live.delivery import Delivery
from shoal.engine.live.memory import Memory
from shoal.engine.live.outgoing import Outgoing
from shoal.engine.live.pool import Pool, room
from shoal.engine.live.schedule import Schedule
from shoal.engine.live.timers import Timers
from shoal.engine.live.transport import Transport
from shoal.engine.live.ways import Ways
from shoal.engine.traffic import Traffic
from shoal.kernel.peer import Batching, Cost, Envelope
from shoal.kernel.runtime import Runtime
from shoal.kernel.tasks import drain
from shoal.kernel.waits import Ready, Wait
from shoal.wire.frame import schema
from shoal.wire.handshake import Credentials
from shoal.wire.identity import Identity
from shoal.wire.message import Message, declared_kinds
from shoal.world.record import Happening, Row, Run

if TYPE_CHECKING:
    from torch import Tensor

_LINGER_S = 2.0
_COUNT_EVERY_S = 0.25
_MOST_REASONS = 200
_MOST_TRIPS = 10_000


class Driver:
    """Runs the peers of a plan; says to `report` what the launcher must know.

    Every callback of the loop ends with `settle`, which runs all tasks that became ready and then
    writes what they sent. `control` may be called in the loop's thread only.
    """

    def __init__(self, plan: control.Plan, report: Callable[[control.Report], None],
                 loop: asyncio.AbstractEventLoop) -> None:  # fmt: skip
        network = plan.network
        self.plan = plan
        self.loop = loop
        self.network = network
        self.limits = plan.limits
        self.ready: Ready = deque()
        self.dirty: dict[Outgoing, None] = {}
        self.slow: dict[int, float] = {}
        self.events = 0
        self.result = Run(
            engine="live", seed=plan.seed, peers=network.peers, settings=asdict(plan.settings)
        )
        self.result.bytes_sent = [0] * network.peers
        self.result.bytes_received = [0] * network.peers
        self.timers = Timers(loop, self.settle)
        self.delivery = Delivery(self)
        self.transmit = self.delivery.transmit
        self.flush = self.delivery.flush
        datagrams = self.datagrams = Datagrams(self)
        self.bind = datagrams.bind
        self.emit = datagrams.emit
        self.unbind = datagrams.unbind
        self.map_port = datagrams.map_port
        self.ways = Ways(self)
        self.schedule = Schedule(self, network.faults)
        self._report = report
        self._stopping = loop.create_future()
        self._start: control.Start | None = None
        self._params: dict[int, Tensor] = {}
        self._traffic = Traffic()
        self._trips: deque[float] = deque(maxlen=_MOST_TRIPS)
        self._running = 0
        self._entered = 0
        self._idle: bool | None = None
        self._failed = False
        self._others = tuple(range(network.peers))
        roster = tuple(PeerId(peer) for peer in self._others)
        self.runtimes = {
            peer: Runtime(self, roster[peer], roster, plan.seed) for peer in plan.peers
        }
        pool = Pool(loop, plan.settings, room(len(plan.peers)))
        self.transports = {
            peer: Transport(loop, peer, self, plan.limits, plan.settings, pool)
            for peer in plan.peers
        }

    # Life.

    async def run(self) -> None:
        """From listening to the last report."""
        watch = Stopwatch()
        self.loop.set_exception_handler(self._broken)
        self.compute_thread = Compute(self)
        self.memory = Memory(self, self.plan.settings.store_dir, self.plan.peers)
        try:
            addresses = {peer: each.bind() for peer, each in self.transports.items()}
            self._report(control.Ready(addresses, self.schemas(), self._keys()))
            await self._stopping
            self.result.virtual_s = to_s(max(0, self.timers.now_ns())) if self._begun else 0.0
            await self._linger()
        finally:
            self._close()
        for transport in self.transports.values():
            await transport.lines.ended()
        await self.datagrams.ended()
        self._report(control.Done(self._outcome(watch)))

    def _keys(self) -> dict[int, bytes]:
        """The public keys of the peers here, from their files or new."""
        settings = self.plan.settings
        if settings.security == "none":
            return {}
        for peer, transport in self.transports.items():
            if transport.credentials is None:
                path = Path(settings.store_dir) / f"peer-{peer}.pem"
                identity = Identity.load_or_new(path) if settings.store_dir else Identity.new()
                transport.credentials = Credentials(identity)
        return {
            peer: each.credentials.identity.public
            for peer, each in self.transports.items()
            if each.credentials is not None
        }

    def schemas(self) -> dict[str, str]:
        """Every message that this process can read."""
        return {kind.kind: schema(kind) for kind in declared_kinds()}

    def control(self, command: control.Command) -> None:
        """A word from the launcher."""
        if isinstance(command, control.Stop):
            if not self._stopping.done():
                self._stopping.set_result(None)
        elif isinstance(command, control.Start):
            self._start = command
            # One reading of both clocks: from here on only the monotonic one counts.
            self.timers.start_ns = self.timers.now_ns() + command.unix_ns - time_ns()
            self.loop.call_at(self.timers.loop_s(0), self._begin)
        else:
            self._entered += 1
            self.schedule.entered(command.round)
            self.settle()
            self.tell_idle(again=True)

    @property
    def _begun(self) -> bool:
        return self._idle is not None

    def _begin(self) -> None:
        assert self._start is not None
        if self._stopping.done():
            return
        self.schedule.begin()
        for peer, runtime in self.runtimes.items():
            transport = self.transports[peer]
            transport.open(self._start.addresses, self._start.digest, self._start.keys)
            if peer not in self.schedule.absent:
                transport.up()
                self._begin_peer(runtime)
        if self.plan.counted:
            self._count_events()
        self.settle()
        self.tell_idle()

    def _begin_peer(self, runtime: Runtime, round: int = -1) -> None:
        self._running += 1
        runtime.round = round
        runtime.start(self.plan.program(runtime.id))

    def halt(self, peer: int) -> None:
        """End a live incarnation at once: its tasks, its sockets, what it computes."""
        runtime = self.runtimes[peer]
        self._running -= 1
        runtime.kill()
        runtime.incarnation += 1
        self.transports[peer].down()
        self.compute_thread.forget(peer)

    def revive(self, peer: int, round: int) -> None:
        """Begin another incarnation, which finds `peer.round == round`."""
        # Until its last commit is written, the peer is still to come.
        self.schedule.to_come += 1
        self.memory.when_written(lambda: self._revived(self.runtimes[peer], round))

    def _revived(self, runtime: Runtime, round: int) -> None:
        self.schedule.to_come -= 1
        if not self._stopping.done() and self.schedule.may_live(runtime.id):
            self.transports[runtime.id].up()
            self._begin_peer(runtime, round)
        self.settle()
        self.tell_idle()

    def expect(self, peers: Collection[int]) -> None:
        """These are back: call them without waiting for a pause to end."""
        for transport in self.transports.values():
            for peer in peers:
                transport.seen(peer)

    def tell_idle(self, again: bool = False) -> None:
        """Tell the launcher when there is nothing left to do here, or something again."""
        idle = not self._running and not self.schedule.to_come
        if idle != self._idle or again:
            self._idle = idle
            self._report(control.Idle(idle, self._entered))

    async def _linger(self) -> None:
        # Programs that are done may have sent their last messages a moment ago.
        limit = self.loop.time() + _LINGER_S
        while self._idle and self.loop.time() < limit:
            if not any(each.busy for each in self.transports.values()):
                return
            await asyncio.sleep(0.001)

    def _close(self) -> None:
        self.schedule.stop()
        for runtime in self.runtimes.values():
            runtime.kill()
        self.ready.clear()
        self.timers.stop()
        for transport in self.transports.values():
            transport.close()
        self.compute_thread.stop(self.plan.settings.stop_s / 4)
        self.memory.stop(self.plan.settings.stop_s / 4)

    def _outcome(self, watch: Stopwatch) -> Run:
        result = self.result
        result.final = {peer: params.cpu() for peer, params in sorted(self._params.items())}
        result.rows.extend(self._traffic.rows())
        result.rows.extend(self._heartbeats())
        result.flops = self.compute_thread.flops
        result.events = self.events + self.timers.fired
        result.wall_s, result.cpu_s = watch.wall_s, watch.cpu_s
        return result

    def _heartbeats(self) -> list[Row]:
        """How long heartbeats of this process took there and back, if there were any."""
        trips = sorted(self._trips)
        if not trips:
            return []
        time_s, first = to_s(max(0, self.timers.now_ns())), str(self.plan.peers[0])
        return [
            Row(
                "round_trip_s", value, time_s,
                labels=(("process of peer", first), ("statistic", name)),
            )
            for name, value in (("median", trips[len(trips) // 2]), ("largest", trips[-1]))
        ]  # fmt: skip

    def _count_events(self) -> None:
        self._report(control.Counted(self.events + self.timers.fired))
        self.loop.call_later(_COUNT_EVERY_S, self._count_events)

    # The loop.

    def settle(self) -> None:
        """Run what became ready, and write what it sent, until there is neither."""
        ready, dirty = self.ready, self.dirty
        while ready or dirty:
            if ready:
                drain(ready)
            while dirty:
                dirty.popitem()[0].write()

    def _broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context.get("message", "the loop failed"))
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            self._report(control.Failed(error))

    # Owner of the transports.

    def arrived(
        self, target: int, source: int, message: Message, request: int, size_bytes: int
    ) -> None:
        runtime = self.runtimes[target]
        if not runtime.alive:
            self.drop("dead")
            return
        self.events += 1
        self.result.messages_delivered += 1
        self.result.bytes_received[target] += size_bytes
        runtime.deliver(Envelope(PeerId(source), message, size_bytes, request))
        # As on the event engine, what a message sets going runs before the next one is looked at.
        if self.ready:
            drain(self.ready)

    def lost(self, reason: str, messages: int) -> None:
        dropped = self.result.dropped
        dropped[reason] = dropped.get(reason, 0) + messages

    def closed(self, peer: int, why: str) -> None:
        # Bounded: a hostile peer must not be able to fill the memory with reasons.
        if len(self.result.happenings) < _MOST_REASONS:
            self._note(f"peer {peer} {why}", (peer,))

    def round_trip(self, seconds: float) -> None:
        self._trips.append(seconds)

    # Host: time.

    def local_ns(self, runtime: Runtime) -> int:
        return self.timers.local_ns(runtime.id)

    def set_timer(self, runtime: Runtime, local_ns: int, wait: Wait) -> None:
        self.timers.set(runtime, local_ns, wait)

    def timer_dropped(self) -> None:
        """Nothing to do: no wait is marked as timed, and `Timers` sweeps instead."""

    # Host: work and memory.

    def compute(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        return self.compute_thread.submit(runtime.id, function, args, static, cost, batch)

    def commit(self, runtime: Runtime, items: Mapping[str, Any]) -> Wait:
        return self.memory.commit(runtime.id, items)

    def stored(self, runtime: Runtime, key: str) -> Any:
        return self.memory.get(runtime.id, key)

    def neighbors(self, runtime: Runtime) -> Sequence[int]:
        topology = self.network.topology
        if topology is None:
            return self._others[: runtime.id] + self._others[runtime.id + 1 :]
        return topology.neighbors(runtime.id, max(runtime.round, 0))

    # Host: reports.

    def record(self, runtime: Runtime, name: str, value: Any, labels: Mapping[str, str]) -> None:
        time_s = to_s(self.timers.now_ns())
        if name == "params":
            self._params[runtime.id] = value
            self._traffic.note(runtime.round, time_s, self.result.bytes_sent)
            if self.plan.observed:
                self._report(control.Observed(runtime.id, runtime.round, time_s, value))
            return
        self.result.rows.append(
            Row(
                name, float(value), time_s, runtime.round, runtime.id, tuple(sorted(labels.items()))
            )
        )

    def note(self, what: str, peers: Sequence[int]) -> None:
        """Mark a fault on the report's time axis; one process does it for all."""
        if self.plan.lead:
            self._note(what, tuple(peers))

    def _note(self, what: str, peers: tuple[int, ...]) -> None:
        time_s = to_s(max(0, self.timers.now_ns()))
        self.result.happenings.append(Happening(time_s, what, peers))

    def enter_round(self, runtime: Runtime, round: int) -> None:
        if self.schedule.awaits(round):
            self.schedule.entered(round, running=True)
            self.loop.call_soon(self._entered_first, round)

    def _entered_first(self, round: int) -> None:
        self._report(control.Entered(round))
        self.settle()
        self.tell_idle()

    def drop(self, reason: str) -> None:
        self.lost(reason, 1)

    def failed(self, runtime: Runtime, error: BaseException) -> None:
        # What other peers or the wire did is to be expected; the rest is a fault of the program.
        if isinstance(error, (PeerError, WireError)):
            self.drop("handler failed")
        else:
            self._blame(runtime, error)

    def finished(self, runtime: Runtime, error: BaseException | None) -> None:
        self._running -= 1
        if error is not None:
            self._blame(runtime, error)
        self.loop.call_soon(self.tell_idle)

    def _blame(self, runtime: Runtime, error: BaseException) -> None:
        error.add_note(
            f"in the program of peer {runtime.id}, {to_s(self.timers.now_ns()):.3f} s after the "
            f"start, seed {self.plan.seed}"
        )
        self._fail(error)
