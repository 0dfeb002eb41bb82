"""Collectives on real sockets and processes: the simulator's text; peers killed and cut off."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from shoal.engine.event.simulation import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.peer import Program
from shoal.lab.bench import _collective
from shoal.lab.bench.collective import _gloo, recovered_s
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.shared_state import SharedState
from shoal.world.faults import Partition
from shoal.world.network import Network
from shoal.world.record import Run

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=50.0)
BUSY_S = float(os.environ.get("SHOAL_BUSY_S", "5"))


@dataclass(frozen=True)
class Works:
    """Reductions of every way through the code, several at once, and a shared state."""

    peers: int

    async def run(self, peer: Any) -> None:
        ring = Ring(piece_bytes=1 << 12, direct_bytes=1 << 14)
        async with Communicator(peer, 0, ring=ring) as group:
            # One by one, as the order of the ring, and of its sums, is that in which peers come.
            await peer.sleep_until(0.4 * peer.id)
            while group.everybody < self.peers:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.02)
            found = []
            for turn, size in enumerate((5, 1000, 1000, 40_000, 3, 40_000)):
                for quantise in (None, Quantised()):
                    values = torch.randn(size, generator=peer.generator("values", turn))
                    await group.all_reduce(values, "avg", quantise=quantise)
                    found.append(values)
            many = [torch.randn(500, generator=peer.generator("many", k)) for k in range(6)]
            await group.all_reduce_multiple_with_retry(many, max_in_flight=3)
            state = SharedState({"all": torch.full((3000,), float(peer.id > 1))})
            await group.sync_shared_state(state)
            peer.record("params", torch.cat([*found, *many, state.tensors["all"]]))


@dataclass(frozen=True)
class WithMaster:
    program: Program

    def __call__(self, peer: int) -> Program:
        return self.program if peer else Master(end_s=200.0)


@pytest.mark.parametrize("security", ["none", "noise"])
def test_reductions_are_the_simulators_bit_for_bit(security: Any) -> None:
    program = WithMaster(Works(3))
    real = run_live(program, Network(4), settings=LiveSettings(horizon_s=50.0, security=security))
    simulated = simulate(program, Network(4), settings=EventSettings(strict=True, horizon_s=200.0))
    assert real.finished
    assert simulated.finished
    assert set(real.final) == {1, 2, 3}
    want = simulated.final[1]
    assert all(torch.equal(params, want) for params in real.final.values())
    assert bool((want[-3000:] == 1.0).all())


def check_survivors(run: Run, at_s: float) -> None:
    took_s = recovered_s(run, 4, at_s)
    assert math.isfinite(took_s), "a survivor has no result"
    # The bench holds it against a second; here the machine may be doing anything.
    assert 0.0 < took_s < 10.0
    with_all = [row for row in run.series("ended_s") if row.labels == (("peers", "4"),)]
    assert with_all, "the loss came before the first reduction"


def test_silence_in_mid_reduce_costs_the_others_no_result() -> None:
    program = _collective.Loses(4, 1 << 20, 2.0, kills=False)
    run = run_live(
        WithMaster(program), Network(5, faults=(Partition(who=(4,), at=2.0),)), settings=SETTINGS
    )
    check_survivors(run, 2.0)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_process_costs_the_others_no_result() -> None:
    program = _collective.Loses(4, 1 << 22, 4.0, kills=True)
    run = _collective.run(program, "noise")
    assert any("signal 9" in mark.what for mark in run.happenings)
    check_survivors(run, 4.0)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gloo_has_no_group_left_after_the_same_loss() -> None:
    told = _gloo("kill", 3, 1 << 20)
    assert len(told) == 2
    assert all(told)


@pytest.mark.slow
@pytest.mark.timeout(240 + int(2 * BUSY_S))
def test_full_load_aborts_nothing() -> None:
    """Of length SHOAL_BUSY_S, in seconds."""
    run = _collective.run(_collective.Busy(8, 1 << 18, BUSY_S), "none")
    assert [row.value for row in run.series("aborts")] == [0.0]
    assert not run.series("dropped")
    assert run.series("done")[0].value >= 1
