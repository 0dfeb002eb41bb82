"""FedZip's bytes back into a payload, for bytes that anybody may have made.

The checksum finds damage, not malice: whoever writes a message can sign it, so every count,
position and code is checked against the layout before anything of its size is made.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.parts.transform._bits import Reader, from_bits, width_of
from shoal.parts.transform._entropy import code_tree, huffman_symbols, rice_gaps
from shoal.parts.transform._fedzip_wire import (
    BASE,
    CODECS,
    COUNT,
    GAP,
    HEADER,
    MOST_CLUSTERS,
    VERSION,
    Clustered,
    Layer,
    layout_checksum,
)
from shoal.parts.transform.base import Buffer, bytes_at, flat_view, tensor_at
from shoal.tensor.flat import FlatSpec


class _Cursor:
    """Walks through the bytes and refuses to leave them."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at

    def skip(self, count: int) -> int:
        """Where the next `count` bytes start."""
        at = self.at
        if count < 0 or at + count > len(self.data):
            raise DecodeError(f"fedzip: {at + count} bytes wanted, {len(self.data)} there")
        self.at = at + count
        return at

    def fields(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack_from(self.data, self.skip(form.size))

    def reader(self, bits: int) -> Reader:
        count = (bits + 7) // 8
        return Reader(bytes_at(self.data, self.skip(count), count), "fedzip")

    def numbers(self, count: int, dtype: torch.dtype) -> Tensor:
        return tensor_at(self.data, self.skip(count * dtype.itemsize), count, dtype)


def unpack(data: Buffer, spec: FlatSpec, codec: str) -> Clustered:
    """A row from its bytes; `codec` is what it would be packed with again.

    DecodeError on anything that `pack` would not have made.
    """
    view = flat_view(data)
    cursor = _Cursor(view, 0)
    version, clusters, check = cursor.fields(HEADER)
    body = zlib.crc32(view[HEADER.size :], zlib.crc32(view[:2], layout_checksum(spec)))
    if version >> 1 != VERSION or not 2 <= clusters <= MOST_CLUSTERS or check != body:
        raise DecodeError("fedzip: wrong checksum (corrupted bytes, or made for another layout)")
    dtype = torch.float64 if version & 1 else torch.float32
    layers, symbols, centroids, plain = [], [], [], []
    for name, size in zip(spec.names, spec.sizes, strict=True):
        (tag,) = view[cursor.skip(1) : cursor.at]
        layers.append(Layer(name, size, coded=tag != 0))
        if tag == 0:
            plain.append(cursor.numbers(size, dtype))
            continue
        base = tag & BASE
        if not 1 <= tag - base <= len(CODECS):
            raise DecodeError(f"fedzip: layer {name!r} has unknown tag {tag}")
        values = cursor.numbers(clusters if base else clusters - 1, dtype)
        if base and values[0] == 0:
            raise DecodeError(f"fedzip: layer {name!r} tags a base centroid that is 0")
        centroids.append(values if base else torch.cat((values.new_zeros(1), values)))
        used = CODECS[tag - base - 1]
        symbols.append(torch.from_numpy(_symbols(cursor, used, size, clusters)))
    if cursor.at != len(view):
        raise DecodeError(f"fedzip: {len(view) - cursor.at} bytes left over")
    return Clustered(
        symbols=torch.cat(symbols) if symbols else torch.empty(0, dtype=torch.uint8, device="cpu"),
        centroids=torch.stack(centroids)
        if centroids
        else torch.empty(0, clusters, dtype=dtype, device="cpu"),
        plain=torch.cat(plain) if plain else torch.empty(0, dtype=dtype, device="cpu"),
        layers=tuple(layers),
        codec=codec,
        checksum=layout_checksum(spec),
    )


def _symbols(cursor: _Cursor, codec: str, size: int, clusters: int) -> np.ndarray:
    if codec == "huffman":
        return _huffman(cursor, size, clusters)
    width = width_of(clusters - 1)
    if codec == "address":
        (count,) = cursor.fields(COUNT)
        _at_most(count, size)
        reader = cursor.reader(count * (width_of(size) + width))
        places = from_bits(reader.take(count * width_of(size)), width_of(size), count)
        places = places.astype(np.int64)
    else:
        count, parameter, unary = cursor.fields(GAP)
        _at_most(count, size)
        _at_most(parameter, width_of(size))
        # Quotients and ones together cannot outnumber the entries.
        _at_most(unary, size)
        reader = cursor.reader(count * (parameter + width) + unary)
        places = np.cumsum(rice_gaps(reader, parameter, count, unary) + 1) - 1
    which = from_bits(reader.take(count * width), width, count)
    reader.finish()
    ascending = count == 0 or (places[-1] < size and bool((places[1:] > places[:-1]).all()))
    if not ascending or (which >= clusters - 1).any():
        raise DecodeError("fedzip: positions out of order or symbols out of range")
    symbols = np.zeros(size, np.uint8)
    symbols[places] = which + np.uint8(1)
    return symbols


def _huffman(cursor: _Cursor, size: int, clusters: int) -> np.ndarray:
    lengths = list(cursor.data[cursor.skip(clusters) : cursor.at])
    if max(lengths) >= MOST_CLUSTERS:
        raise DecodeError(f"fedzip: Huffman code lengths {lengths} are too long")
    node = code_tree(lengths)
    # The tree tells how many bits the root has; each child's number follows from its parent's.
    most = min(len(cursor.data) - cursor.at, (size * max(lengths) + 7) // 8)
    reader = Reader(bytes_at(cursor.data, cursor.at, most), "fedzip")
    symbols = huffman_symbols(reader, size, node)
    cursor.skip(reader.close())
    return symbols


def _at_most(value: int, limit: int) -> None:
    if value > limit:
        raise DecodeError(f"fedzip: {value} where at most {limit} can be")
