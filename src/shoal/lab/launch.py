"""The seam between the lab and the engines: the one place in the lab that calls an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.lab.build import build

if TYPE_CHECKING:
    from shoal.lab.cell import Progress
    from shoal.lab.scenario import Scenario
    from shoal.world.record import Run


def launch(
    what: Any,
    scenario: Scenario,
    *,
    seed: int,
    engine: str = "auto",
    progress: Progress | None = None,
) -> Run:
    """Run a Strategy or Program in a scenario and return what it left behind.

    The scenario's parts are built here; the engine sees live objects and explicit faults only.
    """
    pieces = build(scenario)
    # ---- The engines are called here and nowhere else in the lab. ----
    from shoal.engine import run  # type: ignore[attr-defined]

    return run(
        what,
        peers=scenario.peers,
        seed=seed,
        engine=engine,
        rounds=scenario.rounds,
        seconds=scenario.seconds,
        round_s=scenario.round_s,
        eval_every=scenario.eval_every,
        eval_every_s=scenario.eval_every_s,
        eval_peers=scenario.eval_peers,
        task=pieces.task,
        topology=pieces.topology,
        exchange=pieces.exchange,
        aggregator=pieces.aggregator,
        transform=pieces.transform,
        attack=pieces.attack,
        byzantine=pieces.byzantine,
        links=pieces.links,
        device=pieces.device,
        faults=pieces.faults,
        batching=scenario.engine.batching,
        strict=scenario.engine.strict,
        torch_device=scenario.engine.device,
        progress=progress,
    )
