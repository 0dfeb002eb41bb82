"""Datagrams on the virtual network: addresses, sockets and NAT boxes.

A datagram takes the way of a message (latency, bandwidth, loss, faults, counters, trace) between
the outer endpoints of both sides. The sender's box maps it when it is sent, the receiver's box
decides when it arrives. Public peers have addresses of 198.18.0.0/15 (RFC 2544), as have the boxes
after them; a peer behind a box has one of 10.0.0.0/8.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.engine.event.ways import Carried, Opening, Reservation
from shoal.kernel.datagrams import DATAGRAM, HEADER_BYTES, Datagram, Endpoint, Socket
from shoal.kernel.waits import Wait
from shoal.wire.message import message_key
from shoal.world.nat import NatTable

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime

_PUBLIC = int(IPv4Address("198.18.0.0"))
_PRIVATE = int(IPv4Address("10.0.0.0"))
_MOST_PUBLIC = 1 << 17
_FIRST_FREE_PORT = 49152


class Datagrams:
    """All sockets and boxes of a run; made when the first socket is opened."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        network = simulation.network
        peers = network.peers
        if peers + len(network.nats) > _MOST_PUBLIC:
            raise UsageError(
                f"datagrams: {peers} peers and {len(network.nats)} NAT boxes; the virtual network "
                f"has {_MOST_PUBLIC} addresses (use fewer peers)"
            )
        self._simulation = simulation
        self._hosts = [str(IPv4Address(_PUBLIC + peer)) for peer in range(peers)]
        self._peer_of = {host: peer for peer, host in enumerate(self._hosts)}
        self._tables: dict[int, NatTable] = {}
        self._table_of: dict[str, NatTable] = {}
        for number, box in enumerate(network.nats):
            table = NatTable(box, str(IPv4Address(_PUBLIC + peers + number)), seed)
            self._table_of[table.host] = table
            for peer in box.who:
                del self._peer_of[self._hosts[peer]]
                self._tables[peer] = table
                self._hosts[peer] = host = str(IPv4Address(_PRIVATE + 1 + peer))
                self._peer_of[host] = peer
        self._sockets: dict[Endpoint, Socket] = {}
        self._free = [_FIRST_FREE_PORT] * peers
        for runtime in simulation.runtimes:
            runtime.datagrams.arrived = self._arrived

    def bind(self, socket: Socket, port: int) -> Endpoint:
        """The endpoint of a new socket."""
        peer = socket.runtime.id
        host = self._hosts[peer]
        local = Endpoint(host, port or self._free_port(peer))
        if local in self._sockets:
            raise UsageError(f"datagrams.open: {local} is taken (close its socket, or use port=0)")
        self._sockets[local] = socket
        return local

    def _free_port(self, peer: int) -> int:
        for _ in range(65536 - _FIRST_FREE_PORT):
            port = self._free[peer]
            self._free[peer] = port + 1 if port < 65535 else _FIRST_FREE_PORT
            if Endpoint(self._hosts[peer], port) not in self._sockets:
                return port
        raise UsageError(f"datagrams.open: peer {peer} has no port left (close sockets)")

    def unbind(self, socket: Socket) -> None:
        self._sockets.pop(socket.local, None)
        table = self._tables.get(socket.runtime.id)
        if table is not None:
            table.unmap_port(socket.local)

    def emit(self, socket: Socket, data: bytes, to: Endpoint) -> None:
        """Send: through the own box, if there is one, to whoever holds the other address."""
        if (route := self.route(socket, to)) is None:
            self._simulation.drop("no route")
            return
        target, source = route
        self._simulation.delivery.transmit_as(
            socket.runtime, target, Datagram(source.host, source.port, to.host, to.port, data),
            HEADER_BYTES + len(data), message_key(Datagram.code, (source.port, to.port)), DATAGRAM,
        )  # fmt: skip

    def route(self, socket: Socket, to: Endpoint) -> tuple[int, Endpoint] | None:
        """Who gets a packet to an endpoint (or its box does), and from where it seems to come."""
        peer, source = socket.runtime.id, socket.local
        table = self._tables.get(peer)
        target = self._peer_of.get(to.host)
        if target is not None and target != peer and self._tables.get(target) is not None:
            # An inner address means something behind the same box only.
            return (target, source) if self._tables[target] is table else None
        if target is None or table is not None:
            now = self._simulation.now_ns
            if table is not None and target != peer:
                source = table.outbound(source, to, now)
            other = self._table_of.get(to.host)
            if other is not None and (other is not table or other.box.hairpin):
                holder = other.owner(to, now)
                target = other.box.who[0] if holder is None else self._peer_of[holder.host]
        return None if target is None else (target, source)

    def map_port(self, socket: Socket) -> Wait:
        """For what the socket's box opens for everybody, if it does such a thing: at once."""
        table, wait = self._tables.get(socket.runtime.id), Wait(socket.runtime.ready)
        wait.resolve(None if table is None else table.map_port(socket.local))
        return wait

    def _arrived(self, datagram: Any, runtime: Runtime) -> None:
        if isinstance(datagram, Carried):
            self._simulation.ways.carried(datagram, runtime)
            return
        if isinstance(datagram, Reservation):
            self._simulation.ways.reserving(datagram)
            return
        to = Endpoint(datagram.to_host, datagram.to_port)
        source = Endpoint(datagram.from_host, datagram.from_port)
        table = self._table_of.get(to.host)
        if table is not None:
            inside = table.inbound(to, source, self._simulation.now_ns)
            if inside is None:
                self._simulation.drop("filtered")
                return
            to = inside
        socket = self._sockets.get(to)
        if socket is None:
            self._simulation.drop("no socket")
        elif isinstance(datagram, Opening):
            self._simulation.ways.opening(socket, datagram, source)
        else:
            socket.arrived(datagram.data, source)
