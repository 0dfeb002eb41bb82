"""The plain loop that speed is measured against: one module per peer, one after the other.

Frozen: it is what a newcomer would write with torch alone, and a yardstick must not change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainLoop:
    """Federated averaging of modules with `torch.optim.SGD`; x [peers, samples, *], y as well."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
        import copy

        self.modules = [copy.deepcopy(module) for _ in x]
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=lr) for m in self.modules]
        self.loss = nn.CrossEntropyLoss()
        self.data = list(zip(x.unbind(), y.unbind(), strict=True))
        self.batch = batch
        self.generator = torch.Generator().manual_seed(0)

    def round(self) -> None:
        """One local epoch at every peer, then the average of all of them everywhere."""
        for module, optimizer, (x, y) in zip(self.modules, self.optimizers, self.data, strict=True):
            order = torch.randperm(len(x), generator=self.generator)
            for part in order.split(self.batch):
                optimizer.zero_grad()
                self.loss(module(x[part]), y[part]).backward()
                optimizer.step()
        with torch.no_grad():
            for copies in zip(*[m.parameters() for m in self.modules], strict=True):
                mean = torch.stack(copies).mean(0)
                for parameter in copies:
                    parameter.copy_(mean)

    def params(self) -> Tensor:
        """The first peer's parameters as one vector."""
        return nn.utils.parameters_to_vector(self.modules[0].parameters()).detach()
