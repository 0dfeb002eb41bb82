"""What is learned: a loss over flat parameters, and each peer's own data.

All of it accepts leading axes: `params [dim]` on one peer, `[peers, dim]` in a simulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Index, Key, Mask, Scalar, Vector


@dataclass(frozen=True)
class Shard:
    """Which samples are a peer's own: positions in the task's data, not the data itself.

    index: int64 [..., most], padded with 0; size: int64 [...]. Two peers may share samples.
    labels: [..., most, *] in place of the task's own targets (poisoned data), or None.
    until: int64 [...]: the round from which on a peer's samples are lost, or None (never).
    held: int64 [..., kept]: samples that a peer keeps to test models on and does not train on,
    padded with -1; or None (nobody keeps any).
    inputs: [..., most, *features] in place of the task's own samples (poisoned data), or None;
    tasks made of a module take them.
    """

    index: Index
    size: Tensor
    labels: Tensor | None = None
    until: Tensor | None = None
    held: Index | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Samples for one step. x: [..., batch, *features]; y: [..., batch, *]; mask: [..., batch].

    A masked sample does not count; losses are means over unmasked samples (0 when there are none).
    """

    x: Tensor
    y: Tensor
    mask: Mask


@runtime_checkable
class Task(Protocol):
    """A learning problem. Hashable by identity: batching groups compare tasks with `is`."""

    @property
    def spec(self) -> FlatSpec: ...

    @property
    def peers(self) -> int:
        """How many shards there are."""
        ...

    def init(self, key: Key) -> Vector:
        """Initial parameters `[..., dim]`, one row per key."""
        ...

    def shard(self, peer: int | Index) -> Shard:
        """A peer's own data; an index `[...]` gives a stacked shard `[..., most]`."""
        ...

    def joined(self, tasks: Sequence[Task]) -> Task:
        """One task that has the shards of all, one task after the other (seeds run together).

        UsageError when they do not share models and metrics.
        """
        ...

    def batch(self, shard: Shard, key: Key, size: int) -> Batch:
        """`size` samples drawn by key with replacement; stateless."""
        ...

    def epoch(self, shard: Shard, key: Key, size: int) -> Iterator[Batch]:
        """Every sample once, in an order drawn by key, in batches of at most `size`."""
        ...

    def loss(self, params: Vector, batch: Batch) -> Scalar: ...

    def grad(self, params: Vector, batch: Batch) -> Vector: ...

    def descended(
        self, params: Vector, batch: Batch, rate: float, *, donate: bool = False
    ) -> Vector:
        """`params - rate * grad(params, batch)`; with `donate` it may overwrite `params`.

        One call, as a task can often make the step where it makes the gradient.
        """
        ...

    def walked(
        self, params: Vector, batches: Batch, rate: float, drift: Vector | None = None
    ) -> Vector:
        """A step along gradient plus drift [..., dim] for each batch of [steps, ..., batch].

        A row has samples in all of these batches or in none, and then stays where it is. One call,
        as a task can keep what it works on in the order that suits it; in the last bits the outcome
        may differ from steps one by one.
        """
        ...

    def clipped_grad_sum(self, params: Vector, batch: Batch, clip: float) -> Vector:
        """Sum over samples of per-sample gradients, each scaled to norm at most `clip`.

        A sample whose gradient or its norm is not finite adds nothing: no sample moves the sum by
        more than `clip`.
        """
        ...

    def evaluate(self, params: Vector) -> dict[str, Scalar]:
        """Metrics on the task's test set, such as `accuracy` and `loss`, each `[...]`."""
        ...

    # Optional: outputs(params, x) -> what the model says to samples: params [..., dim], x
    # [..., batch, *features], result [..., batch, *]; for methods that look at predictions.
    # Optional: held(shard) -> Batch. The samples that peers keep for testing; masked where none.
