"""Direct paths between peers behind NAT boxes: reflection, hole punching, and a relay if all fails.

The upgrade is that of libp2p's DCUtR ("Direct Connection Upgrade through Relay"): the called peer
says over the relay how it looks from outside and starts a clock; the caller answers with its own
endpoint; the called peer takes the round trip, says SYNC and dials after half of it; the caller
dials when SYNC comes. So both first packets cross, and each opens its sender's filter even where
the other box drops it. After three attempts the pair stays on the relay.

Messages follow (`peer.paths`): first through the relay, then over a connection that both sides open
at once between the endpoints that the datagrams found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.kernel.datagrams import Endpoint, Socket
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup
from shoal.parts.overlay._traversal_wire import Connect, Hello, Punch, Sync, signed_text
from shoal.parts.overlay.records import KeyOf
from shoal.parts.overlay.relay import (
    Ask,
    Challenge,
    Probe,
    Reserve,
    Reserved,
    Seen,
    Through,
    packed,
    reservation_text,
    unpacked,
)
from shoal.wire.identity import Identity, verify
from shoal.world.nat import ADDRESS, INDEPENDENT, PORT

_PROBE = -2
_TOKEN_BYTES = 8
_MOST_CALLS = 1024
_MOST_OF_ONE = 16
_SILENT = 4
"""Keepalives that a path may miss before it is given up."""

# The other peer, the caller's number for the path, and whether this peer is the caller: two peers
# may call each other at once, with equal numbers.
_Key = tuple[int, int, bool]


@dataclass(frozen=True)
class Path:
    """How a peer is reached: `direct` at an endpoint, or over the relay (endpoint of the relay).

    messages: whether `peer.send` to it goes directly, too.
    """

    to: PeerId
    direct: bool
    endpoint: Endpoint
    messages: bool = False


@dataclass
class _Call:
    """A path in the making."""

    began_s: float
    heard: bool = False
    theirs: Endpoint | None = None
    their_token: bytes = b""
    public: bool = False
    open: Endpoint | None = None
    clocks: dict[int, float] = field(default_factory=dict)


@dataclass
class _Kept:
    """A direct path that is kept open."""

    key: _Key
    endpoint: Endpoint
    token: bytes
    heard_s: float


class Traversal:
    """A peer's side of it, on one socket; start `run` as a task and `await register()` first.

    relay, other: endpoints of two public peers that serve `Relay`, on different hosts; both
    reflect, the first one relays. attempts, punches: dials per path, and packets per dial, `gap_s`
    apart; timeout_s: how long an attempt and an answer of the relay may take, above the longest
    round trip through the relay. keepalive_s: how often the reservation and open paths are renewed,
    which keeps their mappings; it must be below the shortest mapping lifetime (RFC 4787: 120 s or
    more; RFC 8445 uses 15 s). With attempts=0 nobody punches: a peer that strangers can reach is
    dialled, and with `reversal` a caller that can be reached is dialled back. messages: whether
    `peer.send` takes the paths, too; both sides must have it.

    identity, key_of: this peer's key pair and the public keys of peers. With them the relay gives
    this peer's reservation to nobody else, and calls count only with their sender's signature.
    Without, a peer's number is a claim. Punches carry a token that was told in the call; whoever
    needs to know who is at the other end of a path all the same runs a secure session over it, as
    messages do.

        traversal = Traversal(peer, relay, other)
        async with peer.tasks() as group:
            group.start(traversal.run(until_s))
            group.start(traversal.keep_alive(until_s))
            await traversal.register()
            path = await traversal.connect(to)
    """

    def __init__(
        self, peer: Peer, relay: Endpoint, other: Endpoint, *, attempts: int = 3, punches: int = 3,
        gap_s: float = 0.05, timeout_s: float = 2.0, keepalive_s: float = 15.0,
        reversal: bool = True, messages: bool = False, identity: Identity | None = None,
        key_of: KeyOf | None = None,
    ) -> None:  # fmt: skip
        if attempts < 0 or punches < 1 or min(gap_s, timeout_s, keepalive_s) <= 0:
            raise UsageError(
                f"Traversal: attempts={attempts}, punches={punches}, gap_s={gap_s}, timeout_s="
                f"{timeout_s}, keepalive_s={keepalive_s}; need positive numbers"
            )
        self.peer = peer
        self.socket: Socket = peer.datagrams.open()
        self.seen: dict[Endpoint, Endpoint] = {}
        """this socket's outer endpoint, as each reflector saw it"""
        self.reachable = False
        """whether a stranger's datagram came in (AutoNAT): the box filters by no address"""
        self.mapped: Endpoint | None = None
        """the outer endpoint that the box gave on request, see `Socket.map_port`; it is used where
        reflectors see the same address"""
        self._relay, self._other, self._reversal = relay, other, reversal
        self._attempts, self._punches = attempts, punches
        self._gap_s, self._timeout_s, self._keepalive_s = gap_s, timeout_s, keepalive_s
        self._messages = messages
        self._identity, self._key_of = identity, key_of
        self._probed = self._port_passed = False
        self._reserved: Reserved | None = None
        # Above all numbers of an earlier life, which others may remember.
        self._numbers = int(peer.now() * 1000)
        # In the order in which they began.
        self._calls: dict[_Key, _Call] = {}
        self._kept: dict[int, _Kept] = {}

    # What was found out.

    @property
    def symmetric(self) -> bool:
        """Whether two reflectors saw different endpoints: mapping depends on the destination."""
        return self.mapping != INDEPENDENT

    @property
    def mapping(self) -> str:
        """The box's mapping behaviour, as far as the reflectors that answered can tell."""
        here, there = self.seen.get(self._relay), self.seen.get(self._other)
        if here == there or here is None or there is None:
            return INDEPENDENT
        beside = self.seen.get(self._beside) if self._reserved is not None else None
        return ADDRESS if beside == here else PORT

    @property
    def filtering(self) -> str:
        """The box's filtering behaviour: who got in of those that this socket had not sent to."""
        if self.reachable:
            return INDEPENDENT
        return ADDRESS if self._port_passed else PORT

    @property
    def public(self) -> bool:
        """Whether others see this peer as it sees itself, and nothing keeps strangers out."""
        return self.reachable and set(self.seen.values()) == {self.socket.local}

    @property
    def _beside(self) -> Endpoint:
        """The relay's second port."""
        assert self._reserved is not None
        return Endpoint(self._relay.host, self._reserved.alternate)

    # Registering.

    async def register(self) -> bool:
        """Reserve at the relay, be dialled back, ask all reflectors; whether both answered.

        The dial-backs come first: they must come from where nothing was sent to.
        """
        self.mapped = await self.socket.map_port()
        end_s = self.peer.now() + 3 * self._timeout_s
        while not self._probed and self.peer.now() < end_s:
            await self._send(Probe(_PROBE), self._relay)
            await self.peer.sleep_until(self.peer.now() + self._timeout_s / 8)
        for _ in range(2):
            await self._send(Probe(_PROBE), self._relay)
        await self.peer.sleep_until(self.peer.now() + self._timeout_s)
        end_s = again_s = self.peer.now()
        end_s += 3 * self._timeout_s
        while not self._registered() and self.peer.now() < end_s:
            if self.peer.now() >= again_s:
                await self._reserve()
                for number, place in enumerate((self._relay, self._other)):
                    await self._send(Ask(number), place)
                again_s += self._timeout_s / 4
            await self.peer.sleep_until(self.peer.now() + self._gap_s)
        return self._registered() and await self._reserve_for_messages()

    def _registered(self) -> bool:
        if self._reserved is None or not self.seen.keys() >= {self._relay, self._other}:
            return False
        # Only where two hosts saw different ports does the third port tell something.
        same = self.seen[self._relay] == self.seen[self._other]
        return same or self._beside in self.seen

    async def _reserve_for_messages(self) -> bool:
        if not self._messages or self.public:
            return True
        assert self._reserved is not None
        end_s = self.peer.now() + self._timeout_s
        return await self.peer.paths.reserve(PeerId(self._reserved.relay), deadline=end_s)

    async def _reserve(self, nonce: bytes = b"") -> None:
        signature = b""
        if nonce and self._identity is not None:
            signature = self._identity.sign(reservation_text(self.peer.id, nonce))
        await self._send(Reserve(self.peer.id, nonce, signature), self._relay)

    async def keep_alive(self, until_s: float) -> None:
        """Renew the reservation and the direct paths, and with them the mappings, until then."""
        while (at_s := self.peer.now() + self._keepalive_s) < until_s:
            await self.peer.sleep_until(at_s)
            await self._reserve()
            silent_s = self.peer.now() - _SILENT * self._keepalive_s
            for to, kept in list(self._kept.items()):
                if kept.heard_s < silent_s:
                    del self._kept[to]
                else:
                    await self._send(self._punch(kept.key, kept.token, True), kept.endpoint)

    def path(self, to: PeerId) -> Endpoint | None:
        """Where a direct path to that peer leads, while it is kept alive on both sides."""
        kept = self._kept.get(to)
        return kept.endpoint if kept is not None else None

    # Calling.

    async def connect(self, to: PeerId) -> Path | None:
        """A direct path, else one over the relay, else None: nothing came through at all."""
        self._numbers += 1
        key = (int(to), self._numbers, True)
        call = self._calls[key] = _Call(self.peer.now())
        end_s = again_s = self.peer.now()
        end_s += (self._attempts + 1) * self._timeout_s
        while self.peer.now() < end_s and call.open is None:
            if not call.heard and self.peer.now() >= again_s:
                # The call itself may be lost; who has heard it answers by itself.
                await self._through(to, Hello(key[1], self._token(key)))
                again_s += self._timeout_s
            await self.peer.sleep_until(self.peer.now() + self._gap_s)
        if not call.heard:
            return None
        messages = await self._carry(to, call)
        if call.open is None:
            return Path(to, False, self._relay, messages)
        return Path(to, True, call.open, messages)

    async def run(self, until_s: float) -> None:
        """Answer whatever comes to the socket until then."""
        async with self.peer.tasks() as group:
            while (found := await self.socket.recv_from(until_s)) is not None:
                data, source = found
                what = unpacked(data)
                if isinstance(what, Seen):
                    self._saw(what, source)
                elif isinstance(what, Punch):
                    await self._punched(what, source)
                elif source != self._relay:
                    continue
                elif isinstance(what, Challenge):
                    await self._reserve(what.nonce)
                elif isinstance(what, Reserved):
                    self._reserved = what
                    if self._beside not in self.seen:
                        await self._send(Ask(2), self._beside)
                elif isinstance(what, Through) and self._is_signed(what):
                    self._told(what.source, unpacked(what.data), group)

    def _saw(self, what: Seen, source: Endpoint) -> None:
        if what.number == _PROBE:
            if source == self._relay:
                self._probed = True
            elif source == self._other:
                self.reachable = True
            elif source.host == self._relay.host:
                self._port_passed = True
        elif source in (self._relay, self._other) or (
            self._reserved is not None and source == self._beside
        ):
            self.seen[source] = Endpoint(what.host, what.port)

    def _told(self, source: int, what: object, group: TaskGroup) -> None:
        """Something came over the relay."""
        if isinstance(what, Hello):
            key = (source, what.number, False)
            if key not in self._calls and self._has_room(source):
                self._calls[key] = _Call(self.peer.now(), True, their_token=what.token)
                group.start(self._called(key))
        elif isinstance(what, Connect):
            key = (source, what.number, not what.calling)
            if (call := self._calls.get(key)) is not None:
                group.start(self._connect(key, call, what))
        elif isinstance(what, Sync):
            key = (source, what.number, True)
            if (call := self._calls.get(key)) is not None:
                group.start(self._dial(key, call))

    def _has_room(self, source: int) -> bool:
        """Forget calls that are over; whether this peer may have another one."""
        over_s = self.peer.now() - (self._attempts + 3) * self._timeout_s
        while self._calls:
            oldest = next(iter(self._calls))
            if self._calls[oldest].began_s >= over_s:
                break
            del self._calls[oldest]
        its = sum(key[0] == source for key in self._calls)
        return len(self._calls) < _MOST_CALLS and its < _MOST_OF_ONE

    async def _punched(self, punch: Punch, source: Endpoint) -> None:
        key = (punch.peer, punch.number, not punch.calling)
        if punch.token != self._token(key):
            return
        kept = self._kept.get(punch.peer)
        if kept is not None and kept.key == key and kept.endpoint == source:
            kept.heard_s = self.peer.now()
        call = self._calls.get(key)
        if call is None or not call.their_token:
            return
        if punch.back:
            if call.open is None:
                call.open = source
                self._kept[punch.peer] = _Kept(key, source, call.their_token, self.peer.now())
            return
        await self._send(self._punch(key, call.their_token, True), source)
        if call.open is None:
            # A symmetric box shows another port than it told: the one that is seen here.
            await self._send(self._punch(key, call.their_token, False), source)

    async def _called(self, key: _Key) -> None:
        """The called peer's side: CONNECT, until a punch is answered."""
        call = self._calls[key]
        for attempt in range(max(1, self._attempts)):
            call.clocks[attempt] = self.peer.now()
            await self._through(key[0], self._own(key, attempt))
            end_s = self.peer.now() + self._timeout_s
            while self.peer.now() < end_s and call.open is None:
                await self.peer.sleep_until(self.peer.now() + self._gap_s)
            if call.open is not None or not self._attempts:
                break
        await self._carry(PeerId(key[0]), call)

    async def _connect(self, key: _Key, call: _Call, connect: Connect) -> None:
        call.theirs = Endpoint(connect.host, connect.port)
        call.their_token, call.public = connect.token, connect.public
        if not connect.calling:
            call.heard = True
            if not self._attempts and connect.reachable:
                await self._dial(key, call)
            elif self._attempts or (self._reversal and self.reachable) or self._messages:
                await self._through(key[0], self._own(key, connect.attempt))
            return
        began_s = call.clocks.pop(connect.attempt, None)
        if not self._attempts:
            if self._reversal and connect.reachable:
                await self._dial(key, call)
        elif began_s is not None:
            half_s = (self.peer.now() - began_s) / 2
            await self._through(key[0], Sync(connect.number, connect.attempt))
            await self.peer.sleep_until(self.peer.now() + half_s)
            await self._dial(key, call)

    async def _dial(self, key: _Key, call: _Call) -> None:
        for _ in range(self._punches):
            if call.theirs is None:
                return
            await self._send(self._punch(key, call.their_token, False), call.theirs)
            await self.peer.sleep_until(self.peer.now() + self._gap_s)

    async def _carry(self, to: PeerId, call: _Call) -> bool:
        """Have messages take the path; whether they go directly."""
        if not self._messages or call.theirs is None:
            return False
        if self.public and call.public:
            return True
        paths = self.peer.paths
        if not call.public and self._reserved is not None:
            paths.through(to, PeerId(self._reserved.relay))
        if call.open is None:
            return False
        end_s = self.peer.now() + self._timeout_s
        return await paths.punch(to, self.socket, call.open, deadline=end_s)

    # Datagrams.

    def _own(self, key: _Key, attempt: int) -> Connect:
        place = self.seen.get(self._relay, self.socket.local)
        # A box behind another one opens a port on a side that nobody here comes from.
        if self.mapped is not None and self.mapped.host == place.host:
            place = self.mapped
        _, number, calling = key
        return Connect(
            number, attempt, calling, self.reachable, self.public, *place, self._token(key)
        )

    def _token(self, key: _Key) -> bytes:
        """What punches of that path to this peer carry; nobody else can know it."""
        if self._identity is None:
            drawn = self.peer.uniform("punch", *map(int, key))
            return int(drawn * 2**53).to_bytes(_TOKEN_BYTES, "little")
        text = f"shoal punch {self.peer.id} {key}"
        return hashlib.sha256(self._identity.sign(text.encode())).digest()[:_TOKEN_BYTES]

    def _punch(self, key: _Key, token: bytes, back: bool) -> Punch:
        return Punch(self.peer.id, key[1], key[2], back, token)

    def _is_signed(self, what: Through) -> bool:
        """Whether it is for this peer, and from whom it says."""
        if what.target != self.peer.id:
            return False
        if self._key_of is None:
            return True
        public = self._key_of(PeerId(what.source))
        text = signed_text(what.source, what.target, what.data)
        return public is not None and verify(public, text, what.signature)

    async def _through(self, to: int, what: object) -> None:
        own, data, signature = self.peer.id, packed(what), b""
        if self._identity is not None:
            signature = self._identity.sign(signed_text(own, to, data))
        await self._send(Through(own, to, data, signature), self._relay)

    async def _send(self, what: object, to: Endpoint) -> None:
        await self.socket.send_to(packed(what), to)
