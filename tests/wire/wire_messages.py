"""Message classes and strategies that the tests of the wire share."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from shoal.wire.message import Packed, message


@message
class Plain:
    count: int
    share: float
    flag: bool
    text: str
    raw: bytes


@message(tag=("round", "part"))
class Inner:
    round: int
    part: str
    delta: Tensor


@message
class Everything:
    inner: Inner
    many: tuple[Tensor, ...]
    named: dict[str, Tensor]
    pair: tuple[int, float]
    packed: Packed
    maybe: Tensor | None
    plain: Plain


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Segmented:
    """A payload that packs itself, as a transform's does."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def byte_count(self) -> int:
        return len(self.data)

    def pack(self) -> bytes:
        return self.data


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int, layout: str) -> Tensor:
    """Random bits in a tensor of any type; `layout` says how it lies in memory."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    wide = tuple(reversed(shape)) if layout == "transposed" else shape
    if layout == "strided":
        wide = tuple(2 * size for size in shape)
    count = math.prod(wide) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    made = bits.view(dtype).reshape(wide) if count else torch.empty(wide, dtype=dtype)
    if layout == "transposed":
        made = made.permute(tuple(reversed(range(made.dim()))))
    elif layout == "strided":
        made = made[tuple(slice(None, None, 2) for _ in shape)]
    assert made.shape == shape
    return made


tensors = st.builds(
    tensor_of,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.integers(0, 1 << 30),
    st.sampled_from(["dense", "transposed", "strided"]),
)
plains = st.builds(
    Plain,
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
inners = st.builds(Inner, st.integers(0, 1 << 40), st.text(max_size=5), tensors)
everythings = st.builds(
    Everything,
    inners,
    st.lists(tensors, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), tensors, max_size=3),
    st.tuples(st.integers(-5, 5), st.floats()),
    st.binary(max_size=40).flatmap(
        lambda data: (
            st.sampled_from([Packed(data), Packed(memoryview(data))])
            | st.just(Packed(Segmented(data)))
        )
    ),
    st.none() | tensors,
    plains,
)
messages = plains | inners | everythings


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit, NaN included."""
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(_bits(left), _bits(right))
        )
    if isinstance(left, Packed):
        return bytes(left.pack()) == bytes(right.pack())
    if isinstance(left, float):
        return math.isnan(left) and math.isnan(right) if left != left else left == right
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if hasattr(left, "__struct_fields__"):
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in left.__struct_fields__
        )
    return type(left) is type(right) and left == right


def _bits(tensor: Tensor) -> Tensor:
    # A fresh tensor: an axis of length 1 may otherwise keep a stride that no view can have.
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.flatten().view(torch.uint8)
