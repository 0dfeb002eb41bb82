"""Sybils: their graph, what they send, and whether targeted attacks succeed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.lab.launch import launch
from shoal.lab.scenario import Scenario
from shoal.parts.attack.backdoor import Backdoor
from shoal.parts.attack.class_flip import ClassFlip
from shoal.parts.attack.label_flip import LabelFlip
from shoal.parts.attack.sybils import Sybils
from shoal.parts.measure.attack_success import AttackSuccess
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.tasks.digits import Digits
from shoal.parts.topology.from_edges import FromEdges
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.sybil_graph import SybilGraph, attack_edges, attacked
from shoal.rounds.attack import Aim, View
from shoal.tensor import keyed

KEY = keyed.key_of(3, "sybils")


# The graph.


@settings(deadline=None)
@given(
    honest=st.integers(2, 30), sybils=st.integers(1, 12), edges=st.integers(1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_attack_edges_are_dealt_out_evenly(honest: int, sybils: int, edges: int, seed: int) -> None:
    edges = min(edges, honest)
    dealt = attack_edges(honest, sybils, edges, seed)
    assert len({tuple(pair) for pair in dealt.tolist()}) == sybils * edges
    load = np.bincount(dealt[:, 0], minlength=honest)
    assert load.max() - load.min() <= 1
    assert (np.bincount(dealt[:, 1] - honest) == edges).all()
    assert dealt[:, 1].min() >= honest


def test_the_honest_graph_is_the_same_however_many_sybils_there_are() -> None:
    calm = SybilGraph(12, sybils=0, degree=3, seed=5)
    dense = SybilGraph(16, sybils=4, edges_per_sybil=6, kind="dense", degree=3, seed=5)
    for peer in range(12):
        assert tuple(p for p in dense.neighbors(peer) if p < 12) == calm.neighbors(peer)
    for sybil in range(12, 16):
        assert all(p < 12 for p in dense.neighbors(sybil))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SybilGraph(12, sybils=2, edges_per_sybil=2, kind="dense"), "which is sparse"),
        (lambda: SybilGraph(12, sybils=2, edges_per_sybil=11, kind="dense"), "1 to 10"),
        (lambda: SybilGraph(12, sybils=-1), "at least 2 honest"),
        (lambda: SybilGraph(12, sybils=2, kind="many"), "need one of dense"),
        (lambda: SybilGraph(8, sybils=4), "degree=5 with peers=4"),
        (lambda: attacked(_Apart(4, ((0, 1), (2, 3))), 1, 1, "sparse"), "2 components"),
    ],
)
def test_graphs_that_cannot_be_say_why(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


class _Apart(FromEdges):
    def __post_init__(self) -> None:
        """Edges need not connect everybody."""


# What they send.


def test_all_send_the_mean_of_what_finite_ones_made() -> None:
    own = torch.tensor([[1.0, 2.0], [3.0, 6.0], [float("nan"), 0.0]])
    sent = Sybils()(View(honest=own[:1], own=own, round=0), KEY)
    assert sent.tolist() == [[2.0, 4.0]] * 3
    flipped = Sybils("sign_flip")(View(honest=own[:1], own=own[:2], round=0), KEY)
    assert flipped.tolist() == [[-2.0, -4.0]] * 2


def test_the_adversary_s_samples_are_drawn_from_all_and_poisoned() -> None:
    task = Digits(peers=3, hidden=(), holders=(0, 1))
    keys = keyed.grid(KEY, 2)
    shard = task.shard(torch.tensor([2, 2]))
    assert shard.size.tolist() == [0, 0]
    made = Sybils(samples=300).poison(task, shard, keys)
    assert made.size.tolist() == [300, 300]
    assert not torch.equal(made.index[0], made.index[1])
    truth = task.y[made.index]
    assert int((truth == 7).sum()) > 20
    assert torch.equal(made.labels, torch.where(truth == 7, 1, truth))
    first = task.shard(torch.tensor([0]))
    kept = Sybils(samples=0, goal="label_flip").poison(task, first, keys[:1])
    assert torch.equal(kept.index, first.index)
    assert torch.equal(kept.labels, LabelFlip().poison(task, first, keys[:1]).labels)


def test_a_backdoor_marks_its_share_of_images_and_nothing_else() -> None:
    task = Digits(peers=2, hidden=())
    shard = task.shard(torch.tensor([0, 1]))
    made = Backdoor(target=4, size=2, share=0.3).poison(task, shard, keyed.grid(KEY, 2))
    plain = task.x[shard.index]
    corner = made.inputs[..., -2:, -2:]
    marked = (corner == 1).flatten(2).all(-1)
    assert 0.2 < float(marked.float().mean()) < 0.4
    rest = made.inputs.clone()
    rest[..., -2:, -2:] = plain[..., -2:, -2:]
    assert torch.equal(rest, plain)
    assert torch.equal(made.inputs[~marked], plain[~marked])
    assert torch.equal(made.labels, torch.where(marked, 4, task.y[shard.index]))
    # What the task hands out is what was poisoned.
    batch = task.batch(replace(made, index=torch.zeros_like(made.index)), keyed.grid(KEY, 2), 400)
    seen = (batch.x[..., -2:, -2:] == 1).flatten(2).all(-1)
    assert bool((batch.y[seen] == 4).all())
    assert 0.1 < float(seen.float().mean()) < 0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClassFlip(1, 1), "need two classes"),
        (lambda: ClassFlip(source=-1), "source=-1"),
        (lambda: Backdoor(size=0), "at least 1 pixel"),
        (lambda: Backdoor(share=1.5), "share=1.5"),
        (lambda: Backdoor(size=9).trigger(torch.zeros(8, 8)), "larger"),
        (lambda: ClassFlip(12, 1).poison(_digits(), _digits().shard(0), KEY), "class 12"),
        (lambda: Sybils(gossip="loud"), "gossip='loud'"),
        (lambda: Sybils("dissensus"), "one vector for everybody"),
        (lambda: Sybils("sybils"), "one vector for everybody"),
        (lambda: Sybils("class_flip", {"sauce": 1}), "mend the settings"),
        (lambda: Sybils("sign_flip").aim(), "no target class"),
        (lambda: AttackSuccess()(_digits(), torch.zeros(650)), "no aim"),
        (lambda: AttackSuccess().bind(LabelFlip()), "no target class"),
    ],
)
def test_misuse_says_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def _digits() -> Digits:
    return Digits(peers=2, hidden=())


# Whether they succeed.


def test_success_counts_the_attacked_samples_taken_for_the_target() -> None:
    task = _digits()
    # Two models that always say 1, and always 3.
    params = torch.zeros(2, task.spec.dim)
    bias = task.spec.offsets[-1]
    params[0, bias + 1] = params[1, bias + 3] = 1.0
    found = AttackSuccess(Aim(target=1, source=7))(task, params)
    assert found["attack_success"].tolist() == [1.0, 0.0]
    others = task.test_y[task.test_y != 7]
    expected = [float((others == c).double().mean()) for c in (1, 3)]
    assert found["untouched_accuracy"].tolist() == pytest.approx(expected)
    params[0] = float("nan")
    assert AttackSuccess(Aim(1, 7))(task, params)["attack_success"].tolist() == [0.0, 0.0]


def test_a_trigger_counts_on_samples_of_other_classes_alone() -> None:
    task = _digits()
    attack = Backdoor(target=2, size=1)
    params = torch.zeros(task.spec.dim)
    weight = params[: 10 * 64].view(10, 64)
    weight[2, 63] = 1.0
    params[task.spec.offsets[-1] + 5] = 0.5
    found = AttackSuccess().bind(attack)(task, params)
    assert float(found["attack_success"]) == 1.0
    fives = task.test_x.flatten(1)[:, 63] < 0.5
    right = torch.where(fives, task.test_y == 5, task.test_y == 2)
    assert float(found["untouched_accuracy"]) == pytest.approx(float(right.double().mean()))


def test_peers_are_measured_one_by_one_with_the_attack_in_force() -> None:
    world = Scenario(
        "one poisoner", peers=5, rounds=4, byzantine=(4,), measures=("attack_success",),
        attack={"name": "sybils", "goal": "class_flip", "settings": {"source": 3, "target": 9}},
        task={"name": "digits", "hidden": [], "holders": [0, 1, 2, 3]},
        topology={"name": "from_edges", "edges": attacked(Ring(4), 1, 2, "sparse")},
    )  # fmt: skip
    run = launch(LocalSteps(lr=0.5, epochs=2, batch_size=10), world, seed=1)
    last = {row.peer: row.value for row in run.series("attack_success") if row.round == 3}
    assert sorted(last) == [0, 1, 2, 3]
    close = {p for p in range(4) if 4 in run_neighbors(world, p)}
    assert min(last[p] for p in close) > max(last[p] for p in set(last) - close)
    assert all(0 <= row.value <= 1 for row in run.series("untouched_accuracy"))


def run_neighbors(world: Scenario, peer: int) -> tuple[int, ...]:
    from shoal.lab.build import topology_of

    return topology_of(world).neighbors(peer)
