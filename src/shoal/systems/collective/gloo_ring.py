"""What becomes of torch.distributed's Gloo group when one of its processes is killed.

`peers` processes of this machine reduce in a loop; after a while one gets SIGKILL. The others are
asked to go on: whoever gets an error tries again, a few times. A group of fixed members has no way
to leave one out, so this is what collectives with changing members are compared with.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from shoal.base.errors import ShoalError
from shoal.lab.card import System
from shoal.lab.scenario import Scenario

TRIES = 3
TIMEOUT_S = 5.0
"""How long Gloo waits within an operation before it raises."""
START_S = 120.0
"""How long a process may take to start and to reduce for the first times."""


@dataclass(frozen=True)
class _Outcome:
    """What one process says: reductions before its first error, and after it."""

    rank: int
    before: int
    after: int


def _member(rank: int, peers: int, file: str, size: int, report: Connection) -> None:
    """One process: reduce until an error, then try again."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=peers,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    values = torch.ones(size, device="cpu")
    before = after = errors = 0
    while errors <= TRIES:
        try:
            dist.all_reduce(values)
        except RuntimeError:
            errors += 1
            continue
        values.fill_(1.0)
        if errors:
            after += 1
        else:
            before += 1
        if not errors and before == 20:
            report.send(rank)
    report.send(_Outcome(rank, before, after))


def gloo_ring(scenario: Scenario, size: int = 4810) -> dict[str, float]:
    """Kill one of `scenario.peers` processes that reduce `size` numbers.

    worked_before: survivors that had reduced before the kill; survivors_failed: how many of them
    got an error then; reduced_after: reductions that they still achieved together.
    """
    peers = scenario.peers
    context = multiprocessing.get_context("spawn")
    # A pipe for each: a queue's lock dies with the process that was killed while it held it.
    reports, ends = zip(*(context.Pipe(duplex=False) for _ in range(peers)), strict=True)
    with tempfile.TemporaryDirectory(prefix="shoal-gloo-") as folder:
        file = str(Path(folder) / "store")
        members = [
            context.Process(target=_member, args=(rank, peers, file, size, end), daemon=True)
            for rank, end in enumerate(ends)
        ]
        try:
            for member in members:
                member.start()
            for rank, report in enumerate(reports):
                if not report.poll(START_S):
                    raise ShoalError(f"gloo: process {rank} reduced nothing within {START_S:g} s")
                report.recv()
            victim = members[-1].pid
            if victim is None:
                raise ShoalError("gloo: the process to kill is gone already")
            os.kill(victim, signal.SIGKILL)
            for member in members:
                member.join(60.0)
            found: list[_Outcome] = [each.recv() for each in reports[:-1] if each.poll()]
        finally:
            for member in members:
                member.kill()
                member.join()
    return {
        "survivors": float(peers - 1),
        "survivors_failed": float(len(found)),
        "worked_before": float(sum(each.before > 0 for each in found)),
        "reduced_after": float(sum(each.after for each in found)),
    }


SYSTEM = System(
    name="gloo-ring",
    kind="study",
    title="A Gloo group after one of its processes was killed",
    make=gloo_ring,
    scenario=Scenario("collective.gloo", peers=4, rounds=1),
)
