"""Messages past real NAT boxes: what `peer.paths` asks for, given to each peer's lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.kernel.datagrams import Endpoint, Socket
from shoal.kernel.paths import RelayLimits
from shoal.kernel.runtime import Runtime
from shoal.kernel.waits import Wait

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver
    from shoal.engine.live.lines import Lines


class Ways:
    """The lines of all peers of a process."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def _lines(self, runtime: Runtime) -> Lines:
        return self._driver.transports[runtime.id].lines

    def serve(self, runtime: Runtime, limits: RelayLimits) -> None:
        self._lines(runtime).serve(limits)

    def reserve(self, runtime: Runtime, relay: int) -> Wait:
        return self._lines(runtime).reserve(relay)

    def through(self, runtime: Runtime, to: int, relay: int) -> None:
        self._lines(runtime).through(to, relay)

    def direct(self, runtime: Runtime, to: int) -> bool:
        return self._lines(runtime).direct(to)

    def punch(self, runtime: Runtime, to: int, socket: Socket, place: Endpoint) -> Wait:
        datagrams, carriers = self._driver.datagrams, self._driver.plan.settings.carriers
        passage = datagrams.passage(socket, place) if "quic" in carriers else None
        return self._lines(runtime).punch(to, socket.local.port, place, passage)
