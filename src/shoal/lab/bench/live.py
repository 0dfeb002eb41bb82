"""Live: handshakes, calls and tensors between processes, authenticated and encrypted.

In the same run, for comparison: a bare `asyncio.Protocol` with the same cipher, two processes that
send bytes to and fro over a blocking socket, gRPC and the `lattica` package. Then a peer beside a
flooding one, and calls over links with delay. Wall time counts, so a busy machine shows.
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
from shoal.lab.bench import _bare, _delayed, _flood, _others
from shoal.lab.bench._row import Note, Row, missing
from shoal.lab.bench._timing import copy_rate
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

        async def ask(calls: int, text: bytes = text) -> None:
            for number in range(calls):
                await peer.request(1, Call(number, text), deadline=_LATE_S)

        await ask(10)
        for name, size, calls in (
            ("sequential", 64, self.calls),
            ("at 128 B", 128, self.calls // 4),
            ("at 256 KiB", 1 << 18, self.calls // 20),
        ):
            begin = perf_counter()
            await ask(calls, bytes(size))
            peer.record(name, calls / (perf_counter() - begin))
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
    found = _side_by_side(tiny, calls, bulk_bytes, messages, note)
    yield from _calls_and_tensors(found)
    yield from _limits(found, 20 if tiny else 2000)
    yield from _beside_others(found)
    note("a flood")
    yield _beside_a_flood(*((20, 1) if tiny else (2000, 5)))
    for round_trip_s, window, each in ((0.02, 16, 100), (0.15, 64, 20)):
        note(f"a round trip of {round_trip_s} s")
        rate = _delayed.rate(round_trip_s, window, 1 if tiny else each)
        way = f"round trip {round_trip_s * 1e3:.0f} ms"
        yield Row.of(
            f"live: {window} calls of 128 B in flight, {way}", rate, "1/s",
            against=("calls in flight / round trip", window / round_trip_s),
            bound=">= 0.85",
        )  # fmt: skip


def _side_by_side(
    tiny: bool, calls: int, bulk_bytes: int, messages: int, note: Note
) -> dict[str, list[float]]:
    """Rates by contestant and what it did; they take turns."""
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
        note(f"bare protocol and bare sockets, turn {turn}")
        rates = {"bare": _bare.rates(calls, bulk_bytes, messages)}
        rates["sockets"] = {"sequential": _bare.to_and_fro(calls)}
        for other in () if tiny else _others.PACKAGES:
            if not _others.missing(other):
                note(f"{other}, turn {turn}")
                rates[other] = _others.rates(other, calls // 10, bulk_bytes)
        for kind, values in rates.items():
            for name, value in values.items():
                found.setdefault(f"{kind} {name}", []).append(value)
    return found


_TASKS = (
    ("sequential", "round trips of 64 B, one at a time", "1/s", ">= 8000"),
    ("pipelined", f"round trips of 64 B, {_WINDOW} at a time", "1/s", ">= 25000"),
    ("bulk", "messages of 64 MiB", "MB/s", ">= 800"),
)


def _calls_and_tensors(found: dict[str, list[float]]) -> Iterator[Row]:
    for name, what, unit, bound in _TASKS:
        value, clear, bare = (median(found[f"{kind} {name}"]) for kind in ("noise", "none", "bare"))
        yield Row.of(f"live: {what}", value, unit, bound=bound)
        yield Row.of(
            f"live: {what}, against the bare protocol", value, unit, against=("bare", bare),
            bound=">= 0.5",
        )  # fmt: skip
        yield Row.of(
            f"live: {what}, against no security", value, unit, against=("in the clear", clear)
        )
    for size, bound in (("128 B", ">= 1500"), ("256 KiB", None)):
        value = median(found[f"noise at {size}"])
        yield Row.of(f"live: calls of {size}, one at a time", value, "1/s", bound=bound)


def _limits(found: dict[str, list[float]], repeats: int) -> Iterator[Row]:
    """What the machine could do at best: the system's own round trips, the cipher, a copy."""
    yield Row.of(
        "live: round trips of 64 B, one at a time, against blocking sockets in the clear",
        median(found["noise sequential"]), "1/s",
        against=("sockets", median(found["sockets sequential"])),
    )  # fmt: skip
    bulk = median(found["noise bulk"])
    for what, rate in (
        ("the cipher alone", _bare.cipher_rate(repeats)),
        ("a copy in memory", copy_rate(1 << 26, 2) / 2),
    ):
        yield Row.of(
            f"live: messages of 64 MiB, against {what}", bulk, "MB/s", against=(what, rate / 1e6)
        )


def _beside_others(found: dict[str, list[float]]) -> Iterator[Row]:
    for other in _others.PACKAGES:
        for name, what, unit, _ in _TASKS:
            title = f"live: {what}, against {other}"
            if f"{other} {name}" not in found:
                yield missing(title, _others.missing(other) or "not measured at this size")
                continue
            yield Row.of(
                title, median(found[f"noise {name}"]), unit,
                against=(other, median(found[f"{other} {name}"])),
            )  # fmt: skip


def _beside_a_flood(calls: int, turns: int) -> Row:
    found = _flood.seconds(calls, turns)
    calm, flood = (median(found[f"{name} p99"]) for name in ("calm", "flood"))
    return Row.of(
        "live: p99 of round trips while another peer floods", flood, "s",
        against=("p99 without the flood", calm), bound="<= 3",
    )  # fmt: skip


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
