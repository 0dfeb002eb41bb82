"""Benches: their contract at the smallest sizes, and that contestants compute the same thing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.lab import bench
from shoal.lab.bench import Row, bounded, kernel, missing
from shoal.lab.bench._by_hand import ChannelsLastLoop, StackedMLP, VmapLoop
from shoal.lab.bench._plain import PlainLoop
from shoal.lab.bench._rounds import event, lockstep, start
from shoal.lab.bench._run import BenchFailed
from shoal.lab.bench._timing import alternate
from shoal.lab.bench._workload import Workload, small_cnn, small_mlp
from shoal.parts import find


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a bench's own process: two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rows_judge_themselves() -> None:
    alone = Row.of("a", 2.0, "s", bound="<= 3")
    assert (alone.ratio, alone.holds) == (None, True)
    ratio = Row.of("a", 2.0, "s", against=("b", 10.0), bound="<= 1/7")
    assert (ratio.ratio, ratio.holds) == (0.2, False)
    assert Row.of("a", 2.0, "s", against=("b", 0.0), bound=">= 5").ratio == math.inf
    assert Row.of("a", 2.0, "s").holds is None
    assert Row.of("a", math.nan, "s", bound="<= 3").holds is False
    assert missing("a", "no such tool", ">= 1").holds is None
    assert bounded(200_000.0, ">= 200,000")
    for wrong in ("< 3", "3", "<= three", "<= 1/0x"):
        with pytest.raises(UsageError, match="need '<= number'"):
            bounded(1.0, wrong)


def test_discovery_and_titles() -> None:
    names = bench.names()
    assert names == tuple(sorted(names))
    assert {"star-mlp", "star-cnn", "kernel", "scale", "asynchronous", "startup"} <= set(names)
    for name in names:
        assert len(bench.title(name)) > 20
        assert callable(bench.find(name).measure)
    with pytest.raises(UsageError, match="did you mean 'kernel'"):
        bench.find("kernle")


def test_naming_benches_loads_no_torch() -> None:
    code = (
        "import sys, shoal.lab.bench as b; b.title(b.names()[0]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=(pytest.mark.slow, pytest.mark.timeout(300)))
        if n in ("scale", "collective", "live")
        else n
        for n in bench.names()
    ],
)
def test_every_bench_runs_at_its_smallest_size(name: str) -> None:
    notes: list[str] = []
    rows = list(bench.find(name).measure(True, notes.append))
    assert rows
    assert notes
    assert len({row.name for row in rows}) == len(rows)
    assert any(row.bound is not None for row in rows)
    for row in rows:
        assert row.value is None or math.isfinite(row.value)
        assert row.reference is None or row.value is None or row.ratio is not None
        assert (row.bound is None) == (row.holds is None)
    values = {row.name: row.value for row in rows}
    if name == "asynchronous":
        assert values["asynchronous gossip: same trace digest (1 = yes)"] == 1.0
        assert (values["asynchronous gossip: deliveries"] or 0) > 0
    if name == "startup":
        assert values["import shoal: loads torch (1 = yes)"] == 0.0


def test_a_bench_in_its_own_process_judges_nothing_at_the_smallest_size() -> None:
    notes: list[str] = []
    rows = list(bench.run("kernel", tiny=True, note=notes.append))
    assert len(rows) >= 5
    assert notes
    assert {(row.bound, row.holds) for row in rows} == {(None, None)}


def test_full_sizes_state_every_bound() -> None:
    text = "".join(path.read_text() for path in Path(bench.__file__).parent.glob("*.py"))
    bounds = ("<= 1.15", "<= 1.5", "<= 1/7", "<= 0.7", "<= 0.4", ">= 200000", ">= 100000",
              ">= 1.5", "<= 12", "<= 1/5", "<= 0.3", "<= 0.5")  # fmt: skip
    assert [bound for bound in bounds if f'"{bound}"' not in text] == []


@pytest.mark.parametrize(
    ("workload", "loops", "dim"),
    [
        (Workload(5, 15, 8, find("models", "mlp")(hidden=(16,))), (VmapLoop, StackedMLP), 1210),
        (Workload(3, 6, 28, find("models", "cnn")()), (VmapLoop, ChannelsLastLoop), 27_562),
    ],
)
def test_contestants_compute_the_same_models(workload: Workload, loops: tuple, dim: int) -> None:
    # One batch per epoch, so that the order of the samples does not matter.
    task, rounds = workload.task(), 3
    assert task.spec.dim == dim
    plain = start(task, workload, PlainLoop)
    begin = plain.params()
    for _ in range(rounds):
        plain.round()
    assert (plain.params() - begin).norm() > 1e-2
    for loop in loops:
        hand = start(task, workload, loop)
        torch.testing.assert_close(hand.params(), begin)
        for _ in range(rounds):
            hand.round()
        torch.testing.assert_close(hand.params(), plain.params(), atol=2e-5, rtol=1e-4)
    world = workload.star(task, rounds)
    for engine in (lockstep, event):
        final = engine(world).final[0]
        torch.testing.assert_close(final, plain.params(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("loop", [VmapLoop, StackedMLP, PlainLoop, ChannelsLastLoop])
def test_loops_take_every_sample_once_an_epoch(loop: type) -> None:
    # At a small rate two steps add up to twice the gradient of all samples, whatever the order.
    # A smaller one would vanish in the last digits of the parameters.
    workload = Workload(2, 64, 8, find("models", "mlp")(hidden=(4,)))
    task, module = workload.task(), workload.module()
    index = task.shares.index
    x, y = task.x[index], task.y[index]
    made = loop(module, x, y, 1e-2, 32)
    begin = made.params().clone()
    made.round()
    expected = torch.zeros_like(begin)
    for mine, labels in zip(x, y, strict=True):
        found = torch.nn.functional.cross_entropy(module(mine), labels)
        gradients = torch.autograd.grad(found, list(module.parameters()))
        expected += torch.cat([g.flatten() for g in gradients])
    moved = begin - made.params()
    assert torch.nn.functional.cosine_similarity(moved, expected, 0) > 0.999
    torch.testing.assert_close(moved.norm(), 1e-2 * expected.norm(), rtol=0.02, atol=0.0)


def test_sizes_of_the_workloads() -> None:
    mlp, cnn = small_mlp(False), small_cnn(False)
    assert (mlp.peers, mlp.samples, mlp.steps) == (100, 15, 1)
    assert (cnn.peers, cnn.samples, cnn.steps) == (16, 600, 19)
    assert sum(p.numel() for p in mlp.module().parameters()) == 9_610
    assert sum(p.numel() for p in cnn.module().parameters()) == 27_562


def test_kernel_contestants_do_the_same_number_of_deliveries() -> None:
    turns = 30
    assert kernel.plain(turns).messages_delivered == turns * kernel.PEERS
    assert kernel.bare_heap(turns) == turns * kernel.PEERS
    full = kernel.full(turns)
    lost = full.dropped.get("lost", 0)
    assert full.messages_delivered + lost + full.messages_in_flight == full.messages_sent
    assert full.messages_delivered > 0.9 * turns * kernel.PEERS
    assert kernel.PEERS < kernel.largest_heap(40) <= 2 * kernel.PEERS + 1_000


def test_contestants_take_turns_and_the_first_run_does_not_count() -> None:
    order: list[str] = []
    times = alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, lambda text: None
    )
    assert order == ["a", "b"] * 3
    assert set(times) == {"a", "b"}
    assert times["a"].wall >= 0


def test_a_bench_that_breaks_down_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.lab.bench._run._known", lambda name: name)
    with pytest.raises(BenchFailed, match="no bench 'absent'"):
        list(bench.run("absent", tiny=True))
