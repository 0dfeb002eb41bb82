"""Peer programs that the live tests run on both engines; importable by a spawned process."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.wire.message import message

LATE_S = 600.0
"""A deadline that only a hanging test reaches."""


@message(tag=("round",))
class Model:
    round: int
    params: Tensor


@message(tag=("step", "chunk"))
class Chunk:
    step: int
    chunk: int
    values: Tensor


@message
class Ask:
    number: int
    values: Tensor


@message
class Answer:
    number: int
    values: Tensor


@message(tag=("name",))
class Note:
    name: str


def mix(own: Tensor, others: Tensor, rate: Tensor) -> Tensor:
    """A step towards the mean, with a product and a transcendental function in it."""
    stacked = torch.cat((own.unsqueeze(-2), others), -2)
    square = own.reshape(*own.shape[:-1], 16, -1)
    drift = torch.tanh(square @ square.transpose(-1, -2)).sum((-1, -2)).unsqueeze(-1)
    return stacked.mean(-2) - rate * drift * own / own.norm(dim=-1, keepdim=True)


def add(left: Tensor, right: Tensor) -> Tensor:
    return left + right


def square_sum(values: Tensor) -> Tensor:
    return (values @ values).unsqueeze(-1)


@dataclass(frozen=True)
class Gossip:
    """Averaging with the neighbours, round by round."""

    rounds: int = 4
    dim: int = 16 * 67
    start_s: float = 0.0
    round_s: float = LATE_S

    async def run(self, peer) -> None:
        params = torch.randn(self.dim, generator=peer.generator("init"))
        rate = torch.tensor(0.01)
        await peer.sleep_until(self.start_s)
        for round in range(self.rounds):
            peer.enter_round(round)
            for neighbor in peer.neighbors:
                await peer.send(neighbor, Model(round, params))
            end_s = self.start_s + self.round_s * (round + 1)
            heard = await peer.gather(Model, tag=(round,), expect=peer.neighbors, deadline=end_s)
            peer.record("heard", len(heard))
            if heard:
                others = torch.stack([each.params for each in heard.values()])
                params = await peer.compute(mix, params, others, rate)
            peer.record("params", params)
            if self.round_s < LATE_S:
                await peer.sleep_until(end_s)


@dataclass(frozen=True)
class RingAllReduce:
    """Everybody ends with the sum: reduce-scatter, then all-gather, over chunks."""

    dim: int = 1003

    async def run(self, peer) -> None:
        ring = peer.roster
        count, me = len(ring), ring.index(peer.id)
        right = ring[(me + 1) % count]
        chunks = list(torch.randn(self.dim, generator=peer.generator("x")).tensor_split(count))
        for step in range(2 * (count - 1)):
            give = (me - step) % count
            await peer.send(right, Chunk(step, give, chunks[give]))
            take = (me - step - 1) % count
            envelope = await peer.recv(Chunk, tag=(step, take), deadline=LATE_S)
            values = envelope.message.values
            reducing = step < count - 1
            chunks[take] = await peer.compute(add, chunks[take], values) if reducing else values
        peer.record("params", torch.cat(chunks))


@dataclass(frozen=True)
class Echo:
    """Peer 0 serves; the others ask, some of them for what makes the handler raise."""

    calls: int = 6

    async def run(self, peer) -> None:
        async def handle(envelope):
            ask = envelope.message
            if ask.number % 3 == 2:
                raise ValueError(f"no number {ask.number}")
            return Answer(ask.number, await peer.compute(square_sum, ask.values))

        if peer.id == 0:
            peer.serve(Ask, handle)
            await peer.gather(Note, tag=("done",), expect=peer.roster[1:], deadline=LATE_S)
            return
        total = torch.zeros(1)
        for number in range(self.calls):
            values = torch.randn(301, generator=peer.generator(number))
            try:
                answer = await peer.request(0, Ask(number, values), deadline=LATE_S)
            except PeerError as error:
                if str(error) != f"peer 0: ValueError: no number {number}":
                    raise
                peer.record("refused", number)
            else:
                assert answer.number == number
                total = total * 0.5 + answer.values
        peer.record("params", total)
        await peer.send(0, Note("done"))


@dataclass(frozen=True)
class Victim:
    """Gossip with a deadline a round, in which one peer's process dies as by `kill -9`."""

    victim: int
    rounds: int = 4
    round_s: float = 0.4

    async def run(self, peer) -> None:
        for round in range(self.rounds):
            if round == 1 and peer.id == self.victim:
                os.kill(os.getpid(), signal.SIGKILL)
            for other in peer.neighbors:
                await peer.send(other, Note(f"{round}"))
            heard = await peer.gather(
                Note, tag=(f"{round}",), expect=peer.neighbors, deadline=self.round_s * (round + 1)
            )
            peer.record("heard", len(heard))


@dataclass(frozen=True)
class Failing:
    """One peer raises, the others wait for it."""

    culprit: int

    async def run(self, peer) -> None:
        if peer.id == self.culprit:
            raise LookupError("no such thing")
        await peer.recv(Note, deadline=LATE_S)


@dataclass(frozen=True)
class Waiting:
    """Says on the standard output that it runs, and waits."""

    async def run(self, peer) -> None:
        print(f"pid {os.getpid()}", flush=True)  # noqa: T201
        await peer.recv(Note, deadline=LATE_S)
