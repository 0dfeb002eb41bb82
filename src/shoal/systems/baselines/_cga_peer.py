"""One peer of CGA: a round has two exchanges, models out and gradients of them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.errors import WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.rounds.task import Batch, Shard, Task
from shoal.systems.baselines._cga_projection import projected
from shoal.tensor.stack import combine
from shoal.tensor.types import Key, Mask, Stack, Vector, Weight
from shoal.wire.checksum import checksum
from shoal.wire.message import Packed, message

if TYPE_CHECKING:
    from shoal.systems.baselines.cga import Bound


@message(tag=("round",), checked=True)
class Model:
    """A peer's parameters at the start of a round."""

    round: int
    payload: Packed


@message(tag=("round",), checked=True)
class Cross:
    """The gradient of the receiver's model on the sender's data. about: the model's checksum, since
    a peer that has lost its memory may come to a round a second time, with another model."""

    round: int
    about: int
    payload: Packed


def gradients(models: Stack, shard: Shard, key: Key, task: Task, batch_size: int) -> Stack:
    """Of each model [..., k, dim] on one batch of a peer's own samples: [..., k, dim]."""
    batch, axes, k = task.batch(shard, key, batch_size), key.dim(), models.shape[-2]

    def spread(leaf: Tensor) -> Tensor:
        return leaf.unsqueeze(axes).expand(*leaf.shape[:axes], k, *leaf.shape[axes:])

    return task.grad(models, Batch(spread(batch.x), spread(batch.y), spread(batch.mask)))


def moved(
    velocity: Vector, own: Vector, cross: Stack, given: Mask, models: Stack, weights: Weight,
    lr: float, momentum: float,
) -> tuple[Vector, Vector, Tensor]:  # fmt: skip
    """(params, velocity, smallest cosine): the projected gradient after the mean of models.

    cross [..., k, dim] with mask given [..., k]; models [..., k + 1, dim] with weights of sum 1.
    A result that is not finite is passed over.
    """
    direction, cosine = projected(own, cross, given)
    speed = momentum * velocity - lr * direction
    params = combine(weights, models) + speed
    sound = (params.isfinite().all(-1) & speed.isfinite().all(-1)).unsqueeze(-1)
    return (
        torch.where(sound, params, models[..., 0, :]), torch.where(sound, speed, velocity), cosine,
    )  # fmt: skip


class Node:
    """What one peer keeps, and its rounds."""

    def __init__(self, bound: Bound, peer: Peer) -> None:
        workload = bound.workload
        self.bound, self.peer, self.workload = bound, peer, workload
        self.shard = workload.task.shard(peer.id)
        stored = peer.store.get
        self.first_round = max(int(peer.now() / bound.round_s), peer.round + 1)
        done = stored("round")
        if done is None:
            peer.record("fresh", 1)
            self.params = workload.start(peer.id)
            self.velocity = torch.zeros_like(self.params)
        else:
            self.first_round = max(self.first_round, int.from_bytes(done, "little") + 1)
            self.params, self.velocity = map(workload.there, (stored("params"), stored("velocity")))
        self.codec = workload.transform.init(self.params)
        self.codecs: dict[int, Any] = {}

    async def round(self, round: int) -> None:
        """Tell the model, answer the neighbours', follow what is left of one's own gradient."""
        peer, bound = self.peer, self.bound
        peer.enter_round(round)
        others, weights = bound.neighborhood(peer.id, round)
        payload, mine, self.codec = self._encoded(self.params, self.codec, "model", round)
        told, mark = Model(round, payload), checksum(payload)
        for other in others:
            await peer.send(PeerId(other), told)
        middle_s, end_s = ((round + part) * bound.round_s for part in (0.5, 1.0))
        got = await self._gather(Model, round, others, middle_s)
        models = [self._read(got.get(other), like=mine) for other in others]
        heard = [model is not None for model in models]
        stack = torch.stack([mine, *(mine if model is None else model for model in models)])
        made = await peer.compute(
            gradients, stack, self.shard, self.workload.there(peer.key("round", round)),
            static=(self.workload.task, bound.settings.batch_size), cost=bound.cost(len(stack)),
        )  # fmt: skip
        answered = [other for other, there in zip(others, heard, strict=True) if there]
        peer.record("answered", len(answered), others=" ".join(map(str, answered)))
        for other, gradient in zip(others, made[1:], strict=True):
            if other in answered:
                about = checksum(got[other].payload)
                await peer.send(PeerId(other), self._answer(gradient, other, round, about))
        back = await self._gather(Cross, round, others, end_s)
        ours = {other: each for other, each in back.items() if each.about == mark}
        cross = [self._read(ours.get(other), like=mine) for other in others]
        given = [gradient is not None for gradient in cross]
        there = self.workload.there
        own, *rest = weights
        kept = [weight if t else 0.0 for weight, t in zip(rest, heard, strict=True)]
        lost = [0.0 if t else weight for weight, t in zip(rest, heard, strict=True)]
        counts = there(torch.tensor([own + sum(lost), *kept], dtype=torch.float64, device="cpu"))
        mask = there(torch.tensor(given, dtype=torch.bool, device="cpu"))
        nothing = torch.zeros_like(mine)
        columns = mine.new_zeros((0, *mine.shape))
        if cross:
            columns = torch.stack([nothing if each is None else each for each in cross])
        self.params, self.velocity, cosine = await peer.compute(
            moved, self.velocity, made[0], columns, mask, stack, counts,
            static=(bound.settings.lr, bound.settings.momentum),
            cost=bound.projection_cost(len(cross)),
        )  # fmt: skip
        peer.discard(Model, before=(round + 1,))
        peer.discard(Cross, before=(round + 1,))
        await peer.store.commit({
            "params": self.params, "velocity": self.velocity, "round": round.to_bytes(8, "little"),
        })  # fmt: skip
        used = [other for other, got in zip(others, given, strict=True) if got]
        peer.record("followed", len(used), others=" ".join(map(str, used)))
        peer.record("cosine", float(cosine))
        if (round + 1) % self.workload.report_every == 0 or round == bound.rounds - 1:
            peer.record("params", self.params)

    async def _gather(
        self, kind: type[Any], round: int, others: tuple[int, ...], until_s: float
    ) -> dict[int, Any]:
        """What the neighbours say in a round, by peer."""
        expect = [PeerId(other) for other in others]
        got = await self.peer.gather(kind, tag=(round,), expect=expect, deadline=until_s)
        return {int(other): told for other, told in got.items()}

    def _answer(self, gradient: Vector, other: int, round: int, about: int) -> Cross:
        codec = self.codecs.get(other)
        if codec is None:
            codec = self.workload.transform.init(gradient)
        payload, _, self.codecs[other] = self._encoded(gradient, codec, "cross", round, other)
        return Cross(round, about, payload)

    def _encoded(self, vector: Vector, codec: Any, *key: int | str) -> tuple[Packed, Vector, Any]:
        """What is sent, what its receivers read, and the transform's memory."""
        transform, there = self.workload.transform, self.workload.there
        payload, codec = transform.encode(vector, codec, there(self.peer.key(*key)))
        return Packed(payload), transform.decode(payload), codec

    def _read(self, told: Model | Cross | None, like: Vector) -> Vector | None:
        """The vector in a message; None when there is no message, or it holds none."""
        if told is None:
            return None
        content, transform = told.payload.content, self.workload.transform
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            vector: Tensor = transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None
        fits = vector.shape == like.shape and bool(vector.isfinite().all())
        return vector.to(like.dtype) if fits else None
