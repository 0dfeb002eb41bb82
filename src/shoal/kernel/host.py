"""What an engine must offer to the runtime of a peer. Times are integer nanoseconds of the run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shoal.base.limits import Limits
from shoal.kernel.waits import Ready, Wait
from shoal.wire.message import Message

if TYPE_CHECKING:
    from shoal.kernel.datagrams import Endpoint, Socket
    from shoal.kernel.paths import Ways
    from shoal.kernel.peer import Batching, Cost
    from shoal.kernel.runtime import Runtime


class Host(Protocol):
    """The seam between the kernel and an engine."""

    ready: Ready
    limits: Limits

    def local_ns(self, runtime: Runtime) -> int:
        """Now, on that peer's clock."""
        ...

    def set_timer(self, runtime: Runtime, local_ns: int, wait: Wait) -> None:
        """Call `wait.expire()` when the peer's clock shows `local_ns`, unless it is done by then.

        With `wait.timed` set, `timer_dropped` is called when the wait is resolved before.
        """
        ...

    def timer_dropped(self) -> None:
        """A wait marked `timed` was resolved before its time."""
        ...

    def transmit(self, runtime: Runtime, to: int, message: Message, request: int) -> Wait | None:
        """Take a message for sending; a wait when the queue to that peer is full."""
        ...

    def flush(self, runtime: Runtime, to: int) -> Wait | None: ...

    def compute(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        ...

    def commit(self, runtime: Runtime, items: Mapping[str, Any]) -> Wait: ...

    def stored(self, runtime: Runtime, key: str) -> Any: ...

    def bind(self, socket: Socket, port: int, /) -> Endpoint:
        """Open a datagram port, 0 = any; the endpoint as the peer itself knows it."""
        ...

    def emit(self, socket: Socket, data: bytes, to: Endpoint, /) -> None:
        """Send a datagram; nobody learns whether it arrives."""
        ...

    def unbind(self, socket: Socket, /) -> None: ...

    def map_port(self, socket: Socket, /) -> Wait:
        """For the outer endpoint that the socket's NAT box opens for everybody, if it does."""
        ...

    @property
    def ways(self) -> Ways:
        """Who carries messages past NAT boxes."""
        ...

    def neighbors(self, runtime: Runtime) -> Sequence[int]: ...

    def record(
        self, runtime: Runtime, name: str, value: Any, labels: Mapping[str, str]
    ) -> None: ...

    def enter_round(self, runtime: Runtime, round: int) -> None: ...

    def drop(self, reason: str) -> None:
        """Count a message or event that came to nothing."""
        ...

    def failed(self, runtime: Runtime, error: BaseException) -> None:
        """A handler of a message that wants no answer raised."""
        ...

    def finished(self, runtime: Runtime, error: BaseException | None) -> None:
        """The peer's `run` returned or raised."""
        ...
