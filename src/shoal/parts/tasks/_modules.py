"""Which modules can be a task's model, and how their parameters are drawn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.base.errors import UsageError
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Key, Vector


def checked(module: nn.Module) -> nn.Module:
    """A private copy in training mode, or the reason why this module cannot be used."""
    for name, child in module.named_modules():
        where = f"{type(child).__name__} {name!r}" if name else type(child).__name__
        if isinstance(child, nn.modules.batchnorm._NormBase) and (
            child.track_running_stats or isinstance(child, nn.modules.batchnorm._BatchNorm)
        ):
            raise UsageError(
                f"task: {where} mixes samples or keeps running statistics, which no peer can "
                "send and no leading axis can carry (use nn.GroupNorm)"
            )
        chance = child.p if isinstance(child, nn.modules.dropout._DropoutNd) else 0.0
        if isinstance(child, (nn.MultiheadAttention, nn.RNNBase)):
            chance = child.dropout
        if chance > 0:
            raise UsageError(
                f"task: {where} drops with p={chance}; hidden randomness has no key (set p=0)"
            )
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
        raise UsageError("task: the module has lazy parameters (call it once on a sample)")
    if not any(p.requires_grad for p in module.parameters()):
        raise UsageError("task: the module has no trainable parameter (unfreeze one)")
    return copy.deepcopy(module).train()


def probe(module: nn.Module, x: Tensor) -> Tensor:
    """The output for samples x [batch, *]; refuses hidden randomness and changing buffers."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    first, state = None, torch.get_rng_state()
    try:
        with torch.no_grad():
            first, again = module(x), module(x)
    finally:
        torch.set_rng_state(state)
    for name, buffer in module.named_buffers():
        if not torch.equal(before[name], buffer):
            raise UsageError(
                f"task: buffer {name!r} changes when the module runs; only constants can be "
                "shared between peers (make it a parameter, or drop it)"
            )
    if not isinstance(first, Tensor) or first.shape[:1] != x.shape[:1]:
        raise UsageError("task: the module must map [batch, *] to one tensor [batch, *]")
    if not torch.equal(first, again) and not first.isnan().any():
        raise UsageError("task: the module draws hidden random numbers (set p=0, or remove it)")
    return first


class _Drawn(TorchDispatchMode):
    """Sends every random operation inside to one generator; the global one stays untouched."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            if all(argument.name != "generator" for argument in func._schema.arguments):
                func = func.overloadpacket.generator
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch loads its compiler, which takes as long as torch, to keep it off this.
        return False


def draw(module: nn.Module, spec: FlatSpec, key: Key) -> Vector:
    """Parameters `[..., dim]` as the layers' own `reset_parameters` draw them, one row per key.

    A parameter that no `reset_parameters` covers keeps the module's value. Equal keys are drawn
    once, so a common start costs the same for one peer and for many.
    """
    unique, place = torch.unique(key.reshape(-1), return_inverse=True)
    rows = [_draw_one(module, spec, int(word)) for word in unique.tolist()]
    table = torch.stack(rows).to(key.device)
    return table[place].reshape(*key.shape, spec.dim)


def _draw_one(module: nn.Module, spec: FlatSpec, word: int) -> Vector:
    fresh = copy.deepcopy(module).to("cpu")
    generator = torch.Generator().manual_seed(word)
    with torch.no_grad(), _Drawn(generator):
        # Children first: a parent's own rule has the last word.
        for child in reversed(list(fresh.modules())):
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
    named = dict(fresh.named_parameters())
    return spec.flatten({name: named[name].detach() for name in spec.names})
