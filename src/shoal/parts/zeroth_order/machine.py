"""One machine's half of learning from losses, for weights of one's own and any way to tell bytes.

The weights lie where the model has them and are perturbed there, so that it takes the memory of
inference and of one copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.zeroth_order.noise import walk_in_place
from shoal.parts.zeroth_order.replay import Entry, Log, Rule
from shoal.parts.zeroth_order.spsa import check_eps, slope_in_place
from shoal.tensor import keyed


class Machine:
    """Offers numbers for an iteration and applies what all have offered.

    tensors: contiguous weights of one dtype, in an order that is the same on all machines; rule:
    the same on all machines; machine: this one's number; eps: length of the perturbation. backup:
    hold a copy while perturbing, so that the weights come back to the bit. Without it every machine
    drifts by roundings of its own, so call `refresh` with the weights of an earlier iteration now
    and then. Machines that apply the same offers hold the same bits (with backup).

    >>> weights = [torch.zeros(3, dtype=torch.float64)]
    >>> machine = Machine(weights, Rule(run=1, lr=0.1), machine=0)
    >>> told = machine.offer(lambda sample: (weights[0] - 1.0).square().sum())
    >>> entry = machine.apply({0: told})
    >>> len(told), machine.log.end, bool((weights[0] - 1.0).square().sum() < 3.0)
    (1, 1, True)
    """

    def __init__(
        self, tensors: Sequence[Tensor], rule: Rule, machine: int, *, eps: float = 1e-3,
        backup: bool = True,
    ) -> None:  # fmt: skip
        check_eps("Machine", eps)
        if not tensors or len({tensor.dtype for tensor in tensors}) != 1:
            raise UsageError("Machine: need tensors of one dtype, and at least one")
        self.tensors = list(tensors)
        self.rule = rule
        self.machine = machine
        self.eps = eps
        self.backup = backup
        self.log = Log(rule, ())
        self.dropped = 0

    def offer(self, loss: Callable[[int], Tensor]) -> bytes:
        """This machine's numbers for the next iteration.

        loss: of the weights as they are, for a sample's number, with the same batch and no random
        numbers whenever it is called. A loss that is not finite is dropped and counted.
        """
        own = self.rule.machine_keys(self.log.end, self.machine + 1)[-1]
        numbers = []
        for sample in range(self.rule.samples):
            key = int(keyed.fold(own, sample))
            slope = slope_in_place(
                lambda sample=sample: loss(sample), self.tensors, key, self.eps, backup=self.backup
            )
            self.dropped += slope - slope != 0
            numbers.append(slope)
        return self.rule.codec.encode(numbers)

    def apply(self, offers: Mapping[int, bytes]) -> Entry:
        """Step along what the machines have offered, by number: the same on all machines."""
        machines = tuple(sorted(offers))
        entry = Entry(machines, machines, b"".join(offers[machine] for machine in machines))
        keys, scales = self.rule.steps(self.log.end, entry)
        walk_in_place(self.tensors, keys.tolist(), scales.tolist())
        self.log.entries.append(entry)
        return entry

    def refresh(self, weights: Sequence[Tensor]) -> None:
        """Make the weights anew, from those before the log's first entry and the log."""
        for tensor, value in zip(self.tensors, weights, strict=True):
            tensor.detach().copy_(value)
        for place, entry in enumerate(self.log.entries):
            keys, scales = self.rule.steps(self.log.first + place, entry)
            walk_in_place(self.tensors, keys.tolist(), scales.tolist())

    def digest(self) -> int:
        """32 bits that tell weights apart."""
        code = 0
        for tensor in self.tensors:
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            code = zlib.crc32(raw.numpy().data, code)
        return code
