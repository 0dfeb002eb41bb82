"""Messages past NAT boxes on the virtual network: relays, and connections opened from both sides.

Only boxes with `messages` hold them up. Who is behind such a box can call whoever is not, and is
answered on that connection; to be called it needs a path (`shoal.kernel.paths`). What goes through
a relay takes the way of a message twice, sealed for its receiver. Connections keep themselves
alive, as heartbeats do on real sockets; they end with either side's incarnation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.base.errors import WireError
from shoal.base.units import to_ns
from shoal.kernel.datagrams import DATAGRAM, HEADER_BYTES, Endpoint, Socket
from shoal.kernel.paths import RelayLimits
from shoal.kernel.peer import Envelope
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.message import Message, Packed, message, message_key

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime

SEALED_BYTES = 29
"""What a record's head and tag add to a message that a relay passes on."""
_AGAIN_NS = to_ns(0.2)
_PACKET_BYTES = 12 + HEADER_BYTES
"""TCP's header is twelve bytes longer than UDP's."""


@message(tag=("source", "target"))
class Carried:
    """A message through a relay, on either half of its way."""

    source: int
    target: int
    relay: int
    frame: Packed


@message(tag=("source", "relay"))
class Reservation:
    """A peer asks a relay for a reservation, or the relay grants it."""

    source: int
    relay: int
    granted: bool


@message(tag=("from_port", "to_port"))
class Opening:
    """A packet that opens a connection, between the outer endpoints of both sides."""

    from_host: str
    from_port: int
    to_host: str
    to_port: int
    source: int
    target: int
    answer: bool


class Ways:
    """Which peers can reach which; `transmit` stands before `Delivery.transmit`."""

    def __init__(self, simulation: Simulation) -> None:
        network = simulation.network
        self._simulation = simulation
        self._box: dict[int, int] = {
            peer: number
            for number, box in enumerate(network.nats)
            if box.messages
            for peer in box.who
        }
        self.holding = bool(self._box)
        """whether any box holds messages up; otherwise every path is there already"""
        self._serving: dict[int, tuple[int, RelayLimits]] = {}
        self._lines: dict[tuple[int, int], int] = {}
        self._punched: dict[tuple[int, int], int] = {}
        self._reserved: dict[tuple[int, int], int] = {}
        self._relays: dict[tuple[int, int], tuple[int, int]] = {}
        self._asking: dict[tuple[int, int], Wait] = {}
        self._opening: dict[tuple[int, int], Wait] = {}
        self._circuits: dict[tuple[int, int, int], tuple[int, int]] = {}

    # Messages.

    def transmit(self, runtime: Runtime, to: int, message: Message, request: int) -> Wait | None:
        simulation, source = self._simulation, runtime.id
        if source == to or not 0 <= to < simulation.network.peers or self._open(source, to):
            return simulation.delivery.transmit(runtime, to, message, request)
        relay, incarnation = self._relays.get((source, to), (-1, 0))
        if relay < 0 or incarnation != runtime.incarnation:
            simulation.drop("no path")
            return None
        data = b"".join(codec.encode(message, request))
        return self._carry(runtime, relay, Carried(source, to, relay, Packed(data)), len(data))

    def _open(self, source: int, to: int) -> bool:
        """Whether `source` reaches `to` without a relay."""
        box = self._box.get(to)
        pair = (min(source, to), max(source, to))
        if box is None:
            if source in self._box:
                # It is answered on what it opened.
                self._lines[pair] = self._lives(*pair)
            return True
        lives = self._lives(*pair)
        return (
            box == self._box.get(source)
            or self._lines.get(pair) == lives
            or self._punched.get(pair) == lives
            or self._reserved.get((to, source)) == lives
        )

    def _lives(self, one: int, other: int) -> int:
        # Incarnations only grow, so their sum changes when either does.
        runtimes = self._simulation.runtimes
        return runtimes[one].incarnation + runtimes[other].incarnation

    def _carry(self, runtime: Runtime, to: int, what: Carried, size: int) -> Wait | None:
        delivery = self._simulation.delivery
        return delivery.transmit_as(
            runtime, to, what, size + SEALED_BYTES,
            message_key(Carried.code, (what.source, what.target)), DATAGRAM,
        )  # fmt: skip

    # Paths.

    def serve(self, runtime: Runtime, limits: RelayLimits) -> None:
        self._serving[runtime.id] = (runtime.incarnation, limits)

    def _limits(self, relay: int) -> RelayLimits | None:
        incarnation, limits = self._serving.get(relay, (-1, None))
        return limits if incarnation == self._simulation.runtimes[relay].incarnation else None

    def through(self, runtime: Runtime, to: int, relay: int) -> None:
        self._relays[runtime.id, to] = (relay, runtime.incarnation)

    def direct(self, runtime: Runtime, to: int) -> bool:
        pair = (min(runtime.id, to), max(runtime.id, to))
        return self._punched.get(pair) == self._lives(*pair)

    def reserve(self, runtime: Runtime, relay: int) -> Wait:
        wait = Wait(self._simulation.ready)
        if not self.holding:
            wait.resolve(True)
            return wait
        self._asking[runtime.id, relay] = wait
        self._ask(wait, (runtime, relay))
        return wait

    def _ask(self, wait: Wait, what: tuple[Runtime, int]) -> None:
        runtime, relay = what
        if wait.done or not runtime.alive:
            return
        self._control(runtime, relay, Reservation(runtime.id, relay, False))
        simulation = self._simulation
        simulation.at(simulation.now_ns + _AGAIN_NS, self._ask, wait, what)

    def _control(self, runtime: Runtime, to: int, what: Reservation) -> None:
        key = message_key(Reservation.code, (what.source, what.relay))
        self._simulation.delivery.transmit_as(runtime, to, what, _PACKET_BYTES, key, DATAGRAM)

    def punch(self, runtime: Runtime, to: int, socket: Socket, place: Endpoint) -> Wait:
        wait = Wait(self._simulation.ready)
        if not self.holding:
            wait.resolve(True)
            return wait
        self._opening[runtime.id, to] = wait
        self._dial(wait, (runtime, to, socket, place))
        return wait

    def _dial(self, wait: Wait, what: tuple[Runtime, int, Socket, Endpoint]) -> None:
        runtime, to, socket, place = what
        if wait.done or socket.closed:
            return
        self._packet(runtime, to, socket, place, answer=False)
        simulation = self._simulation
        simulation.at(simulation.now_ns + _AGAIN_NS, self._dial, wait, what)

    def _packet(
        self, runtime: Runtime, to: int, socket: Socket, place: Endpoint, *, answer: bool
    ) -> None:
        datagrams = self._simulation.datagrams
        if (route := datagrams.route(socket, place)) is None:
            self._simulation.drop("no route")
            return
        target, outer = route
        self._simulation.delivery.transmit_as(
            runtime, target, Opening(*outer, *place, runtime.id, to, answer), _PACKET_BYTES,
            message_key(Opening.code, (outer.port, place.port)), DATAGRAM,
        )  # fmt: skip

    # What arrives.

    def opening(self, socket: Socket, what: Opening, source: Endpoint) -> None:
        """A packet of a connection came through to a socket, from this endpoint."""
        runtime = socket.runtime
        wait = self._opening.get((runtime.id, what.source))
        if what.target != runtime.id or wait is None:
            self._simulation.drop("no socket")
            return
        if not what.answer:
            self._packet(runtime, what.source, socket, source, answer=True)
        pair = (min(what.source, runtime.id), max(what.source, runtime.id))
        self._punched[pair] = self._lives(*pair)
        wait.resolve(True)

    def reserving(self, what: Reservation) -> None:
        """A relay is asked, or has answered."""
        pair = (what.source, what.relay)
        if what.granted:
            if (wait := self._asking.pop(pair, None)) is not None:
                wait.resolve(True)
            return
        limits = self._limits(what.relay)
        mine = sum(relay == what.relay and pair != (peer, relay) for peer, relay in self._reserved)
        if limits is None or mine >= limits.reservations:
            self._simulation.drop("relay limit")
            return
        self._reserved[pair] = self._lives(*pair)
        relay = self._simulation.runtimes[what.relay]
        self._control(relay, what.source, Reservation(what.source, what.relay, True))

    def carried(self, what: Carried, runtime: Runtime) -> None:
        """A message came to a relay, or through it to its receiver."""
        simulation = self._simulation
        data = what.frame.pack()
        if runtime.id == what.target:
            try:
                found, request = codec.decode(bytearray(data), simulation.limits)
            except WireError:
                simulation.drop("corrupt")
                return
            runtime.deliver(Envelope(what.source, found, len(data), request))  # type: ignore[arg-type]
        elif self._permitted(what, runtime.id, len(data) + SEALED_BYTES):
            self._carry(runtime, what.target, what, len(data))
        else:
            simulation.drop("relay limit")

    def _permitted(self, what: Carried, relay: int, size: int) -> bool:
        limits = self._limits(relay)
        pair = (what.target, relay)
        if limits is None or self._reserved.get(pair) != self._lives(*pair):
            return False
        low, high = min(what.source, what.target), max(what.source, what.target)
        now, most_ns = self._simulation.now_ns, to_ns(limits.circuit_s)
        began, used = self._circuits.get((relay, low, high), (now, 0))
        if now > began + 2 * most_ns:
            began, used = now, 0
        if now > began + most_ns or used + size > limits.circuit_bytes:
            return False
        self._circuits[relay, low, high] = (began, used + size)
        return True
