"""The hash table and the content store on real sockets: the text that the simulator runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from shoal.base.ids import PeerId
from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.peer import Peer
from shoal.lab.bench._table import Security, searched
from shoal.lab.bench._table import figures as figures_of
from shoal.parts.overlay.block_exchange import Exchange
from shoal.parts.overlay.content import Blocks, Manifest
from shoal.parts.overlay.kademlia import Kademlia
from shoal.world.faults import Partition
from shoal.world.network import Network
from shoal.world.record import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "parts"))
from dht_program import Table, at, in_phase, nothing_is_invented

pytestmark = pytest.mark.live


def silenced(
    peers: int, join_gap_s: float, gap_s: float, searches: int, settings: LiveSettings
) -> Run:
    """All join and store; the odd ones search, and again after the even ones fell silent: their
    sockets stay open, but nothing passes."""
    before_s = 1.5 + gap_s * peers
    after_s = before_s + gap_s * peers + 1.0
    program = Table(
        peers, join_gap_s=join_gap_s, put_at_s=1.0, get_at_s=(before_s, after_s), gap_s=gap_s,
        getters=tuple(range(1, peers, 2)), searches=searches, linger_s=2.5,
    )  # fmt: skip
    silence = Partition(who=tuple(range(0, peers, 2)), at=join_gap_s * peers + after_s - 0.3)
    run = run_live(program, Network(peers, faults=(silence,)), settings=settings)
    assert nothing_is_invented(run) is None
    return run


def figures(run: Run, phase: int) -> tuple[float, float, float]:
    """Share found, median and 95th percentile of the time of a search, in seconds."""
    found, times = in_phase(run, "found", phase), in_phase(run, "get_s", phase)
    return sum(found) / len(found), median(times), at(times, 0.95)


def test_eight_nodes_find_what_was_stored_also_when_half_of_them_fall_silent() -> None:
    settings = LiveSettings(horizon_s=50.0)
    run = silenced(8, join_gap_s=0.05, gap_s=0.05, searches=3, settings=settings)
    for phase in (0, 1):
        assert len(in_phase(run, "found", phase)) == 12
        assert figures(run, phase)[0] == 1.0


def check_table(nodes: int, security: Security) -> None:
    """The bars of the specification, at a size that this machine does by the way."""
    run = searched(nodes, keys=nodes // 2, gets=nodes, security=security)
    assert [row.value for row in run.series("join")] == [1.0] * (nodes - 1)
    assert [row.value for row in run.series("put")] == [1.0] * (nodes // 2)
    calm, silent = figures_of(run, 0), figures_of(run, 1)
    assert all(found for found, _ in calm)
    assert median(seconds for _, seconds in calm) < 0.01
    assert sum(found for found, _ in silent) >= 0.99 * len(silent)
    assert at(sorted(seconds for _, seconds in silent), 0.95) < 1.0


@pytest.mark.parametrize("security", ["noise", "none"])
def test_a_table_keeps_to_the_times_of_the_specification(security: Security) -> None:
    check_table(26, security)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("security", ["noise", "none"])
def test_a_table_of_eighty_nodes_keeps_to_them_too(security: Security) -> None:
    check_table(80, security)


@dataclass(frozen=True)
class Copies:
    """Peer 0 publishes a blob, the others find it in the table and fetch it from each other."""

    blob: bytes

    async def run(self, peer: Peer) -> None:
        dht, blocks = Kademlia(peer), Blocks()
        exchange = Exchange(peer, blocks, dht=dht)
        root = Manifest.split(self.blob, 1 << 16)[0].cid
        async with peer.tasks() as group:
            dht.start(group)
            exchange.start(group)
            await dht.join([PeerId(0)] if peer.id else [], deadline=5.0)
            if peer.id == 0:
                blocks.add_blob(self.blob, 1 << 16)
                await exchange.publish(root, deadline=10.0)
            await exchange.fetch(root, deadline=20.0)
            peer.record("whole", float(blocks.blob(root) == self.blob))
            await peer.sleep_until(peer.now() + 1.0)
            dht.stop()


def test_a_blob_comes_through_real_sockets() -> None:
    blob = bytes(range(256)) * 4096
    run = run_live(Copies(blob), Network(5), settings=LiveSettings(horizon_s=40.0))
    assert [row.value for row in run.series("whole")] == [1.0] * 5
    assert run.series("banned") == []
