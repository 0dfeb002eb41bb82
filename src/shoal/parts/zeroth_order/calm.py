"""All machines of a group in which nothing fails, as one: they hold the same bits at any time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shoal.parts.zeroth_order.noise import descend_along
from shoal.parts.zeroth_order.replay import Entry, Rule
from shoal.parts.zeroth_order.spsa import SPSA
from shoal.rounds.task import Task
from shoal.tensor.types import Vector


def calm(
    task: Task, rule: Rule, spsa: SPSA, params: Vector, iterations: int
) -> Iterator[tuple[Entry, Vector]]:
    """What each iteration applies, and the weights [dim] after it, for `task.peers` machines.

    One model stands for all of them, so an iteration costs two losses of a batch of every machine
    and one step along every direction. Entries and weights are those of the machines by
    themselves, as long as all are heard in every iteration.

    >>> from shoal.parts.tasks.digits import Digits
    >>> task = Digits(peers=3, hidden=(4,))
    >>> start = task.init(torch.tensor(1))
    >>> (entry, after), = calm(task, Rule(run=1, lr=0.01), SPSA(batch_size=4), start, 1)
    >>> entry.machines, len(entry.codes), torch.equal(start, after)
    ((0, 1, 2), 3, False)
    """
    machines = tuple(range(task.peers))
    shards = task.shard(torch.arange(task.peers, device=params.device))
    for iteration in range(iterations):
        keys = rule.machine_keys(iteration, task.peers).to(params.device)
        everyone = params.expand(task.peers, -1)
        found = spsa.estimate(task, everyone, shards, keys).tolist()
        entry = Entry(machines, machines, b"".join(map(rule.codec.encode, found)))
        steps, scales = rule.steps(iteration, entry)
        params = descend_along(params, steps.to(params.device), scales.to(params.device))
        yield entry, params
