"""Coded computing of one function on random inputs: who is found out, and what results are worth.

No peers: shares, answers, liars and decoding are arrays, all trials at once. For one function every
dimension of the code is tried against every number and size of lies; the same draws serve for all.

On Securing Berrut Approximated Coded Computing Through Discrete Cosine Transforms, 2025 (arXiv
2507.01330).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab.build import build
from shoal.lab.card import System
from shoal.lab.scenario import Scenario
from shoal.parts.coding.berrut_code import BerrutCode
from shoal.parts.coding.code_dimension import Trials, relative_error
from shoal.parts.coding.lagrange_code import LagrangeCode
from shoal.parts.coding.replication_code import ReplicationCode
from shoal.parts.tasks.base import ModuleTask
from shoal.systems.coding._sbacc_model import test_set, trained
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread
from shoal.world.record import Row, Run

Function = Literal["exp", "sigmoid", "sin", "x sin x", "relu", "layer"]
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "sigmoid": torch.sigmoid, "sin": torch.sin,
    "x sin x": lambda x: x * x.sin(), "relu": torch.relu,
}  # fmt: skip

DIMENSIONS = (11, 15, 21, 25)
CURVE = (7, 9, 11, 13, 15, 17, 19, 21, 23, 25)
"""Dimensions of the curve of error against dimension, with 3 liars of magnitude 1."""
MAGNITUDES = (0.1, 1.0, 10.0, 100.0)
LIARS = (0, 1, 2, 3, 4, 5)
MISSING = (0, 2, 4)
DEGREE = 5
"""Of the polynomials that Lagrange coding takes the function for: with K = 5 and N = 31 it then
finds 5 liars, as the other code does at dimension 21."""


@dataclass(frozen=True)
class Point:
    """One setting of the trials, in the words in which rows carry it."""

    dimension: int
    liars: int
    magnitude: float
    missing: int

    def labels(self) -> tuple[tuple[str, str], ...]:
        return (
            ("dimension", str(self.dimension)), ("liars", str(self.liars)),
            ("magnitude", repr(self.magnitude)), ("missing", str(self.missing)),
        )  # fmt: skip


STANDARD = Point(0, 3, 1.0, 0)
"""What the single numbers of a run are for."""


def points() -> tuple[Point, ...]:
    """Every setting that is tried; missing answers with lies of magnitude 1."""
    grid = [
        Point(dimension, liars, magnitude, missing)
        for dimension in DIMENSIONS
        for liars in LIARS
        for magnitude in (MAGNITUDES if liars else (1.0,))
        for missing in (MISSING if magnitude == 1.0 else (0,))
    ]
    curve = [Point(size, STANDARD.liars, STANDARD.magnitude, STANDARD.missing) for size in CURVE]
    return tuple(dict.fromkeys(grid + curve))


def sbacc_trials(
    scenario: Scenario, function: Function = "sigmoid", trials: int = 6, K: int = 5, N: int = 31,
    dim: int = 50,
) -> Run:  # fmt: skip
    """`trials` tasks of K inputs with `dim` standard normal entries over N workers.

    "layer" is the hidden layer of the scenario's model, trained, applied to 8x8 digits of its test
    set; lies are as large as for the others. Rows with labels (dimension, liars, magnitude,
    missing): "located", the share of trials in which exactly the liars were left out, "error", the
    median relative error, "plain", the same without leaving anybody out, "trusted", and with 3
    liars of magnitude 1 "error_bare", by the zeros of the locator alone. Rows with the label
    missing alone: "clean" and "clean_second", without lies, for nodes of both kinds. Numbers:
    `sbacc`, `best` (its dimension), `bacc`, `bacc_second`, `lagrange`, `replication`, `uncoded`:
    errors with 3 liars of magnitude 1, medians but for `uncoded`, which is a mean.
    """
    if function not in get_args(Function):
        raise UsageError(f"function={function!r}; need one of {', '.join(get_args(Function))}")
    if trials < 1 or not 2 <= K <= min(DIMENSIONS) or max(CURVE) >= N:
        raise UsageError(
            f"trials={trials}, K={K}, N={N}; need a trial, K from 2 to {min(DIMENSIONS)} and N "
            f"above {max(CURVE)}"
        )
    watch = Stopwatch()
    run = Run(engine="study", seed=scenario.seed, peers=scenario.peers)
    with one_thread():
        f, inputs, lies, draws = _task(scenario, function, trials, K, N, dim)
        _play(run, f, inputs, lies, draws, K, N)
    run.wall_s, run.cpu_s = watch.wall_s, watch.cpu_s
    return run


def _task(
    scenario: Scenario, function: Function, trials: int, K: int, N: int, dim: int
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Trials]:
    """The function, inputs [trials, K, dim], lies [trials, N, out] and the draws."""
    if function != "layer":
        draws = Trials.drawn(scenario.seed, trials, K, N, dim)
        return _PLAIN[function], draws.inputs, draws.lies, draws
    task = build(scenario).task
    if not isinstance(task, ModuleTask):
        raise UsageError(
            f"Scenario {scenario.name!r}: task = {type(task).__name__}; function='layer' "
            "needs a model with a hidden layer (set task = 'digits')"
        )
    params = trained(task, scenario.seed, 300)
    hidden = next(p for name, p in task.spec.views(params).items() if p.dim() == 2)
    weight = hidden.to(torch.float64).cpu()
    bias = list(task.spec.views(params).values())[1].to(torch.float64).cpu()
    images = test_set(task)[0].flatten(1).to(torch.float64).cpu()
    draws = Trials.drawn(scenario.seed, trials, K, N, images.shape[1], len(bias))
    order = keyed.uniform(
        keyed.grid(keyed.key_of(scenario.seed, "images"), len(images))
    ).argsort()  # fmt: skip
    chosen = order.repeat(-(-trials * K // len(order)))[: trials * K]
    return (
        lambda x: torch.relu(x @ weight.T + bias), images[chosen].view(trials, K, -1), draws.lies,
        draws,
    )  # fmt: skip


def _play(
    run: Run, f: Callable[[Tensor], Tensor], inputs: Tensor, lies: Tensor, draws: Trials, K: int,
    N: int,
) -> None:  # fmt: skip
    truth = f(inputs)
    plain = BerrutCode(K, N, code_dim=None)
    second = BerrutCode(K, N, nodes="chebyshev2")
    honest, honest_second = (f(code.encode(inputs)) for code in (plain, second))

    def error(Y: Tensor) -> float:
        return float(relative_error(Y, truth).median())

    def tell(name: str, value: float, *labels: tuple[str, str]) -> None:
        run.rows.append(Row(name, value, 0.0, labels=labels))

    for missing in MISSING:
        present, label = draws.present(0, missing), ("missing", str(missing))
        tell("clean", error(plain.interpolate(honest, present)), label)
        tell("clean_second", error(second.interpolate(honest_second, present)), label)
    best: dict[int, float] = {}
    for point in points():
        liars = draws.liars(point.liars)
        present = draws.present(point.liars, point.missing)
        answers = honest + point.magnitude * lies * liars.unsqueeze(-1)
        result = BerrutCode(K, N, code_dim=point.dimension).decode_all(answers, present)
        labels = point.labels()
        exact = (result.errors == liars).all(-1)
        tell("located", float(exact.double().mean()), *labels)
        tell("error", error(result.Y), *labels)
        tell("plain", error(plain.interpolate(answers, present)), *labels)
        tell("trusted", float(result.trusted.double().mean()), *labels)
        if Point(0, point.liars, point.magnitude, point.missing) == STANDARD:
            best[point.dimension] = error(result.Y)
            bare = BerrutCode(K, N, code_dim=point.dimension, exchange=False)
            tell("error_bare", error(bare.decode_all(answers, present).Y), *labels)
    chosen = min(best, key=lambda size: best[size])
    tell("best", float(chosen))
    tell("sbacc", best[chosen])
    _others(tell, error, f, inputs, lies, draws, (plain, second), K, N)


def _others(
    tell: Callable[..., None], error: Callable[[Tensor], float], f: Callable[[Tensor], Tensor],
    inputs: Tensor, lies: Tensor, draws: Trials, berrut: tuple[BerrutCode, BerrutCode], K: int,
    N: int,
) -> None:  # fmt: skip
    """What it is compared with, under the same lies of the same workers."""
    lied = STANDARD.magnitude * lies * draws.liars(STANDARD.liars).unsqueeze(-1)
    present = draws.present(STANDARD.liars, STANDARD.missing)
    for name, code in zip(("bacc", "bacc_second"), berrut, strict=True):
        tell(name, error(code.interpolate(f(code.encode(inputs)) + lied, present)))
    for name, code in (
        ("lagrange", LagrangeCode(K, N, DEGREE, noise=None)),
        ("replication", ReplicationCode(K, N)),
    ):  # fmt: skip
        tell(name, error(code.decode_all(f(code.encode(inputs)) + lied, present).Y))
    # Without a code K workers do it all, of whom as large a share lies. In most trials nobody does,
    # so that a median would say nothing.
    tell("uncoded", float(relative_error(f(inputs) + lied[:, :K], f(inputs)).mean()))


SYSTEM = System(
    name="sbacc-trials",
    kind="study",
    title="Coded computing of a function on random inputs, against liars",
    make=sbacc_trials,
    scenario="coding.digits_inference",
)
