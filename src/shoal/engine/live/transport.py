"""One peer's sockets: a listener, and one TCP connection for each peer that it sends to.

A connection carries frames one way, from the peer that opened it. It is opened when the first
message is sent. The caller greets, the called peer welcomes or refuses, then frames follow.

Nothing here raises for a peer that is dead or hostile: its frames are counted as dropped and its
connection is closed with a reason. Who a peer is rests on the greeting alone, see `Greeting`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Mapping
from typing import Protocol

from shoal.base.limits import Limits
from shoal.engine.live.control import Address
from shoal.engine.live.incoming import Incoming
from shoal.engine.live.outgoing import Outgoing
from shoal.engine.live.settings import LiveSettings
from shoal.kernel.waits import Ready, Wait
from shoal.wire import codec
from shoal.wire.message import Message

_SCRATCH_BYTES = 1 << 18
_MOST_STRANGERS = 256
_ACCEPT_PAUSE_S = 0.1


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

    def settle(self) -> None: ...


class Transport:
    """A peer's connections: `bind`, then `open`; `down` and `up` are a crash and a restart."""

    def __init__(self, loop: asyncio.AbstractEventLoop, peer: int, owner: Owner, limits: Limits,
                 settings: LiveSettings) -> None:  # fmt: skip
        self.loop = loop
        self.peer = peer
        self.owner = owner
        self.limits = limits
        self.settings = settings
        self.digest = bytes(16)
        self.addresses: Mapping[int, Address] = {}
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.strangers: set[Incoming] = set()
        self.incoming: dict[int, Incoming] = {}
        self.is_up = False
        self._outgoing: dict[int, Outgoing] = {}
        self._listener: socket.socket | None = None

    # Life.

    def bind(self) -> Address:
        """Take a free port. Callers are kept waiting until `open`."""
        self._listener = listener = socket.create_server((self.settings.host, 0), backlog=1024)
        listener.setblocking(False)
        return listener.getsockname()[:2]

    def open(self, addresses: Mapping[int, Address], digest: bytes) -> None:
        """Begin to answer callers and to call the others."""
        assert self._listener is not None
        self.addresses = addresses
        self.digest = digest
        self.loop.add_reader(self._listener, self._accept)

    def up(self) -> None:
        self.is_up = True

    def down(self) -> None:
        """Drop every connection at once, with all that is queued; callers are turned away.

        The listener stays, or another program could take the port before the restart.
        """
        self.is_up = False
        for outgoing in list(self._outgoing.values()):
            outgoing.fail("dead")
        self._outgoing.clear()
        for incoming in [*self.incoming.values(), *self.strangers]:
            incoming.close(abrupt=True)

    def close(self) -> None:
        self.is_up = False
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.down()

    # Sending.

    def send(self, to: int, frame: list[codec.Buffer]) -> Wait | None:
        """Queue a frame; a wait when that made the queue to this peer longer than its limit."""
        if not self.is_up:
            self.owner.lost("dead", 1)
            return None
        outgoing = self._outgoing.get(to)
        if outgoing is None:
            outgoing = self._outgoing[to] = Outgoing(self, to)
        if not outgoing.push(frame):
            self.owner.lost("dead", 1)
            return None
        return outgoing.room_wait()

    def flush(self, to: int) -> Wait | None:
        """A wait until all frames queued so far are with the operating system or dropped."""
        outgoing = self._outgoing.get(to)
        return outgoing.flush_wait() if outgoing is not None else None

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are queued for any peer."""
        return sum(outgoing.outbox.waiting_bytes for outgoing in self._outgoing.values())

    def seen(self, peer: int) -> None:
        """A sign of life: call that peer again without waiting for the pause to end."""
        outgoing = self._outgoing.get(peer)
        if outgoing is not None:
            outgoing.forgive()

    # Callers.

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(64):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                # No descriptors left: let the others go on, and try again a little later.
                self.owner.lost("accept", 1)
                self.loop.remove_reader(self._listener)
                self.loop.call_later(_ACCEPT_PAUSE_S, self._listen_again)
                return
            if not self.is_up or len(self.strangers) >= _MOST_STRANGERS:
                connection.close()
            else:
                self.strangers.add(Incoming(self, connection))

    def _listen_again(self) -> None:
        if self._listener is not None:
            self.loop.add_reader(self._listener, self._accept)
