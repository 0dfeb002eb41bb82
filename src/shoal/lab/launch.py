"""The seam between the lab and the engines: the one place in the lab that calls an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.lab.build import Pieces, build, check_apart
from shoal.lab.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

    from shoal.engine.lockstep import Checkpoint
    from shoal.lab.cell import Progress
    from shoal.rounds.measure import Measure
    from shoal.rounds.method import Method
    from shoal.world.network import Network
    from shoal.world.record import Run

ENGINES = ("auto", "event", "lockstep", "live")

LIVE_ROUND_S = 2.0
"""Links and devices of the simulation say nothing of how fast this machine is; a round ends earlier
anyhow when everybody was heard."""


def launch(
    what: Any, scenario: Scenario, *, seed: int, engine: str = "auto",
    progress: Progress | None = None,
) -> Run:  # fmt: skip
    """Run a Strategy or Program in a scenario and return what it left behind.

    "auto" is `lockstep` for a strategy whose faults it knows, else `event`.
    """
    _check_live(what)
    if is_strategy(what):
        return launch_seeds(what, [scenario], [seed], engine=engine, progress=progress)[0]
    if engine not in ("auto", "event", "live"):
        raise UsageError(
            f"engine {engine!r} cannot run a program (use 'event' or 'live'; lockstep is for "
            "strategies)"
        )
    pieces = build(replace(scenario, seed=seed))
    network = network_of(scenario, pieces)
    run = _run_program(
        bound(what, scenario, pieces, seed), scenario, pieces, network, seed, engine, progress
    )
    return _named(run, pieces.task)


def launch_seeds(
    what: Any, scenarios: Sequence[Scenario], seeds: Sequence[int], *, engine: str = "auto",
    progress: Progress | None = None, checkpoint: Checkpoint | None = None,
) -> list[Run]:  # fmt: skip
    """One strategy in one scenario with several seeds: stacked in one lockstep run where it can be.

    `scenarios[i]` is the scenario of `seeds[i]`; they may differ in what a seed determines. The
    checkpoint serves one lockstep run, so it is left alone on other engines, and where several
    seeds run one after the other.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r}; need one of {', '.join(ENGINES)}")
    _check_live(what)
    least_s = LIVE_ROUND_S if engine == "live" else 0.0
    made: list[tuple[Method, Network, Pieces, Measure]] = []
    for scenario, seed in zip(scenarios, seeds, strict=True):
        like = made[0][0] if made else None
        made.append(method_of(what, scenario, seed, least_s, like))
    from shoal.engine.lockstep import LockstepSettings, run_lockstep
    from shoal.engine.lockstep.timeline import beyond

    calm = not any(n.links.windowed or beyond(n.faults, m.exchange.hub) for m, n, _, _ in made)
    if engine == "lockstep" or (engine == "auto" and calm):
        methods = [method for method, *_ in made]
        networks = [network for _, network, *_ in made]
        measures = [measure for *_, measure in made]
        note = None if progress is None else _rounds_note(progress, methods[0].rounds, checkpoint)
        whole = scenarios[0].seconds
        settings = LockstepSettings(horizon_s=float("inf") if whole is None else whole)
        if whole is None or len(methods) == 1:
            runs = run_lockstep(
                methods, networks, settings=settings, measures=measures, progress=note,
                checkpoint=checkpoint,
            )  # fmt: skip
        else:
            # Seeds reach a horizon in seconds in different rounds, so each runs by itself.
            runs = [
                run_lockstep([m], [n], settings=settings, measures=[o], progress=note)[0]
                for m, n, o in zip(methods, networks, measures, strict=True)
            ]
    else:
        from shoal.rounds.adapter import Rounds

        runs = []
        for (method, network, pieces, measure), scenario, seed in zip(
            made, scenarios, seeds, strict=True
        ):
            program = Rounds.of(method)
            runs.append(
                _run_program(program, scenario, pieces, network, seed, engine, progress, measure)
            )
    return [_named(run, pieces.task) for run, (_, _, pieces, _) in zip(runs, made, strict=True)]


def checkpoint(path: Path, key: str) -> Checkpoint:
    """A file that keeps the rounds of one lockstep run; see `launch_seeds`."""
    from shoal.engine.lockstep import Checkpoint

    return Checkpoint(path, key)


def is_strategy(what: Any) -> bool:
    """Whether this is written as rounds (init, local, apply, params), not as a program."""
    return all(hasattr(what, name) for name in ("init", "local", "apply", "params"))


def _check_live(what: Any) -> None:
    """Whether an object from Python is a strategy or a program."""
    name = what.__name__ if isinstance(what, type) else type(what).__name__
    methods = ("init", "local", "apply", "params")
    lacking = [method for method in methods if not callable(getattr(what, method, None))]
    run = getattr(what, "run", None)
    if isinstance(what, type) and (not lacking or callable(run)):
        raise UsageError(f"{name} is a class; need an object of it (write {name}())")
    # Settings of a program make it from the task: `bind`.
    if not lacking or callable(run) or callable(getattr(what, "bind", None)):
        return
    some = f"this strategy lacks {', '.join(lacking)}" if len(lacking) < 4 else "it has neither"
    raise UsageError(
        f"{what!r} cannot be run: {some} (give a system's name, an Arm, a strategy with "
        f"{', '.join(methods)}, or a program with run)"
    )


def network_of(scenario: Scenario, pieces: Pieces) -> Network:
    """The world around the peers."""
    from shoal.world.device import Device
    from shoal.world.links import Links
    from shoal.world.nat import placed
    from shoal.world.network import Network

    return Network(
        scenario.peers, pieces.topology, pieces.links or Links(), pieces.device or Device(),
        pieces.faults, placed(dict(scenario.nats), scenario.seed),
    )  # fmt: skip


def bound(what: Any, scenario: Scenario, pieces: Pieces, seed: int) -> Any:
    """A program with its workload, if it takes one."""
    bind = getattr(what, "bind", None)
    if bind is None:
        return what
    from shoal.rounds.workload import Workload

    if pieces.task is None:
        raise UsageError(
            f"Scenario {scenario.name!r}: {type(what).__name__} learns and needs a task "
            "(set task = 'digits')"
        )
    aggregator, transform = _defaults(pieces)
    workload = Workload(
        pieces.task, aggregator, transform, scenario.rounds, scenario.seconds, seed,
        max(1, scenario.eval_every), scenario.initial == "independent",
        topology=pieces.topology,
    )  # fmt: skip
    return bind(workload)


def _defaults(pieces: Pieces) -> tuple[Any, Any]:
    from shoal.parts import find

    spec = pieces.task.spec
    transform = pieces.transform or find("transform", "identity")()
    aggregator = pieces.aggregator or find("aggregate", "mean")()
    bind = getattr(aggregator, "bind", None)
    return aggregator if bind is None else bind(spec), transform.bind(spec)


def program_of(what: Any, scenario: Scenario, seed: int) -> tuple[Any, Network]:
    """A Strategy or Program as the program that every peer runs, and the world around them."""
    if is_strategy(what):
        from shoal.rounds.adapter import Rounds

        method, network, *_ = method_of(what, scenario, seed)
        return Rounds.of(method), network
    pieces = build(replace(scenario, seed=seed))
    return bound(what, scenario, pieces, seed), network_of(scenario, pieces)


def method_of(
    what: Any, scenario: Scenario, seed: int, least_s: float = 0.0, like: Method | None = None
) -> tuple[Method, Network, Pieces, Measure]:
    """A Strategy with everything around it that a scenario describes.

    least_s: how long a round must be at least when the scenario does not say how long it is; like:
    the method of another seed, whose work need not be counted again.
    """
    from shoal.engine.lockstep import round_seconds
    from shoal.parts import find
    from shoal.rounds.method import Method

    if scenario.rounds is None:
        raise UsageError(
            f"Scenario {scenario.name!r}: no rounds; a strategy needs a number of them (set rounds)"
        )
    pieces = build(replace(scenario, seed=seed))
    if pieces.task is None:
        raise UsageError(f"Scenario {scenario.name!r}: no task to learn (set task = 'digits')")
    exchange = pieces.exchange
    if exchange is None:
        topology = pieces.topology or find("topology", "full")(scenario.peers)
        exchange = find("exchange", "gossip")(topology)
    if pieces.aggregator is not None and hasattr(what, "combine"):
        raise UsageError(
            f"aggregator {type(pieces.aggregator).__name__}: {type(what).__name__} combines what "
            "its peers hear by itself (leave the aggregator out)"
        )
    aggregator, transform = _defaults(pieces)
    told = getattr(aggregator, "byzantine", 0)
    if isinstance(told, int) and told >= max(scenario.peers, 2):
        raise UsageError(
            f"aggregator {type(aggregator).__name__}: byzantine={told} with {scenario.peers} "
            f"peers; need at most {scenario.peers - 1}, since somebody must be honest (lower it)"
        )
    network = network_of(scenario, pieces)
    restarts = any(f.kind == "crash" and f.until is not None for f in pieces.faults)
    method = Method(
        what, pieces.task, exchange, aggregator, transform, scenario.rounds,
        scenario.round_s or 1.0, seed, pieces.attack if pieces.byzantine else None,
        pieces.byzantine, scenario.eval_every or scenario.rounds, int(restarts),
        scenario.initial == "independent",
    )  # fmt: skip
    method = replace(method, counted=(like if like and method.works_as(like) else method).work_cost)
    if scenario.round_s is None:
        method = replace(method, round_s=max(least_s, round_seconds(method, network)))
    return method, network, pieces, measure_of(scenario, pieces, seed)


def measure_of(scenario: Scenario, pieces: Pieces, seed: int) -> Measure:
    """What a scenario says is to be measured of the models; it must have a task."""
    from shoal.parts import find
    from shoal.rounds.measure import Measure

    of_mean = tuple(_measure(find("measure", name)(), pieces.attack) for name in scenario.measures)
    return Measure(
        pieces.task, seed=seed, byzantine=pieces.byzantine, evaluated=scenario.eval_peers,
        of_mean=of_mean,
    )  # fmt: skip


def _measure(measure: Any, attack: Any) -> Any:
    bind = getattr(measure, "bind", None)
    return measure if bind is None else bind(attack)


def _run_program(
    program: Any, scenario: Scenario, pieces: Pieces, network: Network, seed: int, engine: str,
    progress: Progress | None, measure: Measure | None = None,
) -> Run:  # fmt: skip
    if measure is None and pieces.task is not None:
        measure = measure_of(scenario, pieces, seed)
    horizon_s = float("inf") if scenario.seconds is None else scenario.seconds
    note = None if progress is None else _seconds_note(progress, scenario.seconds, engine)

    if engine == "live":
        from shoal.engine.live import LiveSettings, run_live

        live = LiveSettings(horizon_s=horizon_s)
        processes = min(scenario.engine.processes, network.peers)
        if processes > 1:
            check_apart(scenario)
        return run_live(
            program, network, seed=seed, processes=processes, settings=live, observer=measure,
            progress=note,
        )  # fmt: skip
    from shoal.engine.event import EventSettings, simulate

    settings = EventSettings(
        batching=scenario.engine.batching, strict=scenario.engine.strict, horizon_s=horizon_s
    )
    return simulate(program, network, seed=seed, settings=settings, observer=measure, progress=note)


def _seconds_note(progress: Progress, whole_s: float | None, engine: str) -> Any:
    kind = "on sockets" if engine == "live" else "virtual"

    def note(time_s: float, events: int) -> None:
        part = min(1.0, time_s / whole_s) if whole_s else 0.0
        progress(part, f"{time_s:.1f} s {kind}, {events:,} events")

    return note


def _rounds_note(progress: Progress, rounds: int, checkpoint: Checkpoint | None) -> Any:
    def note(done: int) -> None:
        text = f"round {done} of {rounds}"
        begin = 0 if checkpoint is None else checkpoint.resumed
        if begin:
            text = f"resumed at {text}" if done == begin else f"{text}, resumed at round {begin}"
        progress(done / rounds, text)

    return note


def _named(run: Run, task: Any) -> Run:
    """How final parameters split into named tensors."""
    if task is not None:
        run.names, run.shapes = task.spec.names, task.spec.shapes
    return run
