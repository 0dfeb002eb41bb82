"""CGA: the projection against other solvers, gradients that answer models, engines that agree."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.rounds.workload import Workload
from shoal.systems.baselines._cga_peer import gradients, moved
from shoal.systems.baselines._cga_projection import projected
from shoal.systems.baselines.cga import CGA, INVARIANTS, Bound
from shoal.tensor import keyed
from shoal.testing.ladder import check_live, check_program
from shoal.world.device import Device
from shoal.world.faults import Corrupt, Crash, Fault
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

LINKS, DEVICE = Links(latency_s=0.02), Device(overhead_s=0.01)


def rows(seed: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    own = torch.randn(dim, generator=random).double()
    # A common part against the own gradient makes conflicts likely.
    cross = torch.randn(k, dim, generator=random).double() - 0.7 * own
    return own, cross


problems = st.tuples(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 8))


def solved_by_enumeration(own: Tensor, cross: Tensor) -> Tensor:
    """The nearest feasible point among the projections on all faces of the cone."""
    best, k = None, len(cross)
    for active in itertools.chain.from_iterable(
        itertools.combinations(range(k), r) for r in range(k + 1)
    ):
        face = cross[list(active)]
        point = own - torch.linalg.pinv(face) @ (face @ own) if active else own
        feasible = bool((cross @ point >= -1e-9 * cross.norm(dim=-1)).all())
        if feasible and (best is None or (point - own).norm() < (best - own).norm()):
            best = point
    assert best is not None
    return best


@given(problems)
@settings(max_examples=120, deadline=None)
def test_the_projection_is_the_nearest_feasible_point(problem: tuple[int, int, int]) -> None:
    own, cross = rows(*problem)
    found, cosine = projected(own, cross, torch.ones(len(cross), dtype=torch.bool))
    torch.testing.assert_close(found, solved_by_enumeration(own, cross), rtol=1e-8, atol=1e-8)
    assert float(cosine) >= -1e-9


@given(problems)
@settings(max_examples=25, deadline=None)
def test_another_solver_finds_the_same(problem: tuple[int, int, int]) -> None:
    """Sequential quadratic programming on the primal."""
    own, cross = (each.numpy() for each in rows(*problem))
    theirs = minimize(
        lambda z: 0.5 * float(((z - own) ** 2).sum()), np.zeros_like(own), jac=lambda z: z - own,
        method="SLSQP", constraints=[LinearConstraint(cross, lb=0.0)],
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    found, _ = projected(*map(torch.from_numpy, (own, cross)), torch.ones(len(cross)).bool())
    np.testing.assert_allclose(found.numpy(), theirs.x, atol=2e-5 * np.linalg.norm(own))


@given(problems)
@settings(max_examples=60, deadline=None)
def test_its_conditions_of_optimality_hold(problem: tuple[int, int, int]) -> None:
    """It is own plus a nonnegative combination of rows, of which only those that bind count."""
    own, cross = rows(*problem)
    found, _ = projected(own, cross, torch.ones(len(cross), dtype=torch.bool))
    scale = float(own.norm() * cross.norm(dim=-1).max())
    assert bool((cross @ found >= -1e-9 * scale).all())
    # Moreau: what was added is at right angles to what is left, and does not shorten own.
    assert abs(float((found - own) @ found)) <= 1e-9 * float(own @ own)
    assert float(own @ found) >= -1e-9 * float(own @ own)


def test_without_conflicts_nothing_changes_and_opposites_leave_nothing() -> None:
    own = torch.tensor([1.0, 2.0, 0.0]).double()
    everyone = torch.ones(2, dtype=torch.bool)
    alike = torch.stack((own, own + torch.tensor([0.0, 0.0, 1.0])))
    assert torch.equal(projected(own, alike, everyone)[0], own)
    against, cosine = projected(own, torch.stack((-own, -own)), everyone)
    assert float(against.norm()) == 0.0
    assert float(cosine) == 1.0


def test_rows_that_are_none_do_not_count() -> None:
    own = torch.tensor([1.0, 0.0]).double()
    cross = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [float("nan"), 1.0]]).double()
    unheard = torch.tensor([False, True, True])
    assert torch.equal(projected(own, cross, unheard)[0], own)
    assert torch.equal(projected(own, cross[:0], unheard[:0])[0], own)


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_leading_axes_are_peers(seed: int, k: int) -> None:
    random = torch.Generator().manual_seed(seed)
    own = torch.randn(2, 3, 6, generator=random)
    cross = torch.randn(2, 3, k, 6, generator=random)
    mask = torch.rand(2, 3, k, generator=random) < 0.7
    whole, cosines = projected(own, cross, mask)
    for a, b in itertools.product(range(2), range(3)):
        one, cosine = projected(own[a, b], cross[a, b], mask[a, b])
        assert torch.equal(whole[a, b], one)
        assert float(cosines[a, b]) == float(cosine)


# A round.


def test_gradients_of_others_models_are_on_ones_own_batch() -> None:
    task = find("tasks", "digits")(peers=3, hidden=(8,), train_samples=90)
    models = task.init(keyed.grid(keyed.key_of(1), 4))
    key = keyed.key_of(5)
    made = gradients(models, task.shard(2), key, task, 6)
    batch = task.batch(task.shard(2), key, 6)
    for model, gradient in zip(models, made, strict=True):
        torch.testing.assert_close(gradient, task.grad(model, batch), rtol=1e-4, atol=1e-6)


def test_a_step_is_mean_plus_momentum_and_passes_over_what_is_not_finite() -> None:
    one = torch.ones(2).double()
    models, weights = torch.stack((one, 3 * one)), torch.tensor([0.25, 0.75]).double()
    cross, given_ = one.unsqueeze(0), torch.tensor([True])
    params, speed, _ = moved(2 * one, one, cross, given_, models, weights, 0.1, 0.5)
    torch.testing.assert_close(speed, 0.9 * one)
    torch.testing.assert_close(params, 3.4 * one)
    bad = torch.tensor([float("inf"), 1.0]).double()
    params, speed, _ = moved(2 * one, bad, cross, given_, models, weights, 0.1, 0.5)
    assert torch.equal(params, one)
    assert torch.equal(speed, 2 * one)


# The program.


def bound(topology: Any, rounds: int = 6, task: Any = None, **settings_: Any) -> Bound:
    task = task or find("tasks", "quadratics")(peers=topology.peers)
    codec = find("transform", "identity")().bind(task.spec)
    load = Workload(
        task, find("aggregate", "mean")(), codec, rounds, None, 3, 1, independent=True,
        topology=topology,
    )  # fmt: skip
    return CGA(**settings_).bind(load)


def ring(peers: int = 6) -> Any:
    return find("topology", "ring")(peers)


def run_of(program: Bound, *faults: Fault, seed: int = 1) -> Run:
    graph = program.topology
    network = Network(graph.peers, graph, LINKS, DEVICE, faults=faults)
    return simulate(program, network, seed=seed, settings=EventSettings(horizon_s=500.0))


def kept(run: Run) -> list[str | None]:
    return [rule(run) for rule in INVARIANTS]


def test_everybody_answers_and_follows_everybody() -> None:
    run = run_of(bound(ring()))
    assert run.finished
    assert [row.value for row in run.series("followed")] == [2.0] * 36
    assert [row.value for row in run.series("answered")] == [2.0] * 36
    assert kept(run) == [None, None]
    # Two messages each way, to either neighbour, in each round.
    assert run.messages_sent == 6 * 6 * 4


def test_without_learning_it_is_gossip_and_keeps_the_mean() -> None:
    program = bound(ring(), rounds=60, lr=0.0)
    run = run_of(program)
    start = torch.stack([program.workload.start(peer) for peer in range(6)])
    end = torch.stack([run.final[peer] for peer in range(6)])
    torch.testing.assert_close(end, start.mean(0).expand(6, -1), rtol=0, atol=1e-6)


def test_it_learns() -> None:
    """Equal functions: no conflicts, so that it goes to the minimum like anything else."""
    task = find("tasks", "quadratics")(peers=4, condition=2.0)
    program = bound(find("topology", "full")(4), 150, task, lr=0.02, momentum=0.5)
    run = run_of(program)
    start = torch.stack([program.workload.start(peer) for peer in range(4)])
    end = torch.stack([run.final[peer] for peer in range(4)])
    before, after = (float(task.evaluate(x)["distance"].mean()) for x in (start, end))
    assert after < 0.3 * before


def test_a_dead_neighbour_has_no_part_and_a_crashed_one_comes_back() -> None:
    program = bound(ring(), rounds=8, round_s=1.0)
    run = run_of(program, Crash(who=(2,), at=0.2, until=4.0))
    assert run.finished
    assert kept(run) == [None, None]
    rounds = sorted(row.round for row in run.series("followed", 2))
    assert len(rounds) < 8
    assert rounds[-1] == 7
    assert min(row.value for row in run.series("followed", 1)) == 1.0


def test_damaged_messages_count_as_lost() -> None:
    program = bound(ring(), rounds=8, round_s=1.0)
    run = run_of(program, Corrupt(who=(0, 1, 2), at=0.0, probability=1.0))
    assert run.finished
    assert kept(run) == [None, None]
    # 3, 4 and 5 follow each other alone.
    assert {row.value for row in run.series("followed", 4)} == {2.0}
    assert {row.value for row in run.series("followed", 1)} == {0.0}


def test_generated_faults_break_nothing() -> None:
    program = bound(ring(), rounds=5, round_s=1.0)
    found = explore(
        lambda: program, Network(6, program.topology, LINKS, DEVICE), seeds=25, horizon_s=300.0,
        invariants=INVARIANTS,
    )  # fmt: skip
    assert found.failures == ()
    assert found.ended == {}


def test_the_ladder_of_programs() -> None:
    task = find("tasks", "digits")(peers=4, hidden=(8,), train_samples=120)
    program = bound(ring(4), 3, task)
    check_program(program, Network(4, ring(4), LINKS, DEVICE), seed=3)


@pytest.mark.live
def test_on_sockets_it_computes_the_same() -> None:
    program = bound(ring(4), 3)
    check_live(program, program, 3, Network(4, ring(4), Links(latency_s=0.001)))
    run = run_live(program, Network(4, ring(4)), seed=3, settings=LiveSettings(horizon_s=60.0))
    assert run.finished
    assert kept(run) == [None, None]


# Errors.


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"batch_size": 0}, {"round_s": -1.0}],
)
def test_wrong_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        CGA(**bad)


def test_one_way_links_are_refused() -> None:
    with pytest.raises(UsageError, match="not the other way round"):
        bound(find("topology", "exponential")(8, directed=True))


def test_the_invariants_can_fail() -> None:
    def row(name: str, peer: int, others: str, round: int = 0) -> Row:
        return Row(name, 1.0, 0.0, round, peer, (("others", others),))

    def told(*rows_: Row) -> bool:
        return INVARIANTS[0](Run("event", 0, 2, rows=list(rows_))) is not None

    answer, follow = row("answered", 1, "0"), row("followed", 0, "1")
    assert not told(answer, follow)
    assert told(follow)
    assert told(answer, follow, follow)
    assert told(answer, row("followed", 0, "1", 1))
    assert told(answer, row("followed", 0, "1 1"))
    uphill = Row("cosine", -0.1, 0.0, 0, 0)
    assert INVARIANTS[1](Run("event", 0, 2, rows=[uphill])) is not None
