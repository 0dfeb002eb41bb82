"""Which axes of which parameters belong to the same hidden units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Index, Vector

_PLAIN = (
    nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.Identity, nn.Dropout,
    nn.MaxPool2d, nn.AvgPool2d,
)  # fmt: skip
"""Layers that treat all units alike and have no parameters."""


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter along which units lie, `block` entries for each (0 = the first)."""

    name: str
    axis: int
    block: int = 1

    def positions(self, order: Index) -> Index:
        """Where the entries of units in a new order [units] come from: [units * block]."""
        index = order.to("cpu")
        if self.block == 1:
            return index
        steps = torch.arange(self.block, device="cpu")
        return (index.unsqueeze(-1) * self.block + steps).flatten()


@dataclass(frozen=True)
class Layer:
    """Hidden units of one layer: what makes them, what reads them, and the module after which
    their values can be seen."""

    units: int
    made: tuple[Axis, ...]
    read: tuple[Axis, ...]
    seen: int


@dataclass(frozen=True, eq=False)
class Units:
    """The hidden layers of an `nn.Sequential`, first to last.

    Reordering a layer's units in all of `made` and `read` leaves the function of the network as it
    was. The last layer's outputs and the inputs have an order of their own and are none of them.
    """

    module: nn.Sequential
    spec: FlatSpec
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, module: nn.Module, spec: FlatSpec, features: Sequence[int]) -> Units:
        """Trace a network of Linear, Conv2d, GroupNorm, LayerNorm, BatchNorm, Flatten, pooling and
        activations on samples of shape `features`; UsageError for anything else.

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [layer.units for layer in Units.of(net, FlatSpec.of(net), (4,)).layers]
        [3]
        """
        if type(module) is not nn.Sequential:
            raise UsageError(
                f"alignment: {type(module).__name__}; only an nn.Sequential can be traced (give "
                "Units by hand)"
            )
        layers: list[Layer] = []
        made: list[Axis] = []
        count, seen = 0, -1
        x = torch.zeros(2, *features, device=next(module.parameters()).device)
        for place, (name, child) in enumerate(module.named_children()):
            with torch.no_grad():
                after = child(x) if not isinstance(child, nn.modules.batchnorm._BatchNorm) else x
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                if isinstance(child, nn.Conv2d) and child.groups != 1:
                    raise UsageError(f"alignment: layer {name} has groups={child.groups}; need 1")
                if made:
                    inputs = child.weight.shape[1]
                    if inputs % count:
                        raise UsageError(
                            f"alignment: layer {name} reads {inputs} values of {count} units"
                        )
                    read = (Axis(f"{name}.weight", 1, inputs // count),)
                    layers.append(Layer(count, tuple(made), read, seen))
                count = child.weight.shape[0]
                made = [Axis(f"{name}.weight", 0)]
                if child.bias is not None:
                    made.append(Axis(f"{name}.bias", 0))
            elif isinstance(child, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
                made += [Axis(f"{name}.{n}", 0) for n, _ in child.named_parameters()]
            elif isinstance(child, nn.GroupNorm):
                if child.num_groups not in (1, child.num_channels):
                    raise UsageError(
                        f"alignment: layer {name} normalises groups of units, whose order matters "
                        "(use one group, or as many as there are channels)"
                    )
                made += [Axis(f"{name}.{n}", 0) for n, _ in child.named_parameters()]
            elif not isinstance(child, (*_PLAIN, nn.Flatten)):
                raise UsageError(
                    f"alignment: layer {name} is a {type(child).__name__}, which cannot be traced "
                    "(give Units by hand)"
                )
            if made and not isinstance(child, nn.Flatten):
                seen = place
            x = after
        return cls(module, spec, tuple(layers))

    @cached_property
    def _places(self) -> dict[str, Tensor]:
        return self.spec.views(torch.arange(self.spec.dim, device="cpu"))

    def gather(self, orders: Sequence[Index]) -> Index:
        """Positions [dim] such that `params[positions]` has each layer's units in a new order.

        orders: for each layer a permutation [units]; place u of the result is unit order[u].
        """
        found = {name: place.clone() for name, place in self._places.items()}
        for layer, order in zip(self.layers, orders, strict=True):
            for axis in (*layer.made, *layer.read):
                found[axis.name] = found[axis.name].index_select(axis.axis, axis.positions(order))
        return torch.cat([found[name].flatten() for name in self.spec.names])

    def permuted(self, params: Vector, orders: Sequence[Index]) -> Vector:
        """Parameters [..., dim] with the units of each layer in a new order."""
        return params.index_select(-1, self.gather(orders).to(params.device))

    def values(self, params: Vector, inputs: Tensor) -> list[Tensor]:
        """What the units of each layer say to inputs [n, *features].

        params [models, dim] -> per layer [models, units, n * positions].
        """
        named = self.spec.views(params)

        def look(own: Mapping[str, Tensor]) -> list[Tensor]:
            out, x = [], inputs
            wanted = {layer.seen for layer in self.layers}
            for place, (name, child) in enumerate(self.module.named_children()):
                inside = {n: own[f"{name}.{n}"] for n, _ in child.named_parameters()}
                x = torch.func.functional_call(child, inside, (x,))
                if place in wanted:
                    out.append(x.transpose(0, 1).flatten(1))
            return out

        with torch.no_grad():
            return torch.vmap(look, randomness="error")(named)
