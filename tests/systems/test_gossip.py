"""Push gossip: each push counts once, ages add up, damage is passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shoal
from shoal.lab.launch import launch
from shoal.parts.optimise.sgd import SGD
from shoal.systems.baselines.gossip import INVARIANTS, Gossip, update
from shoal.tensor import keyed
from shoal.world.record import Row, Run

WORLD = shoal.Scenario(
    peers=6, rounds=10, topology="ring", eval_every=5,
    task={"name": "digits", "train_samples": 90, "hidden": [8]},
    links={"name": "links", "latency_s": 0.01}, device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def run(**changes: Any) -> Run:
    return launch(Gossip(steps=2), WORLD.with_settings(changes), seed=1)


def kept(found: Run) -> list[str | None]:
    return [rule(found) for rule in INVARIANTS]


def test_without_losses_every_push_is_merged_or_on_its_way() -> None:
    found = run()
    assert kept(found) == [None, None]
    merged = len(found.series("merged"))
    assert 0.8 * found.messages_sent <= merged <= found.messages_delivered


def test_damaged_pushes_are_passed_over() -> None:
    calm = run()
    faults = [{"kind": "corrupt", "who": [0, 1, 2], "at": 0.0, "probability": 1.0}]
    found = run(faults=faults)
    assert kept(found) == [None, None]
    sources = {dict(row.labels)["source"] for row in found.series("merged")}
    assert sources == {"3", "4", "5"}
    assert len(found.series("merged")) < len(calm.series("merged"))


def test_a_crash_and_a_lost_store_keep_the_books() -> None:
    for store in ("kept", "lost"):
        crash = {"kind": "crash", "who": [1, 4], "at": 0.5, "until": 1.0, "store": store}
        assert kept(run(faults=[crash])) == [None, None]


def test_the_older_model_counts_by_its_age() -> None:
    task = shoal.lab.build.build(WORLD).task
    start = task.init(keyed.key_of(1))
    other = start + 1.0
    merged, age = update(
        start, torch.tensor(2.0).double(), other, torch.tensor(6.0).double(), task.shard(0),
        keyed.key_of(2), task, SGD(0.0), 3, 4,
    )  # fmt: skip
    torch.testing.assert_close(merged, start + 0.75)
    assert float(age) == 9.0


def told(*rows: Row) -> list[bool]:
    return [rule(Run("event", 0, 3, rows=list(rows))) is not None for rule in INVARIANTS]


def row(peer: int, value: float, source: int, *, before: float = 0.0, age: float = 0.0,
        due_s: float = 0.0) -> Row:  # fmt: skip
    labels = {"before": repr(before), "told": repr(age), "source": str(source),
              "due_s": repr(due_s)}  # fmt: skip
    return Row("merged", value, 0.0, 0, peer, tuple(labels.items()))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((row(0, 5, 1), row(1, 10, 0, age=5)), [False, False]),
        ((row(0, 5, 1), row(2, 5, 1)), [True, False]),
        ((row(0, 5, 1, age=3),), [False, True]),
        ((row(0, 5, 1), row(0, 9, 1, before=5, due_s=1.0)), [False, True]),
        ((row(0, 5, 1), row(0, 5, 1, before=5, due_s=1.0)), [False, False]),
    ],
)
def test_the_invariants_can_fail(rows: tuple[Row, ...], expected: list[bool]) -> None:
    assert told(*rows) == expected
