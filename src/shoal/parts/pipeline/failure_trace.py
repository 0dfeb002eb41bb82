"""Which stages fail in which iteration: one list for all methods that are compared."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shoal.base import keyed
from shoal.base.errors import UsageError


@dataclass(frozen=True)
class FailureTrace:
    """Failures as (iteration, stage), iterations counted as they are executed, repeats included.

    Stage 0 is the outer part (embedding and output layer). No two consecutive stages fail in one
    iteration, as the published failure model has it.

    >>> trace = FailureTrace(6, ((3, 2), (3, 5)))
    >>> trace.at(3), trace.at(4)
    ((2, 5), ())
    """

    stages: int
    failures: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        found = tuple(sorted({(int(t), int(stage)) for t, stage in self.failures}))
        object.__setattr__(self, "failures", found)
        for iteration, stage in found:
            if iteration < 0 or not 0 <= stage <= self.stages:
                raise UsageError(
                    f"failure_trace: stage {stage} in iteration {iteration}; need iterations from "
                    f"0 and stages from 0 to {self.stages}"
                )
            if (iteration, stage + 1) in self._set:
                raise UsageError(
                    f"failure_trace: stages {stage} and {stage + 1} fail together in iteration "
                    f"{iteration}; neighbours may not (move one of them)"
                )

    @cached_property
    def _set(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.failures)

    @cached_property
    def _by_iteration(self) -> dict[int, tuple[int, ...]]:
        out: dict[int, tuple[int, ...]] = {}
        for iteration, stage in self.failures:
            out[iteration] = (*out.get(iteration, ()), stage)
        return out

    def at(self, iteration: int) -> tuple[int, ...]:
        """The stages that fail in an executed iteration, ascending."""
        return self._by_iteration.get(iteration, ())

    @classmethod
    def bernoulli(
        cls, rate: float, *, stages: int, iterations: int, seed: int,
        among: Collection[int] | None = None, first: int = 0,
    ) -> FailureTrace:  # fmt: skip
        """Every stage of `among` (default: all, stage 0 included) fails with this probability.

        first: no failure before this iteration. A draw depends on seed, iteration and stage alone,
        so a longer trace, or one with fewer stages, has the same failures where both have any. Of
        two consecutive stages that are drawn in one iteration the later one is spared.

        >>> FailureTrace.bernoulli(0.0, stages=6, iterations=100, seed=1).failures
        ()
        """
        if not 0 <= rate <= 1:
            raise UsageError(f"failure_trace: rate={rate}; need a probability from 0 to 1")
        chosen = sorted(range(stages + 1) if among is None else among)
        failures: list[tuple[int, int]] = []
        for iteration in range(first, iterations):
            last = -2
            for stage in chosen:
                drawn = keyed.uniform(seed, "stage fails", iteration, stage) < rate
                if drawn and stage != last + 1:
                    failures.append((iteration, stage))
                    last = stage
        return cls(stages, tuple(failures))

    @staticmethod
    def per_iteration(hourly: float, iteration_s: float) -> float:
        """The probability per iteration that a rate per hour means.

        >>> round(FailureTrace.per_iteration(0.16, 91.0), 4)
        0.0044
        """
        if not (0 <= hourly < 1 and iteration_s > 0):
            raise UsageError(
                f"failure_trace: hourly={hourly}, iteration_s={iteration_s}; need a probability "
                "below 1 and a positive time"
            )
        return 1.0 - (1.0 - hourly) ** (iteration_s / 3600.0)

    def save(self, path: Path) -> None:
        """As JSON; `load` is the inverse."""
        text = json.dumps({"stages": self.stages, "failures": self.failures})
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> FailureTrace:
        """A trace from a file: {"stages": 6, "failures": [[iteration, stage], ...]}."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(data["stages"], tuple((t, stage) for t, stage in data["failures"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"failure_trace: {path}: {error} (need stages and a list of [iteration, stage])"
            ) from None
