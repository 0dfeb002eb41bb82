"""A causal language model cut into equal stages of blocks and an outer part."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.base.errors import UsageError
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Key, Vector


class StagedModel:
    """Part 0 (embedding, final norm, output layer) and parts 1 to `stages` of equally many blocks.

    module: has `embedding`, `blocks`, `norm` and `head`, and may have `position`, `cosine` and
    `sine`, as the module of `shoal.parts.models.transformer` does; a copy of it is kept. A part's
    parameters are one vector [dim], see `spec`. Hashable by identity.

    >>> from shoal.parts.models.transformer import Transformer
    >>> module = Transformer(width=8, layers=4, heads=2, tied=True).build((5,), 11)
    >>> model = StagedModel(module, stages=2)
    >>> model.spec(0).dim, model.spec(1).dim == model.spec(2).dim
    (104, True)
    """

    def __init__(self, module: nn.Module, stages: int) -> None:
        missing = [n for n in ("embedding", "blocks", "norm", "head") if not hasattr(module, n)]
        if missing:
            raise UsageError(
                f"staged_model: {type(module).__name__} has no {missing[0]!r}; need embedding, "
                "blocks, norm and head (such as the module of `Transformer`)"
            )
        depth = len(module.blocks)  # type: ignore[arg-type]
        if stages < 1 or depth % stages:
            raise UsageError(
                f"staged_model: {depth} blocks in {stages} stages; need equally many in each "
                "(change layers)"
            )
        self.stages = stages
        self._whole = copy.deepcopy(module)
        self._outer = _Outer(self._whole)
        self._each = depth // stages
        self._inner = _Inner(self._whole, 0, self._each)
        self._specs = FlatSpec.of(self._outer), FlatSpec.of(self._inner)

    def spec(self, part: int) -> FlatSpec:
        """How the parameters of part 0, or of any stage, lie in its vector."""
        return self._specs[part > 0]

    def drawn(self, part: int, key: Key) -> Vector:
        """A part's initial parameters [dim], by the module's own rule; equal keys, equal bits."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key) & ((1 << 63) - 1))
            self._whole.reset_parameters()  # type: ignore[operator]
        module: nn.Module = self._outer
        if part:
            module = _Inner(self._whole, (part - 1) * self._each, self._each)
        named = dict(module.named_parameters())
        spec = self.spec(part)
        return spec.flatten({name: named[name].detach() for name in spec.names})

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """tokens [batch, length] -> [batch, length, width], by part 0."""
        return functional_call(self._outer, dict(tensors), (tokens, False))

    def pass_through(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """[batch, length, width] -> the same, by a stage."""
        return functional_call(self._inner, dict(tensors), (x,))

    def predict(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, length, vocabulary], by part 0."""
        return functional_call(self._outer, dict(tensors), (x, True))


class _Outer(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.embedding: Any = whole.embedding
        self.position: Any = getattr(whole, "position", None)
        self.norm: Any = whole.norm
        self.head: Any = whole.head

    def forward(self, x: Tensor, last: bool) -> Tensor:
        if last:
            return self.head(self.norm(x))
        h = self.embedding(x)
        return h if self.position is None else h + self.position.weight[: x.shape[-1]]


class _Inner(nn.Module):
    def __init__(self, whole: nn.Module, first: int, count: int) -> None:
        super().__init__()
        blocks: Any = whole.blocks
        self.blocks = nn.ModuleList(blocks[first : first + count])
        self.register_buffer("cosine", getattr(whole, "cosine", None), persistent=False)
        self.register_buffer("sine", getattr(whole, "sine", None), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return x
