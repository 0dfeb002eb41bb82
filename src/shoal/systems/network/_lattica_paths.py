"""Lattica's first and last experiment: who reaches whom through NAT boxes, and calls per second."""

from __future__ import annotations

from collections.abc import Callable

from shoal.kernel.datagrams import Endpoint
from shoal.kernel.peer import Peer
from shoal.parts.overlay.relay import Relay
from shoal.parts.overlay.rpc import Request, Rpc, RpcSettings
from shoal.parts.overlay.traversal import Traversal

PORT = 3478
RELAYS = 2
"""The last peers of the roster, which are public."""
_FIRST_CALL_S = 5.0
_CALL_S = 8.2
_LATE_S = 300.0


async def paths(peer: Peer, pairs: int, attempts: int, reversal: bool) -> None:
    """Every peer calls `pairs` others, one after the other; records "path" (1 direct, 0 over the
    relay, -1 none) with the called peer."""
    until_s = _FIRST_CALL_S + _CALL_S * (pairs + 1)
    places = [Endpoint(f"198.18.{p >> 8}.{p & 255}", PORT) for p in peer.roster[-RELAYS:]]
    if peer.id in peer.roster[-RELAYS:]:
        relay = Relay(partner=places[peer.id == peer.roster[-2]])
        await relay(peer, peer.datagrams.open(PORT), until_s)
        return
    traversal = Traversal(peer, *places, attempts=attempts, reversal=reversal)
    others = [p for p in peer.roster[:-RELAYS] if p != peer.id]
    async with peer.tasks() as group:
        group.start(traversal.run(until_s))
        group.start(traversal.keep_alive(until_s))
        await traversal.register()
        await peer.sleep_until(_FIRST_CALL_S)
        for number in range(pairs):
            called = peer.choice(others, "pair", number)
            others.remove(called)
            path = await traversal.connect(called)
            kind = -1 if path is None else int(path.direct)
            peer.record("path", kind, called=str(called))


async def calls(peer: Peer, share: float) -> None:
    """Peer 0 calls peer 1: small and large payloads as fast as it goes, then with answers that are
    held back, as many at once as the label `at_once` says. share: of the usual numbers of calls."""
    rpc = Rpc(peer, RpcSettings(retry_s=30.0, retry_most_s=30.0))
    done: list[int] = []

    async def echo(request: Request) -> bytes:
        return request.payload

    async def later(request: Request) -> bytes:
        await peer.sleep_until(peer.now() + int.from_bytes(request.payload[:2], "big") / 1000)
        return b""

    async def stop(request: Request) -> bytes:
        done.append(1)
        return b""

    for method, handler in (("echo", echo), ("later", later), ("stop", stop)):
        rpc.serve(method, handler)
    async with peer.tasks() as group:
        rpc.start(group)
        if peer.id == 0:
            await _measure(peer, rpc, share)
            await rpc.call(1, "stop", deadline=_LATE_S)
        elif peer.id == 1:
            while not done and peer.now() < _LATE_S:
                await peer.sleep_until(peer.now() + 0.05)
            # The answer to the last call is still on its way.
            await peer.sleep_until(peer.now() + 0.2)
        rpc.stop()


async def _measure(peer: Peer, rpc: Rpc, share: float) -> None:
    async def rate(method: str, payload: bytes, count: int, at_once: int) -> float:
        left = max(at_once, round(count * share))
        total = left

        async def lane() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await rpc.call(1, method, payload, deadline=_LATE_S)

        began_s = peer.now()
        async with peer.tasks() as group:
            for _ in range(at_once):
                group.start(lane())
        return total / (peer.now() - began_s)

    def delay(milliseconds: int) -> bytes:
        return milliseconds.to_bytes(2, "big") + bytes(126)

    await rate("echo", bytes(128), 200, 8)
    cases: tuple[tuple[str, Callable[[], bytes], int, int, int], ...] = (
        ("echo", lambda: bytes(128), 6000, 16, 0),
        ("echo", lambda: bytes(1 << 18), 400, 8, 0),
        ("later", lambda: delay(20), 600, 16, 20),
        ("later", lambda: delay(150), 80, 8, 150),
        ("later", lambda: delay(150), 320, 32, 150),
    )
    for method, payload, count, at_once, delay_ms in cases:
        data = payload()
        found = await rate(method, data, count, at_once)
        peer.record(
            "calls_per_s", found, size=str(len(data)), at_once=str(at_once), delay_ms=str(delay_ms)
        )
        if delay_ms:
            peer.record(
                "of_little", found * delay_ms / 1000 / at_once, at_once=str(at_once),
                delay_ms=str(delay_ms),
            )  # fmt: skip
