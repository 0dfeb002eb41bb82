"""Whole runs on a device: the same numbers, and a calm round that waits for nothing.

A device that is none stands in for a GPU (`shoal.testing.pretend_device`); with a real one the same
scenarios run there too, within rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from shoal.engine.lockstep import run_lockstep
from shoal.lab.launch import launch_seeds, method_of
from shoal.lab.scenario import EngineSettings, Part, Scenario
from shoal.parts import find
from shoal.testing.ladder import difference
from shoal.testing.pretend_device import PretendDevice
from shoal.world.record import Run

PEERS = 8
TASK = Part("digits", {"alpha": 0.5, "hidden": (8,), "train_samples": 240})
LINKS = Part("links", {"latency_s": 0.02, "jitter_s": 0.002, "seed": 1})
WORLD = Scenario("device", peers=PEERS, rounds=4, eval_every=2, task=TASK, links=LINKS)
FAULTS = (
    {"kind": "crash", "who": [1], "at": 0.13, "until": 0.31},
    {"kind": "crash", "who": [4], "at": 0.2, "until": 0.4, "store": "lost"},
    {"kind": "loss", "who": [2], "at": 0.0, "until": 9.0, "probability": 0.5},
    {"kind": "partition", "who": [0, 1, 2], "at": 0.3, "until": 0.45},
    {"kind": "slow", "who": [3], "at": 0.0, "until": 9.0, "factor": 2.0},
)


def sgd(**settings: Any) -> Any:
    return find("strategy", "local_steps")(**{"steps": 2, "batch_size": 8, **settings})


def updates() -> Any:
    return find("strategy", "local_updates")(steps=2, batch_size=8)


@dataclass(frozen=True)
class Case:
    strategy: Callable[[], Any]
    settings: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    waits: int = 0
    """for the device in a round that is not evaluated"""
    looks: int = 2
    """in one that is: at the metrics of the mean model, at those of the peers"""
    exact: bool = True


DENSE = {"exchange": "gossip", "topology": "full"}
CASES = {
    "sampled star": Case(lambda: sgd(by_samples=True), {"exchange": {"name": "star", "sample": 4}}),
    "star of all": Case(sgd, {"exchange": "star"}),
    "gossip": Case(sgd, {"exchange": "gossip", "topology": "ring"}),
    "gossip with four waves and partial work": Case(
        sgd, {"exchange": {"name": "gossip", "steps": 4, "participation": 0.7}, "topology": "ring"}
    ),
    "gossip with crashes, loss and restarts": Case(
        sgd, {"exchange": "gossip", "topology": "ring", "faults": FAULTS, "round_s": 0.1,
              "rounds": 6}
    ),
    "star with faults": Case(
        sgd, {"exchange": {"name": "star", "sample": 5}, "faults": FAULTS, "round_s": 0.15,
              "rounds": 6}
    ),
    "momentum": Case(
        lambda: sgd(momentum=0.9, keep_momentum=True), {"exchange": "gossip", "topology": "ring"},
        exact=False,
    ),
    "epochs": Case(
        lambda: sgd(steps=None, epochs=2, batch_size=16),
        {"exchange": "gossip", "topology": "ring"}, waits=2,
    ),
    "sharpness": Case(
        lambda: find("strategy", "sharpness_aware")(steps=2, batch_size=8),
        {"exchange": "gossip", "topology": "ring"}, looks=3,
    ),
    "trimmed mean against alie": Case(
        sgd, {**DENSE, "aggregator": {"name": "trimmed_mean", "trim": 2}, "attack": "alie",
              "byzantine": 2},
    ),
    "searched attack on a sparse graph": Case(
        sgd, {"exchange": "gossip", "topology": {"name": "random_regular", "degree": 4},
              "aggregator": "median", "attack": {"name": "alie", "factor": "search"},
              "byzantine": 2},
    ),
    "equivocation": Case(
        sgd, {**DENSE, "aggregator": {"name": "nna", "byzantine": 2}, "attack": "dissensus",
              "byzantine": 2},
    ),
    "poisoned data": Case(
        sgd, {**DENSE, "aggregator": "krum", "attack": "label_flip", "byzantine": 2}
    ),
    "centred clipping": Case(
        sgd, {**DENSE, "aggregator": "centered_clipping", "attack": "sign_flip", "byzantine": 2},
        waits=1,
    ),
    "error feedback": Case(
        updates, {"exchange": "star", "transform": {
            "name": "error_feedback", "inner": "top_k", "settings": {"fraction": 0.1}}},
    ),
    "quantised": Case(updates, {"exchange": "star", "transform": {"name": "qsgd", "levels": 7}}),
    "stacked seeds": Case(
        sgd, {"exchange": "gossip", "topology": {"name": "random_regular", "degree": 4}},
        seeds=(0, 1, 2),
    ),
    "stacked seeds of a star": Case(sgd, {"exchange": {"name": "star", "sample": 4}}, (3, 4)),
}  # fmt: skip


def on(device: str, case: Case, engine: str, **settings: Any) -> list[Run]:
    world = WORLD.with_settings(case.settings)
    worlds = [
        replace(world, seed=seed, engine=EngineSettings(device=device, **settings))
        for seed in case.seeds
    ]
    return launch_seeds(case.strategy(), worlds, list(case.seeds), engine=engine)


def assert_same(here: list[Run], there: list[Run], exact: bool) -> None:
    for near, far in zip(here, there, strict=True):
        assert all(params.is_cpu for params in far.final.values())
        assert near.virtual_s == far.virtual_s
        assert near.trace_digest == far.trace_digest
        assert near.dropped == far.dropped
        assert (near.bytes_sent, near.bytes_received) == (far.bytes_sent, far.bytes_received)
        if exact:
            assert near.state_digest == far.state_digest
            assert near.rows == far.rows
        else:
            assert difference(near, far) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_lockstep_gives_the_same_numbers(name: str) -> None:
    case = CASES[name]
    here = on("cpu", case, "lockstep")
    with PretendDevice() as device:
        there = on(device.name, case, "lockstep")
    assert_same(here, there, case.exact)
    if "faults" in case.settings:
        assert any(sum(run.dropped.values()) for run in here)


@pytest.mark.parametrize("name", CASES)
def test_a_round_waits_for_the_device_as_often_as_stated(name: str) -> None:
    case = CASES[name]
    world = WORLD.with_settings(case.settings)
    with PretendDevice() as device:
        engine = EngineSettings(device=device.name)
        made = [
            method_of(case.strategy(), replace(world, seed=s, engine=engine, eval_every=0), s)
            for s in case.seeds
        ]
        seen: list[Counter[str]] = []

        def note(round: int) -> None:
            seen.append(device.waits.copy())
            device.waits.clear()

        measures = [measure for *_, measure in made]
        run_lockstep([m for m, *_ in made], [n for _, n, *_ in made], measures=measures,
                     progress=note)  # fmt: skip
    assert len(seen) == world.rounds
    # The first one holds what is made once, the last one is evaluated.
    for waits in seen[1:-1]:
        assert waits.total() == case.waits, waits
    assert seen[-1].total() == case.waits + case.looks * len(case.seeds), seen[-1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batching", ["lazy", "off"])
@pytest.mark.parametrize(
    "name",
    ["sampled star", "gossip with crashes, loss and restarts", "equivocation", "error feedback",
     "momentum", "epochs"],
)  # fmt: skip
def test_event_gives_the_same_numbers(name: str, batching: str, strict: bool) -> None:
    """Through bytes, too: strict wire encodes every message on the processor."""
    case = CASES[name]
    settings = {"batching": batching, "strict": strict}
    here = on("cpu", case, "event", **settings)
    with PretendDevice() as device:
        there = on(device.name, case, "event", **settings)
    assert_same(here, there, case.exact)


def test_many_peers_use_the_sparse_product() -> None:
    """From some hundred peers on, mixing is a product with a sparse matrix."""
    case = Case(
        lambda: sgd(steps=1, batch_size=2),
        {"peers": 300, "rounds": 2, "eval_peers": 4, "exchange": "gossip",
         "topology": {"name": "ring"}, "task": {"name": "digits", "hidden": [2]}},
    )  # fmt: skip
    here = on("cpu", case, "lockstep")
    with PretendDevice() as device:
        there = on(device.name, case, "lockstep")
    assert_same(here, there, case.exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["lockstep", "event"])
@pytest.mark.parametrize("name", CASES)
def test_a_real_device_agrees_within_rounding(name: str, engine: str) -> None:
    case = CASES[name]
    for near, far in zip(on("cpu", case, engine), on("cuda:0", case, engine), strict=True):
        assert near.bytes_sent == far.bytes_sent
        assert near.messages_delivered == far.messages_delivered
        assert difference(near, far) < 1e-3
