"""What a user would pick instead, as yardsticks: gRPC in the clear, and the `lattica` package.

Each is measured between two processes over loopback as its own examples use it; a package that is
not installed (extra `bench`) gives no figures.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter, sleep
from typing import Any

PACKAGES = {"gRPC": "grpc", "lattica": "lattica"}
_WINDOW = 64
_SMALL_BYTES = 64
_LONG_S = 60.0
_METHOD = "/bench.Echo/Call"
# What a call of each carries of a long transfer; lattica's frames end below the 64 MiB of ours.
_PIECE_BYTES = {"gRPC": 1 << 26, "lattica": 1 << 20}


def missing(name: str) -> str:
    """Why it cannot be measured, or nothing."""
    if find_spec(PACKAGES[name]) is None:
        return f"{PACKAGES[name]} is not installed (extra `bench`)"
    return ""


def rates(name: str, calls: int, total_bytes: int) -> dict[str, float]:
    """{"sequential": calls per second, "pipelined": the same, "bulk": MB per second}."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve, connect = _SIDES[name]
    process = context.Process(target=serve, args=(theirs, port), daemon=True)
    process.start()
    try:
        call, close = connect(pipe.recv(), port)
        try:
            return _measure(call, calls, total_bytes, _PIECE_BYTES[name])
        finally:
            close()
    finally:
        pipe.send(None)
        process.join(5.0)
        process.kill()


def _measure(
    call: Callable[[bytes], Callable[[], Any]], calls: int, total_bytes: int, piece_bytes: int
) -> dict[str, float]:
    small, found = bytes(_SMALL_BYTES), {}
    for _ in range(10):
        call(small)()
    for name, window in (("sequential", 1), ("pipelined", _WINDOW)):
        begin = perf_counter()
        _drive(call, (small for _ in range(calls)), window)
        found[name] = calls / (perf_counter() - begin)
    piece = bytes(min(piece_bytes, total_bytes))
    pieces = -(-total_bytes // len(piece))
    call(piece)()
    begin = perf_counter()
    _drive(call, (piece for _ in range(pieces)), 1)
    found["bulk"] = pieces * len(piece) / (perf_counter() - begin) / 1e6
    return found


def _drive(
    call: Callable[[bytes], Callable[[], Any]], requests: Iterable[bytes], window: int
) -> None:
    """Make these calls, so many in flight; the oldest is waited for."""
    open_calls: deque[Callable[[], Any]] = deque()
    for request in requests:
        if len(open_calls) == window:
            open_calls.popleft()()
        open_calls.append(call(request))
    while open_calls:
        open_calls.popleft()()


# gRPC, unary, without its code generator: bytes in, bytes out.


def _serve_grpc(pipe: Connection, port: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def echo(request: bytes, context: Any) -> bytes:
        return request[:_SMALL_BYTES]

    handler = grpc.method_handlers_generic_handler(
        "bench.Echo", {"Call": grpc.unary_unary_rpc_method_handler(echo)}
    )
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler], options=options)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    pipe.send("")
    pipe.recv()
    server.stop(0.0)


def _call_grpc(_: str, port: int) -> tuple[Callable[[bytes], Callable[[], Any]], Any]:
    import grpc

    channel = grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]
    )
    method = channel.unary_unary(_METHOD)
    return lambda request: method.future(request, timeout=_LONG_S).result, channel.close


# lattica: its own RPC over libp2p (TCP, Noise, Yamux).


def _lattica_node(port: int, bootstraps: list[str]) -> tuple[Any, Any]:
    import lattica  # pyright: ignore[reportMissingImports]

    package: Any = lattica  # its decorators come from a compiled module without types

    class Echo(package.ConnectionHandler):
        @package.rpc_method
        def echo(self, data: bytes) -> bytes:
            return data[:_SMALL_BYTES]

    builder = package.Lattica.builder().with_listen_addrs([f"/ip4/127.0.0.1/tcp/{port}"])
    builder = builder.with_mdns(False).with_upnp(False)
    if bootstraps:
        builder = builder.with_bootstraps(bootstraps)
    node = builder.build()
    return node, Echo(node)


def _serve_lattica(pipe: Connection, port: int) -> None:
    node, _echo = _lattica_node(port, [])
    pipe.send(node.peer_id())
    pipe.recv()
    node.close()


def _call_lattica(peer: str, port: int) -> tuple[Callable[[bytes], Callable[[], Any]], Any]:
    node, echo = _lattica_node(0, [f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"])
    end_s = perf_counter() + _LONG_S
    while peer not in node.get_all_peers() and perf_counter() < end_s:
        sleep(0.05)
    method = echo.get_stub(peer).echo
    return lambda request: method(request).result, node.close


_SIDES: dict[str, tuple[Any, Any]] = {
    "gRPC": (_serve_grpc, _call_grpc),
    "lattica": (_serve_lattica, _call_lattica),
}
