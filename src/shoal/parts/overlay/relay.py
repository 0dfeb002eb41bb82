"""A public peer that tells others how they look from outside, and passes datagrams on for them.

Reflector: the answer to `Ask` is the endpoint that it came from (as STUN, RFC 8489 section 3).
Relay: who has a reservation can be reached through it, within limits on time and bytes per pair
(as circuit relay v2 of libp2p, "limited relay").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.base.errors import MessageTooLarge, UsageError, WireError
from shoal.base.limits import DEFAULT
from shoal.kernel.datagrams import DATAGRAM_BYTES, Endpoint, Socket
from shoal.kernel.peer import Peer
from shoal.wire import codec
from shoal.wire.message import message


@message
class Ask:
    """How do I look from where you are?"""

    number: int


@message
class Seen:
    """The endpoint that an `Ask` came from."""

    number: int
    host: str
    port: int


@message
class Probe:
    """Have somebody else dial me back: an answer shows that strangers can reach me."""

    number: int


@message
class DialBack:
    """From one reflector to its partner: dial this endpoint."""

    number: int
    host: str
    port: int


@message
class Reserve:
    """Pass on to me what comes for this peer."""

    peer: int


@message
class Through:
    """A packed message on its way from one peer to another through the relay."""

    source: int
    target: int
    data: bytes


def packed(what: Any) -> bytes:
    """A message as the bytes of one datagram."""
    data = b"".join(codec.encode(what))
    if len(data) > DATAGRAM_BYTES:
        raise MessageTooLarge(
            f"datagram: {type(what).__name__} has {len(data)} bytes; limit {DATAGRAM_BYTES} "
            "(send less at once)"
        )
    return data


def unpacked(data: bytes) -> Any:
    """The message in a datagram, or None: anybody can send anything to an open port."""
    try:
        return codec.decode(bytearray(data), DEFAULT)[0]
    except WireError:
        return None


@dataclass(frozen=True)
class Relay:
    """`await Relay()(peer, socket, until_s)` serves on a socket until then.

    reservation_s: how long a reservation lasts; reservations: most at once; circuit_s and
    circuit_bytes: what one pair may use, from its first datagram on, before it is cut off for
    circuit_s. partner: another such server, on another host, which dials back whoever asks here
    with `Probe` (AutoNAT): only ever the endpoint that asked, so that nobody is pointed at others.
    A peer's number is a claim: whoever needs to be sure runs a secure session on top.

    >>> Relay(circuit_s=60.0).circuit_bytes
    131072
    """

    reservation_s: float = 3600.0
    reservations: int = 100_000
    circuit_s: float = 120.0
    circuit_bytes: int = 1 << 17
    partner: Endpoint | None = None

    def __post_init__(self) -> None:
        if min(self.reservation_s, self.reservations, self.circuit_s, self.circuit_bytes) <= 0:
            raise UsageError(f"{self}: all limits must be positive numbers")

    async def __call__(self, peer: Peer, socket: Socket, until_s: float) -> None:
        """Serve; records "relay_refused" for datagrams over a limit or without a reservation."""
        places: dict[int, tuple[Endpoint, float]] = {}
        circuits: dict[tuple[int, int], tuple[float, int]] = {}
        while (found := await socket.recv_from(until_s)) is not None:
            data, source = found
            what, now = unpacked(data), peer.now()
            if isinstance(what, Ask):
                await socket.send_to(packed(Seen(what.number, *source)), source)
            elif isinstance(what, Probe) and self.partner is not None:
                await socket.send_to(packed(DialBack(what.number, *source)), self.partner)
            elif isinstance(what, DialBack) and source == self.partner:
                to = Endpoint(what.host, what.port)
                await socket.send_to(packed(Seen(what.number, *to)), to)
            elif isinstance(what, Reserve):
                if what.peer in places or len(places) < self.reservations:
                    places[what.peer] = (source, now + self.reservation_s)
                    await socket.send_to(packed(Seen(-1, *source)), source)
            elif isinstance(what, Through):
                pair = (min(what.source, what.target), max(what.source, what.target))
                began_s, used = circuits.get(pair, (now, 0))
                if now > began_s + 2 * self.circuit_s:
                    began_s, used = now, 0
                place = places.get(what.target)
                within = now <= began_s + self.circuit_s and used + len(data) <= self.circuit_bytes
                ours = places.get(what.source, (None, 0.0))[0] == source
                if ours and within and place is not None and place[1] > now:
                    circuits[pair] = (began_s, used + len(data))
                    await socket.send_to(data, place[0])
                else:
                    peer.record("relay_refused", what.target)
