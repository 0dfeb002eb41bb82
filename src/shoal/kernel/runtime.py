"""One peer: its tasks, mailbox, handlers and requests, over an engine's `Host`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.base import keyed
from shoal.base.errors import (
    Cancelled,
    DeadlineExceeded,
    Leaving,
    LimitReached,
    PeerError,
    UsageError,
)
from shoal.base.ids import ANY, PeerId, Tag
from shoal.base.units import FOREVER, NANOSECONDS, to_ns, to_s
from shoal.kernel.datagrams import DATAGRAM, Datagrams
from shoal.kernel.host import Host
from shoal.kernel.mailbox import Mailbox, require_message
from shoal.kernel.paths import Paths
from shoal.kernel.peer import Batching, Cost, Envelope, Program, Store
from shoal.kernel.tasks import Task, TaskGroup
from shoal.kernel.waits import RecvWait, ReplyWait, Wait
from shoal.wire.message import Message, message

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
M = TypeVar("M")

# A task that finds this many deadlines past at one moment is not waiting but spinning.
_SPINS = 100_000


@message
class Failure:
    """What comes back instead of an answer when a handler raised or refused."""

    text: str


class Runtime:
    """Implements `Peer`. `start` and `kill` bracket one incarnation; the store outlives them."""

    def __init__(self, host: Host, peer: PeerId, roster: tuple[PeerId, ...], seed: int) -> None:
        self.host = host
        self.ready = host.ready
        self.id = peer
        self.roster = roster
        self.round = -1
        self.incarnation = 0
        self.alive = False
        self.current: Task | None = None
        self.root: Task | None = None
        self.tasks_alive: dict[Task, None] = {}
        self.mailbox = Mailbox(host.limits, host.drop)
        self.store: Store = RuntimeStore(self)
        self.datagrams = Datagrams(self)
        self.paths = Paths(self)
        self._draws = keyed.fold(0, seed, "peer", peer)
        self._handlers: dict[type, Callable[[Any], Awaitable[object]]] = {}
        self._handling: dict[type, int] = {}
        self._pending: dict[tuple[int, int], ReplyWait] = {}
        self._requests = 0
        self._spins = 0
        self._spins_ns = -1
        self._transmit = host.transmit

    # Life, driven by the engine.

    def start(self, program: Program) -> None:
        """Begin an incarnation: fresh mailbox and handlers, the store as it was left."""
        self.incarnation += 1
        self.alive = True
        self.mailbox = Mailbox(self.host.limits, self.host.drop)
        self._handlers = {}
        self._handling = {}
        self._pending = {}
        self._transmit = self.host.transmit
        self.root = self.spawn(program.run(self), None, False)

    def number_requests_from(self, first: int) -> None:
        """For a peer whose process began anew: an answer to its earlier life fits no request."""
        self._requests = first

    def kill(self) -> None:
        """Crash: close every coroutine, newest first, and forget everything but the store.

        What a closing coroutine still asks for in a `finally` has no effect and no answer.
        """
        self.alive = False
        self._transmit = _unheard
        for task in reversed(list(self.tasks_alive)):
            task.kill()
        self.tasks_alive.clear()
        self.datagrams.close()
        self.root = None

    def mute(self) -> None:
        """It dies with the step that it is taking: nothing that it still sends is heard."""
        self._transmit = _unheard

    def leave(self) -> None:
        """Tell the program that it should go."""
        if self.root is not None:
            self.root.interrupt(Leaving())

    def spawn(
        self, coroutine: Coroutine[Any, Any, Any], group: TaskGroup | None, isolated: bool
    ) -> Task:
        task = Task(self, coroutine, group, isolated)
        self.tasks_alive[task] = None
        self.ready.append((task, None, None))
        return task

    def _gone(self) -> Wait:
        """What a dead peer waits for: nothing ever resolves it."""
        return Wait(self.ready)

    def past(self, now_ns: int) -> None:
        """A deadline was past when its wait began; virtual time can't pass a loop of these."""
        if now_ns != self._spins_ns:
            self._spins_ns = now_ns
            self._spins = 0
        self._spins += 1
        if self._spins > _SPINS:
            raise LimitReached(
                f"{_SPINS} waits at {to_s(now_ns):.6f} s had deadlines in the past (a loop that "
                "never waits: compute its deadline from peer.now())"
            )

    def root_finished(self, task: Task) -> None:
        if task is self.root:
            self.root = None
            self.kill()
            error = task.error
            self.host.finished(self, None if isinstance(error, (Leaving, Cancelled)) else error)
        elif task.error is not None and not isinstance(task.error, Cancelled):
            self.host.failed(self, task.error)

    def deliver(self, envelope: Envelope[Any]) -> None:
        """A message arrived for this incarnation."""
        request = envelope.request
        if not (request or self._handlers):
            self.mailbox.put(envelope)
        elif request == DATAGRAM:
            self.datagrams.deliver(envelope.message)
        elif request < 0:
            wait = self._pending.pop((envelope.source, -request), None)
            if wait is None:
                self.host.drop("late answer")
            elif envelope.message.__class__ is Failure:
                wait.fail(PeerError(f"peer {envelope.source}: {envelope.message.text}"))  # type: ignore[attr-defined]
            else:
                wait.resolve(envelope.message)
        else:
            handler = self._handlers.get(envelope.message.__class__)
            if handler is not None:
                self._handle(handler, envelope)
            else:
                self.mailbox.put(envelope)

    def _handle(self, handler: Callable[[Any], Awaitable[Any]], envelope: Envelope[Any]) -> None:
        kind = envelope.message.__class__
        busy = self._handling.get(kind, 0)
        if busy >= self.host.limits.in_flight:
            self.host.drop("busy")
            if envelope.request:
                self.spawn(self._refuse(envelope), None, True)
            return
        self._handling[kind] = busy + 1
        self.spawn(self._answer(handler, envelope), None, True)

    async def _refuse(self, envelope: Envelope[Any]) -> None:
        await self._reply(envelope, Failure("too many requests in flight"))  # type: ignore[arg-type]

    async def _answer(
        self, handler: Callable[[Any], Awaitable[Any]], envelope: Envelope[Any]
    ) -> None:
        try:
            answer = await handler(envelope)
        except Exception as error:
            if not envelope.request:
                raise
            answer = Failure(f"{type(error).__name__}: {error}"[:1000])
        finally:
            self._handling[envelope.message.__class__] -= 1
        if envelope.request:
            if not isinstance(answer, Message):
                answer = Failure(f"the handler answered {type(answer).__name__}, no message")
            await self._reply(envelope, answer)

    async def _reply(self, envelope: Envelope[Any], answer: Any) -> None:
        wait = self._transmit(self, envelope.source, answer, -envelope.request)
        if wait is not None:
            await wait

    # What a program sees.

    @property
    def neighbors(self) -> Sequence[PeerId]:
        return self.host.neighbors(self)  # type: ignore[return-value]

    def now(self) -> float:
        return self.host.local_ns(self) / NANOSECONDS

    def uniform(self, *key: int | str) -> float:
        return keyed.unit(keyed.fold(self._draws, *key))

    def normal(self, *key: int | str) -> float:
        return keyed.normal(self._draws, *key)

    def choice(self, options: Sequence[T], *key: int | str) -> T:
        if not options:
            raise UsageError("choice: nothing to choose from (check for an empty list first)")
        return options[int(self.uniform(*key) * len(options))]

    def key(self, *key: int | str) -> Tensor:
        import torch

        return torch.tensor(
            keyed.signed(keyed.fold(self._draws, *key)), dtype=torch.int64, device="cpu"
        )

    def generator(self, *key: int | str) -> torch.Generator:
        import torch

        made = torch.Generator(device="cpu")
        made.manual_seed(keyed.fold(self._draws, *key) & ((1 << 63) - 1))
        return made

    def record(self, name: str, value: Any, **labels: str) -> None:
        if self.alive:
            self.host.record(self, name, value, labels)

    def enter_round(self, round: int) -> None:
        if not isinstance(round, int) or round < 0:
            raise UsageError(f"enter_round: round={round!r}; need an integer >= 0")
        if self.alive:
            self.round = round
            self.host.enter_round(self, round)

    async def send(self, to: PeerId, message: Any) -> None:
        wait = self._transmit(self, to, message, 0)
        if wait is not None:
            await wait

    async def flushed(self, to: PeerId) -> None:
        wait = self.host.flush(self, to) if self.alive else self._gone()
        if wait is not None:
            await wait

    async def recv(
        self, kind: type[M], *, tag: Any = ANY, source: PeerId | None = None, deadline: float
    ) -> Envelope[M] | None:
        if not self.alive:
            await self._gone()
        mailbox, host = self.mailbox, self.host
        if mailbox.mail:
            envelope = mailbox.take(kind, tag, source)
            if envelope is not None:
                return envelope
        at = to_ns(deadline)
        if at < FOREVER and at <= (now := host.local_ns(self)):
            mailbox.waiting(kind)
            self.past(now)
            return None
        waits = mailbox.waits.get(kind)
        if waits is None:
            waits = mailbox.waiting(kind)
        wait = RecvWait(waits, tag, source)
        waits.append(wait)
        if at < FOREVER:
            host.set_timer(self, at, wait)
        return await wait

    async def gather(
        self, kind: type[M], *, tag: Tag, expect: Collection[PeerId] | None = None,
        count: int | None = None, deadline: float,
    ) -> dict[PeerId, M]:  # fmt: skip
        if not self.alive:
            await self._gone()
        at = to_ns(deadline)
        if expect is None and count is None and at >= FOREVER:
            raise UsageError("gather: no expect, count or deadline: it would never end (give one)")
        tag = tuple(tag)
        wait = self.mailbox.gather(
            self.ready, kind, tag, None if expect is None else set(expect), count
        )
        now = self.host.local_ns(self)
        if wait.complete() or at <= now:
            wait.close()
            wait.done = True
            if at <= now:
                self.past(now)
            return wait.result()  # type: ignore[return-value]
        self.host.set_timer(self, at, wait)
        return await wait

    def discard(self, kind: type[M], *, before: Tag) -> None:
        self.mailbox.discard(kind, before)

    async def request(self, to: PeerId, message: Any, *, deadline: float) -> Any:
        if not self.alive:
            await self._gone()
        at = to_ns(deadline)
        what = f"{type(message).__name__} sent to peer {to}"
        now = self.host.local_ns(self)
        if at <= now:
            self.past(now)
            raise DeadlineExceeded(f"deadline passed before {what}")
        self._requests += 1
        # Registered before the message leaves: the answer may overtake the end of back-pressure.
        wait = ReplyWait(self.ready, self._pending, (to, self._requests), what)
        try:
            queued = self._transmit(self, to, message, self._requests)
            if queued is not None:
                self.host.set_timer(self, at, queued)
                await queued
                if not wait.done and at <= self.host.local_ns(self):
                    raise wait.late()
        except BaseException:
            wait.abandon()
            raise
        if not wait.done:
            self.host.set_timer(self, at, wait)
        return await wait

    def serve(self, kind: type[M], handler: Callable[[Envelope[M]], Awaitable[object]]) -> None:
        require_message(kind)
        if not self.alive:
            return
        self._handlers[kind] = handler
        waiting = self.mailbox.take(kind, ANY, None)
        while waiting is not None:
            self._handle(handler, waiting)
            waiting = self.mailbox.take(kind, ANY, None)

    async def sleep_until(self, time_s: float) -> None:
        if not self.alive:
            await self._gone()
        at = to_ns(time_s)
        now = self.host.local_ns(self)
        if at <= now:
            self.past(now)
            return
        wait = Wait(self.ready)
        self.host.set_timer(self, at, wait)
        await wait

    async def compute(
        self, function: Callable[..., T], *args: Any, static: tuple[Hashable, ...] = (),
        cost: Cost | None = None, batch: Batching = "leading",
    ) -> T:  # fmt: skip
        if not self.alive:
            await self._gone()
        return await self.host.compute(self, function, args, static, cost, batch)

    def tasks(self) -> TaskGroup:
        return TaskGroup(self)


def _unheard(runtime: Runtime, to: int, message: Message, request: int) -> Wait:
    """The `transmit` of a peer that is gone."""
    return Wait(runtime.ready)


class RuntimeStore:
    """A peer's durable store, kept by the engine."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def get(self, key: str) -> Any:
        return self._runtime.host.stored(self._runtime, key)

    async def commit(self, items: Mapping[str, Any]) -> None:
        runtime = self._runtime
        if not runtime.alive:
            await Wait(runtime.ready)
        await runtime.host.commit(runtime, dict(items))
