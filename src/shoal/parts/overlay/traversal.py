"""Direct paths between peers behind NAT boxes: reflection, hole punching, and a relay if all fails.

The upgrade is that of libp2p's DCUtR ("Direct Connection Upgrade through Relay"): the called peer
says over the relay how it looks from outside and starts a clock; the caller answers with its own
endpoint; the called peer takes the round trip, says SYNC and dials after half of it; the caller
dials when SYNC comes. So both first packets cross, and each opens its sender's filter even where
the other box drops it. After three attempts the pair stays on the relay.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.kernel.datagrams import Endpoint, Socket
from shoal.kernel.peer import Peer
from shoal.parts.overlay.relay import Ask, Probe, Reserve, Seen, Through, packed, unpacked
from shoal.wire.message import message


@message
class Hello:
    """The caller wants a path; `number` is its own for it."""

    number: int


@message
class Connect:
    """CONNECT: how its sender looks from outside."""

    number: int
    attempt: int
    calling: bool
    reachable: bool
    host: str
    port: int


@message
class Sync:
    """Dial now."""

    number: int
    attempt: int


@message
class Punch:
    """Opens the way; `back` says that the other one's came through."""

    peer: int
    number: int
    calling: bool
    back: bool


_PROBE = -2

# The other peer, the caller's number for the path, and whether this peer is the caller: two peers
# may call each other at once, with equal numbers.
_Key = tuple[int, int, bool]


@dataclass(frozen=True)
class Path:
    """How a peer is reached: `direct` at an endpoint, or over the relay (endpoint of the relay)."""

    to: PeerId
    direct: bool
    endpoint: Endpoint


class Traversal:
    """A peer's side of it, on one socket; start `run` as a task and `await register()` first.

    relay, other: endpoints of two public peers that serve `Relay`, on different hosts; both
    reflect, the first one relays. attempts, punches: dials per path, and packets per dial, `gap_s`
    apart; timeout_s: how long an attempt and an answer of the relay may take, above the longest
    round trip through the relay. keepalive_s: how often the reservation is renewed, which keeps
    the mapping; it must be below the shortest mapping lifetime (RFC 4787: 120 s or more; RFC 8445
    uses 15 s). With attempts=0 nobody punches: a peer that strangers can reach is dialled, and with
    `reversal` a caller that can be reached is dialled back. Punches are no secret: whoever needs to
    know who is at the other end runs a secure session over the path.

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
        reversal: bool = True,
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
        self._relay, self._other, self._reversal = relay, other, reversal
        self._attempts, self._punches = attempts, punches
        self._gap_s, self._timeout_s, self._keepalive_s = gap_s, timeout_s, keepalive_s
        self._reserved = False
        self._numbers = 0
        self._heard: set[_Key] = set()
        self._open: dict[_Key, Endpoint] = {}
        self._clocks: dict[tuple[_Key, int], float] = {}
        self._theirs: dict[_Key, Endpoint] = {}

    @property
    def symmetric(self) -> bool:
        """Whether two reflectors saw different endpoints: mapping depends on the destination."""
        return len(set(self.seen.values())) > 1

    async def register(self) -> bool:
        """Reserve at the relay, be dialled back, ask both reflectors; whether both answered.

        The dial-back comes first: it must come from a host that was never sent to.
        """
        for _ in range(3):
            await self._send(Probe(_PROBE), self._relay)
        await self.peer.sleep_until(self.peer.now() + self._timeout_s)
        for _ in range(3):
            await self._send(Reserve(self.peer.id), self._relay)
            for number, place in enumerate((self._relay, self._other)):
                await self._send(Ask(number), place)
            end_s = self.peer.now() + self._timeout_s
            while self.peer.now() < end_s and not self._registered():
                await self.peer.sleep_until(self.peer.now() + self._gap_s)
            if self._registered():
                return True
        return False

    def _registered(self) -> bool:
        return self._reserved and len(self.seen) == 2

    async def keep_alive(self, until_s: float) -> None:
        """Renew the reservation, and with it the mapping towards the relay, until then."""
        while (at_s := self.peer.now() + self._keepalive_s) < until_s:
            await self.peer.sleep_until(at_s)
            await self._send(Reserve(self.peer.id), self._relay)

    async def connect(self, to: PeerId) -> Path | None:
        """A direct path, else one over the relay, else None: nothing came through at all."""
        self._numbers += 1
        key = (int(to), self._numbers, True)
        end_s = self.peer.now() + (self._attempts + 1) * self._timeout_s
        again_s = self.peer.now()
        while self.peer.now() < end_s and key not in self._open:
            if key not in self._heard and self.peer.now() >= again_s:
                # The call itself may be lost; who has heard it answers by itself.
                await self._through(to, Hello(key[1]))
                again_s += self._timeout_s
            await self.peer.sleep_until(self.peer.now() + self._gap_s)
        if key in self._open:
            return Path(to, True, self._open[key])
        return Path(to, False, self._relay) if key in self._heard else None

    async def run(self, until_s: float) -> None:
        """Answer whatever comes to the socket until then."""
        async with self.peer.tasks() as group:
            while (found := await self.socket.recv_from(until_s)) is not None:
                data, source = found
                what = unpacked(data)
                if isinstance(what, Seen) and what.number == _PROBE and source == self._other:
                    self.reachable = True
                elif isinstance(what, Seen) and source in (self._relay, self._other):
                    if what.number < 0:
                        self._reserved = True
                    else:
                        self.seen[source] = Endpoint(what.host, what.port)
                elif isinstance(what, Punch):
                    await self._punched(what, source)
                elif isinstance(what, Through) and source == self._relay:
                    inner = unpacked(what.data)
                    if isinstance(inner, Hello):
                        called = (what.source, inner.number, False)
                        if called in self._heard:
                            continue
                        self._heard.add(called)
                        group.start(self._called(what.source, inner.number))
                    elif isinstance(inner, Connect):
                        group.start(self._connect(what.source, inner))
                    elif isinstance(inner, Sync):
                        group.start(self._dial((what.source, inner.number, True)))

    async def _punched(self, punch: Punch, source: Endpoint) -> None:
        key = (punch.peer, punch.number, not punch.calling)
        if punch.back:
            self._open.setdefault(key, source)
            return
        await self._send(Punch(self.peer.id, punch.number, key[2], True), source)
        if key in self._theirs and key not in self._open:
            # A symmetric box shows another port than it told: the one that is seen here.
            await self._send(Punch(self.peer.id, punch.number, key[2], False), source)

    async def _called(self, caller: int, number: int) -> None:
        """The called peer's side: CONNECT, until a punch is answered."""
        for attempt in range(max(1, self._attempts)):
            key = (caller, number, False)
            self._clocks[key, attempt] = self.peer.now()
            await self._through(caller, self._own(number, attempt, False))
            await self.peer.sleep_until(self.peer.now() + self._timeout_s)
            if key in self._open or not self._attempts:
                return

    async def _connect(self, source: int, connect: Connect) -> None:
        key = (source, connect.number, not connect.calling)
        self._theirs[key] = Endpoint(connect.host, connect.port)
        if not connect.calling:
            self._heard.add(key)
            if not self._attempts and connect.reachable:
                await self._dial(key)
            elif self._attempts or (self._reversal and self.reachable):
                await self._through(source, self._own(connect.number, connect.attempt, True))
            return
        began_s = self._clocks.pop((key, connect.attempt), None)
        if not self._attempts:
            await self._dial(key)
        elif began_s is not None:
            half_s = (self.peer.now() - began_s) / 2
            await self._through(source, Sync(connect.number, connect.attempt))
            await self.peer.sleep_until(self.peer.now() + half_s)
            await self._dial(key)

    async def _dial(self, key: _Key) -> None:
        place = self._theirs.get(key)
        if place is None:
            return
        for _ in range(self._punches):
            await self._send(Punch(self.peer.id, key[1], key[2], False), place)
            await self.peer.sleep_until(self.peer.now() + self._gap_s)

    def _own(self, number: int, attempt: int, calling: bool) -> Connect:
        place = self.seen.get(self._relay, self.socket.local)
        return Connect(number, attempt, calling, self.reachable, *place)

    async def _through(self, to: int, what: object) -> None:
        await self._send(Through(self.peer.id, to, packed(what)), self._relay)

    async def _send(self, what: object, to: Endpoint) -> None:
        await self.socket.send_to(packed(what), to)
