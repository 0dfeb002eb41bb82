"""An experiment on lockstep that leaves a checkpoint after every round, as a script of its own.

STOP_AT is a round after which it says so and reads from a pipe that nobody writes, so that a test
can kill it in the middle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shoal.base.stopwatch import Stopwatch
from shoal.engine.lockstep import Checkpoint
from shoal.engine.lockstep.lockstep import Lockstep
from shoal.lab import launch
from shoal.lab.experiment import Experiment
from shoal.lab.faults import FaultSetting, Round
from shoal.lab.scenario import Part, Scenario
from shoal.lab.store import Store

ROUNDS = 9


def experiment() -> Experiment:
    world = Scenario(
        "small", peers=6, rounds=ROUNDS, task=Part("digits", {"hidden": (4,)}), topology="ring",
        faults=(FaultSetting("crash", who=(1, 2), at=Round(3), until=Round(7)),), eval_every=2,
    )  # fmt: skip
    return Experiment({"ring": "dpsgd", "hub": "fedavg"}, world, seeds=2)


class Eager(Checkpoint):
    """Saves after every round."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, key, every_s=0.0)

    def offer(self, engine: Lockstep, round: int, watch: Stopwatch) -> None:
        self._wait_s = 0.0
        super().offer(engine, round, watch)
        if os.environ.get("STOP_AT") == str(round):
            sys.stdout.write("stands still\n")
            sys.stdout.flush()
            reader, _writer = os.pipe()
            os.read(reader, 1)


if __name__ == "__main__":
    launch.checkpoint = Eager
    with Store() as store:
        experiment().run(store)
