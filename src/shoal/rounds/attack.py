"""What Byzantine peers send instead of their honest work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol

from torch import Tensor

from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Mask, Stack


class Knowledge(Enum):
    """What an attacker sees before it must send."""

    OWN = "own"
    """its own honest vector; runs on every engine"""
    ALL = "all"
    """every honest vector of the round; within one process only"""


@dataclass(frozen=True)
class View:
    """What an attack may look at. Leading axes `[...]` are independent worlds (seeds).

    honest: [..., honest, dim] what honest peers send in this round, as receivers will see it;
            for `Knowledge.OWN` the attacker's own row only, [..., 1, dim]
    own:    [..., byzantine, dim] what the Byzantine peers would have sent
    round:  which round
    rule:   for `Knowledge.ALL`: candidate [..., byzantine, dim] -> what the honest peers would
            hold after aggregation of what they wait for, [..., honest, dim] (float); lets an
            attack search against the defence in force
    heard:  for `Knowledge.ALL`: bool [..., honest, honest + byzantine], whose vectors each honest
            peer waits for, its own first of all; None = everybody hears everybody
    """

    honest: Stack
    own: Stack
    round: int
    rule: Callable[[Stack], Stack] | None = None
    heard: Mask | None = None


@dataclass(frozen=True)
class Aim:
    """What a targeted attack wants of honest models: samples of class `source` taken for `target`.

    source: None = samples of any class but the target; trigger: what the attacker does to samples
    [..., *features] to have them taken for the target, None = nothing.
    """

    target: int
    source: int | None = None
    trigger: Callable[[Tensor], Tensor] | None = None


class Attack(Protocol):
    """Numbers in place of work: View -> [..., byzantine, dim].

    With `per_receiver` the result is [..., honest, byzantine, dim]: another vector for each
    honest receiver (equivocation).
    """

    knowledge: ClassVar[Knowledge]
    per_receiver: ClassVar[bool] = False

    def __call__(self, view: View, key: Key) -> Stack: ...

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        """A Byzantine peer's data before it trains (label flip, backdoor); default: unchanged."""
        ...

    # Optional: own_data = True, on the class: `poison` gives a peer samples of the adversary's.
    # Optional: aim() -> Aim. What a targeted attack wants; `attack_success` measures it.
    # Optional: tells(said, state) -> dict. What Byzantine peers say to single receivers beside
    # their vector, in place of what the strategy has them say (`Strategy.address`): name ->
    # [..., t, *], with the strategy's state of each. Without it they say the truth.
