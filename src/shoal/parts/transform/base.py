"""What all transforms share: payloads that know their exact bytes, layers, and names as settings.

Numbers travel in the dtype of the vector that was encoded (float32 or float64), little-endian.
The layout is known from `bind`, so fixed-size payloads carry no header: a receiver tells the two
dtypes apart by the length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from shoal import parts
from shoal.base.errors import DecodeError, UsageError
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Scalar, Vector

FLOATS = (torch.float32, torch.float64)
Settings = tuple[tuple[str, Any], ...]
Buffer = bytes | bytearray | memoryview

ALIGNMENT = 64
"""Where torch puts its own tensors; kernels may round otherwise at other addresses."""


@dataclass(frozen=True, eq=False)
class TensorPayload:
    """Base of payloads: dataclasses of tensors with leading axes, and of hashable constants.

    ranks: for each tensor field, how many axes it has behind the leading ones, in wire order.
    By default a row's bytes are its tensors in that order, raw and little-endian; a payload that
    packs tighter overrides `row_bytes` (equal for all rows) or `size_bytes`, and `pack`.
    """

    ranks: ClassVar[dict[str, int]] = {}

    @property
    def lead(self) -> torch.Size:
        """The leading axes."""
        name, rank = next(iter(self.ranks.items()))
        shape: torch.Size = getattr(self, name).shape
        return shape[: len(shape) - rank]

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.ranks]

    def row_bytes(self) -> int:
        """Exact bytes of one row."""
        axes = len(self.lead)
        return sum(t.element_size() * math.prod(t.shape[axes:]) for t in self._tensors())

    def size_bytes(self) -> Tensor:
        """Exact wire size of each row, int64 [...]; on the processor, where it is accounted."""
        return torch.full(self.lead, self.row_bytes(), dtype=torch.int64, device="cpu")

    def byte_count(self) -> int:
        """Exactly `len(self.pack())`, for a row."""
        self._need_row()
        if type(self).size_bytes is TensorPayload.size_bytes:
            return self.row_bytes()
        return int(self.size_bytes())

    def pack(self) -> bytes | memoryview:
        """The bytes of a row; a single tensor is not copied."""
        self._need_row()
        views = [raw(tensor) for tensor in self._tensors()]
        return views[0] if len(views) == 1 else b"".join(views)

    def _need_row(self) -> None:
        if self.lead:
            raise UsageError(
                f"{type(self).__name__}: leading axes {tuple(self.lead)} cannot be packed; "
                "pack one row at a time (shoal.tensor.tree.rows splits a stack)"
            )


@dataclass(frozen=True, eq=False)
class Dense(TensorPayload):
    """The vector as it is."""

    ranks: ClassVar[dict[str, int]] = {"values": 1}

    values: Vector

    # As the base class has it, for what is asked of every message of a run.

    @property
    def lead(self) -> torch.Size:
        return self.values.shape[:-1]

    def row_bytes(self) -> int:
        return self.values.shape[-1] * self.values.element_size()

    def byte_count(self) -> int:
        self._need_row()
        return self.values.nbytes


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as a contiguous little-endian array, without a copy where possible."""
    plain = tensor.detach().cpu().contiguous().numpy()
    return plain.astype(plain.dtype.newbyteorder("<"), copy=False)


def raw(tensor: Tensor) -> bytes | memoryview:
    """A tensor's bytes, without a copy where possible."""
    return array(tensor).reshape(-1).data.cast("B") if tensor.numel() else b""


def flat_view(data: Buffer) -> memoryview:
    """Any buffer as a contiguous one-axis view of bytes."""
    view = memoryview(data)
    if not view.c_contiguous:
        view = memoryview(view.tobytes())
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def tensor_at(data: memoryview, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers that start at byte `offset`: a view of writable, aligned buffers.

    Others are copied: torch has no read-only tensors, and a result must not depend on where in
    memory its bytes lay.
    """
    piece = data[offset : offset + count * dtype.itemsize]
    if count and not piece.readonly:
        octets = torch.frombuffer(piece, dtype=torch.uint8)
        if octets.data_ptr() % ALIGNMENT == 0:
            return octets.view(dtype)
    numbers = torch.empty(count, dtype=dtype, device="cpu")
    numbers.view(torch.uint8).numpy()[:] = np.frombuffer(piece, np.uint8)
    return numbers


def bytes_at(data: memoryview, offset: int, count: int) -> np.ndarray:
    """`count` bytes as a uint8 array, without a copy."""
    return np.frombuffer(data[offset : offset + count], np.uint8)


def dtype_by_length(data: memoryview, plain_bytes: int, numbers: int, who: str) -> torch.dtype:
    """The dtype with which `numbers` floats and `plain_bytes` other bytes make up the length."""
    for dtype in FLOATS:
        if len(data) == plain_bytes + numbers * dtype.itemsize:
            return dtype
    raise DecodeError(
        f"{who}: {len(data)} bytes; need {plain_bytes + 4 * numbers} (float32) or "
        f"{plain_bytes + 8 * numbers} (float64) for this layout (truncated, or bound to another)"
    )


@dataclass(frozen=True)
class Codec:
    """Base of transforms: settings are fields; the layout is learned by `bind`.

    Class attributes say what a method promises, and the contract suite holds it to them:
    unbiased: the mean over keys of decode(encode(x)) is x; dense: the payload is `Dense`, so other
    transforms may follow in a chain; stateful: `init` gives a state; adds_noise: feeding back the
    error would undo what the noise is for; examples: settings that the suite tries.
    """

    spec: FlatSpec | None = field(default=None, init=False, repr=False)

    unbiased: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    adds_noise: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def bind(self, spec: FlatSpec) -> Self:
        """The same transform for vectors of this layout."""
        bound = copy.copy(self)
        object.__setattr__(bound, "spec", spec)
        return bound

    def init(self, like: Vector) -> Any:
        """No state."""
        return None

    def contraction(self, dim: int) -> float | None:
        """c with E|decode(encode(x)) - x|^2 <= c |x|^2 for finite x [dim]; None = no promise."""
        return None

    @property
    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def _accept(self, x: Vector) -> None:
        """Refuse what cannot be encoded."""
        if x.dtype not in FLOATS:
            raise UsageError(
                f"{self._name}: dtype {x.dtype}; need float32 or float64 (convert the vector)"
            )
        if x.dim() == 0 or x.shape[-1] == 0:
            raise UsageError(f"{self._name}: shape {tuple(x.shape)}; need [..., dim], dim >= 1")
        if self.spec is not None and x.shape[-1] != self.spec.dim:
            raise UsageError(
                f"{self._name}: vector of {x.shape[-1]} entries, but bound to {self.spec.dim} "
                "(bind to the vector's own FlatSpec)"
            )

    def _bound(self) -> FlatSpec:
        if self.spec is None:
            raise UsageError(
                f"{self._name}: unpack needs the layout; call bind(spec) first and use its result"
            )
        return self.spec

    def _groups(self, dim: int, per_layer: bool) -> tuple[int, ...]:
        """Sizes of the runs of entries that share a scale: each layer, or the whole vector."""
        if not per_layer or self.spec is None:
            return (dim,)
        return tuple([size for size in self.spec.sizes if size])


def spread(scale: Tensor, groups: tuple[int, ...]) -> Tensor:
    """One number per group [..., groups], repeated for the entries; broadcasts if there is one."""
    if len(groups) == 1:
        return scale
    sizes = torch.tensor(groups, device="cpu").to(scale.device, non_blocking=True)
    return torch.repeat_interleave(scale, sizes, dim=-1, output_size=sum(groups))


def vector_norm(x: Vector) -> Scalar:
    """Euclidean norm [...], summed in float64 so that squares of large entries stay finite."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)


def check_number(part: str, name: str, value: Any, rule: str, fine: bool) -> None:
    """Raise the UsageError of a setting that breaks its rule."""
    if not fine:
        raise UsageError(f"{part}: {name}={value!r}; need {rule} (change {name})")


def plain_settings(value: Any) -> Any:
    """A JSON-like value as hashable tuples; mappings become pairs sorted by name.

    >>> plain_settings({"bits": 4, "rounding": "nearest"})
    (('bits', 4), ('rounding', 'nearest'))
    """
    if isinstance(value, Mapping):
        return tuple((str(key), plain_settings(value[key])) for key in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(plain_settings(item) for item in value)
    return value


@lru_cache(maxsize=256)
def made(name: str, settings: Settings, spec: FlatSpec | None = None) -> Any:
    """The transform of that name with these settings, bound when there is a layout."""
    fine = isinstance(settings, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in settings
    )
    if not fine:
        raise UsageError(f"{name}: settings={settings!r}; need (name, value) pairs or a mapping")
    kind = parts.find("transform", name)
    known = [item.name for item in fields(kind) if item.init]
    for key, _ in settings:
        if key not in known:
            raise UsageError(f"{name}: no setting {key!r}; there are {', '.join(known) or 'none'}")
    transform = kind(**dict(settings))
    return transform if spec is None else transform.bind(spec)
