"""From `send` to the mailbox: queues, latency, bandwidth, loss, partitions and the strict wire."""

from __future__ import annotations

from heapq import heappush
from math import log1p
from typing import TYPE_CHECKING, Any
from zlib import crc32

from shoal.base import keyed
from shoal.base.digest import bytes_digest
from shoal.base.errors import (
    MessageTooLarge,
    MutatedAfterSend,
    UsageError,
    WireError,
)
from shoal.base.keyed import mix
from shoal.base.units import to_ns
from shoal.kernel.mailbox import require_message
from shoal.kernel.peer import Envelope
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.message import Message, message_key
from shoal.world.faults import Corrupt, Fault, Hold, Loss, Partition
from shoal.world.links import Links, Measured

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime

_REPEATS = 32
"""Kinds and tags per link of which the number of sends is remembered."""


class _Link:
    """What is constant about an ordered pair of peers until the next fault, and what it carried."""

    __slots__ = ("blocked", "drawn", "epoch", "extra", "hold", "jitter_key", "latency_ns", "latest",
                 "loss_key", "path", "path_free", "repeats", "threshold", "waiting")  # fmt: skip

    def __init__(self, latency_ns: int, path: float) -> None:
        self.latency_ns = latency_ns
        # Nanoseconds per byte on the way to that receiver; 0 = unlimited.
        self.path = path
        self.path_free = 0
        self.epoch = -1
        self.blocked = self.drawn = False
        self.hold: int | None = None
        self.extra = 0.0
        self.threshold = 0.0
        self.loss_key = self.jitter_key = 0
        self.repeats: dict[int, int] = {}
        self.latest = 0
        self.waiting = 0


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
        self.corrupting = any(isinstance(f, Corrupt) for f in network.faults)
        self._peers = peers
        self._seed = seed
        self._strict = simulation.settings.strict
        self._frame_bytes = simulation.limits.frame_bytes
        self._kinds: dict[type, int] = {}
        self._keys: dict[Any, int] = {}
        # The last message measured: a broadcast sends one message to many.
        self._last: Any = None
        self._last_size = self._last_key = 0
        self._links: dict[int, _Link] = {}
        self._epoch = 0
        self._active: dict[int, tuple[Fault, frozenset[int]]] = {}
        self._corrupters: dict[int, list[tuple[int, Corrupt]]] = {}
        self._held: dict[int, list[tuple[Any, ...]]] = {}
        self._unflushed: list[tuple[Wait, _Link]] = []
        sharing = links.sharing
        self._windowed = links.windowed
        # Nanoseconds per byte; 0 = unlimited.
        self._up = [1e9 / links.uplink_of(p) for p in range(peers)] if sharing else []
        self._down = [1e9 / links.downlink_of(p) for p in range(peers)] if sharing else []
        # The longest queue that an uplink takes without asking its sender to wait.
        self._up_most = [int(simulation.limits.queue_bytes * rate) for rate in self._up]
        self._up_free = [0] * peers
        self._down_free = [0] * peers
        self._enter = self._enter_downlink
        # The formulas of these two are known, so a draw can start from a key folded once per link.
        self._known = isinstance(links, (Links, Measured))
        self._jitter_s = links.jitter_s if self._known else 0.0
        self._constant = links.plain and not simulation.faulty
        self._plain_ns = to_ns(links.latency_of_s(0, 1)) if links.plain else 0
        plain = self._constant and not self._strict
        self.transmit = self._transmit_plain if plain else self._transmit

    # Measuring.

    def _measure(self, message: Message) -> None:
        """Size and key of a message, remembered as those of `_last`."""
        if message.__class__ not in self._kinds:
            require_message(message.__class__)
            self._kinds[message.__class__] = 0
        size = codec.size_of(message)
        if size > self._frame_bytes:
            raise MessageTooLarge(
                f"send: {type(message).__name__} of {size} bytes; limit {self._frame_bytes} "
                "(split it, or raise Limits.frame_bytes)"
            )
        tag = message.tag
        if tag:
            named = (message.code, tag)
            key = self._keys.get(named)
            if key is None:
                if len(self._keys) > 100_000:
                    self._keys.clear()
                key = self._keys[named] = message_key(message.code, tag)
        else:
            key = message.code
        self._last, self._last_size, self._last_key = message, size, key

    def _no_peer(self, to: Any) -> UsageError:
        return UsageError(f"send: no peer {to!r}; there are 0..{self._peers - 1}")

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes sent, by class name; classes of one name are added up."""
        totals: dict[str, int] = {}
        for kind, size in self._kinds.items():
            totals[kind.__name__] = totals.get(kind.__name__, 0) + size
        return totals

    def in_flight(self, heap: list[tuple[int, int, Any, Any, Any]]) -> int:
        """Messages sent that were neither delivered nor dropped."""
        held = sum(map(len, self._held.values()))
        return held + sum(entry[2] is None or entry[2] is self._enter for entry in heap)

    # The way of a message.

    def transmit_as(
        self, runtime: Runtime, to: int, message: Any, size: int, key: int, request: int
    ) -> Wait | None:
        """Transmit something whose size and key on the wire are not the codec's."""
        self._kinds.setdefault(message.__class__, 0)
        self._last, self._last_size, self._last_key = message, size, key
        return self.transmit(runtime, to, message, request)

    def _transmit_plain(self, runtime: Runtime, to: int, message: Message, request: int) -> None:
        """Constant latency, nothing shared, nothing random, no faults."""
        if message is not self._last:
            self._measure(message)
        if not 0 <= to < self._peers:
            raise self._no_peer(to)
        simulation, source, size = self.simulation, runtime.id, self._last_size
        self.messages_sent += 1
        self.bytes_sent[source] += size
        self._kinds[message.__class__] += size
        heappush(
            simulation.heap,
            (
                simulation.now_ns + self._plain_ns if to != source else simulation.now_ns,
                simulation.sequence(),
                None,
                simulation.runtimes[to],
                Envelope(source, message, size, request, self._last_key),
            ),
        )

    def _transmit(self, runtime: Runtime, to: int, message: Message, request: int) -> Wait | None:
        if message is not self._last:
            self._measure(message)
        if not 0 <= to < self._peers:
            raise self._no_peer(to)
        simulation, source, size = self.simulation, runtime.id, self._last_size
        key = self._last_key
        target = simulation.runtimes[to]
        self.messages_sent += 1
        self.bytes_sent[source] += size
        self._kinds[message.__class__] += size
        # Incarnations only grow, so their sum changes when either does.
        incarnation = runtime.incarnation + target.incarnation
        checked = self._fingerprint(message) if self._strict else ""
        envelope = Envelope(source, message, size, request, key, incarnation, checked)
        now = simulation.now_ns
        if source == to:
            heappush(simulation.heap, (now, simulation.sequence(), None, target, envelope))
            return None
        start = end = now
        full: Wait | None = None
        if self._up:
            free = self._up_free[source]
            if free > now:
                start = free
            end = self._up_free[source] = start + int(size * self._up[source])
            if end - now > self._up_most[source]:
                full = Wait(simulation.ready)
                simulation.at(end - self._up_most[source], _wake, full)
        pair = source * self._peers + to
        link = self._links.get(pair)
        if link is None:
            path = 1e9 / self.links.path_of(source, to) if self._windowed else 0.0
            link = self._links[pair] = _Link(to_ns(self.links.latency_of_s(source, to)), path)
        if link.path:
            start, end, full = self._enter_path(link, start, end, size, full)
        if link.epoch != self._epoch:
            self._refresh(link, source, to)
        if link.blocked:
            simulation.drop("partition")
            return full
        travel = link.latency_ns
        if link.drawn:
            extra = self._draw(link, source, to, key)
            if extra < 0:
                simulation.drop("lost")
                return full
            travel += extra
        last = end + travel
        if link.hold is not None:
            link.waiting += 1
            self._held[link.hold].append((link, start + travel, last, target, envelope))
        else:
            self._arrive(link, start + travel, last, target, envelope)
        return full

    def _enter_path(
        self, link: _Link, start: int, end: int, size: int, full: Wait | None
    ) -> tuple[int, int, Wait | None]:
        """The turn on a way that connections limit: when first and last byte leave."""
        simulation = self.simulation
        if link.path_free > start:
            start = link.path_free
        end = link.path_free = max(end, start + int(size * link.path))
        most = int(simulation.limits.queue_bytes * link.path)
        if full is None and end - simulation.now_ns > most:
            full = Wait(simulation.ready)
            simulation.at(end - most, _wake, full)
        return start, end, full

    def _arrive(
        self, link: _Link, first: int, last: int, target: Runtime, envelope: Envelope[Any]
    ) -> None:
        """Schedule the arrival of a message whose first and last byte get there at these times."""
        simulation = self.simulation
        action = None
        if self._down and (rate := self._down[target.id]):
            # Behind a slow uplink the downlink is busy only for the message's own service time.
            service = int(envelope.size_bytes * rate)
            action = self._enter
            if last - service > first:
                first = last - service
            else:
                last = first + service
        else:
            first = last
        if last > link.latest:
            link.latest = last
        heappush(simulation.heap, (first, simulation.sequence(), action, target, envelope))

    def _enter_downlink(self, target: Runtime, envelope: Envelope[Any]) -> None:
        """The first byte arrives: the receiver's downlink serves arrivals one after the other."""
        simulation, peer = self.simulation, target.id
        now, free = simulation.now_ns, self._down_free[peer]
        service = int(envelope.size_bytes * self._down[peer])
        end = (free if free > now else now) + service
        self._down_free[peer] = end
        if free > now:
            link = self._links[envelope.source * self._peers + peer]
            if end > link.latest:
                link.latest = end
        heappush(simulation.heap, (end, simulation.sequence(), None, target, envelope))

    def _draw(self, link: _Link, source: int, to: int, key: int) -> int:
        """Jitter in nanoseconds, or -1 for a message that is lost: `links`' own draws."""
        repeats = link.repeats
        number = repeats.pop(key, 0)
        if not number and len(repeats) >= _REPEATS:
            del repeats[next(iter(repeats))]
        repeats[key] = number + 1
        # A message sent again is another message: it must not share its predecessor's fate.
        draw = mix(key, number) if number else key
        if not self._known:
            draw = keyed.signed(draw)
            if self.links.lost(source, to, draw, link.extra):
                return -1
            return to_ns(self.links.jitter_of_s(source, to, draw))
        if link.threshold and mix(link.loss_key, draw) >> 11 < link.threshold:
            return -1
        if not self._jitter_s:
            return 0
        return to_ns(log1p(-keyed.unit(mix(link.jitter_key, draw))) * -self._jitter_s)

    def flush(self, runtime: Runtime, to: int) -> Wait | None:
        """A wait until all sent so far to that peer has arrived or was lost."""
        simulation, now = self.simulation, self.simulation.now_ns
        if not 0 <= to < self._peers:
            raise self._no_peer(to)
        if to == runtime.id:
            return None
        if self._constant:
            # The plain path keeps no books; the strict path must keep the same times.
            wait = Wait(simulation.ready)
            simulation.at(now + self._plain_ns, _wake, wait)
            return wait
        link = self._links.get(runtime.id * self._peers + to)
        if link is None or (link.latest <= now and not link.waiting):
            return None
        wait = Wait(simulation.ready)
        self._flushed(wait, link)
        return wait

    def _flushed(self, wait: Wait, link: _Link) -> None:
        if wait.done:
            return
        if link.waiting:
            self._unflushed.append((wait, link))
        elif link.latest > self.simulation.now_ns:
            self.simulation.at(link.latest, self._flushed, wait, link)
        else:
            wait.resolve(None)

    def forget(self, peer: int) -> None:
        """A crash empties the peer's queues; what it had queued is lost with its incarnation."""
        self._up_free[peer] = self.simulation.now_ns
        self._down_free[peer] = self.simulation.now_ns
        if self._windowed:
            for pair, link in self._links.items():
                if peer in divmod(pair, self._peers):
                    link.path_free = self.simulation.now_ns

    # Faults on links.

    def begin(self, number: int, fault: Fault) -> None:
        self._active[number] = (fault, frozenset(fault.who))
        if isinstance(fault, Hold):
            self._held[number] = []
        self._changed()

    def end(self, number: int) -> None:
        fault, _ = self._active.pop(number)
        self._changed()
        if isinstance(fault, Hold):
            self._release(number)

    def _changed(self) -> None:
        self._epoch += 1
        self._corrupters.clear()
        for number, (fault, _) in self._active.items():
            if isinstance(fault, Corrupt):
                for peer in fault.who:
                    self._corrupters.setdefault(peer, []).append((number, fault))

    def _release(self, number: int) -> None:
        """The end of a hold: what it kept arrives, unless another hold keeps it on."""
        now = self.simulation.now_ns
        for link, first, last, target, envelope in self._held.pop(number):
            self._refresh(link, envelope.source, target.id)
            if link.hold is not None:
                self._held[link.hold].append((link, first, last, target, envelope))
            else:
                link.waiting -= 1
                self._arrive(link, max(first, now), max(last, now), target, envelope)
        pending, self._unflushed = self._unflushed, []
        for wait, link in pending:
            self._flushed(wait, link)

    def _refresh(self, link: _Link, source: int, to: int) -> None:
        """What the faults of this moment make of a link."""
        link.epoch = self._epoch
        link.blocked, link.hold, link.drawn = False, None, not self._known
        passing = 1.0
        for number, (fault, who) in self._active.items():
            inside, outside = source in who, to in who
            if isinstance(fault, Partition):
                if inside != outside and (inside or not fault.one_way):
                    link.blocked = True
            elif isinstance(fault, Loss):
                if inside or outside:
                    passing *= 1.0 - fault.probability
            elif isinstance(fault, Hold) and (inside or outside) and link.hold is None:
                link.hold = number
        link.extra = 1.0 - passing
        if self._known:
            links = self.links
            # As in `links.lost`; a power of two scales exactly, so whole numbers can be compared.
            link.threshold = (1.0 - (1.0 - links.loss) * (1.0 - link.extra)) / keyed.UNIT
            link.drawn = link.threshold > 0.0 or self._jitter_s > 0.0
            link.loss_key = keyed.fold(0, links.seed, "loss", source, to)
            link.jitter_key = keyed.fold(0, links.seed, "jitter", source, to)

    # Strict wire and corruption.

    def _fingerprint(self, message: Message) -> str:
        return bytes_digest(*codec.encode(message))

    def inspect(self, envelope: Envelope[Any], target: int) -> Envelope[Any] | None:
        """The message as it would come off the target's wire; None when it no longer decodes."""
        corrupters = self._corrupters.get(envelope.source)
        if corrupters is None and not self._strict:
            return envelope
        simulation = self.simulation
        parts = codec.encode(envelope.message, envelope.request)
        if self._strict and bytes_digest(*codec.encode(envelope.message)) != envelope.checked:
            kind, source = type(envelope.message).__name__, envelope.source
            error = MutatedAfterSend(
                f"{kind} from peer {source} changed between send and delivery (send a clone, or "
                "await flushed() before writing)"
            )
            simulation.blame(simulation.runtimes[source], error)
            return None
        frame = bytearray(b"".join(parts))
        flipped = corrupters is not None and self._flip(frame, envelope, target, corrupters)
        if not (flipped or self._strict):
            return envelope
        try:
            message, request = codec.decode(frame, simulation.limits)
        except WireError as error:
            simulation.drop("corrupt")
            if not flipped:
                simulation.blame(simulation.runtimes[envelope.source], error)
            return None
        key = envelope.key
        if flipped:
            # The trace tells what was delivered: perhaps of another round, surely of other content.
            key = message_key(message.code, message.tag) if message.tag else message.code
            key ^= crc32(frame)
        return Envelope(envelope.source, message, envelope.size_bytes, request, key)  # type: ignore[arg-type]

    def _flip(
        self, frame: bytearray, envelope: Envelope[Any], target: int,
        corrupters: list[tuple[int, Corrupt]],
    ) -> bool:  # fmt: skip
        """Flip the bits that the faults want; whether there was one."""
        flipped = False
        for number, fault in corrupters:
            draw = keyed.fold(
                0, self._seed, "corrupt", envelope.source, target, envelope.key,
                self.simulation.now_ns, number,
            )  # fmt: skip
            if keyed.unit(draw) < fault.probability:
                bit = keyed.fold(draw, 1) % (8 * len(frame))
                frame[bit // 8] ^= 1 << (bit % 8)
                flipped = True
        return flipped


def _wake(wait: Wait, _: Any) -> None:
    wait.resolve(None)
