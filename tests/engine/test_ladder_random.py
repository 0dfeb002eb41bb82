"""Lockstep against event under generated fault lists: the same messages, message for message."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

import shoal
from shoal.base.errors import UsageError
from shoal.engine.event import simulate
from shoal.engine.lockstep import run_lockstep
from shoal.engine.lockstep.timeline import beyond
from shoal.lab.explore import generate
from shoal.lab.faults import FaultSetting
from shoal.lab.launch import launch, method_of
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.rounds.adapter import Rounds
from shoal.testing.ladder import MARGIN, check_strategy
from shoal.world.faults import Crash, Hold, Leave, Round, Skew

# Holds beyond their round are counted differently (docs/design.md, 3.1).
KINDS = ("crash", "join", "leave", "partition", "slow", "loss")
STAR = {"exchange": "star"}
GOSSIP = {"topology": {"name": "random_regular", "degree": 4}}


def world(seed: int, around: dict[str, Any]) -> tuple[Any, Any]:
    scenario = shoal.Scenario(
        peers=8 + seed % 5, rounds=5, seed=seed, eval_every=5, **around,
        task={"name": "digits", "hidden": [8], "train_samples": 240},
        links={"name": "links", "latency_s": 0.02, "latency_spread": 0.3, "seed": 1},
        device={"name": "device", "flops_per_s": 1e8, "spread": 0.3},
    )  # fmt: skip
    method, network, *_ = method_of(LocalSteps(steps=1, batch_size=4), scenario, seed)
    return replace(method, round_s=4.0 * method.round_s), network


@pytest.mark.parametrize("around", [GOSSIP, STAR], ids=["gossip", "star"])
def test_generated_faults_mean_the_same(around: dict[str, Any]) -> None:
    compared = 0
    for seed in range(24):
        method, network = world(seed, around)
        faults = generate(seed, network.peers, window_s=5 * method.round_s, rounds=5, kinds=KINDS)
        lives = Counter(p for f in faults if f.kind in KINDS[:3] for p in f.who)
        if max(lives.values(), default=0) > 1 or (around is STAR and 0 in lives):
            continue
        back = any(f.kind == "crash" and f.until is not None for f in faults)
        method = replace(method, checkpoint_every=int(back))
        network = replace(network, faults=faults)
        ours = run_lockstep([method], [network])[0]
        if ours.settings["margin"] <= MARGIN or ours.settings["behind"]:
            continue
        theirs = simulate(Rounds.of(method), network, seed=seed)
        known = {
            k: n for k, n in theirs.dropped.items() if k in ("lost", "dead", "partition") and n
        }
        for mine, other in (
            (ours.messages_sent, theirs.messages_sent),
            (ours.messages_delivered, theirs.messages_delivered),
            (ours.messages_in_flight, theirs.messages_in_flight),
            (ours.bytes_sent, theirs.bytes_sent),
            (ours.bytes_received, theirs.bytes_received),
            (ours.dropped, known),
        ):
            assert mine == other, f"seed {seed}: {faults}"
        compared += 1
    assert compared >= 8


def test_what_lockstep_cannot_do_is_refused_and_runs_on_event() -> None:
    method, network = world(0, STAR)
    for fault in (
        (Hold(who=(2,), at=0.1, until=Round(2)),),
        (Leave(who=(0,), at=Round(1)),),
        (Leave(who=(1,), at=Round(1)), Crash(who=(1,), at=9.0)),
        (Skew(who=(1,), at=0.0, offset_s=0.1),),
    ):
        struck = replace(network, faults=fault)
        with pytest.raises(AssertionError, match="ladder: "):
            check_strategy(method, struck)
        with pytest.raises(UsageError, match="use engine='event'"):
            run_lockstep([method], [struck])
    assert not beyond((Leave(who=(1,), at=Round(1)),), 0)


@pytest.mark.parametrize("kind", ["hold", "skew"])
def test_auto_takes_the_engine_that_knows_the_faults(kind: str) -> None:
    setting = {"skew": {"offset_s": 0.01}, "hold": {}}[kind]
    until = {"skew": None, "hold": Round(2)}[kind]
    fault = FaultSetting(kind, who=(1,), at=0.0, until=until, settings=setting)
    scenario = shoal.Scenario(peers=4, rounds=3, task={"name": "digits"}, faults=(fault,))
    assert launch(LocalSteps(steps=1), scenario, seed=0).engine == "event"
    assert launch(LocalSteps(steps=1), replace(scenario, faults=()), seed=0).engine == "lockstep"


def test_who_comes_back_after_the_end_is_counted() -> None:
    method, network = world(1, GOSSIP)
    end_s = run_lockstep([method], [network])[0].virtual_s
    late = Crash(who=(1,), at=end_s - 0.4 * method.round_s, until=end_s + method.round_s)
    method = replace(method, checkpoint_every=1)
    assert run_lockstep([method], [replace(network, faults=(late,))])[0].settings["behind"] == 1
