"""Just One Byte where nothing fails: one model stands for all machines, which hold the same bits.

The arithmetic of `just-one-byte` without messages and clocks, as fast as a loop written by hand; a
test compares both bit for bit. For grids of learning rates, and for long runs.
"""

from __future__ import annotations

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab.build import build
from shoal.lab.card import System
from shoal.lab.scenario import Scenario
from shoal.parts.zeroth_order.calm import calm
from shoal.parts.zeroth_order.replay import Rule
from shoal.parts.zeroth_order.scalars import FourBytes, OneByte
from shoal.parts.zeroth_order.spsa import SPSA
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread
from shoal.world.record import Row, Run


def just_one_byte_calm(
    scenario: Scenario, lr: float = 6e-3, eps: float = 1e-3, samples: int = 1,
    batch_size: int = 32, mean: bool = True, number: str = "byte", lowest: int = -74,
) -> Run:  # fmt: skip
    """The curves of a run of `scenario.rounds` iterations; settings as in `just-one-byte`.

    Records `mean_model_loss` and `mean_model_accuracy` before the first iteration and after every
    `eval_every`, and at the end `payload_bytes` of all machines. UsageError for faults, and for a
    world without a task or rounds.
    """
    if number not in ("byte", "float"):
        raise UsageError(f"just-one-byte-calm: number={number!r}; need byte or float")
    if scenario.faults:
        raise UsageError("just-one-byte-calm: faults; nothing fails here (take just-one-byte)")
    task, rounds = build(scenario).task, scenario.rounds
    if task is None or rounds is None:
        raise UsageError("just-one-byte-calm: no task or no rounds (set both)")
    codec = OneByte(lowest) if number == "byte" else FourBytes()
    rule = Rule(scenario.seed, lr, samples, codec, mean)
    every, watch = max(1, scenario.eval_every), Stopwatch()
    run = Run("study", scenario.seed, scenario.peers)
    params = task.init(keyed.key_of(scenario.seed, "init"))
    payload = 0
    with one_thread():
        _evaluate(run, task.evaluate(params), 0)
        steps = calm(task, rule, SPSA(eps, samples, batch_size), params, rounds)
        for iteration, (entry, params) in enumerate(steps):
            payload += len(entry.codes)
            if (iteration + 1) % every == 0 or iteration + 1 == rounds:
                _evaluate(run, task.evaluate(params), iteration)
    run.rows.append(Row("payload_bytes", float(payload), 0.0, rounds - 1))
    run.final = {0: params.cpu()}
    run.names, run.shapes = task.spec.names, task.spec.shapes
    run.wall_s, run.cpu_s = watch.wall_s, watch.cpu_s
    return run


def _evaluate(run: Run, found: dict[str, object], iteration: int) -> None:
    for name, value in found.items():
        run.rows.append(Row(f"mean_model_{name}", float(value), 0.0, iteration))  # type: ignore[arg-type]


SYSTEM = System(
    name="just-one-byte-calm",
    kind="study",
    title="Just One Byte where nothing fails, at the speed of a loop written by hand",
    make=just_one_byte_calm,
    scenario="compression.rotated_digits",
)
