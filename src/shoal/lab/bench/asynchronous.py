"""Lazy batching: asynchronous gossip of 256 peers with log-normal speeds, batched and one by one.

Peers share no rounds, so computations are batched only because nobody can see a result before it
is due. The trace, every delivery with its time, must not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shoal.lab.bench._row import Note, Row
from shoal.lab.bench._timing import alternate
from shoal.lab.run import run
from shoal.lab.scenario import EngineSettings, Part, Scenario


def world(tiny: bool) -> Scenario:
    """Digits with replacement, the MLP of W1, degree 8, speeds that vary by a factor of e^0.5.

    The median machine is the one that `gossip` sets its period by: a push every four updates.
    """
    return Scenario(
        "asynchronous gossip", peers=12 if tiny else 256, rounds=2 if tiny else 6, eval_every=100,
        eval_peers=1,
        task=Part("digits", {
            "samples_per_peer": 15, "with_replacement": True, "hidden": (8 if tiny else 128,),
        }),
        topology=Part("random_regular", {"degree": 4 if tiny else 8}),
        device=Part("device", {"flops_per_s": 1e8, "spread": 0.5}),
    )  # fmt: skip


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    lazy = world(tiny)
    off = replace(lazy, engine=EngineSettings(batching="off"))
    runs: dict[str, Any] = {}

    def running(name: str, scenario: Scenario) -> None:
        runs[name] = run("gossip", scenario, engine="event")

    times = alternate(
        {"on": lambda: running("on", lazy), "off": lambda: running("off", off)},
        1 if tiny else 5, note,
    )  # fmt: skip
    for what in ("cpu", "wall"):
        on, alone = (getattr(times[name], what) for name in ("on", "off"))
        label = what.upper() if what == "cpu" else what
        yield Row.of(
            f"asynchronous gossip: batching on, {label}", on, "s", against=("batching off", alone),
            bound="<= 1/5",
        )  # fmt: skip
    same = runs["on"].trace_digest == runs["off"].trace_digest
    yield Row.of("asynchronous gossip: same trace digest (1 = yes)", float(same), "", bound=">= 1")
    yield Row.of("asynchronous gossip: deliveries", runs["on"].messages_delivered, "messages")
