"""Remote calls over real sockets: the text that the simulator runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoal.engine.live import LiveSettings, run_live
from shoal.parts.overlay.rpc import RpcSettings
from shoal.world.faults import Loss
from shoal.world.network import Network

sys.path.insert(0, str(Path(__file__).parents[1] / "parts"))
from rpc_programs import (
    Calling,
    Heartbeats,
    counts,
    nothing_runs_twice,
    what_is_answered_ran_and_is_right,
)

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=40.0)


def test_calls_run_once_over_sockets_that_lose_messages() -> None:
    program = Calling(calls=8, gap_s=0.1, timeout_s=5.0, settle_s=0.5)
    faults = (Loss(at=0.0, probability=0.1),)
    run = run_live(program, Network(3, faults=faults), settings=SETTINGS)
    assert run.finished
    assert nothing_runs_twice(run) is None
    assert what_is_answered_ran_and_is_right(run) is None
    assert len(run.series("right")) == 3 * 7
    assert set(counts(run).values()) == {1}


def test_heartbeats_overtake_tensors_between_processes() -> None:
    program = Heartbeats(1 << 26, 2, RpcSettings())
    run = run_live(program, Network(2), processes=2, settings=SETTINGS)
    assert run.finished
    assert [row.value for row in run.series("right")] == [1.0]
    beats = sorted(row.value for row in run.series("beat_s"))
    whole_s = run.series("sent_s")[0].value
    # Far below what a tensor takes; a machine that is busy with other things delays single ones.
    assert beats[len(beats) // 2] < 0.25 * whole_s / 2
