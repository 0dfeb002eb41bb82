"""The live row of the agreement ladder: the event engine without batching and real sockets give
the same parameters bit for bit, for synchronous programs without faults, and with keyed loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_programs import Echo, Gossip, RingAllReduce

from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.parts.topology.ring import Ring
from shoal.world.faults import Loss
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=50.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def both(program: Any, network: Network, processes: int = 1, seed: int = 5) -> tuple[Run, Run]:
    twin = simulate(program, network, seed=seed, settings=EventSettings(batching="off"))
    live = run_live(program, network, seed=seed, processes=processes, settings=SETTINGS)
    return twin, live


def recorded(run: Run) -> list[tuple[int, int, str, float]]:
    """What each peer recorded, without when."""
    rows = [row for row in run.rows if row.peer >= 0]
    return sorted((row.peer, row.round, row.name, row.value) for row in rows)


def assert_traffic(twin: Run, live: Run) -> None:
    """Both have the traffic of the whole run, at the same rounds or at moments of their own.

    How much others had sent when the last peer recorded its model depends on who is a little ahead,
    so points need not be equal; they rise to at most what was sent in all.
    """
    for run in (twin, live):
        rows = run.series("bytes_sent")
        assert bool(rows) == bool(run.final)
        values = [row.value for row in rows]
        assert values == sorted(values)
        assert values[-1:] <= [sum(run.bytes_sent)]
    rounds = [[row.round for row in run.series("bytes_sent")] for run in (twin, live)]
    if min(rounds[0], default=-1) >= 0:
        assert rounds[0] == rounds[1]


def assert_agree(twin: Run, live: Run) -> None:
    assert twin.final.keys() == live.final.keys()
    for peer, params in twin.final.items():
        assert torch.equal(params, live.final[peer]), f"peer {peer}"
    assert live.state_digest == twin.state_digest
    assert recorded(live) == recorded(twin)
    assert_traffic(twin, live)
    assert live.bytes_sent == twin.bytes_sent
    assert live.bytes_by_kind == twin.bytes_by_kind
    assert live.messages_sent == twin.messages_sent
    assert live.dropped == twin.dropped


@pytest.mark.parametrize(
    ("program", "peers", "processes"),
    [
        (Gossip(), 8, 1),
        (RingAllReduce(), 5, 1),
        (Echo(), 6, 1),
        (Gossip(), 6, 2),
        (RingAllReduce(), 4, 3),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_synchronous_programs_agree_bit_for_bit(program: Any, peers: int, processes: int) -> None:
    topology = Ring(peers) if isinstance(program, Gossip) else None
    twin, live = both(program, Network(peers, topology), processes)
    assert_agree(twin, live)
    assert live.engine == "live"
    assert live.finished
    assert live.trace_digest == ""
    assert live.messages_delivered == live.messages_sent
    assert live.messages_in_flight == 0
    assert live.bytes_received == twin.bytes_received


def test_the_numbers_are_right_and_not_only_equal() -> None:
    """The ring's sum is compared with a plain one, so that two equal mistakes would be seen."""
    program, network = RingAllReduce(dim=64), Network(4)
    live = run_live(program, network, seed=1, settings=SETTINGS)
    sums = torch.stack([live.final[peer] for peer in range(4)])
    assert torch.equal(sums, sums[:1].expand_as(sums))
    one = run_live(RingAllReduce(dim=64), Network(1), seed=1, settings=SETTINGS)
    assert one.messages_sent == 0
    # Peer 0 alone holds its own vector; the rest of the sum is the other peers' vectors.
    assert not torch.equal(one.final[0], live.final[0])


@pytest.mark.parametrize("how", ["links", "fault"])
def test_keyed_loss_loses_the_same_messages(how: str) -> None:
    loss = Loss(at=0.05, probability=0.3) if how == "fault" else None
    network = Network(
        4, links=Links(loss=0.0 if loss else 0.3, seed=3), faults=(loss,) if loss else ()
    )
    program = Gossip(rounds=3, start_s=0.3, round_s=0.5)
    twin, live = both(program, network)
    assert twin.dropped["lost"] > 3
    assert_agree(twin, live)
