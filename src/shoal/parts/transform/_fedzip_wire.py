"""FedZip's payload: clustered layers, and the bytes they become.

    message   version*2 + (1 if float64) u8 | clusters u8 | CRC-32 u32 | layers in order
    layer     tag u8 (codec 0 raw, 1 huffman, 2 address, 3 gap; +4 = base centroid follows)
    raw       the entries
    coded     [base centroid] | other centroids | codec
    huffman   code length u8 of each symbol | bits
    address   count u32 | positions of ceil(log2 n) bits | symbols of ceil(log2(clusters-1)) bits
    gap       count u32 | Rice parameter u8 | unary bits u32 | remainders | unary | symbols

Symbol 0 is the base cluster, which is not sent by address and gap; its centroid is 0 unless tagged.
The checksum covers the layer names and shapes too, so bytes made for another layout are refused.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.parts.transform._bits import join, to_bits, width_of
from shoal.parts.transform._entropy import (
    code_tree,
    first_minimum,
    gaps_of,
    huffman_bits,
    huffman_lengths,
    huffman_planes,
    rice_bits,
    rice_planes,
)
from shoal.parts.transform.base import (
    TensorPayload,
    array,
    raw,
)
from shoal.tensor.flat import FlatSpec

CODECS = ("huffman", "address", "gap")
MOST_CLUSTERS = 16
VERSION = 1
HEADER = struct.Struct("<BBI")
COUNT = struct.Struct("<I")
GAP = struct.Struct("<IBI")
BASE = 4


@dataclass(frozen=True)
class Layer:
    """One named run of entries; coded layers are clustered, the others travel as they are."""

    name: str
    size: int
    coded: bool


@dataclass(frozen=True)
class LayerStats:
    """What became of one layer of one row."""

    name: str
    entries: int
    codec: str
    size_bytes: int
    nonzero: int

    @property
    def bits_per_entry(self) -> float:
        return 8 * self.size_bytes / max(self.entries, 1)

    @property
    def sparsity(self) -> float:
        """Share of entries that decode to the base value."""
        return 1 - self.nonzero / max(self.entries, 1)


@dataclass(frozen=True)
class Plan:
    """Sizes of one layer for all rows: bytes [rows, codecs], counts [rows, clusters]."""

    counts: Tensor
    bytes: Tensor
    parameter: Tensor
    gaps: Tensor

    def best(self, codec: str) -> tuple[Tensor, Tensor]:
        """Bytes and codec number [rows] of the chosen codec."""
        if codec == "auto":
            return first_minimum(self.bytes, 1)
        number = CODECS.index(codec)
        return self.bytes[:, number], torch.full_like(self.counts[:, 0], number)


def plan(symbols: Tensor, clusters: int) -> Plan:
    """Exact sizes of uint8 symbols [rows, n] under each codec, nothing packed."""
    entries = symbols.shape[1]
    others = [(symbols == symbol).sum(1) for symbol in range(1, clusters)]
    count = torch.stack(others).sum(0)
    counts = torch.stack([entries - count, *others], 1)
    row, gaps = gaps_of(symbols != 0)
    parameter, gap_bits = rice_bits(gaps, row, count)
    symbol_bits = count * width_of(clusters - 1)
    bits = (huffman_bits(counts), count * width_of(entries) + symbol_bits, gap_bits + symbol_bits)
    fixed = (clusters, COUNT.size, GAP.size)
    sizes = [extra + (part + 7) // 8 for extra, part in zip(fixed, bits, strict=True)]
    return Plan(counts=counts, bytes=torch.stack(sizes, 1), parameter=parameter, gaps=gaps)


@lru_cache(maxsize=64)
def layout_checksum(spec: FlatSpec) -> int:
    return zlib.crc32(repr((spec.names, spec.shapes)).encode())


@dataclass(frozen=True, eq=False)
class Clustered(TensorPayload):
    """Layers as symbols and centroids.

    symbols: uint8 [..., coded entries]; centroids: [..., coded layers, clusters], symbol s of a
    layer stands for its centroid s; plain: [..., raw entries]. codec: which to pack with.
    """

    ranks: ClassVar[dict[str, int]] = {"symbols": 1, "centroids": 2, "plain": 1}

    symbols: Tensor
    centroids: Tensor
    plain: Tensor
    layers: tuple[Layer, ...]
    codec: str
    checksum: int

    @cached_property
    def _plans(self) -> list[Plan]:
        sizes = [layer.size for layer in self.layers if layer.coded]
        if not sizes:
            return []
        rows = self.symbols.reshape(-1, sum(sizes))
        return [plan(part, self._clusters) for part in rows.split(sizes, 1)]

    def size_bytes(self) -> Tensor:
        """Exact wire size of each row, int64 [...], from counts and gaps alone."""
        item = self.centroids.element_size()
        fixed = HEADER.size + len(self.layers) + self.plain.shape[-1] * item
        fixed += item * self.centroids[..., 1:].shape[-2:].numel()
        present = (self.centroids[..., 0] != 0).sum(-1)
        size = fixed + item * present
        for each in self._plans:
            size = size + each.best(self.codec)[0].view(size.shape)
        return size.to(torch.int64)

    def decode(self) -> Tensor:
        """The vector [..., dim]."""
        parts, coded, start, plain = [], 0, 0, 0
        for layer in self.layers:
            if layer.coded:
                symbols = self.symbols[..., start : start + layer.size].long()
                parts.append(self.centroids[..., coded, :].gather(-1, symbols))
                start, coded = start + layer.size, coded + 1
            else:
                parts.append(self.plain[..., plain : plain + layer.size])
                plain += layer.size
        return torch.cat(parts, -1)

    def pack(self) -> bytes:
        self._need_row()
        body = b"".join([piece for piece, _ in self._packed()])
        start = bytes((VERSION * 2 + (self.centroids.dtype == torch.float64), self._clusters))
        check = zlib.crc32(body, zlib.crc32(start, self.checksum))
        return start + check.to_bytes(4, "little") + body

    @property
    def _clusters(self) -> int:
        return self.centroids.shape[-1]

    def _packed(self) -> list[tuple[bytes, LayerStats]]:
        plans = iter(self._plans)
        start = plain = coded = 0
        pieces: list[tuple[bytes, LayerStats]] = []
        for layer in self.layers:
            if layer.coded:
                symbols = array(self.symbols[start : start + layer.size])
                piece, codec, used = self._coded(symbols, self.centroids[coded], next(plans))
                start, coded = start + layer.size, coded + 1
            else:
                entries = self.plain[plain : plain + layer.size]
                piece, codec = b"\0" + bytes(raw(entries)), "raw"
                used, plain = int(entries.count_nonzero()), plain + layer.size
            pieces.append((piece, LayerStats(layer.name, layer.size, codec, len(piece), used)))
        return pieces

    def _coded(self, symbols: np.ndarray, centroids: Tensor, each: Plan) -> tuple[bytes, str, int]:
        number = int(each.best(self.codec)[1])
        counts = each.counts[0].tolist()
        count = sum(counts[1:])
        base = int(bool(centroids[0] != 0))
        head = bytes((number + 1 + BASE * base,)) + bytes(raw(centroids[1 - base :]))
        if CODECS[number] == "huffman":
            lengths = huffman_lengths(counts)
            planes = huffman_planes(symbols, code_tree(lengths))
            middle = bytes(lengths)
        else:
            places = np.flatnonzero(symbols)
            which = to_bits(symbols[places] - np.uint8(1), width_of(self._clusters - 1))
            if CODECS[number] == "address":
                middle = COUNT.pack(count)
                planes = [to_bits(places, width_of(len(symbols))), which]
            else:
                parameter = int(each.parameter[0])
                remainders, unary = rice_planes(array(each.gaps), parameter)
                middle = GAP.pack(count, parameter, len(unary))
                planes = [remainders, unary, which]
        return head + middle + (join(planes) if planes else b""), CODECS[number], count

    def stats(self) -> tuple[LayerStats, ...]:
        """What became of each layer of a row."""
        self._need_row()
        return tuple([stats for _, stats in self._packed()])
