"""Collective: all-reduce on four processes beside Gloo, with losses and at full load.

Wall time counts, so a busy machine shows; both sides take turns in one run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from shoal.lab.bench import _collective
from shoal.lab.bench._row import Note, Row, missing
from shoal.world.faults import Partition
from shoal.world.record import Run

_PEERS = 4
_PACE = "200mbit"
_BUSY_S = float(os.environ.get("SHOAL_BENCH_BUSY_S", "120"))


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    large, small = (1 << 20, 1 << 14) if tiny else (1 << 26, 1 << 16)
    plan = ((large, 2), (small, 5)) if tiny else ((large, 7), (small, 100))
    found: dict[tuple[str, int], list[float]] = {}
    for turn in range(1 if tiny else 3):
        for who in ("gloo", "none", "noise"):
            note(f"{'Gloo' if who == 'gloo' else 'security ' + who}, turn {turn}")
            if who == "gloo":
                took = _gloo("rate", _PEERS, *(number for pair in plan for number in pair))
            else:
                took = _collective.seconds(who, plan, peers=_PEERS)
            for (size, _), values in zip(plan, took, strict=True):
                found.setdefault((who, size), []).extend(values)
    took_s = {key: median(values) for key, values in found.items()}
    gloo = ("Gloo", large / took_s["gloo", large] / 1e6)
    ways = (("none", "in the clear", ">= 0.8"), ("noise", "encrypted", ">= 0.4"))
    for security, how, bound in ways:
        rate = large / took_s[security, large] / 1e6
        yield Row.of(f"all-reduce of 64 MiB, {how}", rate, "MB/s", against=gloo, bound=bound)
    gloo_ms = 1e3 * took_s["gloo", small]
    for security, how, _ in ways:
        value = 1e3 * took_s[security, small]
        yield Row.of(f"all-reduce of 64 KiB, {how}", value, "ms", bound="<= 3")
        yield Row.of(
            f"all-reduce of 64 KiB, {how}, beside Gloo", value, "ms", against=("Gloo", gloo_ms)
        )
    yield _paced(1 << 20 if tiny else 1 << 26, 1 if tiny else 3, note)
    yield from _losses(1 << 20 if tiny else 1 << 24, note)
    yield from _busy(2.0 if tiny else _BUSY_S, note)


def _gloo(*arguments: object) -> Any:
    return _child("_gloo", arguments)


def _child(module: str, arguments: Sequence[object], before: Sequence[str] = ()) -> Any:
    command = [*before, sys.executable, "-m", f"shoal.lab.bench.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600.0, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _paced(size: int, repeats: int, note: Note) -> Row:
    """Both in network namespaces whose loopback carries what four links of that pace would."""
    name = f"all-reduce of 64 MiB as int8, links of {_PACE}"
    total = f"{_PEERS * int(_PACE.removesuffix('mbit'))}mbit"
    within = (
        "unshare", "--net", "sh", "-c",
        f"ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate {total} burst 256kb "
        'latency 50ms && exec "$@"', "sh",
    )  # fmt: skip
    try:
        subprocess.run([*within, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return missing(name, f"no paced network here: {error}", ">= 3")
    note("paced links, Gloo")
    gloo = median(_child("_gloo", ("rate", _PEERS, size, repeats), within)[0])
    note("paced links, int8")
    own = median(_child("_collective", (1, size, repeats), within)[0])
    return Row.of(name, size / own / 1e6, "MB/s", against=("Gloo", size / gloo / 1e6), bound=">= 3")


def _losses(size: int, note: Note) -> Iterator[Row]:
    note("a peer is killed under Gloo")
    told = _gloo("kill", _PEERS, size) or ["no answer in 300 s"]
    after = "Gloo works on" if not all(told) else f"Gloo fails for good: {told[-1]}"
    for what, kills in (("kill -9", True), ("silence", False)):
        note(f"{what} in mid-reduce")
        at_s = 4.0
        program = _collective.Loses(_PEERS, size, at_s, kills)
        faults = () if kills else (Partition(who=(_PEERS,), at=at_s),)
        run = _collective.run(program, "none", faults)
        yield Row.of(
            f"{what} of one of four in mid-reduce until the others have their result ({after})",
            recovered_s(run, _PEERS, at_s), "s", bound="<= 1",
        )  # fmt: skip


def recovered_s(run: Run, peers: int, at_s: float) -> float:
    """From the loss until the last survivor had the result of the peers that are left."""
    ends: dict[int, float] = {}
    for row in run.series("ended_s"):
        if row.labels == (("peers", str(peers - 1)),):
            ends.setdefault(row.peer, row.value)
    return max(ends.values()) - at_s if len(ends) == peers - 1 else float("nan")


def _busy(for_s: float, note: Note) -> Iterator[Row]:
    note(f"8 peers at full load for {for_s:.0f} s")
    run = _collective.run(_collective.Busy(8, 1 << 20, for_s), "none")
    (aborts,), (done,) = run.series("aborts"), run.series("done")
    yield Row.of(
        f"aborts in {for_s:.0f} s of 8 peers that compute all the time", aborts.value, "",
        bound="<= 0",
    )  # fmt: skip
    yield Row.of("reductions of 1 MiB meanwhile", done.value, "")
