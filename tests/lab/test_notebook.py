"""Inside a running event loop, as in a notebook: the library brings its own or needs none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from shoal.lab.scenario import Scenario
from shoal.lab.store import Store

# Rounds end as soon as everybody was heard; real deadlines are far away, so that all are heard.
WORLD = Scenario(
    "notebook", peers=4, rounds=2, round_s=20.0, topology="ring",
    task={"name": "digits", "split": "iid", "hidden": [8], "train_samples": 120},
    links={"name": "links", "latency_s": 0.01},
)  # fmt: skip


def in_a_loop(work: Callable[[], Any]) -> Any:
    """Call `work` as a notebook's cell does: no await, with a loop running in this thread."""

    async def main() -> Any:
        ticks: list[int] = []
        ticking = asyncio.ensure_future(_tick(ticks))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        found = work()
        # The loop is still ours, still running, and its tasks go on where they were.
        assert asyncio.get_running_loop() is loop
        before = len(ticks)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(ticks) > before
        ticking.cancel()
        assert asyncio.all_tasks() == {asyncio.current_task(), ticking}
        return found

    return asyncio.run(main())


async def _tick(ticks: list[int]) -> None:
    while True:
        ticks.append(len(ticks))
        await asyncio.sleep(0)


ENGINES = ["lockstep", "event", pytest.param("live", marks=pytest.mark.live)]


@pytest.mark.parametrize("engine", ENGINES)
def test_run_in_a_running_loop(engine: str) -> None:
    inside = in_a_loop(lambda: shoal.run("dpsgd", WORLD, engine=engine))
    assert inside.engine == engine
    assert inside.finished
    assert len(inside.series("accuracy")) == 8
    outside = shoal.run("dpsgd", WORLD, engine=engine)
    assert inside.state_digest == outside.state_digest


@pytest.mark.parametrize("engine", ["event", pytest.param("live", marks=pytest.mark.live)])
def test_program_in_a_running_loop(engine: str) -> None:
    run = in_a_loop(lambda: shoal.run("gossip", WORLD, engine=engine))
    assert run.engine == engine
    assert sorted(run.final) == [0, 1, 2, 3]
    assert run.messages_delivered > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_experiment_in_a_running_loop(engine: str, tmp_path: Any) -> None:
    arms = {"ring": "dpsgd", "nobody": "local-only"}
    store = Store(tmp_path)
    report = in_a_loop(lambda: shoal.Experiment(arms, WORLD, seeds=2, engine=engine).run(store))
    assert (report.arms, report.seeds) == (("ring", "nobody"), (0, 1))
    for seed in report.seeds:
        assert report.cell("ring", seed=seed).totals["bytes_sent"] > 0
        assert report.cell("nobody", seed=seed).totals["bytes_sent"] == 0
