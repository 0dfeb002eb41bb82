"""Paths of messages to peers behind NAT boxes: through a relay, or opened from both sides.

`peer.send` and `peer.request` need no path to a peer that can be called. To one that cannot they
take the path that was set here; without one their messages are lost. A peer that can be called
answers on what the other one opened. Parts decide which path (`shoal.parts.overlay.traversal`);
engines carry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shoal.base.errors import ProgramError, UsageError
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.base.units import FOREVER, to_ns
from shoal.kernel.waits import Wait

if TYPE_CHECKING:
    from shoal.kernel.datagrams import Endpoint, Socket
    from shoal.kernel.runtime import Runtime


@dataclass(frozen=True)
class RelayLimits:
    """What a relay does for others; the defaults are those of libp2p's circuit relay v2.

    reservations: peers that it can be asked for, at most; circuit_s, circuit_bytes: how long and
    how much one pair may talk, both ways together, before it is cut off for circuit_s.
    """

    reservations: int = 128
    circuit_s: float = 120.0
    circuit_bytes: int = 1 << 17

    def __post_init__(self) -> None:
        check_positive("RelayLimits", self, "reservations", "circuit_s", "circuit_bytes")


class Ways(Protocol):
    """What an engine does for `Paths`.

    The waits resolve to whether it worked; one that is done before is not wanted any more.
    """

    def serve(self, runtime: Runtime, limits: RelayLimits) -> None: ...

    def reserve(self, runtime: Runtime, relay: int) -> Wait: ...

    def through(self, runtime: Runtime, to: int, relay: int) -> None: ...

    def punch(self, runtime: Runtime, to: int, socket: Socket, place: Endpoint) -> Wait: ...

    def direct(self, runtime: Runtime, to: int) -> bool: ...


class Paths:
    """`peer.paths`: how this peer's messages get to others, and others' to it."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def serve(self, limits: RelayLimits | None = None) -> None:
        """Be a relay: pass on what others send each other through this peer, unread."""
        self._check()
        self._runtime.host.ways.serve(self._runtime, limits or RelayLimits())

    async def reserve(self, relay: PeerId, *, deadline: float) -> bool:
        """Be reachable through a peer that serves; False when it refuses or does not answer.

        It lasts until this peer or the relay crashes, or the relay cannot be reached any more.
        """
        return await self._until(deadline, lambda ways: ways.reserve(self._runtime, int(relay)))

    def through(self, to: PeerId, relay: PeerId) -> None:
        """Messages to that peer go through a relay, where it has a reservation, from now on."""
        self._check()
        if to in (self._runtime.id, relay):
            raise UsageError(f"paths.through: to={to}, relay={relay}; need two other peers")
        self._runtime.host.ways.through(self._runtime, int(to), int(relay))

    async def punch(
        self, to: PeerId, socket: Socket, place: Endpoint, *, deadline: float
    ) -> bool:  # fmt: skip
        """Open a connection to an endpoint from this socket's port, while `to` does the same.

        Both ask each other again and again until the deadline. When it works, messages of both go
        over it; when it breaks, they take the relay again, if there is one.

        Assumes boxes that give a connection the port that they give datagrams of the same inner
        port (Linux and most home routers do, as long as it is free); elsewhere it fails.
        """
        return await self._until(
            deadline, lambda ways: ways.punch(self._runtime, int(to), socket, place)
        )

    def direct(self, to: PeerId) -> bool:
        """Whether a connection that `punch` opened to that peer stands."""
        self._check()
        return self._runtime.host.ways.direct(self._runtime, int(to))

    def _check(self) -> None:
        if not self._runtime.alive:
            raise ProgramError("paths: this peer is gone (use them while it runs)")

    async def _until(self, deadline: float, begin: Callable[[Ways], Wait]) -> bool:
        runtime = self._runtime
        if not runtime.alive:
            await Wait(runtime.ready)
        at, now = to_ns(deadline), runtime.host.local_ns(runtime)
        if at <= now:
            runtime.past(now)
            return False
        wait = begin(runtime.host.ways)
        if not wait.done:
            runtime.host.set_timer(runtime, min(at, FOREVER), wait)
        return bool(await wait)
