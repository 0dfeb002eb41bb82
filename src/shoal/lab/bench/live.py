"""Live: handshakes, calls and tensors between two processes, authenticated and encrypted.

Beside a bare `asyncio.Protocol` with the same cipher in the same run. Wall time counts, so a busy
machine shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from shoal.base.stopwatch import Stopwatch
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.bench import _bare
from shoal.lab.bench._row import Note, Row
from shoal.wire.handshake import Credentials, Handshake, Trust
from shoal.wire.identity import Identity
from shoal.wire.message import message
from shoal.world.network import Network

_LATE_S = 300.0
_WINDOW = 64


@message
class Call:
    number: int
    text: bytes


@message
class Bulk:
    values: Tensor


@message
class Got:
    number: int


@dataclass(frozen=True)
class Measured:
    """Peer 0 calls and times itself, peer 1 answers."""

    calls: int
    bulk_bytes: int
    messages: int

    async def run(self, peer: Any) -> None:
        if peer.id:
            await self._answer(peer)
        else:
            await self._ask(peer)

    async def _answer(self, peer: Any) -> None:
        async def answer(envelope: Any) -> Got:
            return Got(1)

        peer.serve(Call, answer)
        peer.serve(Bulk, answer)
        await peer.recv(Got, deadline=_LATE_S)

    async def _ask(self, peer: Any) -> None:
        text = bytes(64)

        async def ask(calls: int) -> None:
            for number in range(calls):
                await peer.request(1, Call(number, text), deadline=_LATE_S)

        await ask(10)
        begin = perf_counter()
        await ask(self.calls)
        peer.record("sequential", self.calls / (perf_counter() - begin))
        begin = perf_counter()
        each = self.calls // _WINDOW + 1
        async with peer.tasks() as group:
            for _ in range(_WINDOW):
                group.start(ask(each))
        peer.record("pipelined", each * _WINDOW / (perf_counter() - begin))
        bulk = Bulk(torch.zeros(self.bulk_bytes // 4))
        begin = perf_counter()
        for _ in range(self.messages):
            await peer.request(1, bulk, deadline=_LATE_S)
        peer.record("bulk", self.messages * self.bulk_bytes / (perf_counter() - begin) / 1e6)
        await peer.send(1, Got(0))


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    note("handshakes")
    yield Row.of("live: handshakes, both sides, CPU", _handshakes(20 if tiny else 500), "1/s")
    calls, bulk_bytes, messages = (200, 1 << 20, 1) if tiny else (20_000, 1 << 26, 8)
    program = Measured(calls, bulk_bytes, messages)
    found: dict[str, list[float]] = {}
    for turn in range(1 if tiny else 3):
        note(f"two processes, turn {turn}")
        for security in ("noise", "none"):
            run = run_live(
                program, Network(2), processes=2,
                settings=LiveSettings(horizon_s=_LATE_S, security=security),
            )  # fmt: skip
            for row in run.rows:
                found.setdefault(f"{security} {row.name}", []).append(row.value)
        note(f"bare protocol, turn {turn}")
        for name, value in _bare.rates(calls, bulk_bytes, messages).items():
            found.setdefault(f"bare {name}", []).append(value)
    for name, what, unit, bound in (
        ("sequential", "round trips of 64 B, one at a time", "1/s", ">= 8000"),
        ("pipelined", f"round trips of 64 B, {_WINDOW} at a time", "1/s", ">= 25000"),
        ("bulk", "messages of 64 MiB", "MB/s", ">= 800"),
    ):
        value, clear, bare = (median(found[f"{kind} {name}"]) for kind in ("noise", "none", "bare"))
        yield Row.of(f"live: {what}", value, unit, bound=bound)
        yield Row.of(
            f"live: {what}, against the bare protocol", value, unit, against=("bare", bare),
            bound=">= 0.5",
        )  # fmt: skip
        yield Row.of(
            f"live: {what}, against no security", value, unit, against=("in the clear", clear)
        )


def _handshakes(count: int) -> float:
    keys = [Credentials(Identity.new()) for _ in range(2)]
    trust = Trust({peer: key.identity.public for peer, key in enumerate(keys)})
    watch = Stopwatch()
    for _ in range(count):
        sides = (
            Handshake(keys[0], 0, bytes(16), trust.check, target=1),
            Handshake(keys[1], 1, bytes(16), trust.check),
        )
        data, at = sides[0].begin(), 1
        while data:
            side, data, rest = sides[at], b"", data
            while rest:
                missing = side.missing
                data += side.receive(rest[:missing])
                rest = rest[missing:]
            at = 1 - at
    return count / watch.cpu_s
