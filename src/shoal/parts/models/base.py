"""What a model part is, and how a module becomes a stacked model.

A model part is a frozen dataclass of settings whose `build` makes an ordinary `torch.nn.Module`.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from shoal.parts.models._compile import compile_module
from shoal.parts.models._stacked import OutputGradient, Stacked

__all__ = ["Model", "OutputGradient", "Stacked", "compile_module"]


class Model(Protocol):
    """Settings from which a module can be built."""

    def build(self, features: tuple[int, ...], outputs: int) -> nn.Module:
        """A module for samples of shape `features` (sequences: `(length,)`), `outputs` wide."""
        ...
