"""DADAO: the flow, its invariants, the peers against the compiled loop, faults, references."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.explore import explore
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts import find
from shoal.parts.tasks.quadratics import Quadratics
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.from_edges import FromEdges
from shoal.parts.topology.full import Full
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.star import Star
from shoal.rounds.workload import Workload
from shoal.systems.training import _dadao_references as references
from shoal.systems.training import dadao_counted as counted
from shoal.systems.training._dadao_flow import Y_FAST, Z_FAST, Constants, X, Y, Z, flow
from shoal.systems.training._dadao_loop import Agenda, Played, Problem, agenda, play, synchronised
from shoal.systems.training.dadao import DADAO, INVARIANTS, SYSTEM, Bound
from shoal.systems.training.dadao_counted import dadao_counted, world_of
from shoal.testing.ladder import check_live, check_program
from shoal.world.device import Device
from shoal.world.faults import Corrupt, Crash, Hold, Join, Leave, Loss, Partition, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

CONDITIONS = st.floats(1.0, 2000.0)


def constants(condition: float, chi_1: float = 1.0) -> Constants:
    return Constants(1.0 / condition, 1.0, chi_1)


# The flow.


@given(CONDITIONS, st.floats(0.0, 300.0))
@settings(max_examples=40, deadline=None)
def test_the_flow_is_the_matrix_exponential(condition: float, elapsed: float) -> None:
    generator = constants(condition).generator()
    expected = expm(generator * elapsed)
    found = flow(generator, elapsed)
    np.testing.assert_allclose(found, expected, atol=1e-10 * max(1.0, np.abs(expected).max()))


@given(CONDITIONS, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
@settings(max_examples=60, deadline=None)
def test_an_interval_may_be_split(condition: float, first: float, second: float) -> None:
    generator = constants(condition).generator()
    whole = flow(generator, first + second)
    parts = flow(generator, second) @ flow(generator, first)
    np.testing.assert_allclose(parts, whole, atol=1e-10 * max(1.0, np.abs(whole).max()))
    assert np.array_equal(flow(generator, 0.0), np.eye(6))


def test_the_flow_solves_the_equations_of_the_paper() -> None:
    mu, smoothness = 0.2, 5.0
    made = Constants(mu, smoothness, 2.0)
    nu = mu / 2
    s = math.sqrt(nu / smoothness)
    alpha, eta, theta = s / 4, s / 8, 1 / (2 * s)
    x, x_fast, y, y_fast, z, z_fast = state = np.arange(1.0, 7.0) ** 1.5
    slopes = made.generator() @ state
    expected = [
        eta * (x_fast - x), eta * (x - x_fast), alpha * (y_fast - y),
        -theta * (y + z + nu * x_fast), alpha * (z_fast - z), eta * (z - z_fast),
    ]  # fmt: skip
    np.testing.assert_allclose(slopes, expected, rtol=1e-13)
    gradient = [
        -1 / (4 * smoothness), -1 / (4 * math.sqrt(smoothness * nu)), 0, s / 4 + 1, 0, 0,
    ]  # fmt: skip
    np.testing.assert_allclose(made.gradient_jump(), gradient)
    np.testing.assert_allclose(made.gossip_jump(), [0, 0, 0, 0, -0.5, -2 * 2.0 / s])


# Events.


def problem_of(task: Quadratics) -> Problem:
    return Problem(task.matrices.numpy(), task.centres.numpy(), task.minimum.numpy())


def workload(
    task: Any, rounds: int, topology: Any = None, seed: int = 3, report_every: int = 5, **parts: Any
) -> Workload:  # fmt: skip
    transform = (parts.get("transform") or find("transform", "identity")()).bind(task.spec)
    return Workload(
        task, find("aggregate", "mean")(), transform, rounds, parts.get("seconds"), seed,
        report_every, topology=topology,
    )  # fmt: skip


def played(bound: Bound, task: Quadratics, until: float | None = None) -> tuple[Played, np.ndarray]:
    """The loop's outcome for a bound program, and its states at the end."""
    at = bound.until if until is None else until
    events = agenda(bound.workload.seed, bound.rates, at, bound.settings.gradient_rates)
    start = np.stack([bound.workload.start(p).numpy() for p in range(task.peers)])
    done = play(events, bound.constants, problem_of(task), start)
    return done, synchronised(done, bound.constants, at)


@given(
    st.integers(2, 7), st.floats(2.0, 200.0), st.floats(0.5, 30.0), st.integers(0, 999),
    st.sampled_from(["shared", "own"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_dual_sums_stay_zero_at_a_common_date(
    peers: int, condition: float, until: float, seed: int, axes: Any
) -> None:
    task = Quadratics(peers=peers, condition=condition, seed=seed, axes=axes)
    bound = DADAO().bind(workload(task, 10, Star(peers), seed=seed))
    _, states = played(bound, task, until)
    size = np.abs(states).sum()
    assert np.abs(states[:, [Z, Z_FAST]].sum(0)).max() <= 1e-9 * max(size, 1.0)


@given(st.integers(1, 6), st.floats(1.5, 300.0), st.integers(0, 99), st.floats(0.01, 50.0))
@settings(max_examples=25, deadline=None)
def test_the_minimum_is_a_fixed_point(
    peers: int, condition: float, seed: int, elapsed: float
) -> None:
    task = Quadratics(peers=peers, condition=condition, seed=seed, axes="own")
    made = Constants(*task.curvature, 1.7)
    minimum = task.minimum.numpy()
    slopes = np.einsum("pij,pj->pi", task.matrices.numpy(), minimum - task.centres.numpy())
    dual = slopes - made.nu * minimum
    state = np.zeros((peers, 6, task.dim))
    state[:, [X]] = state[:, [X + 1]] = minimum
    state[:, Y] = state[:, Y_FAST] = dual
    state[:, Z] = state[:, Z_FAST] = -(dual + made.nu * minimum)
    scale = np.abs(state).max()
    flowed = flow(made.generator(), elapsed) @ state
    np.testing.assert_allclose(flowed, state, atol=1e-9 * scale)
    change = slopes - made.nu * state[:, X] - state[:, Y_FAST]
    assert np.abs(change).max() <= 1e-12 * scale
    told = state[:, Y] + state[:, Z]
    assert np.abs(told - told[0]).max() <= 1e-12 * scale
    # The z of all peers sum to 0 there, too.
    assert np.abs(state[:, Z].sum(0)).max() <= 1e-9 * scale


@pytest.mark.parametrize("condition", [10.0, 100.0])
def test_alone_it_is_an_accelerated_gradient_method(condition: float) -> None:
    task = Quadratics(peers=1, condition=condition)
    bound = DADAO().bind(workload(task, 20))
    assert bound.rates.total == 0.0
    events = agenda(0, bound.rates, 4000.0)
    start = task.init(torch.tensor(1)).numpy()[None]
    first = float(((start - task.minimum.numpy()) ** 2).sum())
    done = play(events, bound.constants, problem_of(task), start, target=1e-8 * first)
    assert done.reached
    assert done.exchanges == 0
    # Plain gradient descent takes about condition / 2 * log(1e8) steps.
    assert done.gradients <= 9.0 * math.sqrt(condition) * math.log(1e8)


@pytest.mark.parametrize("topology", [Full(8), Ring(8), Star(8)])
@pytest.mark.parametrize("axes", ["shared", "own"])
def test_the_rate_is_the_flows_at_least(topology: Any, axes: Any) -> None:
    task = Quadratics(peers=8, condition=30.0, axes=axes)
    bound = DADAO().bind(workload(task, 300, topology))
    done, _ = played(bound, task)
    times, logs = np.arange(30, len(done.distances)), np.log(done.distances[30:])
    rate = -np.polyfit(times, logs, 1)[0]
    assert bound.constants.rate == pytest.approx(math.sqrt(1 / 60) / 8)
    assert 1.0 <= rate / bound.constants.rate <= 4.0


def test_dates_of_a_peer_are_those_of_all_that_concern_it() -> None:
    rates = DADAO().bind(workload(Quadratics(peers=5), 1, Ring(5))).rates
    whole = agenda(1, rates, 40.0)
    assert (np.diff(whole.dates) >= 0).all()
    assert whole.exchanges == pytest.approx(40.0 * rates.total, abs=4 * math.sqrt(40 * rates.total))
    for peer in range(5):
        mine = (whole.first == peer) | (whole.second == peer)
        own = agenda(1, rates, 40.0, peer=peer)
        assert np.array_equal(own.dates, whole.dates[mine])
        assert np.array_equal(own.first, whole.first[mine])
        assert np.array_equal(own.second, whole.second[mine])
    slow = agenda(1, rates, 400.0, (0.1, 1.0, 1.0, 1.0, 1.0))
    counts = [int(((slow.first == p) & (slow.second < 0)).sum()) for p in (0, 1)]
    assert counts[0] == pytest.approx(40, abs=25)
    assert counts[1] == pytest.approx(400, abs=80)


# Peers.

LINKS = Links(latency_s=0.02, latency_spread=0.5)
DEVICE = Device(overhead_s=0.05, spread=0.5)


def network(topology: Any, faults: tuple[Any, ...] = (), links: Links = LINKS) -> Network:
    return Network(topology.peers, topology, links, DEVICE, faults)


def finals(run: Run) -> np.ndarray:
    return torch.stack([run.final[p] for p in sorted(run.final)]).numpy()


def kept(run: Run) -> list[str | None]:
    return [invariant(run) for invariant in INVARIANTS]


FINE = [None] * len(INVARIANTS)


@pytest.mark.parametrize(
    ("topology", "program"),
    [
        (Ring(6), DADAO()),
        (Full(5), DADAO(gradient_rates=(0.2, 1.0, 1.0, 1.0, 2.0))),
        (FromEdges(6, ((0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5))),
         DADAO(rates="optimal")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("unit_s", [0.0, 0.01])
def test_peers_compute_what_the_loop_computes(topology: Any, program: DADAO, unit_s: float) -> None:
    """With time to spare, and so little of it that all run behind."""
    task = Quadratics(peers=topology.peers, axes="own", condition=10.0)
    program = DADAO(**{**vars(program), "unit_s": unit_s, "patience_s": 60.0, "retry_s": 30.0})
    bound = program.bind(workload(task, 25, topology))
    run = simulate(bound, network(topology), seed=3, settings=EventSettings(strict=True))
    done, states = played(bound, task)
    np.testing.assert_allclose(finals(run), states[:, X], rtol=0, atol=1e-11)
    assert kept(run) == FINE
    # One vector each way, and a word to each neighbour at the end.
    assert run.messages_sent == 2 * done.exchanges + 2 * len(bound.rates.edges)
    assert len(run.series("exchanged")) == 2 * done.exchanges
    assert run.dropped == {}
    if not unit_s:
        assert run.virtual_s == pytest.approx(25 * bound.unit_s, rel=0.2)


def test_the_whole_way_to_the_minimum() -> None:
    task = Quadratics(peers=4, condition=10.0)
    bound = DADAO(audit=False).bind(workload(task, 260, Ring(4), report_every=20))
    run = simulate(bound, network(Ring(4)), seed=3)
    assert ((finals(run) - task.minimum.numpy()) ** 2).sum(1).max() < 1e-5
    _, states = played(bound, task)
    np.testing.assert_allclose(finals(run), states[:, X], rtol=0, atol=1e-10)


def test_the_ladder_of_programs() -> None:
    task = Quadratics(peers=5, condition=10.0, axes="own")
    check_program(DADAO().bind(workload(task, 12, Ring(5))), network(Ring(5)), seed=3)


@pytest.mark.live
def test_sockets_give_the_same_bits() -> None:
    task = Quadratics(peers=4, condition=10.0, axes="own")
    bound = DADAO(unit_s=0.05).bind(workload(task, 20, Ring(4)))
    check_live(bound, bound, 3, Network(4, Ring(4)))
    run = run_live(bound, Network(4, Ring(4)), seed=3, settings=LiveSettings(horizon_s=60.0))
    assert run.finished
    assert kept(run) == FINE


def test_a_lossy_codec_keeps_the_sums() -> None:
    """Both ends take the difference of what was decoded, so what one gains the other loses."""
    task = Quadratics(peers=5, condition=10.0, axes="own")
    codec = find("transform", "qsgd")(levels=16)
    bound = DADAO().bind(workload(task, 15, Ring(5), transform=codec))
    run = simulate(bound, network(Ring(5)), seed=3, settings=EventSettings(strict=True))
    assert kept(run) == FINE
    exact = DADAO().bind(workload(task, 15, Ring(5)))
    _, states = played(exact, task)
    assert 1e-6 < np.abs(finals(run) - states[:, X]).max() < 3.0


def test_drawn_batches_report_their_mean() -> None:
    """Noise of the gradients leaves x moving; its mean over time lies nearer to the minimum."""
    task = Quadratics(peers=4, condition=4.0, noise=2.0)
    full = workload(task, 150, Ring(4), report_every=50)
    run = simulate(DADAO(batch_size=1, audit=False).bind(full), network(Ring(4)), seed=3)
    assert ((finals(run) - task.minimum.numpy()) ** 2).sum(1).mean() < 0.5
    assert kept(run) == FINE


def test_single_precision_tasks_keep_double_states() -> None:
    task = find("tasks", "digits")(peers=4, hidden=(), train_samples=80)
    bound = DADAO(mu=0.05, smoothness=3.0).bind(workload(task, 10, Ring(4)))
    run = simulate(bound, network(Ring(4)), seed=3)
    assert finals(run).dtype == np.float32
    assert kept(run) == FINE
    before = task.evaluate(bound.workload.initial)["loss"]
    assert float(task.evaluate(torch.from_numpy(finals(run)).mean(0))["loss"]) < float(before)


# Faults.


def under(*faults: Any, rounds: int = 40, peers: int = 6, **program: Any) -> tuple[Run, np.ndarray]:
    """A run of a ring with faults, and where the loop without any ends."""
    task = Quadratics(peers=peers, condition=10.0, axes="own")
    bound = DADAO(**program).bind(workload(task, rounds, Ring(peers)))
    _, states = played(bound, task)
    return simulate(bound, network(Ring(peers), faults), seed=3), states[:, X]


@pytest.mark.parametrize(
    "faults",
    [
        (Loss(probability=0.3),),
        (Corrupt(probability=0.3),),
        (Slow(who=(1,), factor=10.0, at=1.0, until=4.0),),
        (Hold(who=(2,), at=1.0, until=3.0),),
        (Crash(who=(1, 4), at=2.0, until=5.0),),
        (Crash(who=(1,), at=2.0, until=3.5), Loss(probability=0.2)),
        (Partition(who=(0, 1), at=2.0, until=5.0),),
    ],
)  # fmt: skip
def test_what_is_lost_is_asked_for_and_changes_nothing(faults: tuple[Any, ...]) -> None:
    """Losses, damage, delays and restarts within patience: the same numbers, later."""
    run, expected = under(*faults)
    np.testing.assert_allclose(finals(run), expected, rtol=0, atol=1e-11)
    assert kept(run) == FINE
    assert len({(r.peer, r.labels, r.value) for r in run.series("exchanged")}) == len(
        run.series("exchanged")
    )


def test_halves_that_come_after_patience_still_balance() -> None:
    """Both ends pass an exchange over while messages are held back, and apply it when they come."""
    run, expected = under(Hold(who=(2,), at=1.0, until=4.0), patience_s=0.5, retry_s=0.2)
    assert kept(run) == FINE
    sums = [sum(row.value for row in run.series(name)) for name in ("dual_sum", "fast_dual_sum")]
    size = sum(row.value for row in run.series("dual_size"))
    assert max(map(abs, sums)) <= 1e-9 * size
    ends = {
        (row.peer, int(dict(row.labels)["other"]), row.value) for row in run.series("exchanged")
    }
    assert ends == {(other, peer, number) for peer, other, number in ends}
    # Late jumps are others than timely ones: the numbers differ, and the optimum is the same.
    apart = np.abs(finals(run) - expected).max()
    assert 1e-9 < apart < 2.0


def test_a_peer_that_dies_or_leaves_is_passed_over() -> None:
    for fault in (Crash(who=(3,), at=2.0), Leave(who=(3,), at=2.0)):
        run, _ = under(fault, patience_s=1.0, rounds=60)
        assert run.finished
        rest = [p for p in run.final if p != 3]
        assert rest == [0, 1, 2, 4, 5]
        late = [r for r in run.series("exchanged") if r.time_s > 8.0 and r.peer in rest]
        assert late
        assert all("3" not in dict(r.labels).values() for r in late)
        assert run.virtual_s < 60 * 0.2 + 5.0


def test_a_peer_that_joins_late_takes_part() -> None:
    run, _ = under(Join(who=(2,), at=5.0), patience_s=1.0, rounds=60)
    assert sorted(run.final) == list(range(6))
    mine = run.series("exchanged", 2)
    assert mine
    assert min(row.time_s for row in mine) >= 5.0


@pytest.mark.parametrize("first", [0, 500])
def test_generated_faults_break_nothing(first: int) -> None:
    task = Quadratics(peers=6, condition=10.0)
    bound = DADAO(patience_s=2.0, retry_s=0.4).bind(workload(task, 10, Ring(6)))
    found = explore(
        lambda: bound, network(Ring(6)), seeds=12, first_seed=first, horizon_s=900.0,
        invariants=INVARIANTS,
    )  # fmt: skip
    assert found.failures == ()
    assert found.ended == {}


def test_the_invariants_can_fail() -> None:
    def row(name: str, value: float, peer: int, other: int = -1) -> Row:
        return Row(name, value, 0.0, 0, peer, (("other", str(other)),) if other >= 0 else ())

    def told(*rows: Row, **more: Any) -> list[bool]:
        run = Run("event", 0, 2, rows=list(rows), **more)
        return [invariant(run) is not None for invariant in INVARIANTS]

    both = [row("exchanged", 0, 0, 1), row("exchanged", 0, 1, 0)]
    sums = [row(name, 1.0, p) for name in ("dual_size",) for p in (0, 1)]
    sums += [
        row(name, v, p) for name in ("dual_sum", "fast_dual_sum") for p, v in ((0, 2), (1, -2))
    ]
    assert told(*both, *sums) == [False] * 3
    assert told(*both, both[0]) == [True, True, False]
    assert told(both[0]) == [False, True, False]
    assert told(both[0], dropped={"lost": 1}) == [False] * 3
    assert told(*both, *sums, row("fresh", 1, 0), both[0]) == [False, True, False]
    assert told(*both, *sums[:-1], row("fast_dual_sum", -1.9, 1)) == [False, False, True]


# What is compared with it.


def world(topology: str = "full", condition: float = 30.0, peers: int = 8) -> Scenario:
    return Scenario(
        "test", peers=peers, rounds=1, seed=5, topology=topology,
        task={"name": "quadratics", "condition": condition, "axes": "own"},
    )  # fmt: skip


@pytest.mark.parametrize("topology", ["full", "ring", "star"])
def test_references_reach_the_minimum(topology: str) -> None:
    found = world_of(world(topology, condition=10.0))
    minimum = found.problem.minimum
    for name, points, iterations in (
        ("ssda", references.ssda(found), 600),
        ("msda", references.msda(found), 200),
        ("adom+", references.adom_plus(found), 12_000),
        ("adom+ consensus", references.adom_plus(found, consensus=True), 2500),
        ("tracking", references.gradient_tracking(found, 0.25), 1500),
    ):
        x = next(x for i, x in enumerate(points) if i == iterations - 1)
        assert ((x - minimum) ** 2).sum(1).max() < 1e-8, name


def test_dual_gradients_invert_gradients() -> None:
    found = world_of(world("ring"))
    x = np.random.default_rng(0).standard_normal(found.start.shape)
    np.testing.assert_allclose(found.dual_gradient(found.gradient(x)), x, atol=1e-9)


def test_chebyshev_gossip_on_a_full_graph_is_one_average() -> None:
    found = world_of(world("full"))
    assert references.chebyshev_waves(found) == 1
    assert references.consensus_waves(found) == 1
    on_ring = world_of(world("ring", peers=16))
    assert references.chebyshev_waves(on_ring) == math.floor(1 / math.sqrt(on_ring.gossip[1]))
    assert references.consensus_waves(on_ring) == math.ceil(math.log(2) / on_ring.gossip[1])


def test_what_is_counted() -> None:
    def numbers(method: Any, **more: Any) -> dict[str, float]:
        run = dadao_counted(world(), method, **more)
        return {row.name: row.value for row in run.rows if row.name != "distance"}

    ssda = numbers("ssda")
    assert ssda["gradients"] == 8 * ssda["time"]
    assert ssda["exchanges"] == 28 * ssda["time"]
    assert numbers("ssda", slow=10.0)["time"] == pytest.approx(10 * ssda["time"])
    tracking = numbers("tracking", lr=0.5)
    assert tracking["exchanges"] == 2 * 28 * tracking["time"]
    continuized = numbers("continuized")
    assert continuized["gradients"] == 2 * continuized["exchanges"] == 8 * continuized["time"]
    dadao = numbers("dadao")
    assert dadao["gradients"] == pytest.approx(8 * dadao["time"], rel=0.1)
    assert (dadao["chi_1"], dadao["chi_2"]) == pytest.approx((3.5, 3.5))
    assert dadao["rate_over_flow"] >= 1.0
    # A constant step leaves plain gossip at a distance, and it arrives nowhere.
    gossip = numbers("gossip", lr=0.1)
    assert 1e-5 < gossip["floor"] < 0.1
    assert "time" not in gossip


@pytest.mark.parametrize("graph", ["full", "ring"])
def test_counted_methods_keep_their_sums(graph: str) -> None:
    for method in get_args(counted.Method):
        run = dadao_counted(world(graph), method, lr=0.3)
        assert [rule(run) for rule in counted.INVARIANTS] == [None, None]
        assert len(run.series("off")) == (method in ("dadao", "ssda", "msda", "tracking"))


def test_a_sum_that_is_not_kept_is_found_out() -> None:
    found = world_of(world("ring"))
    first, second = islice(references.gradient_tracking(found, 0.3), 2)
    right, wrong = (counted._kept(found, "tracking", lr, first, second) for lr in (0.3, 0.31))
    assert right["off"] < 1e-12
    assert wrong["off"] > 1e-4
    assert counted._kept(found, "ssda", 1.0, first, second)["off"] > 1e-4
    rows = [Row("off", 1e-6, 0.0), Row("gradients", 2.5, 0.0)]
    told = [rule(Run("study", 0, 2, rows=rows)) for rule in counted.INVARIANTS]
    assert all(told)


# Errors and the card.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mu": 0.1}, "give both, or neither"),
        ({"mu": 0.0, "smoothness": 1.0}, "0 < mu <= smoothness"),
        ({"mu": -1.0, "smoothness": 1.0}, "0 < mu <= smoothness"),
        ({"mu": 2.0, "smoothness": 1.0}, "0 < mu <= smoothness"),
        ({"unit_s": -1.0}, "unit_s=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DADAO(**settings)


def test_graphs_and_horizons_that_cannot_be_are_refused() -> None:
    task = Quadratics(peers=8)
    with pytest.raises(UsageError, match="pairs gossip both ways"):
        DADAO().bind(workload(task, 5, Exponential(8, directed=True)))
    with pytest.raises(UsageError, match="rates='slow'"):
        DADAO(rates="slow").bind(workload(task, 5))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="2 gradient rates for 8 peers"):
        agenda(0, DADAO().bind(workload(task, 5)).rates, 5.0, (1.0, 1.0))
    with pytest.raises(UsageError, match="no horizon"):
        DADAO().bind(workload(task, None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="compared on quadratics"):
        dadao_counted(Scenario("digits", peers=4, rounds=1, task="digits"))
    with pytest.raises(UsageError, match=r"slow=0\.5"):
        dadao_counted(world(), slow=0.5)


def test_measures_on_numbers_known_by_hand() -> None:
    def run(**numbers: float) -> Run:
        return Run("study", 0, 16, rows=[Row(n, v, 0.0) for n, v in numbers.items()])

    from shoal.systems.training import _dadao_claims as measured

    made = {(arm, 0): run() for arm in SYSTEM.arms}
    for value in measured.CONDITIONS:
        arm = "dadao" if value == 30 else f"condition {value:g}"
        made[arm, 0] = run(gradients=7 * value**0.5, exchanges=16.0, fit=0.99)
        arm = "tracking" if value == 30 else f"tracking {value:g}"
        made[arm, 0] = run(gradients=value)
    for size in (8, 32):
        made[f"peers {size}", 0] = run(exchanges=size)
    rows = Rows(made, tuple(SYSTEM.arms), (0,))
    assert measured.gradients_over_condition(rows)[0] == pytest.approx(0.5)
    assert measured.tracking_over_condition(rows)[0] == pytest.approx(1.0)
    assert measured.exchanges_over_peers(rows)[0] == pytest.approx(1.0)
    assert math.isnan(measured.ssda_over_peers(rows)[0])
    assert math.isnan(measured.exchanges_over_primal(rows)[0])
    for arm, exchanges in (
        ("dadao", 4.0), ("adom+", 8.0), ("star", 3.0), ("adom+ star", 9.0), ("consensus star", 4.0),
        ("cycle", 1.0), ("adom+ cycle", 5.0), ("consensus cycle", 6.0),
    ):  # fmt: skip
        rows.runs[arm, 0] = run(exchanges=exchanges)
    assert measured.exchanges_over_primal(rows)[0] == pytest.approx(3 / 4)


def test_agenda_is_empty_before_anything_rings() -> None:
    empty = agenda(0, DADAO().bind(workload(Quadratics(peers=2), 1)).rates, 0.0)
    assert isinstance(empty, Agenda)
    assert empty.exchanges == len(empty.dates) == 0
