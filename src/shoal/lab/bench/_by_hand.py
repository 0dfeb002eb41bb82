"""Loops written by hand for one model, as fast as we can make them.

They know their model, keep its parameters in the layout that suits them, and have no messages, no
clocks and no peers that fail. Nothing here comes from the package that they are compared with.
All of them average equal weights; x [peers, samples, *], y [peers, samples].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

where_positive = torch.ops.aten.threshold_backward.grad_input


def _orders(y: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The samples of y [peers, samples] in a fresh order, [peers, at most batch] at a time."""
    order = torch.rand(y.shape, generator=generator, device=generator.device).argsort(1)
    yield from order.split(batch, 1)


class VmapLoop:
    """`torch.func`: vmap over the gradient of a functional call, for any module."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
        self.tensors = {
            name: value.detach().expand(len(x), *value.shape).contiguous()
            for name, value in module.named_parameters()
        }
        self.rows = torch.arange(len(x)).unsqueeze(1)
        self.x, self.y, self.lr, self.batch = x, y, lr, batch
        self.generator = torch.Generator().manual_seed(0)

        def loss(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(functional_call(module, tensors, (x,)), y)

        self.gradient = vmap(grad(loss))

    def round(self) -> None:
        values = list(self.tensors.values())
        for part in _orders(self.y, self.batch, self.generator):
            found = self.gradient(self.tensors, self.x[self.rows, part], self.y[self.rows, part])
            torch._foreach_add_(values, [found[n] for n in self.tensors], alpha=-self.lr)  # pyright: ignore[reportPrivateImportUsage]
        for value in values:
            value.copy_(value.mean(0, keepdim=True).expand_as(value))

    def params(self) -> Tensor:
        """The first peer's parameters as one vector."""
        return torch.cat([value[0].flatten() for value in self.tensors.values()])


class StackedMLP:
    """The MLP with one hidden layer as batched products, gradients derived by hand.

    Samples lie innermost, 16 or a multiple of 8 of them, so that every product is of a weight with
    a wide matrix; weights are updated by the product that makes their gradient.
    """

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
        first, second = (m for m in module.modules() if isinstance(m, nn.Linear))
        peers = len(x)

        def own(value: Tensor) -> Tensor:
            return value.detach().expand(peers, *value.shape).contiguous()

        self.w1, self.b1 = own(first.weight), own(first.bias.unsqueeze(1))
        self.w2, self.b2 = own(second.weight), own(second.bias.unsqueeze(1))
        self.x, self.y = x.flatten(2), y
        self.place = torch.arange(peers).unsqueeze(1) * x.shape[1]
        self.lr, self.batch = lr, batch
        self.widths: dict[int, tuple[Tensor, ...]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def _buffers(self, count: int) -> tuple[Tensor, ...]:
        """Input, hidden layer, output and the hidden layer's gradient for so many samples."""
        if count not in self.widths:
            wide = -(-count // 8) * 8
            peers, hidden, features = self.w1.shape
            shapes = (features, hidden, self.w2.shape[1], hidden)
            self.widths[count] = tuple(self.w1.new_zeros(peers, n, wide) for n in shapes)
        return self.widths[count]

    def round(self) -> None:
        lr, features = self.lr, self.x.reshape(-1, self.x.shape[-1])
        labels = self.y.reshape(-1)
        for part in _orders(self.y, self.batch, self.generator):
            count = part.shape[1]
            flat = (part + self.place).reshape(-1)
            x, h, o, dh = self._buffers(count)
            taken = features.index_select(0, flat).view(len(part), count, -1)
            x[..., :count].copy_(taken.transpose(1, 2))
            torch.bmm(self.w1, x, out=h).add_(self.b1).clamp_min_(0)
            torch.baddbmm(self.b2, self.w2, h, out=o)
            # A softmax of torch over ten classes is five times slower than its four parts.
            o.sub_(o.amax(1, keepdim=True)).exp_().div_(o.sum(1, keepdim=True))
            target = labels.index_select(0, flat).view(len(part), 1, count)
            o[..., :count].scatter_add_(1, target, o.new_full((), -1.0).expand(target.shape))
            o[..., count:] = 0
            o.mul_(1 / count)
            torch.bmm(self.w2.transpose(1, 2), o, out=dh)
            where_positive(dh, h, 0, grad_input=dh)
            self.w2.baddbmm_(o, h.transpose(1, 2), alpha=-lr)
            self.b2.add_(o.sum(2, keepdim=True), alpha=-lr)
            self.w1.baddbmm_(dh, x.transpose(1, 2), alpha=-lr)
            self.b1.add_(dh.sum(2, keepdim=True), alpha=-lr)
        for value in (self.w1, self.b1, self.w2, self.b2):
            value.copy_(value.mean(0, keepdim=True).expand_as(value))

    def params(self) -> Tensor:
        """The first peer's parameters as one vector, in the module's order."""
        return torch.cat([v[0].flatten() for v in (self.w1, self.b1, self.w2, self.b2)])


class ChannelsLastLoop:
    """One module per peer with channels-last images and in-place steps, for convolutions.

    The gradient goes straight from autograd into the step: no optimiser object, no zeroing.
    """

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
        import copy

        last = torch.channels_last
        self.modules = [copy.deepcopy(module).to(memory_format=last) for _ in x]  # pyright: ignore[reportCallIssue]
        self.values = [list(m.parameters()) for m in self.modules]
        self.x = [part.contiguous(memory_format=last) for part in x]
        self.y, self.lr, self.batch = y, lr, batch
        self.generator = torch.Generator().manual_seed(0)

    def round(self) -> None:
        for part in _orders(self.y, self.batch, self.generator):
            for i, (module, values) in enumerate(zip(self.modules, self.values, strict=True)):
                output = module(self.x[i].index_select(0, part[i]))
                loss = nn.functional.cross_entropy(output, self.y[i].index_select(0, part[i]))
                found = torch.autograd.grad(loss, values)
                with torch.no_grad():
                    torch._foreach_add_(values, found, alpha=-self.lr)  # pyright: ignore[reportPrivateImportUsage]
        with torch.no_grad():
            for copies in zip(*self.values, strict=True):
                mean = torch.stack(copies).mean(0)
                torch._foreach_copy_(list(copies), [mean] * len(copies))  # pyright: ignore[reportPrivateImportUsage]

    def params(self) -> Tensor:
        """The first peer's parameters as one vector."""
        return torch.cat([value.detach().reshape(-1) for value in self.values[0]])
