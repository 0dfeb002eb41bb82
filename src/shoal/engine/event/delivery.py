"""From `send` to the mailbox: queues, latency, bandwidth, loss, partitions and the strict wire."""

from __future__ import annotations

from heapq import heappush
from typing import TYPE_CHECKING, Any

from shoal.base import keyed
from shoal.base.digest import bytes_digest
from shoal.base.errors import MutatedAfterSend, UndeclaredMessage, UsageError, WireError
from shoal.base.units import to_ns
from shoal.kernel.peer import Envelope
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.message import Message
from shoal.world.faults import Corrupt, Fault, Hold, Loss, Partition

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime

_SIGN = 1 << 63


class Delivery:
    """All links of a run. `transmit` is the plain or the full path, chosen once."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        network = simulation.network
        peers = network.peers
        self.simulation = simulation
        self.links = links = network.links
        self.messages_sent = 0
        self.bytes_sent = [0] * peers
        self.bytes_received = [0] * peers
        self.bytes_by_kind: dict[type, int] = {}
        self.corrupting = any(isinstance(f, Corrupt) for f in network.faults)
        self._seed = seed
        self._strict = simulation.settings.strict
        self._keys: dict[Any, int] = {}
        self._active: list[Fault] = []
        self._latency_ns: dict[int, int] = {}
        self._plain_ns = to_ns(links.latency_s) if links.plain else 0
        self._up = [links.uplink_of(p) for p in range(peers)] if links.sharing else []
        self._down = [links.downlink_of(p) for p in range(peers)] if links.sharing else []
        self._up_free = [0] * peers
        self._down_free = [0] * peers
        self._repeats: dict[int, dict[int, int]] = {}
        self._random = links.loss > 0 or links.jitter_s > 0
        self._latest: dict[int, int] = {}
        plain = links.plain and not self._strict and not simulation.faulty
        self.transmit = self._transmit_plain if plain else self._transmit

    def _refuse(self, to: Any, message: Any) -> None:
        if not isinstance(message, Message):
            raise UndeclaredMessage(
                f"send: {type(message).__name__} is no message (declare it with @message)"
            )
        raise UsageError(f"send: no peer {to!r}; there are 0..{len(self.bytes_sent) - 1}")

    def key_of(self, message: Message) -> int:
        """The signed 64 bits that stand for a message's kind and tag."""
        tag = message.tag
        if not tag:
            return message.code
        named = (message.code, tag)
        key = self._keys.get(named)
        if key is None:
            if len(self._keys) > 100_000:
                self._keys.clear()
            key = self._keys[named] = keyed.signed(keyed.fold(message.code, *tag))
        return key

    def _count(self, source: int, message: Message, size: int) -> None:
        self.messages_sent += 1
        self.bytes_sent[source] += size
        kinds = self.bytes_by_kind
        kind = message.__class__
        kinds[kind] = kinds.get(kind, 0) + size

    def _transmit_plain(self, runtime: Runtime, to: int, message: Message, request: int) -> None:
        """Constant latency, nothing shared, nothing random, no faults."""
        simulation = self.simulation
        try:
            size = codec.size_of(message)
            target = simulation.runtimes[to]
        except (AttributeError, IndexError, TypeError):
            self._refuse(to, message)
            raise
        source = runtime.id
        self.messages_sent += 1
        self.bytes_sent[source] += size
        kind = message.__class__
        kinds = self.bytes_by_kind
        kinds[kind] = kinds.get(kind, 0) + size
        heappush(
            simulation.heap,
            (
                simulation.now_ns + self._plain_ns,
                simulation.sequence(),
                None,
                target,
                Envelope(source, message, size, request, self.key_of(message)),
            ),
        )

    def _transmit(self, runtime: Runtime, to: int, message: Message, request: int) -> Wait | None:
        simulation = self.simulation
        try:
            size = codec.size_of(message)
            target = simulation.runtimes[to]
        except (AttributeError, IndexError, TypeError):
            self._refuse(to, message)
            raise
        source = runtime.id
        self._count(source, message, size)
        key = self.key_of(message)
        envelope = Envelope(source, message, size, request, key)
        if simulation.faulty:
            envelope.incarnation = (runtime.incarnation, target.incarnation)  # type: ignore[assignment]
        if self._strict:
            envelope.checked = self._fingerprint(message)
        now = simulation.now_ns
        start = end = now
        full: Wait | None = None
        if self._up and source != to:
            start = max(now, self._up_free[source])
            end = start + int(size / self._up[source] * 1e9)
            self._up_free[source] = end
            full = self._backlog(runtime, end - now)
        pair = source * len(self.bytes_sent) + to
        latency = self._latency_ns.get(pair)
        if latency is None:
            latency = 0 if source == to else to_ns(self.links.latency_of_s(source, to))
            self._latency_ns[pair] = latency
        extra = held = 0
        loss = 0.0
        if self._active:
            blocked, loss, held = self._faults_on(source, to)
            if blocked:
                simulation.drop("partition")
                return full
        if source != to and (self._random or loss):
            draw = self._draw_key(pair, key)
            if self.links.lost(source, to, draw, loss):
                simulation.drop("lost")
                return full
            if self.links.jitter_s > 0:
                extra = to_ns(self.links.jitter_of_s(source, to, draw))
        if self._down and source != to:
            service = int(size / self._down[to] * 1e9)
            first = max(start + latency + extra, end + latency + extra - service, held)
            simulation.at(first, self._enter_downlink, (target, service), envelope)
            latest = first + service
        else:
            latest = max(end + latency + extra, held)
            heappush(simulation.heap, (latest, simulation.sequence(), None, target, envelope))
        if latest > self._latest.get(pair, 0):
            self._latest[pair] = latest
        return full

    def _enter_downlink(self, what: Any, envelope: Envelope[Any]) -> None:
        """The first byte arrives: the receiver's downlink serves arrivals one after the other."""
        target, service = what
        simulation = self.simulation
        end = max(simulation.now_ns, self._down_free[target.id]) + service
        self._down_free[target.id] = end
        heappush(simulation.heap, (end, simulation.sequence(), None, target, envelope))

    def _backlog(self, runtime: Runtime, backlog_ns: int) -> Wait | None:
        """A wait until the uplink's queue is back under its limit."""
        rate = self._up[runtime.id]
        excess = backlog_ns - int(self.simulation.limits.queue_bytes / rate * 1e9)
        if excess <= 0:
            return None
        wait = Wait(self.simulation.ready)
        self.simulation.at(self.simulation.now_ns + excess, _wake, wait)
        return wait

    def _draw_key(self, pair: int, key: int) -> int:
        """The key of this message's draws: kind and tag, and its number among equal ones."""
        counts = self._repeats.get(pair)
        if counts is None:
            counts = self._repeats[pair] = {}
        number = counts.get(key, 0)
        if number == 0 and len(counts) >= 256:
            del counts[next(iter(counts))]
        counts[key] = number + 1
        return key if number == 0 else keyed.signed(keyed.fold(key, number))

    def flush(self, runtime: Runtime, to: int) -> Wait | None:
        """A wait until all sent so far to that peer has arrived or was lost."""
        simulation = self.simulation
        if simulation.transmit == self._transmit_plain:
            latest = simulation.now_ns + self._plain_ns
        else:
            latest = self._latest.get(runtime.id * len(self.bytes_sent) + to, 0)
        if self._down:
            latest = max(latest, self._down_free[to])
        if latest <= simulation.now_ns:
            return None
        wait = Wait(simulation.ready)
        simulation.at(latest, _wake, wait)
        return wait

    def forget(self, peer: int) -> None:
        """A crash empties the peer's queues; what it had queued is lost with its incarnation."""
        self._up_free[peer] = self.simulation.now_ns
        self._down_free[peer] = self.simulation.now_ns

    # Faults on links.

    def begin(self, fault: Fault) -> None:
        self.simulation.note(fault.kind, fault.who)
        self._active.append(fault)
        self._sets = [(each, frozenset(each.who)) for each in self._active]

    def end(self, fault: Fault) -> None:
        self.simulation.note(f"{fault.kind} ends", fault.who)
        self._active.remove(fault)
        self._sets = [(each, frozenset(each.who)) for each in self._active]

    def _faults_on(self, source: int, to: int) -> tuple[bool, float, int]:
        """(blocked, extra loss probability, held until ns) of a message sent now."""
        passing, held = 1.0, 0
        for fault, who in self._sets:
            if isinstance(fault, Partition):
                inside = source in who
                if inside != (to in who) and (inside or not fault.one_way):
                    return True, 0.0, 0
            elif isinstance(fault, Loss):
                if source in who or to in who:
                    passing *= 1.0 - fault.probability
            elif isinstance(fault, Hold) and (source in who or to in who):
                if isinstance(fault.until, float | int):
                    held = max(held, to_ns(float(fault.until)))
        return False, 1.0 - passing, held

    # Strict wire and corruption.

    def _fingerprint(self, message: Message) -> str:
        return bytes_digest(*codec.encode(message))

    def inspect(self, envelope: Envelope[Any]) -> Envelope[Any] | None:
        """The message as it would come off a wire; None when it no longer decodes."""
        frame = bytearray(b"".join(codec.encode(envelope.message, envelope.request)))
        if self._strict and bytes_digest(*codec.encode(envelope.message)) != envelope.checked:
            raise MutatedAfterSend(
                f"{type(envelope.message).__name__} from peer {envelope.source} changed between "
                "send and delivery (send a clone, or await flushed() before writing)"
            )
        self._flip(frame, envelope)
        try:
            message, request = codec.decode(frame, self.simulation.limits)
        except WireError:
            self.simulation.drop("corrupt")
            return None
        return Envelope(envelope.source, message, envelope.size_bytes, request, envelope.key)  # type: ignore[arg-type]

    def _flip(self, frame: bytearray, envelope: Envelope[Any]) -> None:
        if not self.corrupting:
            return
        now = self.simulation.now_ns
        for number, fault in enumerate(self._active):
            if isinstance(fault, Corrupt) and envelope.source in fault.who:
                draw = keyed.fold(0, self._seed, "corrupt", envelope.source, envelope.key, now, number)
                if keyed.unit(draw) < fault.probability:
                    bit = keyed.fold(draw, 1) % (8 * len(frame))
                    frame[bit // 8] ^= 1 << (bit % 8)


def _wake(wait: Wait, _: Any) -> None:
    wait.resolve(None)


