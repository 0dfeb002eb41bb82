"""What both round benches share: the contestants, and the rows that compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from shoal.engine.event import simulate
from shoal.engine.lockstep import run_lockstep
from shoal.lab.bench._plain import PlainLoop
from shoal.lab.bench._row import Note, Row
from shoal.lab.bench._timing import Seconds, alternate, copy_rate, product_rate
from shoal.lab.bench._workload import BATCH, LR, Workload
from shoal.rounds.adapter import Rounds

if TYPE_CHECKING:
    from shoal.rounds.method import Method
    from shoal.world.network import Network

Loop = Callable[..., Any]


def start(task: Any, workload: Workload, loop: Loop) -> Any:
    """A loop with the workload's data and the run's own initial parameters."""
    from shoal.tensor import keyed

    module = workload.module()
    torch.nn.utils.vector_to_parameters(
        task.init(keyed.key_of(0, "init")).clone(), module.parameters()
    )
    index = task.shares.index
    return loop(module, task.x[index], task.y[index], LR, BATCH)


def lockstep(world: tuple[Method, Network]) -> Any:
    """A run of lockstep, without measuring the models."""
    method, network = world
    return run_lockstep([method], [network])[0]


def event(world: tuple[Method, Network]) -> Any:
    """A run of the event engine, without measuring the models."""
    method, network = world
    return simulate(Rounds.of(method), network, seed=method.seed)


class Contest:
    """One workload's contestants; `run` makes all of them take turns."""

    def __init__(
        self, workload: Workload, rounds: int, by_hand: Mapping[str, Loop], degree: int | None
    ) -> None:
        self.workload, self.rounds = workload, rounds
        self.task = task = workload.task()
        self.loops = {
            name: start(task, workload, loop)
            for name, loop in {"plain loop": PlainLoop, **by_hand}.items()
        }
        self.by_hand = tuple(by_hand)
        star = workload.star(task, rounds)
        self.engines: dict[str, Callable[[], Any]] = {
            "lockstep": lambda: lockstep(star),
            "event": lambda: event(star),
        }
        if degree is not None:
            gossip = workload.gossip(task, rounds, degree)
            self.engines[f"lockstep, gossip of degree {degree}"] = lambda: lockstep(gossip)
            self.engines[f"event, gossip of degree {degree}"] = lambda: event(gossip)

    def run(self, repeats: int, note: Note) -> dict[str, Seconds]:
        """Seconds per round of each contestant."""

        def turning(loop: Any) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(self.rounds):
                    loop.round()

            return turn

        contestants = {name: turning(loop) for name, loop in self.loops.items()}
        return alternate({**contestants, **self.engines}, repeats, note, self.rounds)

    def rows(
        self, name: str, times: Mapping[str, Seconds], flops: float, touched_bytes: float
    ) -> Iterator[Row]:
        """The times themselves, and the engines against the best loop by hand.

        flops and touched_bytes: the least that a round's arithmetic needs.
        """
        best = min(self.by_hand, key=lambda each: times[each].cpu)
        for who, seconds in times.items():
            yield Row.of(f"{name}: {who}, CPU", seconds.cpu, "s/round")
            yield Row.of(f"{name}: {who}, wall", seconds.wall, "s/round")
        for who, bound in (("lockstep", "<= 1.15"), ("event", "<= 1.5")):
            yield Row.of(
                f"{name}: {who} against the best by hand, CPU", times[who].cpu, "s/round",
                against=(best, times[best].cpu), bound=bound,
            )  # fmt: skip
        least = flops / product_rate() + touched_bytes / copy_rate(int(touched_bytes / 2))
        for who in (best, "lockstep"):
            yield Row.of(
                f"{name}: {who} against arithmetic and memory alone, CPU", times[who].cpu,
                "s/round", against=("large products and one pass over parameters", least),
            )  # fmt: skip
