"""What asynchronous servers whose clients make steps of SGD have in common."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.learning import Learning, Terms
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.rule import Rule
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings that a server's own class inherits, and the program that follows from them.

    importances: of clients in ascending order, sum 1 (none = equal). lr, momentum, batch_size:
    local. patience_s, give_up_s: see `Terms`. `rule()` says what the server does; it is asked when
    the settings are made, so that those which no run could use are a UsageError at once.

    >>> from shoal.parts.asynchronous.buffered import Buffered
    >>> class Each(ServerSettings):
    ...     def rule(self):
    ...         return Buffered(size=1)
    >>> Each(lr=0.5).lr
    0.5
    """

    importances: tuple[float, ...] = ()
    lr: float = 0.1
    momentum: float = 0.0
    batch_size: int = 32
    patience_s: float = 5.0
    give_up_s: float = 600.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(
                f"{type(self).__name__}: batch_size={self.batch_size}; need at least one sample"
            )
        self.rule()
        _ = self._work, self._terms(ties=False)

    def rule(self) -> Rule:
        """What the server does."""
        raise NotImplementedError

    @property
    def _work(self) -> Displacement:
        return Displacement(SGD(self.lr, momentum=self.momentum), self.batch_size)

    def _terms(self, ties: bool) -> Terms:
        return Terms(patience_s=self.patience_s, give_up_s=self.give_up_s, ties=ties)

    def learning(
        self, workload: Workload, habits: Habits | None = None, *, ties: bool = False
    ) -> Learning:
        """The program for a task. ties: see `Terms`; habits None: the server decides on steps."""
        return Learning(
            workload, self.rule(), self._work, habits or Habits(), terms=self._terms(ties)
        )
