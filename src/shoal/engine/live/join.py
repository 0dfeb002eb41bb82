"""`join_live`: one peer of a run that needs nothing but addresses.

The first peer, which is given no others to ask, founds the run: it draws the run's name and, when
enough peers are there, announces the start. Everybody else asks one of the addresses that it was
given. From then on all are equal: the founder may die like any other, and a peer that comes late or
comes back finds the run through anybody.

With a store the peer also keeps who it is and whom it knew: killed at any moment and started again
with the same store, it has the same id and key, calls those whom it knew, and its program goes on
from the last commit.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic_ns, time_ns
from typing import Any

from shoal.base.errors import SimulationError, UsageError, WireError
from shoal.base.limits import DEFAULT, Limits, check_positive
from shoal.engine.live import control
from shoal.engine.live.book import RUN_BYTES, Book, Record, signed
from shoal.engine.live.control import Address
from shoal.engine.live.desk import Desk, Refusal, Welcome, ask, hello, resolve
from shoal.engine.live.driver import Driver
from shoal.engine.live.launch import ON_THE_WAY, Observer
from shoal.engine.live.schedule import check_faults
from shoal.engine.live.settings import LiveSettings
from shoal.engine.live.store import DiskStore
from shoal.kernel.peer import Program
from shoal.tensor.threads import one_thread
from shoal.wire.frame import agreement
from shoal.wire.handshake import Credentials
from shoal.wire.identity import Identity
from shoal.wire.message import message
from shoal.world.faults import Join
from shoal.world.network import Network
from shoal.world.record import Run, digest_of

_WILD = ("0.0.0.0", "::", "")
_AT_ONCE = 16
"""Exchanges that one peer has under way at most."""
_TICK_S = 1.0
_TELL_S = 0.5
_ALONE_S = 5.0
"""How long a peer that comes back looks for the others before it goes on without them."""


@message
class Membership:
    """What a peer must remember to be itself again. start_unix_ns: 0 before the run's start."""

    run: bytes
    peer: int
    public: bytes
    version: int
    start_unix_ns: int
    records: tuple[Record, ...]


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How a peer takes part in a run that it does not launch.

    listen: where it listens; port 0 = any free one. advertise: where others reach it, if that is
    elsewhere (a router or container in between). bootstrap: addresses of other peers; () founds the
    run. peer: the id to have, None = the first free one. allow: names of those who may take part
    (`peer_name` of their keys), None = any. program: 16 bytes that stand for what is run; all peers
    must agree on them.
    wait_for: with how many peers the founder starts, None = all that do not join later by the fault
    list. gone_s: for how long a peer that is done waits for one that does not answer any more.

    >>> Joining(bootstrap=(("127.0.0.1", 7000),)).listen
    ('127.0.0.1', 0)
    """

    listen: Address = ("127.0.0.1", 0)
    advertise: Address | None = None
    bootstrap: tuple[Address, ...] = ()
    peer: int | None = None
    identity: Identity = field(default_factory=Identity.new)
    allow: frozenset[str] | None = None
    program: bytes = bytes(16)
    wait_for: int | None = None
    gone_s: float = 10.0

    def __post_init__(self) -> None:
        check_positive("Joining", self, "gone_s")
        if self.wait_for is not None and self.wait_for < 1:
            raise UsageError(f"Joining: wait_for={self.wait_for}; need at least 1 peer")
        if self.allow is not None and self.identity.name not in self.allow:
            raise UsageError(
                f"Joining: this peer's own key {self.identity.name} is not among those allowed "
                "(add it, so that all peers can use the same list)"
            )


@dataclass(frozen=True)
class Status:
    """How a joined peer is doing. state: "looking" for the run, "waiting" for its start, "running",
    "done" (its program has ended; it stays for the others), "stopping"."""

    peer: int
    state: str
    address: Address
    known: int
    round: int
    time_s: float
    messages_sent: int
    messages_delivered: int
    bytes_sent: int
    bytes_received: int
    rejoined: bool
    """whether it found itself in its store"""


def join_live(
    program: Program, network: Network, joining: Joining, *, seed: int = 0,
    settings: LiveSettings | None = None, observer: Observer | None = None,
    limits: Limits = DEFAULT, tell: Callable[[Status, Run | None], None] | None = None,
    stop: threading.Event | None = None,
) -> Run:  # fmt: skip
    """Run one peer of a network; the others run elsewhere. Returns what this peer adds to the run.

    It ends when its own program and those of all others that still answer are done, when
    `settings.horizon_s` is over, or when `stop` is set. `tell` gets its status and what was
    recorded so far (rows may still be appended to it) twice a second. `settings.start_s` bounds the
    wait for the start.

    Assumes that all peers are given the same program, network and seed.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Hello:
    ...     async def run(self, peer):
    ...         peer.record("id", peer.id)
    >>> [row.value for row in join_live(Hello(), Network(1), Joining()).series("id")]
    [0.0]
    """
    check_faults(network.faults)
    settings = settings or LiveSettings()
    if joining.allow is not None:
        settings = replace(settings, allow=tuple(sorted(joining.allow)))
    member = _Joined(program, network, joining, seed, settings, limits,
                     observer is not None)  # fmt: skip
    with one_thread():
        return member.watch(observer, tell, stop)


class _Joined:
    """One joined peer: a thread with the loop of its sockets, watched by the caller's thread."""

    def __init__(self, program: Program, network: Network, joining: Joining, seed: int,
                 settings: LiveSettings, limits: Limits, observed: bool) -> None:  # fmt: skip
        self.identity = joining.identity
        self.program = joining.program
        self.round = -1
        self._text = program
        self._network = network
        self._joining = joining
        self._seed = seed
        self._settings = settings
        self._limits = limits
        self._observed = observed
        self._reports: SimpleQueue[control.Report] = SimpleQueue()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run, name="shoal peer", daemon=True)
        self._peer = -1 if joining.peer is None else joining.peer
        self._state = "looking"
        self._host, self._port = "", 0
        self._version = 0
        self._incarnation = 0
        self._start_ns: int | None = None
        self._heard_s: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing: asyncio.Task[None] | None = None
        self._addresses: dict[int, Address] = {}
        self._keys: dict[int, bytes] = {}
        self._stored: Membership | None = None
        self._disk: DiskStore | None = None
        self._kept: Membership | None = None
        self._driver: Driver | None = None
        self._ended = False
        self._whole = False

    # The caller's thread.

    def watch(self, observer: Observer | None, tell: Callable[[Status, Run | None], None] | None,
              stop: threading.Event | None) -> Run:  # fmt: skip
        self._thread.start()
        try:
            run = None
            while run is None:
                if stop is not None and stop.is_set():
                    self._ask_to_stop()
                with suppress(Empty):
                    run = self._take(self._reports.get(timeout=_TELL_S / 2), observer)
                if tell is not None:
                    tell(self._status(), self._driver.result if self._driver else None)
        finally:
            self._ask_to_stop()
            self._thread.join(self._settings.stop_s)
        if self._thread.is_alive():
            raise SimulationError(
                f"the peer did not end in {self._settings.stop_s} s: its program holds the loop "
                "(use peer.compute for work)"
            )
        on_the_way = sum(run.dropped.get(reason, 0) for reason in ON_THE_WAY)
        run.messages_in_flight = max(0, run.messages_sent - run.messages_delivered - on_the_way)
        run.state_digest = digest_of(run.final)
        run.finished = self._whole
        run.settings = {**asdict(self._settings), "joined": True}
        if observer is not None:
            run.rows += observer.rows()
        return run

    def _take(self, report: control.Report, observer: Observer | None) -> Run | None:
        if isinstance(report, control.Done):
            return report.run
        if isinstance(report, control.Failed):
            raise report.error
        if isinstance(report, control.Observed) and observer is not None:
            observer.params(report.peer, report.round, report.time_s, report.params)
        return None

    def _ask_to_stop(self) -> None:
        with suppress(RuntimeError):  # The loop is closed: it has ended.
            self._loop.call_soon_threadsafe(self._leave)

    def _status(self) -> Status:
        driver = self._driver
        result = driver.result if driver is not None else None
        runtime = driver.runtimes[self._peer] if driver is not None else None
        return Status(
            self._peer, self._state, (self._host, self._port), len(self._addresses),
            runtime.round if runtime else -1, max(0, self.elapsed_ns() or 0) / 1e9,
            result.messages_sent if result else 0, result.messages_delivered if result else 0,
            sum(result.bytes_sent) if result else 0, sum(result.bytes_received) if result else 0,
            self._stored is not None,
        )  # fmt: skip

    # The loop's thread, from here on.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            # The thread's edge: the caller raises it.
            self._reports.put(control.Failed(error))
        finally:
            self._loop.close()

    async def _live(self) -> None:
        self._stop = asyncio.Event()
        self._idle = False
        listener = self._listen()
        try:
            if not await self._find_run():
                self._reports.put(control.Done(Run("live", self._seed, self._network.peers)))
                listener.close()
                return
        except BaseException:
            listener.close()
            raise
        plan = control.Plan(
            control.ByPeer((self._text,) * self._network.peers), self._network, self._seed,
            self._settings, self._limits, (self._peer,), lead=self._leads(),
            observed=self._observed, counted=False,
        )  # fmt: skip
        self._driver = driver = Driver(plan, self._report, self._loop)
        # An answer to what an earlier life asked must not pass for one to a question of this life.
        driver.runtimes[self._peer].number_requests_from(self._incarnation // 1000)
        transport = driver.transports[self._peer]
        if self._settings.security == "noise":
            transport.credentials = Credentials(self.identity)
        self._desk = Desk(self._loop, self, transport.admit, self._settings.handshake_s)
        transport.adopt(listener, self._desk)
        running = self._loop.create_task(driver.run())
        try:
            await self._attend(driver)
        except Exception as error:
            # Said before the driver says its last word.
            self._reports.put(control.Failed(error))
        finally:
            self._state = "stopping"
            driver.control(control.Stop())
            self._desk.close()
            for task in self._tasks:
                task.cancel()
            await running

    def _leads(self) -> bool:
        # Happenings of the fault list are noted by the first peer that exists from the start.
        late = {p for f in self._network.faults if isinstance(f, Join) for p in f.who}
        first = next((p for p in range(self._network.peers) if p not in late), 0)
        return self._peer == first

    def _listen(self) -> socket.socket:
        host, port = self._joining.listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror} (name another address; port 0 "
                "is any free one)"
            ) from None
        self._host, self._port = listener.getsockname()[:2]
        if self._host in _WILD:
            self._host = ""
        if self._joining.advertise is not None:
            self._host, self._port = self._joining.advertise
        return listener

    # Finding the run.

    async def _find_run(self) -> bool:
        """Know the run, the own id and the others; False when stopped before that."""
        joining, peers = self._joining, self._network.peers
        self._stored = stored = self._recall()
        known = () if stored is None else stored.records
        run = os.urandom(RUN_BYTES) if stored is None else stored.run
        self.book = Book(run, peers, joining.allow)
        if stored is not None:
            self._peer = stored.peer
            self.book.take(known)
        self._incarnation = max(time_ns(), 0 if stored is None else stored.version + 1)
        self._version = self._incarnation
        others = [r.address for r in known if r.peer != self._peer]
        contacts = list(dict.fromkeys([*joining.bootstrap, *others]))
        if not contacts:
            # A founder, or the only peer there ever was.
            if self._peer < 0:
                self._peer = 0
            self._resume(stored)
        elif not await self._ask_around(contacts, stored):
            return False
        self._open_disk()
        self._declare("here")
        if contacts:
            # Everybody must know this peer before it calls them, or they would turn it away.
            await self._exchange_with([r for r in self.book.records if r != self._peer])
        return not self._stop.is_set()

    def _resume(self, stored: Membership | None) -> None:
        if stored is not None and stored.start_unix_ns:
            self._start_ns = monotonic_ns() + stored.start_unix_ns - time_ns()

    async def _ask_around(self, contacts: list[Address], stored: Membership | None) -> bool:
        """The first answer of anybody; without one, what the store says."""
        begun = stored is not None and stored.start_unix_ns > 0
        patience_s = _ALONE_S if begun else self._settings.start_s
        end = self._loop.time() + patience_s
        why = ""
        while not self._stop.is_set():
            for address in contacts:
                question = hello(
                    self.program, self.identity, b"" if stored is None else stored.run, self._peer
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
                self._admitted(*found)
                return True
            if self._loop.time() >= end:
                if begun:
                    self._resume(stored)
                    return True
                raise SimulationError(
                    f"none of {len(contacts)} bootstrap addresses answered in {patience_s:g} s; "
                    f"the last: {why} (start a peer without --bootstrap first)"
                )
            await self._sleep(0.2)
        return False

    def _admitted(self, welcome: Welcome, moment_ns: int, local: str) -> None:
        if self._stored is None:
            self.book = Book(welcome.run, self._network.peers, self._joining.allow)
        self._peer = welcome.peer
        if not self._host:
            self._host = local
        self._understood(welcome, moment_ns)

    def _understood(self, welcome: Welcome, moment_ns: int) -> None:
        if welcome.begun and self._start_ns is None:
            self._start_ns = moment_ns - welcome.elapsed_ns
        changed = self.book.take(welcome.records)
        sender = next(
            (r.peer for r in self.book.records.values() if r.public == welcome.public), -1
        )
        if sender >= 0:
            self._heard_s[sender] = self._loop.time()
        self.learnt(changed, welcome.round)

    # The clerk's side of the desk.

    def elapsed_ns(self) -> int | None:
        return None if self._start_ns is None else monotonic_ns() - self._start_ns

    def learnt(self, peers: list[int], round: int) -> None:
        now = self._loop.time()
        for peer in peers:
            self._heard_s[peer] = now
        if peers:
            self._start(self._locate([p for p in peers if p != self._peer]))
        if round > self.round:
            self.round = round
            if self._driver is not None:
                self._driver.control(control.Entered(round))

    def reached(self, host: str) -> None:
        if not self._host:
            self._host = host
            self._declare("here")

    async def _locate(self, peers: list[int]) -> None:
        """Names of hosts become numbers before the transport sees them."""
        for peer in peers:
            # The key first: whoever has an address may be called.
            self._keys[peer] = self.book.records[peer].public
            with suppress(OSError):
                _, self._addresses[peer] = await resolve(
                    self._loop, self.book.records[peer].address
                )
        if self._driver is not None:
            self._driver.expect(peers)
            self._driver.settle()

    # Life in the run.

    def _report(self, report: control.Report) -> None:
        if isinstance(report, control.Idle):
            self._idle = report.idle
            if self._state in ("running", "done"):
                self._state = "done" if report.idle else "running"
                self._declare("done" if report.idle else "here")
                self._start(self._exchange_with(self._others()))
        elif isinstance(report, control.Entered):
            if report.round > self.round:
                self.round = report.round
                self._start(self._exchange_with(self._others()))
        elif isinstance(report, control.Failed):
            self._ended = True
            self._stop.set()
        self._reports.put(report)

    async def _attend(self, driver: Driver) -> None:
        """From the own record to the end of the run."""
        await asyncio.sleep(0)  # The driver listens after its first step.
        self._state = "waiting"
        await self._await_start()
        if self._start_ns is None:
            return
        kinds = driver.schemas()
        digest = agreement(self.book.run + self.program, kinds)
        self._keep()
        unix_ns = time_ns() + self._start_ns - monotonic_ns()
        start = control.Start(self._addresses, digest, unix_ns, self._keys)
        self._state = "running"
        driver.control(start)
        await self._sleep(max(0.0, (self._start_ns - monotonic_ns()) / 1e9))
        if self.round >= 0:
            driver.control(control.Entered(self.round))
        end = self._start_ns / 1e9 + self._settings.horizon_s
        turn = 0
        while not self._stop.is_set() and self._loop.time() < end:
            if self._state == "done" and self._all_done():
                self._whole = True
                break
            await self._sleep(min(_TICK_S, end - self._loop.time()))
            others = self._others()
            if self._state != "done" and others:
                turn += 1
                others = [others[turn % len(others)]]
            self._start(self._exchange_with(others))
            self._keep()
        if self._stop.is_set() and not self._ended:
            self._declare("left")
            await self._exchange_with(self._others())

    async def _await_start(self) -> None:
        """The founder announces the start when enough are there; the others ask until it did."""
        needed = self._joining.wait_for
        if needed is None:
            late = {p for f in self._network.faults if isinstance(f, Join) for p in f.who}
            needed = self._network.peers - len(late - {self._peer})
        founder = not self._joining.bootstrap and self._stored is None
        pause_s = max(0.1, self._network.peers / 400)
        end = self._loop.time() + self._settings.start_s
        while self._start_ns is None and not self._stop.is_set():
            here = sum(r.state == "here" for r in self.book.records.values())
            if founder and here >= min(needed, self._network.peers):
                # Far enough ahead that all hear of it in time; who hears it late begins late.
                self._start_ns = monotonic_ns() + int(2.5e9 * pause_s)
                return
            if self._loop.time() >= end:
                raise SimulationError(
                    f"the run did not start in {self._settings.start_s:g} s: {here} of {needed} "
                    "peers are there (start the others, wait longer, or for fewer)"
                )
            await self._sleep(pause_s)
            if not founder:
                await self._exchange_with(self._others()[:3])

    def _all_done(self) -> bool:
        """Nobody is left who could need this peer."""
        now = self._loop.time()
        return all(
            record.state != "here" or now - self._heard_s.get(peer, 0.0) > self._joining.gone_s
            for peer, record in self.book.records.items()
            if peer != self._peer
        )

    def _others(self) -> list[int]:
        return [p for p in self.book.records if p != self._peer]

    def _leave(self) -> None:
        self._stop.set()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(control.Failed(error))

    async def _exchange_with(self, peers: Iterable[int]) -> None:
        """Tell and hear what is known; who does not answer is tried again at another time."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(peer: int) -> None:
            async with places:
                record = self.book.records[peer]
                question = hello(
                    self.program, self.identity, self.book.run, self._peer, self.round,
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
                    if self._state == "looking" and error.public == record.public:
                        raise
                    return
                self._understood(welcome, moment)

        await asyncio.gather(*(one(peer) for peer in list(peers)))

    def _declare(self, state: str) -> None:
        """Sign a new record of this peer, if it can say where it is."""
        if not self._host:
            return
        self._version = max(time_ns(), self._version + 1)
        record = Record(
            self._peer, self._host, self._port, self.identity.public, self._version,
            self._incarnation, state, b"",
        )  # fmt: skip
        self.book.take([signed(record, self.book.run, self.identity)])

    # The store.

    def _recall(self) -> Membership | None:
        """This key's membership in the store, if there is one."""
        folder = Path(self._settings.store_dir) / "book" if self._settings.store_dir else None
        for path in sorted(folder.glob("peer-*.store")) if folder is not None else ():
            peer = int(path.stem.removeprefix("peer-"))
            found = DiskStore(str(path.parent), peer).load().get("membership")
            if isinstance(found, Membership) and found.public == self.identity.public:
                if self._peer not in (-1, found.peer):
                    raise UsageError(
                        f"store {self._settings.store_dir}: this key is peer {found.peer} there, "
                        f"not {self._peer} (use another --store, or leave --id out)"
                    )
                return found
        return None

    def _open_disk(self) -> None:
        if self._settings.store_dir:
            folder = Path(self._settings.store_dir) / "book"
            self._disk = DiskStore(str(folder), self._peer)
            self._disk.load()

    def _keep(self) -> None:
        """Remember the run and who is in it, if that has changed."""
        if self._disk is None or (self._writing is not None and not self._writing.done()):
            return
        start = 0
        if self._start_ns is not None:
            start = time_ns() + self._start_ns - monotonic_ns()
        records = tuple(self.book.records[peer] for peer in sorted(self.book.records))
        known = self._kept
        if (
            known is not None
            and known.records == records
            and bool(known.start_unix_ns) == (start > 0)
        ):
            return
        self._kept = Membership(
            self.book.run, self._peer, self.identity.public, self._version, start, records
        )
        self._writing = self._start(
            asyncio.to_thread(self._disk.commit, {"membership": self._kept})
        )
