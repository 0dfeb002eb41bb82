"""Eight peers whose machine has no time for them: none takes another one for dead.

`SHOAL_BUSY_S` sets how many seconds it goes on (8 by default; 600 for the long run).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from live_programs import Answer, Ask, Model

from shoal.engine.live import LiveSettings, run_live
from shoal.world.network import Network

pytestmark = pytest.mark.live
PEERS = 8
BUSY_S = float(os.environ.get("SHOAL_BUSY_S", "8"))


def burn(steps: torch.Tensor) -> torch.Tensor:
    """Python that holds the interpreter's lock, in the worker thread beside the loop."""
    total = 0
    for number in range(int(steps)):
        total += number * number
    return torch.tensor(total % 7)


@dataclass(frozen=True)
class Busy:
    """Everybody works all the time, asks everybody else, and sends a large message around."""

    seconds: float

    async def run(self, peer: Any) -> None:
        async def echo(envelope: Any) -> Any:
            return Answer(envelope.message.number, envelope.message.values)

        async def work() -> None:
            while peer.now() < self.seconds:
                await peer.compute(burn, torch.tensor(400_000))

        async def listen() -> None:
            while peer.now() < self.seconds + 1.0:
                if await peer.recv(Model, deadline=self.seconds + 1.0) is not None:
                    peer.record("model", 1.0)

        async def ask(other: int) -> None:
            number = 0
            while peer.now() < self.seconds:
                values = torch.full((100,), float(number))
                began = peer.now()
                # It raises when the answer does not come, and that ends the run.
                answer = await peer.request(other, Ask(number, values), deadline=began + 60.0)
                assert torch.equal(answer.values, values)
                peer.record("asked_s", peer.now() - began)
                await peer.send(other, Model(number, torch.zeros(1 << 17)))
                number += 1
                await peer.sleep_until(peer.now() + 0.3)

        peer.serve(Ask, echo)
        async with peer.tasks() as group:
            group.start(work())
            group.start(listen())
            for other in range(PEERS):
                if other != peer.id:
                    group.start(ask(other))


@contextmanager
def burning(processes: int) -> Iterator[None]:
    """Processes that keep the cores busy beside those of the run."""
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for each in burners:
            each.kill()
            each.wait()


@pytest.mark.slow
@pytest.mark.timeout(BUSY_S + 120)
@pytest.mark.parametrize("security", ["noise", "none"])
def test_no_peer_is_taken_for_dead_however_busy_all_are(security: Any) -> None:
    settings = LiveSettings(
        horizon_s=BUSY_S + 60.0, security=security, heartbeat_s=0.5, dead_after_s=4.0,
        stop_s=30.0,
    )  # fmt: skip
    with burning(os.cpu_count() or 1):
        run = run_live(Busy(BUSY_S), Network(PEERS), processes=4, settings=settings)
    assert run.finished
    assert run.dropped == {}
    assert [each.what for each in run.happenings] == []
    asked = [row.value for row in run.series("asked_s")]
    assert len(asked) > PEERS * (PEERS - 1)
    # What was sent at last may still be on its way when a peer stops listening.
    assert len(run.series("model")) > len(asked) / 2
