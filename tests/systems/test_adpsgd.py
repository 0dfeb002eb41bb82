"""AD-PSGD: the sum of all models under faults, halves of a graph, learning, sockets."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.parts.tasks.quadratics import Quadratics
from shoal.parts.topology.from_edges import FromEdges
from shoal.parts.topology.full import Full
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.star import Star
from shoal.parts.topology.torus import Torus
from shoal.rounds.workload import Workload
from shoal.systems.baselines.adpsgd import ADPSGD, INVARIANTS, active_peers
from shoal.testing.ladder import check_program
from shoal.world.device import Device
from shoal.world.faults import Corrupt, Crash, Hold, Leave, Loss, Partition, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

LINKS = Links(latency_s=0.02, latency_spread=0.5)
DEVICE = Device(overhead_s=0.03, spread=0.5)
PEERS = 8


class Apart:
    """Quadratics whose peers begin at points of their own."""

    def __init__(self, peers: int = PEERS, **more: Any) -> None:
        self.task = Quadratics(peers=peers, condition=10.0, axes="own", **more)

    def workload(self, topology: Any, rounds: int = 40, transform: Any = None) -> Workload:
        codec = (transform or find("transform", "identity")()).bind(self.task.spec)
        return Workload(
            self.task, find("aggregate", "mean")(), codec, rounds, None, 3, 5, independent=True,
            topology=topology,
        )  # fmt: skip


def run_of(
    *faults: Any, topology: Any = None, rounds: int = 40, transform: Any = None,
    strict: bool = False, **program: Any,
) -> tuple[Run, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(run, models at the beginning, models at the end [peers, dim])."""
    topology = topology or Ring(PEERS)
    load = Apart(topology.peers).workload(topology, rounds, transform)
    bound = ADPSGD(**program).bind(load)
    network = Network(topology.peers, topology, LINKS, DEVICE, faults)
    run = simulate(bound, network, seed=3, settings=EventSettings(strict=strict))
    start = torch.stack([load.start(peer) for peer in range(topology.peers)])
    return run, start, torch.stack([run.final[p] for p in sorted(run.final)])


def kept(run: Run) -> list[str | None]:
    return [invariant(run) for invariant in INVARIANTS]


# The sum of all models.


@pytest.mark.parametrize("topology", [Ring(8), Full(7), Star(6), Torus(9)])
def test_averaging_keeps_the_sum_and_brings_all_together(topology: Any) -> None:
    run, start, end = run_of(topology=topology, lr=0.0, rounds=80, strict=True)
    torch.testing.assert_close(end.sum(0), start.sum(0), rtol=0, atol=1e-11)
    assert float((end - end.mean(0)).norm()) < 0.2 * float((start - start.mean(0)).norm())
    assert kept(run) == [None]
    exchanges = len(run.series("averaged"))
    assert exchanges > 2 * topology.peers
    # An offer and an answer for each two of these; and the word at the end, once per edge.
    assert exchanges <= run.messages_sent <= exchanges + topology.peers**2


@pytest.mark.parametrize(
    "faults",
    [
        (Loss(probability=0.3),),
        (Corrupt(probability=0.3),),
        (Slow(who=(1, 2), factor=20.0),),
        (Hold(who=(2,), at=1.0, until=3.0),),
        (Crash(who=(1, 4), at=2.0, until=4.0),),
        (Crash(who=(1, 2), at=2.0, until=3.5), Loss(probability=0.2)),
        (Partition(who=(0, 1), at=2.0, until=5.0),),
        (Partition(who=(0, 1), at=2.0, until=5.0, one_way=True),),
    ],
)  # fmt: skip
def test_nothing_of_the_sum_is_lost_when_messages_are(faults: tuple[Any, ...]) -> None:
    run, start, end = run_of(*faults, lr=0.0, rounds=60)
    torch.testing.assert_close(end.sum(0), start.sum(0), rtol=0, atol=1e-11)
    assert not torch.equal(end, start)
    assert kept(run) == [None]


@given(st.floats(0.0, 0.5), st.integers(0, 50))
@settings(max_examples=8, deadline=None)
def test_any_loss_keeps_the_sum(loss: float, seed: int) -> None:
    load = Apart(6).workload(Ring(6), 20)
    network = Network(6, Ring(6), Links(latency_s=0.03, loss=loss), DEVICE)
    run = simulate(ADPSGD(lr=0.0, patience_s=8.0).bind(load), network, seed=seed)
    start = torch.stack([load.start(peer) for peer in range(6)])
    end = torch.stack([run.final[p] for p in range(6)])
    torch.testing.assert_close(end.sum(0), start.sum(0), rtol=0, atol=1e-11)


def test_gradients_that_come_in_between_are_kept() -> None:
    """With one pair: the sum changes by exactly what both have learned."""
    # Equal curvature, so that the sum of both models follows a recursion of its own when updates
    # happen at the same moments, whatever is averaged between them.
    task = Quadratics(peers=2, condition=1.0)
    codec = find("transform", "identity")().bind(task.spec)
    load = Workload(
        task, find("aggregate", "mean")(), codec, 30, None, 3, 1, independent=True, topology=Full(2)
    )
    # An exchange takes longer than several updates.
    network = Network(2, Full(2), Links(latency_s=0.5), Device(overhead_s=0.01))
    run = simulate(ADPSGD(lr=0.1, retry_s=2.0).bind(load), network, seed=1)
    assert len(run.series("averaged")) >= 8
    # Each update takes a tenth of the way to the peer's own centre; both have had 30.
    total = task.centres.sum(0)
    first = sum(load.start(peer) for peer in (0, 1))
    end = run.final[0] + run.final[1]
    left = (end - total).norm() / (first - total).norm()
    assert float(left) == pytest.approx(0.9**30, rel=0.6)


def test_a_lossy_codec_keeps_the_sum() -> None:
    codec = find("transform", "qsgd")(levels=8)
    run, start, end = run_of(lr=0.0, transform=codec, strict=True)
    torch.testing.assert_close(end.sum(0), start.sum(0), rtol=0, atol=1e-11)
    assert kept(run) == [None]


def test_it_learns_and_a_slow_or_dead_peer_holds_nobody_up() -> None:
    calm, start, end = run_of(rounds=80, lr=0.1)
    task = Apart().task
    before = float(task.evaluate(start)["distance"].mean())
    assert float(task.evaluate(end)["distance"].mean()) < 0.1 * before
    slow, _, _ = run_of(Slow(who=(0,), factor=100.0), rounds=80, lr=0.1)
    assert slow.virtual_s < calm.virtual_s + 10.0
    for fault in (Crash(who=(3,), at=5.0), Leave(who=(3,), at=5.0)):
        run, _, end = run_of(fault, rounds=80, lr=0.1)
        assert run.finished
        rest = end[[p != 3 for p in sorted(run.final)]]
        assert float(task.evaluate(rest)["distance"].mean()) < 0.1 * before
        late = {row.peer for row in run.series("averaged") if row.time_s > 11.0}
        assert late == set(range(PEERS)) - {3}


def test_generated_faults_break_nothing() -> None:
    load = Apart(6).workload(Full(6), 10)
    bound = ADPSGD(patience_s=1.0, retry_s=0.3).bind(load)
    found = explore(
        lambda: bound, Network(6, Full(6), LINKS, DEVICE), seeds=20, horizon_s=900.0,
        invariants=INVARIANTS,
    )  # fmt: skip
    assert found.failures == ()
    assert found.ended == {}


def test_the_ladder_of_programs() -> None:
    load = Apart(6).workload(Ring(6), 12)
    check_program(ADPSGD().bind(load), Network(6, Ring(6), LINKS, DEVICE), seed=3)


@pytest.mark.live
def test_on_sockets_the_sum_stays() -> None:
    load = Apart(4).workload(Ring(4), 20)
    bound = ADPSGD(lr=0.0, period_s=0.05, patience_s=5.0).bind(load)
    run = run_live(bound, Network(4, Ring(4)), seed=3, settings=LiveSettings(horizon_s=60.0))
    assert run.finished
    assert run.series("averaged")
    assert kept(run) == [None]
    start = sum(load.start(peer) for peer in range(4))
    end = sum(run.final[peer] for peer in range(4))
    torch.testing.assert_close(end, start, rtol=0, atol=1e-11)


# Halves.


@st.composite
def graphs(draw: st.DrawFn) -> FromEdges:
    peers = draw(st.integers(1, 12))
    edges = {(draw(st.integers(0, b - 1)), b) for b in range(1, peers)}
    pair = st.tuples(st.integers(0, peers - 1), st.integers(0, peers - 1))
    edges |= {(min(p), max(p)) for p in draw(st.lists(pair, max_size=14)) if p[0] != p[1]}
    return FromEdges(peers, tuple(sorted(edges)))


@given(graphs())
@settings(max_examples=80, deadline=None)
def test_halves_connect_whatever_the_graph_connects(topology: FromEdges) -> None:
    active = active_peers(topology)
    across = [(a, b) for a, b in topology.edges if (a in active) != (b in active)]
    graph = networkx.Graph(across)
    graph.add_nodes_from(range(topology.peers))
    assert networkx.is_connected(graph)
    whole = networkx.Graph(topology.edges)
    if networkx.is_bipartite(whole):
        assert len(across) == len(topology.edges)


def test_halves_of_a_full_graph_are_halves() -> None:
    for peers in (2, 5, 16):
        assert len(active_peers(Full(peers))) == peers // 2
    assert active_peers(Star(5)) == {1, 2, 3, 4}
    assert active_peers(Full(1)) == frozenset()


# Errors.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"retry_s": -1.0}, r"retry_s=-1\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ADPSGD(**settings)


def test_the_invariant_can_fail() -> None:
    def row(number: int, peer: int, other: int) -> Row:
        return Row("averaged", number, 0.0, 0, peer, (("other", str(other)),))

    def told(*rows: Row, **more: Any) -> bool:
        return INVARIANTS[0](Run("event", 0, 2, rows=list(rows), **more)) is not None

    assert not told(row(0, 0, 1), row(0, 1, 0))
    assert told(row(0, 0, 1), row(0, 1, 0), row(0, 0, 1))
    assert told(row(0, 0, 1))
    assert not told(row(0, 1, 0), dropped={"lost": 1})
