"""A round-based method as a few pure functions.

A round is `local -> encode -> exchange -> decode -> aggregate -> apply`. A strategy owns the first
and the last word; the others are axes of the scenario. Everything has leading axes `[...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Index, Key, Mask, Scalar, Vector


@dataclass(frozen=True)
class Step:
    """What a strategy may look at in one round.

    round: the same for all rows; shard, key, active: one per row; sent: this round's own payload
    after encode and decode, [..., dim] (only in `combine` and `apply`; CHOCO and EF21 need it);
    given: what came down with a hub's parameters (only in `adopt`; see `Strategy.down`);
    peers: how many the run has; own: the peers' own ids [...] (only in `address`).
    """

    round: int
    task: Task
    shard: Shard
    key: Key
    active: Mask
    sent: Vector | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    peers: int = 1
    own: Index | None = None


@dataclass(frozen=True)
class Parcel:
    """What a peer sends: a vector, its weight in weighted means, and named extras.

    vector [..., dim]; weight [...] (None = 1; 0 = "I have learned nothing yet");
    extra: name -> [..., *], combined like the vector and handed to `apply` in `Heard.extra`.
    """

    vector: Vector
    weight: Scalar | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Heard:
    """The combined messages, own row included.

    vector [..., dim]: the aggregate (a peer that heard nobody gets its own vector back);
    count [...]: how many rows came in, own included; extra: the combined extras.
    """

    vector: Vector
    count: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Strategy(Protocol):
    """A method. The state is a dataclass (or tuple, dict, tensor) of tensors with leading axes."""

    def init(self, params: Vector) -> Any:
        """State for parameters [..., dim]."""
        ...

    def local(self, state: Any, step: Step) -> tuple[Any, Parcel]:
        """Work on the peer's own data, and what to send."""
        ...

    def apply(self, state: Any, heard: Heard, step: Step) -> Any:
        """What to do with the combined messages; with a hub it runs at the hub only."""
        ...

    def params(self, state: Any) -> Vector:
        """The model [..., dim] that a user would take away."""
        ...

    # Optional: adopt(state, received, step) -> state. A client takes the hub's parameters; without
    # it the adapter uses `init(received)`, which forgets everything else that the client knew.
    # Optional: needs_hub = True, on the class. Without a hub it would do something else: refused.
    # Optional: down(state) -> dict of name -> [..., *]. What a hub gives its clients beside its
    # parameters (a control variate, a mean gradient); they find it in `adopt` as `step.given`.
    # Optional: combine(state, rows, mask, share, extra, step) -> Heard. In place of an aggregator,
    # for methods that look at each message by itself (aligning models, telling kinds apart):
    # rows [..., k + 1, dim] and extra name -> [..., k + 1, *], own first; mask bool [..., k + 1] is
    # who was heard; share [..., k + 1] >= 0 sums to 1 over them. What it returns goes to `apply`.
    # With several waves the earlier ones are averaged; with a hub the state is the hub's.
    # Optional, with `combine`: mixer(spec) -> a function like an aggregator's `mix`, or None. What
    # `combine` makes of the rows, for all receivers at once, where it looks at nothing else.
    # Optional: pushes = True, on the class, with a `combine`. A sender divides what it has equally
    # among itself and those who hear it: share [..., k + 1] are the senders' portions, which sum
    # to 1 over a sender's receivers instead of a receiver's senders. What is lost on the way is
    # lost. One wave a round, without a hub.
    # Optional: address(state, to, step) -> dict of name -> [..., t, *]. What single receivers `to`
    # [..., t] (ids, -1 = nobody) get beside the parcel, each its own; said after `local`, of what
    # the peer knew then. It arrives in `combine`, which must be there, as extra of these names
    # (zeros in the own row). One wave a round, without a hub. It takes no virtual time.
    # Optional: names_sources = True, on the class, with a `combine`; with an `address` always.
    # extra["source"] int64 [..., k + 1] is then who sent each row, as the transport knows it: the
    # own id first, -1 where nothing was heard.
    # Optional: fitted(spec, peers) -> the strategy for parameters of this layout in a run of so
    # many peers, for methods that keep something of each. Equal arguments, the same object.
    # Optional: report(state, spec) -> dict of name -> [...]. Numbers of a peer's own, recorded with
    # its parameters in every engine; peers of a hub have nothing to report.
