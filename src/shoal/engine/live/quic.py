"""QUIC over a datagram socket that is open already, as the pipe of a line.

What boxes let through belongs to the socket that punched, so the packets of the connection (RFC
9000, by the package `aioquic`) pass it too. A line has the same bytes, priorities and credit over
it as over TCP: one QUIC stream carries them all.

TLS inside QUIC has a certificate made for this one connection, which nobody checks. Who is at the
other end is proved as on every line, by a signed introduction, and what goes through the line is
sealed from transport to transport (Noise XX). An attacker on the way who ends the TLS session
learns and can do what one on the way of a TCP line can: drop it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, StreamDataReceived
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal.engine.live.datagrams import Passage
from shoal.engine.live.line import PIECE_BYTES, UNSENT_BYTES, Pipe

_APPLICATION = ["shoal-line"]
# As long as a silent TCP connection lasts, and asked for signs of life as often (`line.tuned`).
_IDLE_S = 60.0
_PROBE_AFTER_S = 15.0
_HELD = 256
"""Packets kept while nobody reads; others are lost, as in an operating system."""
_STREAM = 0
_PLACE = ("peer", 0)
"""What the QUIC library is told: to it, everything comes from one place."""


@cache
def _name() -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "line")])


def _configuration(client: bool) -> QuicConfiguration:
    made = QuicConfiguration(
        is_client=client, alpn_protocols=_APPLICATION, idle_timeout=_IDLE_S,
        verify_mode=ssl.CERT_NONE,
    )  # fmt: skip
    if not client:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(_name()).issuer_name(_name())
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1))
        made.certificate = builder.not_valid_after(now + timedelta(days=1)).sign(
            key, hashes.SHA256()
        )
        made.private_key = key
    return made


class QuicTransport(asyncio.Transport):
    """One side of a connection; `ready` is called once, with the pipe, when bytes can pass.

    The client begins when it hears a packet of the other side, whose box lets its own in by then.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, passage: Passage, client: bool,
        ready: Callable[[Pipe], None],
    ) -> None:  # fmt: skip
        super().__init__()
        self._loop = loop
        self._client = client
        self._ready: Callable[[Pipe], None] | None = ready
        self._quic: QuicConnection | None = None
        self._protocol: asyncio.BaseProtocol | None = None
        self._closed = False
        self._reads = True
        self._held: deque[bytes] = deque()
        self._written = 0
        self._is_full = False
        self._soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._passage = passage
        passage.take = self._took
        passage.lost = self.abort

    def open_filter(self) -> None:
        """A packet without content, so that boxes let in what comes from there."""
        if not self._closed:
            self._passage.send(b"")

    # What comes.

    def _took(self, data: bytes) -> None:
        if self._quic is None:
            self._begin(data)
        if not data or self._quic is None or self._closed:
            return
        if not self._reads:
            if len(self._held) < _HELD:
                self._held.append(data)
            return
        self._quic.receive_datagram(data, _PLACE, self._loop.time())
        self._events()

    def _begin(self, data: bytes) -> None:
        if self._client:
            self._quic = QuicConnection(configuration=_configuration(True))
            self._quic.connect(_PLACE, self._loop.time())
            self._transmit_soon()
        elif data[:1] and data[0] & 0xC0 == 0xC0 and len(data) > 6 + data[5]:
            # A packet with a long header (RFC 9000, section 17.2), which names its target.
            self._quic = QuicConnection(
                configuration=_configuration(False),
                original_destination_connection_id=data[6 : 6 + data[5]],
            )

    def _events(self) -> None:
        assert self._quic is not None
        while (event := self._quic.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                if event.stream_id != _STREAM:
                    self.abort()
                    return
                self._pipe()
                if event.data and isinstance(self._protocol, asyncio.StreamReaderProtocol):
                    self._protocol.data_received(event.data)
            elif isinstance(event, HandshakeCompleted):
                self._probe = self._loop.call_later(_PROBE_AFTER_S, self._ping)
                if self._client:
                    self._pipe()
            elif isinstance(event, ConnectionTerminated):
                self._end()
                return
        self._transmit_soon()

    def _pipe(self) -> None:
        """The called side can say nothing before the caller's stream begins."""
        if self._ready is None:
            return
        ready, self._ready = self._ready, None
        reader = asyncio.StreamReader(limit=PIECE_BYTES, loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        self._protocol = protocol
        protocol.connection_made(self)
        ready((reader, asyncio.StreamWriter(self, protocol, reader, self._loop)))

    def pause_reading(self) -> None:
        self._reads = False

    def resume_reading(self) -> None:
        self._reads = True
        while self._held and self._reads:
            self._took(self._held.popleft())

    # What goes.

    def write(self, data: Any) -> None:
        if self._closed or not data:
            return
        assert self._quic is not None
        self._quic.send_stream_data(_STREAM, bytes(data))
        self._written += len(data)
        if not self._is_full and self.get_write_buffer_size() > UNSENT_BYTES:
            self._is_full = True
            assert isinstance(self._protocol, asyncio.StreamReaderProtocol)
            self._protocol.pause_writing()
        self._transmit_soon()

    def get_write_buffer_size(self) -> int:
        """Bytes that were in no packet yet; what is on the way is the congestion window's."""
        assert self._quic is not None
        stream = self._quic._streams.get(_STREAM)
        return self._written - (0 if stream is None else stream.sender.highest_offset)

    def _transmit_soon(self) -> None:
        if not self._soon:
            self._soon = True
            self._loop.call_soon(self._transmit)

    def _transmit(self) -> None:
        self._soon = False
        if self._closed or self._quic is None:
            return
        for data, _ in self._quic.datagrams_to_send(self._loop.time()):
            self._passage.send(data)
        if self._is_full and self.get_write_buffer_size() <= UNSENT_BYTES // 2:
            self._is_full = False
            assert isinstance(self._protocol, asyncio.StreamReaderProtocol)
            self._protocol.resume_writing()
        at_s = self._quic.get_timer()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at_s is None else self._loop.call_at(at_s, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._quic is not None and not self._closed:
            self._quic.handle_timer(self._loop.time())
            self._events()

    def _ping(self) -> None:
        """Keeps the mappings of boxes, and finds out that the other side is gone."""
        if self._quic is not None and not self._closed:
            self._quic.send_ping(0)
            self._transmit_soon()
            self._probe = self._loop.call_later(_PROBE_AFTER_S, self._ping)

    # The end.

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Tell the other side, once, and end; what was not sent is lost."""
        if self._closed:
            return
        if self._quic is not None:
            self._quic.close()
            for data, _ in self._quic.datagrams_to_send(self._loop.time()):
                self._passage.send(data)
        self._end()

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        for timer in (self._timer, self._probe):
            if timer is not None:
                timer.cancel()
        self._held.clear()
        self._passage.close()
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, None)
