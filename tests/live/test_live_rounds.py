"""Rounds over sockets without a length of their own: long enough for this machine."""

from __future__ import annotations

import pytest

import shoal


@pytest.mark.live
def test_derived_rounds_leave_nobody_out() -> None:
    world = shoal.Scenario(
        peers=4, rounds=4, topology="ring", links={"name": "links", "latency_s": 0.001},
        task={"name": "digits", "hidden": [8]},
    )  # fmt: skip
    live = shoal.run("dpsgd", world, engine="live")
    exact = world.with_settings({"engine": {"batching": "off"}, "round_s": 2.0})
    twin = shoal.run("dpsgd", exact, engine="event")
    assert not live.dropped
    assert live.state_digest == twin.state_digest
