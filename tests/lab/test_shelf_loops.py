"""The shelf's loops by hand end where our runs end when they draw the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.lab.bench._shelf_draws import Drawn
from shoal.lab.bench.shelf import MATCHES, Contest
from shoal.parts.zeroth_order.noise import noise_rows
from shoal.parts.zeroth_order.replay import Rule
from shoal.rounds.task import Shard
from shoal.tensor import keyed


class Keyed:
    """A `Chance` that draws by our keys."""

    def __init__(self, contest: Contest) -> None:
        self.task, self.method, self.seed = contest.task, contest.method, contest.seed
        shares = self.task.shares
        self.index, self.size = shares.index, shares.size
        self.batch_size = contest.match.draws.get("batch_size", 16)

    def key(self, round: int) -> Tensor:
        return torch.stack(self.method.keys(round))

    def places(self, key: Tensor, size: int, rows: Tensor | None = None) -> Tensor:
        every = slice(None) if rows is None else rows
        index, count = self.index[every], self.size[every].unsqueeze(1)
        draws = keyed.uniform(keyed.fold(key, "batch").unsqueeze(-1), torch.arange(size))
        return index.gather(1, (draws * count).long())

    def batch(self, round: int, step: int, rows: Tensor | None = None) -> Tensor:
        if self.method is None:
            keys = Rule(self.seed, 1.0).machine_keys(round, len(self.size))
            return self.places(keyed.fold(keyed.fold(keys, 0), "data"), self.batch_size)
        key = self.key(round)
        if rows is not None:
            return self.places(keyed.fold(key[rows], "mine", step), self.batch_size, rows)
        return self.places(keyed.fold(key, step), self.batch_size)

    def epoch(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Positions in place of samples: the task itself is asked for the order.
        task, most = self.task, self.index.shape[1]
        places = torch.arange(most).expand(len(self.size), most)
        shard = Shard(self.index, self.size, labels=places)
        for batch in task.epoch(shard, keyed.fold(self.key(round), 0), self.batch_size):
            yield self.index.gather(1, batch.y), batch.mask

    def probes(self, round: int) -> Tensor:
        return self.places(keyed.fold(self.key(round), "probe"), 256)

    def graph(self, round: int) -> Tensor:
        (hop,) = self.method.exchange.hops(round, self.seed)
        graph = torch.zeros(len(self.size), len(self.size), dtype=torch.float64)
        graph.scatter_(1, hop.sources, hop.weights)
        return (graph + torch.diag(hop.own)).float()

    def clients(self, round: int) -> tuple[Tensor, Tensor]:
        active = self.method.active(round)
        draws = keyed.uniform(keyed.fold(self.key(round), "anchor"))
        anchors = (draws < 0.6) | (round == 0)
        return (active & anchors).nonzero()[:, 0], (active & ~anchors).nonzero()[:, 0]

    def noise(self, iteration: int) -> Tensor:
        keys = keyed.fold(Rule(self.seed, 1.0).machine_keys(iteration, len(self.size)), 0)
        return noise_rows(keys.tolist(), self.task.spec.dim)

    def _of(self, worker: int, *words: Any) -> Tensor:
        return keyed.key_of(self.seed, "peer", worker, *words)

    def rest_s(self, worker: int, number: int) -> float:
        return -float(torch.log1p(-keyed.uniform(self._of(worker, "rest", number)))) * 2.0

    def steps(self, worker: int, number: int) -> int:
        return 1 + int(float(keyed.uniform(self._of(worker, "steps", number))) * 9)

    def work(self, worker: int, number: int, step: int) -> Tensor:
        key = keyed.fold(self._of(worker, "work", number), step)
        return self.places(key.unsqueeze(0), self.batch_size, torch.tensor([worker]))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a bench's own process: two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: match.name)
def test_a_loop_by_hand_ends_where_our_run_ends(match: Any) -> None:
    rounds = {"dimat": 2, "anarchic-fl": 12}.get(match.system, 6)
    contest = Contest(match, rounds)
    loop = contest.theirs(Keyed(contest))
    for _ in range(rounds):
        loop.round()
    begin, theirs, ours = contest.begin, loop.params(), contest.ours()[: len(loop.params())]
    moved = float((ours - begin).norm())
    assert moved > 1e-3 * float(begin.norm())
    # A byte's last step may round the other way, where two losses differ in their last digit.
    within = 2e-2 if match.system == "just-one-byte" else 2e-4
    assert float((theirs - ours).norm()) <= within * moved


def test_draws_of_the_loops_stay_within_a_peers_own_samples() -> None:
    index = torch.tensor([[0, 1, 2, 3], [7, 8, 0, 0]])
    drawn = Drawn(index, torch.tensor([4, 2]), batch_size=64, degree=1)
    assert set(drawn.batch(0, 0)[1].tolist()) == {7, 8}
    assert set(drawn.batch(0, 0)[0].tolist()) == {0, 1, 2, 3}
    found = [(part[1].tolist(), counts[1].tolist()) for part, counts in drawn.epoch(0)]
    ((order, counts),) = found
    assert sorted(order[:2]) == [7, 8]
    assert counts == [True, True, False, False]
    graph = drawn.graph(0)
    torch.testing.assert_close(graph.sum(1), torch.ones(2))
