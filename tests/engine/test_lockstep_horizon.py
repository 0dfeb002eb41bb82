"""A horizon in seconds ends lockstep at the round that would begin after it."""

from __future__ import annotations

import pytest

from shoal.base.errors import UsageError
from shoal.engine.lockstep import LockstepSettings, run_lockstep
from shoal.parts import find
from shoal.rounds.method import Method
from shoal.world.device import Device
from shoal.world.network import Network


def _world(rounds: int) -> tuple[Method, Network]:
    task = find("tasks", "digits")(peers=4, hidden=(8,))
    method = Method(
        find("strategy", "local_steps")(lr=0.1, steps=1), task,
        find("exchange", "gossip")(find("topology", "ring")(4)), find("aggregate", "mean")(),
        find("transform", "identity")().bind(task.spec), rounds, 5.0,
    )  # fmt: skip
    return method, Network(4, device=Device(flops_per_s=1e9, overhead_s=1.0))


def test_no_round_begins_after_the_horizon() -> None:
    whole = run_lockstep([_world(8)[0]], [_world(8)[1]])[0]
    per_round = whole.virtual_s / 8
    settings = LockstepSettings(horizon_s=2.5 * per_round)
    cut = run_lockstep([_world(8)[0]], [_world(8)[1]], settings=settings)[0]
    # Rounds begin at 0, 1 and 2 lengths of a round; the third is finished.
    assert cut.virtual_s == pytest.approx(3 * per_round, rel=0.01)
    three = run_lockstep([_world(3)[0]], [_world(3)[1]])[0]
    assert cut.state_digest == three.state_digest
    assert cut.bytes_sent == three.bytes_sent


def test_seeds_do_not_share_a_horizon() -> None:
    method, network = _world(3)
    with pytest.raises(UsageError, match="one by one"):
        run_lockstep([method] * 2, [network] * 2, settings=LockstepSettings(horizon_s=3.0))
    with pytest.raises(UsageError, match="horizon_s"):
        LockstepSettings(horizon_s=0.0)
