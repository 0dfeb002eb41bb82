"""What a peer program sees of the world."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import msgspec

from shoal.base.ids import PeerId, Tag

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shoal.kernel.datagrams import Datagrams
    from shoal.kernel.paths import Paths
    from shoal.kernel.tasks import TaskGroup

T = TypeVar("T")
M = TypeVar("M")
"""A class declared with `@message`. No bound: to a type checker a decorator adds no base, so that
such classes are dataclasses to it; the kernel refuses others with UndeclaredMessage."""
Batching = Literal["leading", "vmap", "never"]
Storable = "bytes | Tensor | Message"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a computation takes: floating-point operations, bytes moved, or plain seconds."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Envelope(msgspec.Struct, Generic[M], eq=False):
    """A message with its sender. `size_bytes` is the frame's exact size.

    The rest is the engines' own: request number, draw key, incarnations at sending, digest.
    """

    source: PeerId
    message: M
    size_bytes: int = 0
    request: int = 0
    key: int = 0
    incarnation: int = 0
    checked: str = ""

    @property
    def tag(self) -> Tag:
        return self.message.tag  # pyright: ignore[reportAttributeAccessIssue]

    def __repr__(self) -> str:
        return f"Envelope(source={self.source}, message={self.message!r})"


class Store(Protocol):
    """What survives a crash. Reads see the last commit that returned."""

    def get(self, key: str) -> Any:
        """The committed value (bytes, Tensor or Message), or None."""
        ...

    async def commit(self, items: Mapping[str, Any]) -> None:
        """Write all items or none; durable once this returns; costs device time."""
        ...


class Peer(Protocol):
    """The only handle that a program has. Times are seconds on this peer's own clock."""

    id: PeerId
    roster: tuple[PeerId, ...]
    store: Store
    datagrams: Datagrams
    paths: Paths
    round: int

    @property
    def neighbors(self) -> Sequence[PeerId]:
        """Whom this peer may talk to now; may differ after any await."""
        ...

    def now(self) -> float:
        """Seconds since the run's announced start, on this peer's own, possibly skewed, clock."""
        ...

    def uniform(self, *key: int | str) -> float:
        """A draw from [0, 1) that depends on the run's seed, this peer and the key alone."""
        ...

    def normal(self, *key: int | str) -> float: ...
    def choice(self, options: Sequence[T], *key: int | str) -> T: ...
    def key(self, *key: int | str) -> Tensor:
        """A scalar random key for numeric code, see `shoal.tensor.keyed`."""
        ...

    def generator(self, *key: int | str) -> torch.Generator: ...

    def record(self, name: str, value: Any, **labels: str) -> None:
        """Report a number, or under the name "params" this peer's current model [dim]."""
        ...

    def enter_round(self, round: int) -> None:
        """Say which round begins; faults and reports may be tied to rounds."""
        ...

    async def send(self, to: PeerId, message: object) -> None:
        """Queue a message; waits while the queue is full; never raises for a dead peer."""
        ...

    async def flushed(self, to: PeerId) -> None:
        """Wait until the tensors sent to that peer so far may be written again."""
        ...

    async def recv(
        self, kind: type[M], *, tag: Any = ..., source: PeerId | None = None, deadline: float
    ) -> Envelope[M] | None:
        """The oldest matching message, or None at the deadline."""
        ...

    async def gather(
        self, kind: type[M], *, tag: Tag, expect: Collection[PeerId] | None = None,
        count: int | None = None, deadline: float,
    ) -> dict[PeerId, M]:  # fmt: skip
        """One message per sender: until `count` came, or all of `expect`, or the deadline.

        Closes the tag: later mail of it is dropped and counted. A sender's second message of the
        same tag is dropped. The result is ordered by sender.
        """
        ...

    def discard(self, kind: type[M], *, before: Tag) -> None:
        """Drop mail with smaller tags, now and later."""
        ...

    async def request(self, to: PeerId, message: object, *, deadline: float) -> Any:
        """Send and wait for the handler's answer; DeadlineExceeded, PeerUnreachable, PeerError."""
        ...

    def serve(self, kind: type[M], handler: Callable[[Envelope[M]], Awaitable[object]]) -> None:
        """Handle every message of a kind in a task of its own, at most `in_flight` at once."""
        ...

    async def sleep_until(self, time_s: float) -> None: ...

    async def compute(
        self, function: Callable[..., T], *args: Any, static: tuple[Hashable, ...] = (),
        cost: Cost | None = None, batch: Batching = "leading",
    ) -> T:  # fmt: skip
        """`function(*args, *static)`: pure, module-level, leading axes allowed.

        Equal calls of several peers may run as one on stacked arguments. `cost` sets the virtual
        duration (default: a flop count of the function at its shapes).
        """
        ...

    def tasks(self) -> TaskGroup:
        """`async with peer.tasks() as group: group.start(coroutine)`; leaves no task behind."""
        ...


class Program(Protocol):
    """What one peer does. A frozen dataclass of settings; `run` starts anew after each crash."""

    async def run(self, peer: Peer) -> None: ...
