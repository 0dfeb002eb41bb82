"""DFedSAM: mixing matrices, powers of them, agreement with DFedAvg and between engines."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.base.errors import UsageError
from shoal.lab.cell import cell_of, execute
from shoal.lab.launch import launch
from shoal.parts.exchange.gossip import Gossip
from shoal.parts.strategy.sharpness_aware import SharpnessAware
from shoal.parts.topology.base import check_mixing, spectral_gap
from shoal.parts.topology.erdos_renyi import ErdosRenyi
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.ring import Ring
from shoal.systems.training.dfedsam import SYSTEM, dfedsam

TINY = shoal.Scenario(
    peers=6, rounds=3, topology="ring", measures=("flatness",),
    task={"name": "digits", "split": "dirichlet", "hidden": [8], "train_samples": 120},
    exchange={"name": "gossip", "steps": 2}, links={"name": "links", "latency_s": 0.02},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def mixed(topology: Ring | ErdosRenyi, steps: int, x: torch.Tensor) -> torch.Tensor:
    """What `steps` waves make of x [peers, dim]."""
    for hop in Gossip(topology, steps=steps).hops(0, seed=0):
        assert hop.weights is not None
        assert hop.own is not None
        x = hop.own[:, None] * x + (hop.weights[..., None] * x[hop.sources.clamp_min(0)]).sum(1)
    return x


@given(st.integers(2, 14), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_q_steps_are_the_power_of_w(peers: int, steps: int, seed: int) -> None:
    for topology in (Ring(peers), ErdosRenyi(peers, p=0.9, seed=seed)):
        w = topology.weights().to_dense()
        check_mixing(w)
        x = torch.randn(peers, 3, generator=torch.Generator().manual_seed(seed)).double()
        found = mixed(topology, steps, x)
        torch.testing.assert_close(found, torch.linalg.matrix_power(w, steps) @ x)
        torch.testing.assert_close(found.mean(0), x.mean(0))
        # Without training a wave lowers the consistency by lambda^2 at least.
        second = 1.0 - spectral_gap(w)
        before = (x - x.mean(0)).square().sum()
        after = (mixed(topology, 1, x) - x.mean(0)).square().sum()
        assert float(after) <= second**2 * float(before) + 1e-12


def test_spectra_of_the_paper() -> None:
    ring = Ring(32).weights().to_dense()
    second = 1 / 3 + 2 / 3 * math.cos(2 * math.pi / 32)
    assert 1 - spectral_gap(ring) == pytest.approx(second, abs=1e-9)
    assert second == pytest.approx(0.98719, abs=1e-5)
    assert float(torch.linalg.eigvalsh(ring)[0]) == pytest.approx(-1 / 3, abs=1e-9)
    exponential = Exponential(32).weights().to_dense()
    assert int((exponential[0] > 0).sum()) == 10
    assert float(exponential[0, 1]) == pytest.approx(0.1)
    assert 1 - spectral_gap(exponential) == pytest.approx(0.6, abs=1e-9)
    one_way = Exponential(32, directed=True).weights().to_dense()
    assert 1 - spectral_gap(one_way) == pytest.approx(2 / 3, abs=1e-9)


def test_rho_zero_is_dfedavg_bit_for_bit() -> None:
    common = {"steps": 2, "batch_size": 4, "lr": 0.1, "lr_decay": 0.995}
    ours = launch(SharpnessAware(rho=0.0, **common), TINY, seed=3)
    theirs = launch(shoal.load("dpsgd").make(**common), TINY, seed=3)  # type: ignore[misc]
    assert ours.state_digest == theirs.state_digest
    assert launch(SharpnessAware(rho=0.1, **common), TINY, seed=3).state_digest != ours.state_digest


def test_engines_record_the_same() -> None:
    sam = SharpnessAware(rho=0.1, steps=2, batch_size=4)
    runs = [launch(sam, TINY, seed=1, engine=engine) for engine in ("lockstep", "event")]
    for name in ("spread_removed", "sharpness", "hessian_top", "generalisation_gap"):
        found = [[(r.round, r.peer, r.value) for r in run.series(name)] for run in runs]
        assert len(found[0]) == (18 if name == "spread_removed" else 1)
        for one, other in zip(*map(sorted, found), strict=True):
            assert one[:2] == other[:2]
            assert one[2] == pytest.approx(other[2], rel=2e-2, abs=1e-4)


def test_spread_removed_is_what_gossip_takes() -> None:
    """Against the consistency of what peers sent, from a run in which they do not mix."""
    sam = SharpnessAware(rho=0.1, steps=2, batch_size=4)
    one = shoal.Scenario.from_json(TINY.to_json() | {"rounds": 1})
    alone = launch(sam, one.with_settings({"exchange": {"name": "isolated"}}), seed=2)
    together = launch(sam, one, seed=2)
    before = alone.series("consensus")[-1].value
    after = together.series("consensus")[-1].value
    removed = [row.value for row in together.series("spread_removed")]
    assert before == pytest.approx(after + sum(removed) / len(removed), rel=1e-3)
    assert after < before


def test_gossip_steps_cost_a_latency_each() -> None:
    """Waves follow each other: more of them take more link latencies and as many more messages."""
    sam = SharpnessAware(steps=1, batch_size=4)
    runs = {
        q: launch(sam, TINY.with_settings({"exchange.steps": q, "round_s": 5.0}), seed=1)
        for q in (1, 4)
    }
    assert runs[4].messages_sent == 4 * runs[1].messages_sent
    assert runs[4].virtual_s - runs[1].virtual_s >= 3 * 3 * 0.02


def test_two_gradients_are_counted() -> None:
    one, two = (
        launch(SharpnessAware(rho=rho, steps=4, batch_size=8), TINY, seed=0).flops
        for rho in (0.0, 0.1)
    )
    assert 1.8 < two / one < 2.1


def test_errors_name_the_check() -> None:
    with pytest.raises(UsageError, match="gossip_steps=0; need at least 1"):
        dfedsam(Ring(4), gossip_steps=0)
    with pytest.raises(UsageError, match="rho=-1"):
        dfedsam(Ring(4), rho=-1)
    with pytest.raises(UsageError, match="not symmetric"):
        dfedsam(Exponential(8, directed=True))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not doubly stochastic"):
        dfedsam(ErdosRenyi(9, p=0.5, mixing="uniform"))


def test_arm_runs() -> None:
    arm = dfedsam(Ring(4), local_steps=1, gossip_steps=2, batch_size=4)
    world = shoal.Scenario(rounds=1, task={"name": "digits", "hidden": [4], "train_samples": 40})
    run = execute(cell_of("it", arm, 0, world), launch)  # type: ignore[arg-type]
    assert run.messages_sent == 4 * 2 * 2


def test_card_compares_like_with_like() -> None:
    pairs = [("dfedsam", "dfedavg"), ("dfedsam mgs", "dfedavg mgs")]
    for sam, plain in pairs:
        ours, theirs = SYSTEM.arms[sam], SYSTEM.arms[plain]
        assert dict(ours.scenario) == dict(theirs.scenario)
        for name in ("steps", "batch_size", "lr", "lr_decay"):
            assert ours.set[name] == theirs.set[name]
