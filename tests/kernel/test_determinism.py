"""The same run gives the same bits: in any process, batched or not, on any executor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_programs import Gossip, event, mix

from shoal.base.errors import UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.engine.executor import Executor, Local, Processes, Threads
from shoal.kernel.peer import Cost, Peer
from shoal.world.device import Device
from shoal.world.faults import Corrupt, Crash, Loss
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

NETWORK = Network(
    8,
    links=Links(
        latency_s=0.02, latency_spread=0.5, jitter_s=0.05, loss=0.1, uplink_bytes_per_s=1e5, seed=3
    ),
    device=Device(flops_per_s=1e5, spread=0.7, overhead_s=0.01, seed=3),
    faults=(Crash(who=(2,), at=0.3, until=0.8), Loss(who=(5,), probability=0.5, at=0.2)),
)


def gossip(batching: str = "lazy", executor: Executor | None = None, seed: int = 9) -> Run:
    return simulate(
        Gossip(), NETWORK, seed=seed, settings=EventSettings(batching=batching), executor=executor
    )


def facts(run: Run) -> tuple[Any, ...]:
    return run.trace_digest, run.state_digest, run.messages_delivered, run.dropped, run.rows


@pytest.fixture(scope="module")
def plain() -> Run:
    return gossip()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SCRIPT = """
from test_determinism import gossip
run = gossip()
print(run.trace_digest, run.state_digest)
"""


def test_a_process_with_another_hash_seed_agrees(plain: Run) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True,
        check=True, timeout=50,
    )  # fmt: skip
    assert done.stdout.split() == [plain.trace_digest, plain.state_digest]


def test_a_run_repeats_and_another_seed_does_not(plain: Run) -> None:
    assert facts(gossip()) == facts(plain)
    other = gossip(seed=10)
    assert other.state_digest != plain.state_digest
    # Links and devices have seeds of their own; the programs drew other numbers, no other times.
    assert other.messages_sent == plain.messages_sent


def test_lazy_batching_changes_no_trace_and_hardly_a_number(plain: Run) -> None:
    calls: list[int] = []
    one = gossip(batching="off", executor=Counting(calls))
    many = gossip(executor=Counting(calls))
    assert facts(one)[0] == facts(plain)[0] == facts(many)[0]
    for peer, params in plain.final.items():
        torch.testing.assert_close(one.final[peer], params, rtol=1e-6, atol=1e-6)
    # It did batch: something ran for more than one peer.
    assert max(calls) > 1


class Counting:
    """Local, noting how many rows each batch has."""

    workers = 1

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows

    def run(self, function: Any, batches: Any) -> list[Any]:
        self._rows += [batch[2][0].shape[0] for batch in batches]
        return Local().run(function, batches)


class Halved(Local):
    """Local, with the batches that two workers would get."""

    workers = 2


def test_threads_and_processes_give_the_bits_of_this_process() -> None:
    """Peers of one pace, so that batches are large enough for two workers."""
    network = Network(8, device=Device(flops_per_s=1e5, overhead_s=0.01))

    def run(executor: Executor) -> tuple[Any, ...]:
        return facts(simulate(Gossip(), network, seed=9, executor=executor))

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(5, 257, generator=generator), torch.randn(5, 3, 257, generator=generator))
        for _ in range(4)
    ]
    expected, results = run(Halved()), Local().run(mix, batches)
    with Threads(2) as threads, Processes(2) as processes:
        for executor in (threads, processes):
            assert run(executor) == expected
            found = executor.run(mix, batches)
            assert all(torch.equal(a, b) for a, b in zip(found, results, strict=True))


def over_the_wrong_axis(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean()


def into_its_arguments(values: torch.Tensor) -> torch.Tensor:
    return values.mul_(2.0)


def with_hidden_randomness(values: torch.Tensor) -> torch.Tensor:
    return values + torch.rand(())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (over_the_wrong_axis, "gave other numbers"),
        (with_hidden_randomness, "global random"),
        (into_its_arguments, "writes into its arguments"),
    ],
)
def test_functions_that_may_not_be_batched_are_found(function: Any, words: str) -> None:
    async def run(peer: Any) -> None:
        await peer.compute(function, torch.arange(3.0) * peer.id, cost=Cost(seconds=1.0))

    with pytest.raises(UsageError, match=words):
        event(run, run, run)


def test_the_device_works_on_one_call_at_a_time_and_charges_flops() -> None:
    ends: list[float] = []

    async def run(peer: Any) -> None:
        async def one() -> None:
            await peer.compute(torch.mm, torch.ones(2, 3), torch.ones(3, 4), batch="never")
            ends.append(peer.now())

        async with peer.tasks() as group:
            group.start(one())
            group.start(one())

    result = event(run, device=Device(flops_per_s=48.0))
    assert ends == [1.0, 2.0]
    assert result.flops == 96.0


def test_corruption_is_keyed_too() -> None:
    network = Network(4, faults=(Corrupt(who=(0, 1), probability=0.5),))
    first, second = (simulate(Gossip(), network, seed=1) for _ in range(2))
    assert first.dropped.get("corrupt", 0) > 0
    assert facts(first) == facts(second)


def _square_only(x: torch.Tensor) -> torch.Tensor:
    """Takes one vector of three: a stack of them has another shape."""
    return x.view(3) * 2


@dataclass(frozen=True)
class Unstackable:
    async def run(self, peer: Peer) -> None:
        await peer.compute(_square_only, torch.ones(3), cost=Cost(seconds=1.0))


def test_a_function_that_raises_only_when_stacked_is_named() -> None:
    with pytest.raises(UsageError, match="stacked calls only"):
        simulate(Unstackable(), Network(4))
    assert simulate(Unstackable(), Network(4), settings=EventSettings(batching="off")).finished


def _doubled(x: Any, factor: Any) -> torch.Tensor:
    return x * 2.0


@pytest.mark.parametrize("peers", [1, 3])
def test_arguments_that_are_no_tree_are_refused_alone_and_together(peers: int) -> None:
    async def run(peer: Any) -> None:
        await peer.compute(_doubled, torch.ones(2), [3.0], cost=Cost(seconds=1.0))

    with pytest.raises(UsageError, match="neither a tensor"):
        event(*[run] * peers)


def test_only_calls_that_are_alike_run_as_one() -> None:
    """Other shapes, other constants and other structures are other batches, in any order."""
    rows: list[int] = []
    arguments = [
        (torch.ones(2), None), (torch.ones(3), None), (torch.ones(2), 1), (torch.ones(2), 2),
        (torch.ones(2), torch.ones(1)), (torch.ones(2), None), (torch.ones(3), None),
        (torch.ones(2), 1), (torch.ones(2), None),
    ]  # fmt: skip

    @dataclass(frozen=True)
    class Mixed:
        async def run(self, peer: Peer) -> None:
            x, factor = arguments[peer.id]
            for _ in range(2):
                x = await peer.compute(_doubled, x, factor, cost=Cost(seconds=1.0))
            assert x.tolist() == [4.0] * len(x)

    assert simulate(Mixed(), Network(len(arguments)), executor=Counting(rows)).finished
    assert sorted(rows) == sorted([3, 2, 2] * 2)
