"""One peer's sockets: a listener, and connections to each peer that it sends to.

A connection carries frames one way, from the peer that opened it, and credit, receipts and answers
to heartbeats the other way. It is opened when the first message is sent. The caller greets, the
called peer welcomes or refuses, then both speak as `shoal.wire.mux` says.

Nothing here raises for a peer that is dead or hostile: its frames are counted as dropped and its
connection is closed with a reason. Who a peer is rests on its key (`shoal.wire.handshake`), or on
its word alone without security (`shoal.wire.frame.Greeting`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import ChainMap
from collections.abc import Mapping
from typing import Protocol

from shoal.base.limits import Limits
from shoal.engine.live.calling import NO_DESCRIPTORS
from shoal.engine.live.control import Address
from shoal.engine.live.incoming import Incoming, Inlet
from shoal.engine.live.lines import Lines
from shoal.engine.live.outgoing import Outgoing
from shoal.engine.live.pool import Pool
from shoal.engine.live.settings import LiveSettings
from shoal.kernel.waits import Ready, Wait
from shoal.wire import codec
from shoal.wire.handshake import Credentials, Handshake, Trust
from shoal.wire.message import Message

_SCRATCH_BYTES = 1 << 16
_MOST_STRANGERS = 256
_ACCEPT_PAUSE_S = 0.02
# Few at a time, so that greetings are heard between them and strangers do not pile up.
_ACCEPTS = 16
_SWEEPS_A_STALL = 16
_CROWD = 512
_RARELY = 8.0
# A peer that listens everywhere calls itself here.
_WILD = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Owner(Protocol):
    """What a transport tells the engine; `settle` is the last call of every turn."""

    ready: Ready
    dirty: dict[Outgoing, None]
    """connections with something to write; `settle` calls their `write`"""

    def arrived(
        self, target: int, source: int, message: Message, request: int, size_bytes: int
    ) -> None: ...

    def lost(self, reason: str, messages: int) -> None: ...

    def closed(self, peer: int, why: str) -> None: ...

    def round_trip(self, seconds: float) -> None: ...

    def settle(self) -> None: ...


class Reception(Protocol):
    """Looks at callers before the transport does, and hands them on with `Transport.admit`."""

    def take(self, connection: socket.socket) -> None: ...

    def open(self) -> None:
        """The run has begun: who waited may be handed on."""
        ...


class Transport:
    """A peer's connections: `bind`, then `open`; `down` and `up` are a crash and a restart."""

    def __init__(self, loop: asyncio.AbstractEventLoop, peer: int, owner: Owner, limits: Limits,
                 settings: LiveSettings, pool: Pool | None = None) -> None:  # fmt: skip
        self.loop = loop
        self.peer = peer
        self.owner = owner
        self.limits = limits
        self.settings = settings
        self.pool = pool or Pool(loop, settings)
        """shared with the other peers of the process"""
        self.digest = bytes(16)
        self.book: Mapping[int, Address] = {}
        """where peers say that they listen"""
        self.detours: dict[int, Address] = {}
        """ports of this machine behind which a line to a peer begins, see `Lines`"""
        self.addresses: Mapping[int, Address] = {}
        """where peers are called: a detour, if there is one"""
        self.listening: Address = ("", 0)
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.credentials: Credentials | None = None
        """who this peer is; None: everything goes in the clear"""
        self.trust = Trust()
        self.strangers: set[Incoming] = set()
        self.incoming: dict[int, Inlet] = {}
        self.is_up = False
        self.life = 0
        """a number of this incarnation's own: nothing of another one's goes on in it"""
        self._sweeper: asyncio.TimerHandle | None = None
        self._outgoing: dict[int, Outgoing] = {}
        self._listener: socket.socket | None = None
        self._reception: Reception | None = None
        self.lines = Lines(self)

    # Life.

    def adopt(self, listener: socket.socket, reception: Reception) -> None:
        """Use a socket that listens already; callers go to the reception, also before `open`."""
        self._listener = listener
        self._reception = reception

    def bind(self) -> Address:
        """Take a free port, unless a socket was adopted. Callers are kept waiting until `open`."""
        listener = self._listener
        if listener is None:
            listener = socket.create_server((self.settings.host, 0), backlog=1024)
        self._listener = listener
        listener.setblocking(False)
        if self._reception is not None:
            self.loop.add_reader(listener, self._accept)
        host, port = listener.getsockname()[:2]
        self.listening = _WILD.get(host) or str(host), port
        return host, port

    def open(
        self, addresses: Mapping[int, Address], digest: bytes, keys: Mapping[int, bytes]
    ) -> None:
        """Begin to answer callers and to call the others."""
        assert self._listener is not None
        self.trust = Trust(keys, frozenset(self.settings.allow))
        self.book = addresses
        self.addresses = ChainMap(self.detours, addresses)  # type: ignore[arg-type]
        self.digest = digest
        self.pool.enter()
        self.loop.add_reader(self._listener, self._accept)
        if self._reception is not None:
            # Once the start is over: whom the peer admits depends on whether it is up by then.
            self.loop.call_soon(self._reception.open)
        self._sweep()

    def up(self) -> None:
        self.is_up = True
        self.life = int.from_bytes(os.urandom(8), "little")

    def down(self) -> None:
        """Drop every connection at once, with all that is queued; callers are turned away.

        The listener stays, or another program could take the port before the restart.
        """
        self.is_up = False
        for outgoing in list(self._outgoing.values()):
            outgoing.fail("dead")
        self._outgoing.clear()
        for inlet in self.incoming.values():
            inlet.close()
        self.incoming.clear()
        for stranger in list(self.strangers):
            stranger.close(abrupt=True)
        self.lines.close()

    def close(self) -> None:
        self.is_up = False
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
            self.pool.leave()
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.down()

    # Sending.

    def send(self, to: int, frame: list[codec.Buffer]) -> Wait | None:
        """Queue a frame; a wait when that made the queue to this peer longer than its limit."""
        outgoing = self._outgoing.get(to)
        if outgoing is None and self.is_up and to in self.addresses:
            outgoing = self._outgoing[to] = Outgoing(self, to)
            self.lines.called(to)
        if outgoing is None or not outgoing.push(frame):
            self.owner.lost("dead", 1)
            return None
        return outgoing.room_wait()

    def flush(self, to: int) -> Wait | None:
        """A wait until all frames queued so far are with the operating system or dropped."""
        outgoing = self._outgoing.get(to)
        return outgoing.flush_wait() if outgoing is not None else None

    @property
    def busy(self) -> bool:
        """Whether a frame for any peer is not written, or a large one not received."""
        return any(outgoing.busy for outgoing in self._outgoing.values())

    def handshake(self, target: int | None = None) -> Handshake | None:
        """For a connection to the target, or from whoever calls; None without security."""
        if self.credentials is None:
            return None
        return Handshake(self.credentials, self.peer, self.digest, self.trust.check, target)

    def forget(self, outgoing: Outgoing) -> None:
        """It has no connections, and nothing to say."""
        self.pool.forget(outgoing)
        if self._outgoing.get(outgoing.target) is outgoing:
            del self._outgoing[outgoing.target]

    def rerouted(self, peer: int) -> None:
        """That peer is reached another way from now on."""
        outgoing = self._outgoing.get(peer)
        if outgoing is not None:
            outgoing.reroute()

    def seen(self, peer: int) -> None:
        """A sign of life: call that peer again without waiting for the pause to end."""
        outgoing = self._outgoing.get(peer)
        if outgoing is not None:
            outgoing.forgive()

    def _sweep(self) -> None:
        """Look after what no event of a socket would tell: heartbeats, and who is too slow."""
        settings = self.settings
        # A process with thousands of connections looks less often: one look takes about 2 us each.
        crowd = min(_RARELY, max(1.0, self.pool.open / _CROWD))
        every_s = crowd * min(settings.heartbeat_s / 4, settings.stall_s / _SWEEPS_A_STALL)
        self._sweeper = self.loop.call_later(every_s, self._sweep)
        now_s = self.loop.time()
        self.pool.idle(now_s)
        if shortage := self.pool.shortage():
            self.owner.closed(self.peer, shortage)
        for outgoing in list(self._outgoing.values()):
            outgoing.beat(now_s)
            if outgoing.over:
                self.forget(outgoing)
        heard_s = self.pool.attention.now_s
        for source, inlet in list(self.incoming.items()):
            if inlet.sweep(heard_s):
                del self.incoming[source]
        self.owner.settle()

    # Callers.

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTS):
            if not self.pool.has_room:
                self._accept_later()
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_DESCRIPTORS:
                    raise
                self._accept_later()
                return
            if self._reception is not None:
                self._reception.take(connection)
            else:
                self.admit(connection)

    def admit(self, connection: socket.socket) -> None:
        """A caller who wants to send messages, as far as is known."""
        try:
            host = connection.getpeername()[0]
        except OSError:
            connection.close()
            return
        if not self.is_up or len(self.strangers) >= _MOST_STRANGERS:
            connection.close()
        elif sum(each.host == host for each in self.strangers) >= self.settings.address_callers:
            self.owner.lost("greeting", 1)
            connection.close()
        else:
            self.strangers.add(Incoming(self, connection, host))

    def _accept_later(self) -> None:
        """No descriptors left: others are asked to close, and callers wait a little."""
        assert self._listener is not None
        self.pool.exhausted()
        self.loop.remove_reader(self._listener)
        self.loop.call_later(_ACCEPT_PAUSE_S, self._listen_again)

    def _listen_again(self) -> None:
        if self._listener is not None:
            self.loop.add_reader(self._listener, self._accept)
