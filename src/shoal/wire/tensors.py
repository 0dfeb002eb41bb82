"""Tensors as segments of a frame. Loaded with the first tensor: it is all of `wire` that has torch.

A segment is the raw little-endian bytes of a dense tensor; its type and shape stand in the frame's
header.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from shoal.base.errors import DecodeError, UndeclaredMessage
from shoal.wire.codec import ALIGNMENT

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_MOST_DIMS = 8


def describe(value: Tensor) -> tuple[int, bytes]:
    """(bytes of the segment, type and shape for the header)."""
    code = _DTYPE_CODES.get(value.dtype)
    if code is None:
        raise UndeclaredMessage(f"a tensor of {value.dtype} cannot be sent (convert it)")
    if value.dim() > _MOST_DIMS:
        raise UndeclaredMessage(f"a tensor of {value.dim()} axes cannot be sent; at most 8")
    if value.layout != torch.strided or value.is_meta:
        raise UndeclaredMessage(
            f"a tensor of layout {value.layout} on {value.device} cannot be sent (densify it)"
        )
    shape = struct.pack(f"<{value.dim()}Q", *value.shape)
    return value.numel() * value.element_size(), bytes((code,)) + shape


def raw(value: Tensor) -> bytes | memoryview:
    """The segment's bytes: the tensor's own memory where it is dense and on the processor."""
    # Conjugation and negation are lazy bits of a view; bytes know nothing of them.
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if dense.numel() == 0:
        return b""
    # Not `reshape(-1)`: an axis of length 1 counts as contiguous and may keep any stride.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def read_form(data: memoryview, length: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape from the header, checked against the segment's length."""
    dims = (len(data) - 1) // 8
    if data[0] >= len(_DTYPES) or dims > _MOST_DIMS:
        raise DecodeError("frame: unknown tensor type")
    dtype = _DTYPES[data[0]]
    shape = struct.unpack_from(f"<{dims}Q", data, 1)
    # An empty tensor may still claim axes whose strides overflow.
    if math.prod(shape) * dtype.itemsize != length or math.prod(s or 1 for s in shape) > 1 << 56:
        raise DecodeError(f"frame: shape {shape} does not take {length} bytes")
    return dtype, shape


def view(piece: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor in a segment; shares its memory where that starts at a multiple of `ALIGNMENT`."""
    if not len(piece):
        return torch.empty(shape, dtype=dtype, device="cpu")
    if piece.readonly:
        # torch has no read-only tensors; a received message is its receiver's own.
        piece = memoryview(bytearray(piece))
    flat = torch.frombuffer(piece, dtype=torch.uint8)
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    if dtype == torch.bool and int(flat.max()) > 1:
        raise DecodeError("frame: a truth value that is neither 0 nor 1")
    return flat.view(dtype).reshape(shape)
