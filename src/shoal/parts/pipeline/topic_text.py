"""The standard library's help topics as text to learn, character by character."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.types import Key


@dataclass(frozen=True)
class TopicText:
    """Windows of `length` characters and the one behind each, from `pydoc_data.topics`.

    The first nine tenths of the topics, in the order of their names, are for training. held_out:
    how many windows of the rest, evenly spaced, are for validation.

    Assumes one version of Python: another one has other topics, hence other numbers.

    >>> TopicText(length=8, held_out=3).validation.shape
    torch.Size([3, 9])
    """

    length: int = 32
    held_out: int = 64

    def __post_init__(self) -> None:
        if self.length < 2 or self.held_out < 1:
            raise UsageError(
                f"topic_text: length={self.length}, held_out={self.held_out}; need windows of at "
                "least 2 characters, and one to validate"
            )

    @property
    def vocabulary(self) -> int:
        """How many different characters there are."""
        return _topics()[1]

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        codes = _topics()[0]
        cut = len(codes) * 9 // 10
        return codes[:cut], codes[cut:]

    @property
    def validation(self) -> Tensor:
        """[held_out, length + 1]."""
        return self._windows

    @cached_property
    def _windows(self) -> Tensor:
        text = self._parts[1]
        last = len(text) - self.length - 1
        starts = [place * last // self.held_out for place in range(self.held_out)]
        return torch.stack([text[start : start + self.length + 1] for start in starts])

    def batch(self, key: Key, size: int) -> Tensor:
        """Windows [size, length + 1], drawn with replacement."""
        text = self._parts[0]
        draws = keyed.uniform(keyed.grid(key, size))
        starts = (draws * (len(text) - self.length)).long()
        steps = torch.arange(self.length + 1, device=starts.device)
        return text[starts.unsqueeze(-1) + steps]


@lru_cache(maxsize=1)
def _topics() -> tuple[Tensor, int]:
    """All topics as numbers of characters, and how many characters there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: place for place, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([number[c] for c in text], dtype=torch.int64, device="cpu")
    return codes, len(number)
