"""Strategies without rounds: nobody waits, a message is used once, the lost cost nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.build import build
from shoal.lab.launch import launch, network_of
from shoal.parts import find
from shoal.parts.strategy.dec_avg import DecAvg
from shoal.rounds.unpaced import Unpaced

WORLD = shoal.Scenario(
    peers=6, rounds=8, topology="ring",
    task={"name": "digits", "train_samples": 60, "hidden": [8]},
    links={"name": "links", "latency_s": 0.01}, device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def run(world: shoal.Scenario = WORLD, **settings: Any) -> shoal.Run:
    return launch(Unpaced(DecAvg(steps=2), **settings), world, seed=1)


def turns(found: shoal.Run) -> Counter[int]:
    """How often each peer recorded its parameters, the last record at the end left out."""
    return Counter(row.peer for row in found.series("accuracy"))


def test_messages_and_turns_are_exact() -> None:
    found = run()
    # Two neighbours are told in each of eight turns.
    assert found.messages_sent == 6 * 8 * 2
    assert found.finished
    assert set(turns(found)) == set(range(6))


def test_it_learns_from_others() -> None:
    world = WORLD.with_settings({"rounds": 40, "eval_every": 40})
    together = launch(Unpaced(DecAvg(steps=4)), world, seed=1)
    alone = shoal.run(shoal.Arm("local-only", set={"steps": 4, "batch_size": 8}), world, seed=1)

    def mean(found: shoal.Run) -> float:
        last = {row.peer: row.value for row in found.series("accuracy")}
        return sum(last.values()) / len(last)

    assert mean(together) > mean(alone) + 0.05


def test_who_hears_nobody_learns_alone_bit_for_bit() -> None:
    """With every message lost, a peer's run is that of a peer without neighbours."""
    deaf = run(WORLD.with_settings({"links.loss": 1.0}))
    plain = launch(
        DecAvg(steps=2), WORLD.with_settings({"exchange": {"name": "isolated"}}), seed=1,
        engine="event",
    )  # fmt: skip
    for peer in range(6):
        torch.testing.assert_close(deaf.final[peer], plain.final[peer])


def test_a_slow_peer_holds_nobody_up() -> None:
    slow = {"kind": "slow", "who": [2], "at": 0.0, "factor": 500.0}
    calm, held = run(), run(WORLD.with_settings({"faults": [slow]}))
    sent = [a - b for a, b in zip(calm.bytes_sent, held.bytes_sent, strict=True)]
    assert sent[2] > 0
    assert [s for p, s in enumerate(sent) if p != 2] == [0] * 5
    # It ends with the turn that it is in.
    assert held.virtual_s < 2.0 * calm.virtual_s


def test_a_restarted_peer_goes_on_with_what_it_stored() -> None:
    period = 0.5
    crash = {"kind": "crash", "who": [1], "at": 2.1, "until": 2.6}
    found = run(WORLD.with_settings({"faults": [crash]}), period_s=period)
    lost = run(WORLD.with_settings({"faults": [crash | {"store": "lost"}]}), period_s=period)
    assert not torch.equal(found.final[1], lost.final[1])
    assert found.messages_sent >= 6 * 8 * 2 - 4


def test_news_count_once() -> None:
    """The only news of a neighbour that died changes one turn, not all that follow."""
    pair = WORLD.with_settings({"peers": 2, "topology": "full", "task.train_samples": 20})
    pair = pair.with_settings({"faults": [{"kind": "crash", "who": [1], "at": 0.9}]})
    strategy = Counting(steps=1)
    launch(Unpaced(strategy, period_s=0.5), replace(pair, rounds=6), seed=1)
    heard = Counting.heard[-6:]
    assert sum(heard) - 6 <= 2
    assert heard[-3:] == [1, 1, 1]


class Counting(DecAvg):
    """Notes how many rows each apply of peer 0 had (the only one that lives on)."""

    heard: list[int]

    def apply(self, state: Any, heard: shoal.Heard, step: Any) -> Any:
        Counting.heard += heard.count.flatten().tolist()
        return super().apply(state, heard, step)


Counting.heard = []


def test_horizon_in_seconds_and_misuse() -> None:
    world = replace(WORLD, rounds=None, seconds=2.0)
    found = run(world, period_s=0.5)
    assert found.virtual_s == pytest.approx(2.0, abs=0.6)
    with pytest.raises(UsageError, match="set one of them"):
        run(world)
    with pytest.raises(UsageError, match="period_s=-1"):
        run(period_s=-1.0)


def test_any_strategy_runs_without_rounds() -> None:
    plain = find("strategy", "local_steps")(steps=2, batch_size=4)
    found = launch(Unpaced(plain), WORLD, seed=1)
    assert found.finished
    pieces = build(replace(WORLD, seed=1))
    assert network_of(WORLD, pieces).peers == len(found.final)


def test_news_count_once_and_damaged_ones_not_at_all() -> None:
    faults = [{"kind": "corrupt", "who": [0, 1], "at": 0.0, "probability": 1.0}]
    for changes in ({}, {"faults": faults}):
        found = run(WORLD.with_settings(changes))
        used = Counter(
            (row.peer, news) for row in found.series("used")
            for news in dict(row.labels)["news"].split()
        )  # fmt: skip
        assert used
        assert max(used.values()) == 1
        sources = {news.split(".")[0] for _, news in used}
        assert ("0" in sources) == (not changes)
