"""The durable store: atomic commits, crashes around them, private copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_programs import LATE_S, Note, event

from shoal.world.device import Device
from shoal.world.faults import Crash


@settings(max_examples=25)
@given(crash_ms=st.integers(1, 2999).filter(lambda ms: ms % 1000))
def test_a_crash_leaves_all_of_a_commit_or_nothing(crash_ms: int) -> None:
    """Two commits of a second each, of items that belong together."""
    after: list[Any] = []

    async def run(peer: Any) -> None:
        if peer.now() >= crash_ms / 1000:
            after.append((peer.store.get("a"), peer.store.get("b")))
            return
        await peer.store.commit({"a": b"1", "b": b"1"})
        # Before a commit returns, reads see the one before.
        async with peer.tasks() as group:
            group.start(peer.store.commit({"a": b"2", "b": b"2"}))
            await peer.sleep_until(1.5)
            assert peer.store.get("a") == b"1"
        await peer.sleep_until(LATE_S)

    event(run, device=Device(store_s=1.0), faults=(Crash(who=(0,), at=crash_ms / 1000, until=4.0),))
    value = (None, b"1", b"2")[crash_ms // 1000]
    assert after == [(value, value)]


@pytest.mark.parametrize("store", ["kept", "lost"])
def test_a_restart_finds_the_store_unless_the_crash_took_it(store: str) -> None:
    found: list[Any] = []

    async def run(peer: Any) -> None:
        found.append((peer.store.get("note"), peer.store.get("none")))
        await peer.store.commit({"note": Note(3)})
        await peer.sleep_until(5.0)

    event(run, faults=(Crash(who=(0,), at=1.0, until=2.0, store=store),))
    assert found == [(None, None), (Note(3) if store == "kept" else None, None)]


def test_what_is_durable_does_not_change_with_the_program_s_tensors() -> None:
    async def run(peer: Any) -> None:
        params = torch.zeros(3)
        await peer.store.commit({"params": params})
        params += 1.0
        read = peer.store.get("params")
        assert read.tolist() == [0.0] * 3
        read += 2.0
        assert peer.store.get("params").tolist() == [0.0] * 3

    assert event(run).finished
