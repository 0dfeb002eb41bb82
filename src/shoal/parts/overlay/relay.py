"""A public peer that tells others how they look from outside, and passes datagrams on for them.

Reflector: the answer to `Ask` is the endpoint that it came from (as STUN, RFC 8489 section 3), and
`Probe` has the asker dialled back from another host and from another port of this host, which shows
what its box lets in (as RFC 5780 section 4.4). Relay: who has a reservation can be reached through
it, within limits on time and bytes per pair (as circuit relay v2 of libp2p, "limited relay").
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from shoal.base.errors import MessageTooLarge, UsageError, WireError
from shoal.base.ids import PeerId
from shoal.base.limits import DEFAULT
from shoal.kernel.datagrams import DATAGRAM_BYTES, Endpoint, Socket
from shoal.kernel.peer import Peer
from shoal.parts.overlay.records import KeyOf
from shoal.wire import codec
from shoal.wire.identity import Identity, verify
from shoal.wire.message import message


@message
class Ask:
    """How do I look from where you are?"""

    number: int


@message
class Seen:
    """The endpoint that an `Ask` came from, or that was to be dialled back."""

    number: int
    host: str
    port: int


@message
class Probe:
    """Have me dialled back: what arrives shows what my box lets in. The answer says it is done."""

    number: int


@message
class DialBack:
    """From one reflector to its partner: dial this endpoint."""

    number: int
    host: str
    port: int


@message
class Reserve:
    """Pass on to me what comes for this peer. nonce, signature: of a `Challenge`, or empty."""

    peer: int
    nonce: bytes
    signature: bytes


@message
class Challenge:
    """Sign this and ask again: it shows that you have that peer's key, and that endpoint."""

    nonce: bytes


@message
class Reserved:
    """The reservation stands. relay: the relay's own number; alternate: its second port."""

    relay: int
    alternate: int


@message
class Through:
    """A packed message on its way from one peer to another through the relay.

    signature: of `source`, over both numbers and the data; the relay does not look at it.
    """

    source: int
    target: int
    data: bytes
    signature: bytes


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


def reservation_text(peer: int, nonce: bytes) -> bytes:
    """What a peer signs to get a reservation."""
    return b"shoal reservation" + peer.to_bytes(8, "little", signed=True) + nonce


_NONCE_S = 30.0
_NONCE_BYTES = 16
_PAIRS_PER_PLACE = 16


@dataclass(frozen=True)
class Relay:
    """`await Relay()(peer, socket, until_s)` serves on a socket until then.

    reservation_s: how long a reservation lasts; reservations: most at once, per_host: of one
    address (many peers may be behind one box); circuit_s and circuit_bytes: what one pair may use,
    from its first datagram on, before it is cut off for circuit_s. partner: another such server, on
    another host, which dials back whoever asks here with `Probe` (AutoNAT): only ever the endpoint
    that asked, so that nobody is pointed at others.

    identity, key_of: this peer's key pair, and the public keys of peers. With them, a reservation
    goes to whoever signs a nonce that was sent to that endpoint; a peer without a key gets none.
    Without, a peer's number is a claim, and the last one to make it has it.

    >>> Relay(circuit_s=60.0).circuit_bytes
    131072
    """

    reservation_s: float = 3600.0
    reservations: int = 100_000
    circuit_s: float = 120.0
    circuit_bytes: int = 1 << 17
    partner: Endpoint | None = None
    per_host: int = 256
    identity: Identity | None = None
    key_of: KeyOf | None = None

    def __post_init__(self) -> None:
        limits = (self.reservation_s, self.reservations, self.circuit_s, self.circuit_bytes)
        if min(*limits, self.per_host) <= 0:
            raise UsageError(f"{self}: all limits must be positive numbers")
        if self.key_of is not None and self.identity is None:
            raise UsageError(
                "Relay: key_of without an identity (give one: its signatures make nonces that "
                "nobody can guess)"
            )

    async def __call__(self, peer: Peer, socket: Socket, until_s: float) -> None:
        """Serve; records "relay_refused" for datagrams over a limit or without a reservation."""
        alternate = peer.datagrams.open()
        serving = _Serving(self, peer, socket, alternate)
        async with peer.tasks() as group:
            group.start(_reflect(alternate, until_s))
            while (found := await socket.recv_from(until_s)) is not None:
                await serving.answer(*found)
        alternate.close()


async def _reflect(socket: Socket, until_s: float) -> None:
    """The second port: tells how others look, and serves as one that nobody has sent to yet."""
    while (found := await socket.recv_from(until_s)) is not None:
        data, source = found
        what = unpacked(data)
        if isinstance(what, Ask):
            await socket.send_to(packed(Seen(what.number, *source)), source)


@dataclass
class _Circuit:
    """What a pair has used."""

    began_s: float
    used: int = 0


class _Serving:
    """The tables of a relay. All are bounded, and what has expired goes first."""

    def __init__(self, rules: Relay, peer: Peer, socket: Socket, alternate: Socket) -> None:
        self._rules = rules
        self._peer = peer
        self._socket = socket
        self._alternate = alternate
        # Renewed entries go to the end, so that the oldest of both tables stand in front.
        self._places: dict[int, tuple[Endpoint, float]] = {}
        self._hosts: dict[str, int] = {}
        self._circuits: dict[tuple[int, int], _Circuit] = {}

    async def answer(self, data: bytes, source: Endpoint) -> None:
        what, partner = unpacked(data), self._rules.partner
        if isinstance(what, Ask):
            await self._say(Seen(what.number, *source), source)
        elif isinstance(what, Probe):
            await self._say(Seen(what.number, *source), source)
            await self._alternate.send_to(packed(Seen(what.number, *source)), source)
            if partner is not None:
                await self._say(DialBack(what.number, *source), partner)
        elif isinstance(what, DialBack) and source == partner:
            to = Endpoint(what.host, what.port)
            await self._say(Seen(what.number, *to), to)
        elif isinstance(what, Reserve):
            await self._reserve(what, source)
        elif isinstance(what, Through):
            if (to := self._route(what, source, len(data))) is not None:
                await self._socket.send_to(data, to)
            else:
                self._peer.record("relay_refused", what.target)

    async def _say(self, what: object, to: Endpoint) -> None:
        await self._socket.send_to(packed(what), to)

    # Reservations.

    async def _reserve(self, what: Reserve, source: Endpoint) -> None:
        now = self._peer.now()
        place = self._places.get(what.peer)
        # Whoever sends from the endpoint that showed the key may go on using it.
        known = place is not None and place[0] == source and place[1] > now
        if not known and self._rules.key_of is not None:
            public = self._rules.key_of(PeerId(what.peer))
            if public is None:
                return
            if what.nonce not in (self._nonce(source, now), self._nonce(source, now - _NONCE_S)):
                await self._say(Challenge(self._nonce(source, now)), source)
                return
            if not verify(public, reservation_text(what.peer, what.nonce), what.signature):
                return
        self._forget(now)
        if what.peer in self._places:
            self._drop(what.peer)
        if (
            len(self._places) >= self._rules.reservations
            or self._hosts.get(source.host, 0) >= self._rules.per_host
        ):
            return
        self._places[what.peer] = (source, now + self._rules.reservation_s)
        self._hosts[source.host] = self._hosts.get(source.host, 0) + 1
        await self._say(Reserved(self._peer.id, self._alternate.local.port), source)

    def _nonce(self, source: Endpoint, now_s: float) -> bytes:
        """Remembered by nobody: this peer's signature over the endpoint and the time."""
        assert self._rules.identity is not None
        text = f"shoal nonce {source} {int(now_s // _NONCE_S)}"
        return hashlib.sha256(self._rules.identity.sign(text.encode())).digest()[:_NONCE_BYTES]

    def _drop(self, peer: int) -> None:
        host = self._places.pop(peer)[0].host
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]

    def _forget(self, now_s: float) -> None:
        """Let go what has expired."""
        while self._places:
            oldest = next(iter(self._places))
            if self._places[oldest][1] > now_s:
                break
            self._drop(oldest)

    # Circuits.

    def _route(self, what: Through, source: Endpoint, size: int) -> Endpoint | None:
        """Where a datagram goes; None without reservations, or over the pair's limits."""
        now = self._peer.now()
        place, own = self._places.get(what.target), self._places.get(what.source)
        if own is None or own[0] != source or place is None or place[1] <= now:
            return None
        circuit = self._circuit((min(what.source, what.target), max(what.source, what.target)), now)
        if (
            circuit is None
            or now > circuit.began_s + self._rules.circuit_s
            or circuit.used + size > self._rules.circuit_bytes
        ):
            return None
        circuit.used += size
        return place[0]

    def _circuit(self, pair: tuple[int, int], now_s: float) -> _Circuit | None:
        """What the pair has used since it began; None when there is no room for another pair."""
        ended_s = now_s - 2 * self._rules.circuit_s
        while self._circuits:
            oldest = next(iter(self._circuits))
            if self._circuits[oldest].began_s >= ended_s:
                break
            del self._circuits[oldest]
        circuit = self._circuits.get(pair)
        if circuit is None and len(self._circuits) < _PAIRS_PER_PLACE * self._rules.reservations:
            circuit = self._circuits[pair] = _Circuit(now_s)
        return circuit
