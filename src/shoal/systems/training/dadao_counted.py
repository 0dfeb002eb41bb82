"""Decentralised methods on strongly convex quadratics, counted: gradients, exchanges and time until
all peers are near the common minimum.

DADAO's and the other asynchronous methods' events run in a compiled loop, synchronous methods step
by step; no messages are simulated. What is counted follows the definitions of each method: an
exchange is one vector each way over one edge; in one unit of time a peer can take one gradient, and
an iteration of a synchronous method lasts as long as its slowest peer. A dual method's gradients
are those of conjugate functions, which quadratics have in closed form and most functions do not.

Nabli and Oyallon 2023 (arXiv 2208.00779).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Literal, get_args

import numpy as np

from shoal.base.errors import UsageError
from shoal.lab.build import build
from shoal.lab.card import Source, System
from shoal.lab.scenario import Scenario
from shoal.parts.tasks.quadratics import Quadratics
from shoal.parts.topology._gossip_rates import GossipRates, Rates, gossip_edges, gossip_rates
from shoal.parts.topology._measures import gossip_constants
from shoal.parts.topology.full import Full
from shoal.systems.training import _dadao_references as references
from shoal.systems.training._dadao_flow import Array, Constants, Z
from shoal.systems.training._dadao_loop import Problem, agenda, play, synchronised
from shoal.systems.training._dadao_references import World
from shoal.tensor import keyed
from shoal.world.record import Row, Run

Method = Literal[
    "dadao", "ssda", "msda", "adom+", "adom+ consensus", "continuized", "tracking", "gossip"
]  # fmt: skip

UNITS = 4000
"""Units of time after which an asynchronous method is given up."""
ITERATIONS = 60_000
BURN_IN = 0.1
"""Part of a run that is left out of the fit of its rate."""
_POINTS = 200


def dadao_counted(
    scenario: Scenario, method: Method = "dadao", rates: Rates = "uniform", slow: float = 1.0,
    precision: float = 1e-6, lr: float = 1.0,
) -> Run:  # fmt: skip
    """One method until the mean squared distance to the minimum is `precision` of what it was.

    The scenario says peers, topology and quadratics. rates: of gossip clocks; slow: how many times
    slower peer 0 takes gradients than the others; lr: step of "tracking" and "gossip" in units of
    1 / L. Series `distance`, relative to the start, by units of time; numbers at the end:
    `gradients`, `exchanges`, `time`, the graph's `chi_1` and `chi_2` of one exchange per unit of
    time, `floor` (where a method that does not arrive stays), `off` (by which part what the method
    keeps over all peers is off at the end; not for every method), `fit` (R^2 of a straight line
    through the logarithm of the distance). Raises UsageError for tasks that are no quadratics.
    """
    if method not in get_args(Method):
        raise UsageError(f"method={method!r}; need one of {', '.join(get_args(Method))}")
    if not (slow >= 1.0 and 0.0 < precision < 1.0 and lr > 0.0):
        raise UsageError(
            f"slow={slow}, precision={precision}, lr={lr}; need slow >= 1, a precision between 0 "
            "and 1 and a positive lr"
        )
    world = world_of(scenario, rates)
    first = float(((world.start - world.problem.minimum) ** 2).sum(1).mean())
    run = Run(engine="study", seed=scenario.seed, peers=scenario.peers)
    graph = world.rates
    chi_1, chi_2 = gossip_constants(graph.peers, graph.edges, graph.rates / graph.total)
    _tell(run, 0.0, chi_1=chi_1, chi_2=chi_2)
    if method == "dadao":
        _dadao(run, world, slow, precision, first)
    elif method == "continuized":
        _continuized(run, world, precision, first)
    elif method == "gossip":
        _gossip(run, world, lr, first)
    else:
        points, waves = _synchronous(world, method, lr)
        _iterate(run, world, method, lr, points, waves, slow, precision, first)
    return run


def world_of(scenario: Scenario, rates: Rates = "uniform") -> World:
    """The problem and the graph of a scenario, as arrays."""
    pieces = build(scenario)
    task = pieces.task
    if not isinstance(task, Quadratics):
        raise UsageError(
            f"Scenario {scenario.name!r}: task = {type(task).__name__}; these methods are compared "
            "on quadratics (set task = 'quadratics')"
        )
    problem = Problem(task.matrices.numpy(), task.centres.numpy(), task.minimum.numpy())
    edges = gossip_edges(pieces.topology or Full(scenario.peers))
    mu, smoothness = task.curvature
    start = task.init(keyed.key_of(scenario.seed, "init")).numpy()
    return World(
        problem, mu, smoothness, np.repeat(start[None], scenario.peers, 0),
        gossip_rates(scenario.peers, edges, rates),
    )  # fmt: skip


def _tell(run: Run, at: float, **numbers: float) -> None:
    run.rows.extend(Row(name, float(value), at) for name, value in numbers.items())


def _curve(run: Run, times: Array, distances: Array) -> None:
    step = max(1, math.ceil(len(times) / _POINTS))
    run.rows.extend(
        Row("distance", float(value), float(time), round(float(time)))
        for time, value in zip(times[::step], distances[::step], strict=True)
    )


def _dadao(run: Run, world: World, slow: float, precision: float, first: float) -> None:
    constants = Constants(world.mu, world.smoothness, world.rates.chi_1)
    own = (1.0 / slow, *(1.0,) * (run.peers - 1))
    events = agenda(run.seed, world.rates, UNITS, own)
    played = play(events, constants, world.problem, world.start, target=precision * first)
    times = np.arange(1.0, len(played.distances) + 1.0)
    _curve(run, times, played.distances / first)
    duals = synchronised(played, constants, played.time)[:, Z:]
    off = float(np.abs(duals.sum(0)).sum() / max(np.abs(duals).sum(), 1e-300))
    _tell(run, played.time, floor=float(played.distances[-1]) / first, off=off)
    if played.reached:
        _tell(
            run, played.time, gradients=played.gradients, exchanges=played.exchanges,
            time=played.time, fit=straightness(times, played.distances),
            rate_over_flow=_slope(times, played.distances) / constants.rate,
        )  # fmt: skip


def straightness(times: Array, distances: Array) -> float:
    """R^2 of a straight line through log distances, after the burn-in."""
    kept = times >= BURN_IN * times[-1]
    return float(np.corrcoef(times[kept], np.log(distances[kept]))[0, 1] ** 2)


def _slope(times: Array, distances: Array) -> float:
    """By how much the logarithm of the distance falls per unit of time."""
    kept = times >= BURN_IN * times[-1]
    return -float(np.polyfit(times[kept], np.log(distances[kept]), 1)[0])


def _continuized(run: Run, world: World, precision: float, first: float) -> None:
    edges = world.rates.edges
    share = np.full(len(edges), 1.0 / len(edges))
    clocks = GossipRates(run.peers, edges, share, 0.0, 0.0)
    # Each event takes two gradients, so this many make one per peer and unit of time.
    per_unit = run.peers / 2.0
    events = agenda(run.seed, clocks, UNITS * per_unit, (0.0,) * run.peers)
    done, apart, reached = references.continuized(world, events, precision * first)
    _tell(run, done / per_unit, floor=apart / first)
    if reached:
        _tell(
            run, done / per_unit, gradients=2 * done, exchanges=done, time=done / per_unit
        )  # fmt: skip


def _gossip(run: Run, world: World, lr: float, first: float) -> None:
    events = agenda(run.seed, world.rates, UNITS)
    distances = references.asynchronous_gossip(world, events, lr, _POINTS) / first
    times = np.linspace(0.0, UNITS, _POINTS + 1)[1:]
    _curve(run, times, distances)
    _tell(run, UNITS, floor=float(distances[-20:].mean()))


def _synchronous(world: World, method: Method, lr: float) -> tuple[Iterator[Array], int]:
    """The points of a method, and how many exchanges an edge carries in an iteration."""
    match method:
        case "ssda":
            return references.ssda(world), 1
        case "msda":
            return references.msda(world), references.chebyshev_waves(world)
        case "adom+":
            return references.adom_plus(world), 1
        case "adom+ consensus":
            return references.adom_plus(world, consensus=True), references.consensus_waves(world)
        case _:
            return references.gradient_tracking(world, lr), 2


def _iterate(
    run: Run, world: World, method: Method, lr: float, points: Iterator[Array], waves: int,
    slow: float, precision: float, first: float,
) -> None:  # fmt: skip
    distances: list[float] = []
    before = x = world.start
    for point in islice(points, ITERATIONS):
        before, x = x, point
        distances.append(float(((x - world.problem.minimum) ** 2).sum(1).mean()) / first)
        if not precision < distances[-1] < math.inf:
            break
    count = len(distances)
    times = slow * np.arange(1.0, count + 1.0)
    _curve(run, times, np.array(distances))
    _tell(run, slow * count, floor=distances[-1], **_kept(world, method, lr, before, x))
    if distances[-1] <= precision:
        exchanges = waves * len(world.rates.edges) * count
        _tell(
            run, slow * count, gradients=run.peers * count, exchanges=exchanges, time=slow * count
        )


def _kept(world: World, method: Method, lr: float, before: Array, x: Array) -> dict[str, float]:
    """What a synchronous method keeps, from its last two points: a number `off`, or nothing.

    Dual variables sum to 0, and those of the dual methods are the gradients at their points; mean
    trackers are the mean gradient, so that the mean point moves as by gradient descent.
    """
    slopes = world.gradient(x if method in ("ssda", "msda") else before)
    size = max(float(np.abs(slopes).sum()), 1e-300)
    if method in ("ssda", "msda"):
        return {"off": float(np.abs(slopes.sum(0)).sum()) / size}
    if method == "tracking":
        step = (before - x).sum(0) * world.smoothness / lr
        # The points' own rounding, divided by the step, is no departure of the method.
        size += float(np.abs(x).sum()) * world.smoothness / lr
        return {"off": float(np.abs(step - slopes.sum(0)).sum()) / size}
    return {}


def sums_are_kept(run: Run) -> str | None:
    """What a method keeps over all peers is what it was, up to rounding."""
    for row in run.series("off"):
        if not row.value <= 1e-9:
            return f"the sum over all peers is off by {row.value:.3g} of its parts"
    return None


def counts_are_whole(run: Run) -> str | None:
    """Gradients and exchanges are counted one by one, and distances by rising time."""
    for name in ("gradients", "exchanges"):
        for row in run.series(name):
            if row.value < 0 or row.value != round(row.value):
                return f"{row.value} {name}"
    times = [row.time_s for row in run.series("distance")]
    if times != sorted(set(times)):
        return "distances are not in the order of time"
    return None


INVARIANTS = (sums_are_kept, counts_are_whole)
"""What every run keeps; a study is checked by its tests, since there are no faults to explore."""

SYSTEM = System(
    name="dadao-counted",
    kind="study",
    title="Decentralised methods on quadratics: gradients, exchanges and time to a precision",
    make=dadao_counted,
    source=Source(
        "Nabli and Oyallon 2023",
        "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization",
        arxiv="2208.00779",
        venue="ICML 2023",
    ),
    scenario="training.quadratics",
    deviations=("claims about these methods are on the card of dadao",),
)
