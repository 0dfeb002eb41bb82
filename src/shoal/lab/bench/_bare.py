"""A bare `asyncio.Protocol` with the cipher of `live`, as the yardstick: no messages, no identity.

Records of a length and AES-256-GCM over one TCP connection between two processes; the key is
simply known. A small record is sent back as it is; a long one is answered once, when all of a
transfer is there.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shoal.base.stopwatch import Stopwatch
from shoal.wire.session import RECORD_BYTES

_LENGTH = struct.Struct("<I")
_NONCE = struct.Struct(">IQ")
_KEY = bytes(range(32))
_TAG_BYTES = 16
_PIECE_BYTES = 1 << 18
_SMALL_BYTES = 64
_WINDOW = 64


class _Link(asyncio.Protocol):
    def __init__(self, heard: Callable[[_Link, bytes], None]) -> None:
        self._heard = heard
        self._cipher = AESGCM(_KEY)
        self._sent = self._received = 0
        self._data = bytearray()
        self.room = asyncio.Event()
        self.room.set()
        self.got_bytes = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def send(self, data: bytes | memoryview) -> None:
        sealed = self._cipher.encrypt(_NONCE.pack(1, self._sent), data, None)
        self._sent += 1
        self.transport.write(_LENGTH.pack(len(sealed)) + sealed)

    def data_received(self, data: bytes) -> None:
        self._data += data
        view, at = memoryview(self._data), 0
        while len(view) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(view, at)
            end = at + _LENGTH.size + size
            if end > len(view):
                break
            with view[at + _LENGTH.size : end] as record:
                opened = self._cipher.decrypt(_NONCE.pack(1, self._received), record, None)
            self._received += 1
            at = end
            self._heard(self, opened)
        view.release()
        del self._data[:at]


def cipher_rate(repeats: int) -> float:
    """Bytes per CPU second that the cipher seals, in records as long as those of `live`."""
    cipher, nonce = AESGCM(_KEY), _NONCE.pack(1, 0)
    record = memoryview(bytearray(RECORD_BYTES))
    place = memoryview(bytearray(RECORD_BYTES + _TAG_BYTES))
    watch = Stopwatch()
    for _ in range(repeats):
        cipher.encrypt_into(nonce, record, None, place)
    return repeats * RECORD_BYTES / watch.cpu_s


def _send_back(pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection = server.accept()[0]
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(1 << 12):
            connection.send(data)


def to_and_fro(calls: int) -> float:
    """Round trips per second of 64 bytes between two processes that block on plain sockets."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_send_back, args=(theirs,), daemon=True)
    process.start()
    with socket.create_connection(("127.0.0.1", pipe.recv())) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = bytes(_SMALL_BYTES)
        begin = perf_counter()
        for _ in range(calls):
            connection.send(data)
            connection.recv(1 << 12)
        rate = calls / (perf_counter() - begin)
    process.join(5.0)
    process.kill()
    return rate


def _serve(pipe: Connection, total: int) -> None:
    def heard(link: _Link, data: bytes) -> None:
        if len(data) <= _SMALL_BYTES:
            link.send(data)
            return
        link.got_bytes += len(data)
        if link.got_bytes >= total:
            link.got_bytes = 0
            link.send(b"all")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Link(heard), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        server.close()

    asyncio.run(main())


def rates(calls: int, total_bytes: int, messages: int) -> dict[str, float]:
    """{"sequential": calls per second, "pipelined": the same, "bulk": MB per second}."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, total_bytes), daemon=True)
    process.start()
    try:
        return asyncio.run(_measure(pipe.recv(), calls, total_bytes, messages))
    finally:
        pipe.send(None)
        process.join(5.0)
        process.kill()


async def _measure(port: int, calls: int, total_bytes: int, messages: int) -> dict[str, float]:
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(
        lambda: _Link(lambda _, data: answers.put_nowait(data)), "127.0.0.1", port
    )
    small, found = bytes(_SMALL_BYTES), {}
    for name, window in (("sequential", 1), ("pipelined", _WINDOW)):
        begin = perf_counter()
        for sent in range(calls + window):
            if sent < calls:
                link.send(small)
            if sent >= window - 1 and sent - window + 1 < calls:
                await answers.get()
        found[name] = calls / (perf_counter() - begin)
    large = memoryview(bytearray(total_bytes))
    begin = perf_counter()
    for _ in range(messages):
        for at in range(0, total_bytes, _PIECE_BYTES):
            await link.room.wait()
            link.send(large[at : at + _PIECE_BYTES])
        await answers.get()
    found["bulk"] = messages * total_bytes / (perf_counter() - begin) / 1e6
    link.transport.close()
    return found
