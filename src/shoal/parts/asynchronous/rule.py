"""What a kind of asynchronous learning decides: the arithmetic of a version, and its moment.

A rule has two sides. Its `step` is numeric and pure, and runs as a computation of the server. Its
`Course` is plain bookkeeping, told what happens and answering with actions; it never waits, draws
or sends, so that it can be tested without an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from shoal.parts.asynchronous.staleness import Staleness
from shoal.tensor.types import Index, Vector, Weight


@dataclass(frozen=True, eq=False)
class Delta:
    """A work that was taken: vector [dim] and what is known of it.

    version: of the model that it began from; steps: local steps made; weight: of the client's data.
    """

    origin: int
    client: int
    number: int
    version: int
    steps: int
    weight: float
    arrived_s: float
    vector: Vector = field(repr=False)

    @property
    def name(self) -> str:
        """Unlike that of any other work in a run."""
        return f"{self.origin}.{self.client}.{self.number}"


@dataclass(frozen=True)
class Moment:
    """When something happens: seconds on the server's clock, and its newest version."""

    now_s: float
    version: int


@dataclass(frozen=True, eq=False)
class Advance:
    """Make the next version from these works, each with its weight; they are used up.

    Without any the version is made from nothing: a rule that keeps time may want that.
    """

    deltas: Sequence[Delta]
    weights: Sequence[float]


@dataclass(frozen=True)
class Send:
    """Give a client the newest model, for `steps` local steps (0 = as many as it likes)."""

    client: int
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Drop:
    """Leave a work that was taken out for good, counted by reason."""

    delta: Delta
    reason: str


Action = Advance | Send | Drop


class Course:
    """One run of a rule: when to make a version, and whom to give it to.

    This one never makes any and answers everybody at once. The server calls, in this order:
    `arrived` for a work that was taken, `asked` when the client wants a model (as a rule with the
    same message), `timed` at `due_s`. The version of the moment is that before the actions; an
    `Advance` among them makes the next one, and a `Send` after it gives that. After a crash the
    server calls `load` with what was saved at the last commit, and clients who still wait ask once
    more, so `asked` may come twice for a client that has been given nothing since.
    """

    @property
    def due_s(self) -> float:
        """When `timed` wants to be called next; later than the last time, inf = never."""
        return float("inf")

    def arrived(self, delta: Delta, at: Moment) -> Iterable[Action]:
        """A work was taken; it stays with the server until it is used by `Advance` or `Drop`."""
        return ()

    def asked(self, client: int, at: Moment) -> Iterable[Action]:
        """A client wants a model; it waits until it is sent one."""
        return (Send(client),)

    def timed(self, at: Moment) -> Iterable[Action]:
        """The moment `due_s` has come; `at.now_s` is exactly that."""
        return ()

    def save(self) -> bytes:
        """What must outlive a crash besides the works that are kept."""
        return b""

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        """Go on from `save`, with the works that were taken and not used, as they came."""


class Rule(Protocol):
    """Frozen, hashable settings.

    clients are peers' numbers; `step` gets vectors [k, dim], weights float64 [k] and clients int64
    [k], k >= 0, and gives the new parameters [dim] and the new state, a tree of tensors. It writes
    into none of its arguments. Leaves of the state that it gives back as they were need not be
    written to the disk again.
    """

    @property
    def staleness(self) -> Staleness:
        """What is taken at all."""
        ...

    def init(self, params: Vector, clients: Sequence[int]) -> Any:
        """The state beside the parameters [dim]; None when there is none."""
        ...

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]: ...

    def course(self, clients: Sequence[int]) -> Course:
        """A new course for these clients."""
        ...
