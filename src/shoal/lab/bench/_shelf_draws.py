"""What the shelf's loops leave to chance, drawn as one would by hand: torch's own generator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.tensor import keyed


@dataclass
class Drawn:
    """A `Chance` for everything that the loops ask for.

    index [peers, most], size [peers]: whose samples are whose. batch_size, probe: samples at a
    time; degree: neighbours that are heard; sample: clients of a round, of which each is an anchor
    with probability `anchor`; mean_rest_s, most_steps: of a worker. dim: of a direction, which with
    `counted` is made from counters, so that any part of it can be made again anywhere, else by the
    generator, seeded anew for each machine.
    """

    index: Tensor
    size: Tensor
    batch_size: int = 16
    probe: int = 256
    degree: int = 6
    own_weight: float = 0.5
    sample: int = 10
    anchor: float = 0.6
    dim: int = 0
    counted: bool = True
    mean_rest_s: float = 2.0
    most_steps: int = 9
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def batch(self, round: int, step: int, rows: Tensor | None = None) -> Tensor:
        return self._draw(self.batch_size, rows)

    def _draw(self, count: int, rows: Tensor | None = None) -> Tensor:
        index, size = self.index, self.size
        if rows is not None:
            index, size = index[rows], size[rows]
        draws = torch.rand(len(index), count, generator=self.generator)
        place = (draws * size.unsqueeze(1)).long().clamp_max_(size.max() - 1)
        return index.gather(1, place)

    def epoch(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        own = torch.arange(self.index.shape[1]) < self.size.unsqueeze(1)
        draws = torch.rand(self.index.shape, generator=self.generator).masked_fill_(~own, 2.0)
        order = draws.argsort(1)
        ordered, own = self.index.gather(1, order), own.gather(1, order)
        yield from zip(
            ordered.split(self.batch_size, 1), own.split(self.batch_size, 1), strict=True
        )

    def probes(self, round: int) -> Tensor:
        return self._draw(self.probe)

    def graph(self, round: int) -> Tensor:
        peers = len(self.size)
        draws = torch.rand(peers, peers, generator=self.generator)
        draws.fill_diagonal_(2.0)
        heard = draws.topk(self.degree, 1, largest=False).indices
        graph = torch.zeros(peers, peers).scatter_(1, heard, (1 - self.own_weight) / self.degree)
        return graph.fill_diagonal_(self.own_weight)

    def clients(self, round: int) -> tuple[Tensor, Tensor]:
        everybody = torch.randperm(len(self.size), generator=self.generator)
        if not round:
            return everybody, everybody[:0]
        chosen = everybody[: self.sample]
        anchors = torch.rand(len(chosen), generator=self.generator) < self.anchor
        return chosen[anchors], chosen[~anchors]

    def noise(self, iteration: int) -> Tensor:
        machines = torch.arange(len(self.size))
        if self.counted:
            return keyed.normal(
                keyed.key_of(iteration, "noise"), machines.unsqueeze(1), torch.arange(self.dim)
            )
        rows = []
        for machine in range(len(self.size)):
            self.generator.manual_seed(iteration * len(self.size) + machine)
            rows.append(torch.randn(self.dim, generator=self.generator))
        return torch.stack(rows)

    def rest_s(self, worker: int, number: int) -> float:
        return -math.log1p(-float(torch.rand((), generator=self.generator))) * self.mean_rest_s

    def steps(self, worker: int, number: int) -> int:
        return int(torch.randint(1, self.most_steps + 1, (), generator=self.generator))

    def work(self, worker: int, number: int, step: int) -> Tensor:
        return self._draw(self.batch_size, torch.tensor([worker]))
