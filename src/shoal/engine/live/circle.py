"""Whom a joined peer knows, and how it keeps that up to date: it asks, tells and is asked.

All of this belongs to the thread of the peer's loop; other threads may read plain attributes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from time import monotonic_ns, time_ns
from typing import Any

from shoal.base.errors import SimulationError, UsageError, WireError
from shoal.engine.live import control
from shoal.engine.live.book import Book, Record, signed
from shoal.engine.live.control import Address
from shoal.engine.live.desk import Refusal, Welcome, ask, hello, resolve
from shoal.engine.live.driver import Driver
from shoal.engine.live.joining import Joining
from shoal.engine.live.membership import Membership

_WILD = ("0.0.0.0", "::", "")
_AT_ONCE = 16
"""Exchanges that one peer has under way at most."""


class Circle:
    """One peer's view of the run: its address book, who was heard when, and when it started.

    `Desk` answers callers in its name (`desk.Clerk`). peer: this peer's id, -1 until it has one.
    failed: gets the error that one of its tasks ended in.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, joining: Joining, peers: int,
        failed: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self.identity = joining.identity
        self.program = joining.program
        self.book: Book
        self.peer = -1 if joining.peer is None else joining.peer
        self.round = -1
        self.host, self.port = "", 0
        """where others reach this peer; "" until it knows"""
        self.start_ns: int | None = None
        """when the run starts, on this machine's monotonic clock"""
        self.looking = True
        self.addresses: dict[int, Address] = {}
        self.keys: dict[int, bytes] = {}
        self.driver: Driver | None = None
        self.version = 0
        self.incarnation = 0
        self.stop = asyncio.Event()
        self._loop = loop
        self._joining = joining
        self._peers = peers
        self._failed = failed
        self._heard_s: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> socket.socket:
        """Take the port that others call; one port is both the desk's and the transport's."""
        joining = self._joining
        host, port = joining.listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror} (name another address; port 0 "
                "is any free one)"
            ) from None
        self.host, self.port = listener.getsockname()[:2]
        if self.host in _WILD:
            self.host = ""
        if joining.advertise is not None:
            self.host, self.port = joining.advertise
        return listener

    # What a desk needs to know, and tells.

    def elapsed_ns(self) -> int | None:
        return None if self.start_ns is None else monotonic_ns() - self.start_ns

    def learnt(self, peers: list[int], round: int) -> None:
        now = self._loop.time()
        for peer in peers:
            self._heard_s[peer] = now
        if peers:
            self.start(self.locate([p for p in peers if p != self.peer]))
        if round > self.round:
            self.round = round
            if self.driver is not None:
                self.driver.control(control.Entered(round))

    def reached(self, host: str) -> None:
        if not self.host:
            self.host = host
            self.declare("here")

    # The book.

    def open(self, run: bytes, stored: Membership | None) -> None:
        """Begin with an empty book of a run, or with what the store knows."""
        self.book = Book(run, self._peers, self._joining.allow, self._joining.kept)
        if stored is not None:
            self.peer = stored.peer
            self.book.take(stored.records)
        self.incarnation = max(time_ns(), 0 if stored is None else stored.version + 1)
        self.version = self.incarnation

    def others(self) -> list[int]:
        return [peer for peer in self.book.records if peer != self.peer]

    def declare(self, state: str) -> None:
        """Sign a new record of this peer, if it can say where it is."""
        if not self.host:
            return
        self.version = max(time_ns(), self.version + 1)
        record = Record(
            self.peer, self.host, self.port, self.identity.public, self.version,
            self.incarnation, state, b"",
        )  # fmt: skip
        self.book.take([signed(record, self.book.run, self.identity)])

    def all_done(self, gone_s: float) -> bool:
        """Nobody is left who could need this peer."""
        now = self._loop.time()
        return all(
            record.state != "here" or now - self._heard_s.get(peer, 0.0) > gone_s
            for peer, record in self.book.records.items()
            if peer != self.peer
        )

    def membership(self) -> Membership:
        """What this peer would need to be itself again."""
        start = 0
        if self.start_ns is not None:
            start = time_ns() + self.start_ns - monotonic_ns()
        records = tuple(self.book.records[peer] for peer in sorted(self.book.records))
        return Membership(
            self.book.run, self.peer, self.identity.public, self.version, start, records
        )

    def resume(self, stored: Membership | None) -> None:
        """Take the run's start from the store."""
        if stored is not None and stored.start_unix_ns:
            self.start_ns = monotonic_ns() + stored.start_unix_ns - time_ns()

    # Exchanges.

    async def ask_around(
        self, contacts: list[Address], stored: Membership | None, patience_s: float
    ) -> bool:
        """Take the first answer of anybody; False when nobody answered, or it was stopped.

        Raises SimulationError when nobody answered one who cannot know the run by itself.
        """
        end = self._loop.time() + patience_s
        why = ""
        while not self.stop.is_set():
            for address in contacts:
                question = hello(
                    self.program, self.identity, b"" if stored is None else stored.run, self.peer
                )
                book = None if stored is None else self.book
                try:
                    found = await ask(self._loop, address, question, book, self.book.allows)
                except (OSError, TimeoutError, WireError, Refusal) as error:
                    # A stranger may have the port of one whom the store knows.
                    if stored is None and isinstance(error, Refusal):
                        raise
                    why = f"{address[0]}:{address[1]}: {error or type(error).__name__}"
                    continue
                self._admitted(*found, fresh=stored is None)
                return True
            if self._loop.time() >= end:
                if stored is not None:
                    return False
                raise SimulationError(
                    f"none of {len(contacts)} bootstrap addresses answered in {patience_s:g} s; "
                    f"the last: {why} (start a peer without --bootstrap first)"
                )
            await self.sleep(0.2)
        return False

    def _admitted(self, welcome: Welcome, moment_ns: int, local: str, *, fresh: bool) -> None:
        if fresh:
            joining = self._joining
            self.book = Book(welcome.run, self._peers, joining.allow, joining.kept)
        self.peer = welcome.peer
        if not self.host:
            self.host = local
        self._understood(welcome, moment_ns)

    def _understood(self, welcome: Welcome, moment_ns: int) -> None:
        if welcome.begun and self.start_ns is None:
            self.start_ns = moment_ns - welcome.elapsed_ns
        changed = self.book.take(welcome.records)
        sender = next(
            (r.peer for r in self.book.records.values() if r.public == welcome.public), -1
        )
        if sender >= 0:
            self._heard_s[sender] = self._loop.time()
        self.learnt(changed, welcome.round)

    async def exchange_with(self, peers: Iterable[int]) -> None:
        """Tell and hear what is known; who does not answer is tried again at another time."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(peer: int) -> None:
            async with places:
                record = self.book.records[peer]
                question = hello(
                    self.program, self.identity, self.book.run, self.peer, self.round,
                    tuple(self.book.records.values()),
                )  # fmt: skip
                try:
                    welcome, moment, _ = await ask(
                        self._loop, record.address, question, self.book, self.book.allows
                    )
                except (OSError, TimeoutError, WireError):
                    return
                except Refusal as error:
                    # Somebody of another run may have taken the port of one that died; but the
                    # peer itself knows best why it turns this one away.
                    if self.looking and error.public == record.public:
                        raise
                    return
                self._understood(welcome, moment)

        await asyncio.gather(*(one(peer) for peer in list(peers)))

    async def locate(self, peers: list[int]) -> None:
        """Let the transport know these: names of hosts become numbers before it sees them."""
        for peer in peers:
            # The key first: whoever has an address may be called.
            self.keys[peer] = self.book.records[peer].public
            with suppress(OSError):
                _, self.addresses[peer] = await resolve(self._loop, self.book.records[peer].address)
        if self.driver is not None:
            self.driver.expect(peers)
            self.driver.settle()

    # Tasks.

    async def sleep(self, seconds: float) -> None:
        """Until the time is over, or the peer is to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside; its error goes to `failed`."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
