"""What a program that learns is given by its scenario."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from shoal.rounds.aggregator import Aggregator
from shoal.rounds.task import Task
from shoal.rounds.transform import Transform
from shoal.tensor import keyed, tree
from shoal.tensor.types import Vector
from shoal.world.topology import Topology

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Workload:
    """Task, combining rule and horizon of a run, for programs that are no `Strategy`.

    A program with a method `bind(workload) -> Program` is bound to this before it runs; one
    without needs no data. transform is bound to the task's layout already. rounds: None = until
    the horizon in seconds. report_every: rounds between records of "params". independent: every
    peer draws initial parameters of its own. topology: the scenario's graph
    (`shoal.world.topology`) for programs that must know all of it in advance; None = everybody may
    talk to everybody.
    """

    task: Task
    aggregator: Aggregator
    transform: Transform
    rounds: int | None
    seconds: float | None
    seed: int
    report_every: int = 1
    independent: bool = False
    topology: Topology | None = None

    @cached_property
    def initial(self) -> Vector:
        """The common initial parameters [dim]; with `independent` no peer's, but of their kind."""
        return self.task.init(keyed.key_of(self.seed, "init"))

    def start(self, peer: int) -> Vector:
        """A peer's initial parameters [dim]."""
        if not self.independent:
            return self.initial
        return self.task.init(keyed.key_of(self.seed, "init", peer))

    def there(self, value: T) -> T:
        """A tree of tensors where the models are: a peer's keys and its mail are made elsewhere."""
        return tree.there(value, self.initial.device)
