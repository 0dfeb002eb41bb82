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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING

from shoal.base.errors import SimulationError, UsageError
from shoal.base.limits import DEFAULT, Limits
from shoal.engine.live import control
from shoal.engine.live.book import RUN_BYTES
from shoal.engine.live.circle import Circle
from shoal.engine.live.desk import Desk
from shoal.engine.live.driver import Driver
from shoal.engine.live.joining import Joining, Status
from shoal.engine.live.launch import Observer
from shoal.engine.live.membership import Membership, MembershipStore
from shoal.engine.live.merging import ON_THE_WAY
from shoal.engine.live.schedule import check_faults
from shoal.engine.live.settings import LiveSettings
from shoal.kernel.peer import Program
from shoal.tensor.threads import one_thread
from shoal.wire.frame import agreement
from shoal.wire.handshake import Credentials
from shoal.world.faults import Join
from shoal.world.network import Network
from shoal.world.record import Run, digest_of

if TYPE_CHECKING:
    from shoal.engine.live.upnp import Ports

_TICK_S = 1.0
_TELL_S = 0.5
_ALONE_S = 5.0
"""How long a peer that comes back looks for the others before it goes on without them."""


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
    if network.nats:
        raise UsageError(
            f"join_live: {len(network.nats)} NAT boxes; they exist on the virtual network only "
            "(use the event engine, or leave nats empty: real boxes are where the peers are)"
        )
    # Datagrams come and go where the peer listens.
    settings = replace(settings or LiveSettings(), host=joining.listen[0])
    if joining.peer is not None and not 0 <= joining.peer < network.peers:
        raise UsageError(
            f"join_live: peer={joining.peer}; need 0 to {network.peers - 1} (None = a free one)"
        )
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
        self._program = program
        self._network = network
        self._joining = joining
        self._seed = seed
        self._settings = settings
        self._limits = limits
        self._observed = observed
        self._reports: SimpleQueue[control.Report] = SimpleQueue()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run, name="shoal peer", daemon=True)
        self._circle = Circle(
            self._loop, joining, network.peers, lambda error: self._report(control.Failed(error))
        )
        self._state = "looking"
        self._memberships = MembershipStore(settings.store_dir)
        self._stored: Membership | None = None
        self._kept: Membership | None = None
        self._writing: asyncio.Task[None] | None = None
        self._driver: Driver | None = None
        self._ports: Ports | None = None
        self._idle = False
        self._ended = False
        self._whole = False
        self._said: list[str] = []

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
            self._loop.call_soon_threadsafe(self._circle.stop.set)

    def _status(self) -> Status:
        circle, driver = self._circle, self._driver
        result = driver.result if driver is not None else None
        runtime = driver.runtimes[circle.peer] if driver is not None else None
        return Status(
            circle.peer, self._state, (circle.host, circle.port), len(circle.addresses),
            runtime.round if runtime else -1, max(0, circle.elapsed_ns() or 0) / 1e9,
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
        circle = self._circle
        listener = circle.listen()
        try:
            await self._open_port(listener)
            if not await self._find_run():
                self._reports.put(control.Done(Run("live", self._seed, self._network.peers)))
                listener.close()
                await self._close_port()
                return
        except BaseException:
            listener.close()
            await self._close_port()
            raise
        plan = control.Plan(
            control.ByPeer((self._program,) * self._network.peers), self._network, self._seed,
            self._settings, self._limits, (circle.peer,), lead=self._leads(),
            observed=self._observed, counted=False,
        )  # fmt: skip
        self._driver = circle.driver = driver = Driver(plan, self._report, self._loop)
        # An answer to what an earlier life asked must not pass for one to a question of this life.
        driver.runtimes[circle.peer].number_requests_from(circle.incarnation // 1000)
        for what in self._said:
            driver.closed(circle.peer, what)
        transport = driver.transports[circle.peer]
        if self._settings.security == "noise":
            transport.credentials = Credentials(circle.identity)
        desk = Desk(self._loop, circle, transport.admit, self._settings.handshake_s)
        transport.adopt(listener, desk)
        running = self._loop.create_task(driver.run())
        try:
            await self._attend(driver)
        except Exception as error:
            # Said before the driver says its last word.
            self._reports.put(control.Failed(error))
        finally:
            self._state = "stopping"
            driver.control(control.Stop())
            desk.close()
            circle.close()
            await self._close_port()
            await running

    async def _open_port(self, listener: socket.socket) -> None:
        """Have the router open the port where this peer listens, and tell others that one."""
        settings, circle = self._settings, self._circle
        if settings.upnp == "off" or self._joining.advertise is not None:
            return
        from shoal.engine.live.upnp import Ports  # Its packages are an extra.

        self._ports = Ports(settings.upnp, self._say)
        host, port = listener.getsockname()[:2]
        if ":" in host:
            self._say(f"asks no router for port {port}: it listens on IPv6 (which needs none)")
        elif (outer := await self._ports.map(host, port, ("TCP",))) is not None:
            # A private one leads nowhere from outside, where the peer's own may do inside.
            if ip_address(outer.host).is_global:
                circle.host, circle.port = outer
            self._say(f"has port {outer.port} of the router at {outer.host}")

    async def _close_port(self) -> None:
        if self._ports is not None:
            await self._ports.close()

    def _say(self, what: str) -> None:
        """Kept until there is a driver, which reports it."""
        if self._driver is None:
            self._said.append(what)
        else:
            self._driver.closed(self._circle.peer, what)

    def _leads(self) -> bool:
        # Happenings of the fault list are noted by the first peer that exists from the start.
        late = self._late()
        first = next((p for p in range(self._network.peers) if p not in late), 0)
        return self._circle.peer == first

    def _late(self) -> set[int]:
        return {p for f in self._network.faults if isinstance(f, Join) for p in f.who}

    async def _find_run(self) -> bool:
        """Know the run, the own id and the others; False when stopped before that."""
        circle, joining = self._circle, self._joining
        self._stored = stored = self._memberships.recall(circle.identity.public, circle.peer)
        circle.open(os.urandom(RUN_BYTES) if stored is None else stored.run, stored)
        known = () if stored is None else stored.records
        others = [r.address for r in known if r.peer != circle.peer]
        contacts = list(dict.fromkeys([*joining.bootstrap, *others]))
        if not contacts:
            # A founder, or the only peer there ever was.
            circle.peer = max(circle.peer, 0)
            circle.resume(stored)
        elif not await circle.ask_around(contacts, stored, self._patience_s()):
            if circle.stop.is_set():
                return False
            circle.resume(stored)
        # What the store knew and nobody changed since is no news, so nobody else would see to it.
        await circle.locate(circle.others())
        circle.declare("here")
        if contacts:
            # Everybody must know this peer before it calls them, or they would turn it away.
            await circle.exchange_with(circle.others())
        return not circle.stop.is_set()

    def _patience_s(self) -> float:
        """How long to look for the others; those who know the run's start can go on alone."""
        stored = self._stored
        alone = stored is not None and (stored.start_unix_ns or not self._joining.bootstrap)
        return _ALONE_S if alone else self._settings.start_s

    def _report(self, report: control.Report) -> None:
        circle = self._circle
        if isinstance(report, control.Idle):
            self._idle = report.idle
            if self._state in ("running", "done"):
                self._state = "done" if report.idle else "running"
                circle.declare("done" if report.idle else "here")
                circle.start(circle.exchange_with(circle.others()))
        elif isinstance(report, control.Entered):
            if report.round > circle.round:
                circle.round = report.round
                circle.start(circle.exchange_with(circle.others()))
        elif isinstance(report, control.Failed):
            self._ended = True
            circle.stop.set()
        self._reports.put(report)

    async def _attend(self, driver: Driver) -> None:
        """From the own record to the end of the run."""
        circle = self._circle
        await asyncio.sleep(0)  # The driver listens after its first step.
        self._state = "waiting"
        circle.looking = False
        await self._await_start()
        if circle.start_ns is None:
            return
        await self._keep_now()
        unix_ns = time_ns() + circle.start_ns - monotonic_ns()
        digest = agreement(circle.book.run + circle.program, driver.schemas())
        self._state = "running"
        driver.control(control.Start(circle.addresses, digest, unix_ns, circle.keys))
        await circle.sleep(max(0.0, (circle.start_ns - monotonic_ns()) / 1e9))
        if circle.round >= 0:
            driver.control(control.Entered(circle.round))
        end = circle.start_ns / 1e9 + self._settings.horizon_s
        turn = 0
        while not circle.stop.is_set() and self._loop.time() < end:
            if self._state == "done" and circle.all_done(self._joining.gone_s):
                self._whole = True
                break
            await circle.sleep(min(_TICK_S, end - self._loop.time()))
            others = circle.others()
            if self._state != "done" and others:
                turn += 1
                others = [others[turn % len(others)]]
            circle.start(circle.exchange_with(others))
            self._keep()
        if circle.stop.is_set() and not self._ended:
            circle.declare("left")
            await circle.exchange_with(circle.others())

    async def _await_start(self) -> None:
        """The founder announces the start when enough are there; the others ask until it did."""
        circle = self._circle
        needed = self._joining.wait_for
        if needed is None:
            needed = self._network.peers - len(self._late() - {circle.peer})
        founder = not self._joining.bootstrap
        pause_s = max(0.1, self._network.peers / 400)
        end = self._loop.time() + self._settings.start_s
        while circle.start_ns is None and not circle.stop.is_set():
            # A founder that dies before the start must find the same run again.
            self._keep()
            here = sum(r.state == "here" for r in circle.book.records.values())
            if founder and here >= min(needed, self._network.peers):
                # Far enough ahead that all hear of it in time; who hears it late begins late.
                circle.start_ns = monotonic_ns() + int(2.5e9 * pause_s)
                return
            if self._loop.time() >= end:
                raise SimulationError(
                    f"the run did not start in {self._settings.start_s:g} s: {here} of {needed} "
                    "peers are there (start the others, wait longer, or for fewer)"
                )
            await circle.sleep(pause_s)
            if not founder:
                await circle.exchange_with(circle.others()[:3])

    async def _keep_now(self) -> None:
        """Remember the run's start before its program begins: a peer that is killed right then
        would come back with the program's commits and wait for a start that has been."""
        # A write that is under way may be of before; the second one is not.
        for _ in range(2):
            self._keep()
            if self._writing is not None:
                await asyncio.wait((self._writing,))

    def _keep(self) -> None:
        """Remember the run and who is in it, if that has changed."""
        if not self._settings.store_dir or (self._writing and not self._writing.done()):
            return
        now, known = self._circle.membership(), self._kept
        if (
            known is not None
            and known.records == now.records
            and bool(known.start_unix_ns) == bool(now.start_unix_ns)
        ):
            return
        self._kept = now
        self._writing = self._circle.start(asyncio.to_thread(self._memberships.keep, now))
