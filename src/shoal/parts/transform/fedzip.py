"""Top-z sparsification, k-means quantisation and three lossless codes.

Beside the transform, `compress` and `decompress` do the same for named tensors and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.transform._cluster import assign, lloyd, midpoints
from shoal.parts.transform._fedzip_unpack import unpack
from shoal.parts.transform._fedzip_wire import (
    CODECS,
    MOST_CLUSTERS,
    Clustered,
    Layer,
    LayerStats,
    layout_checksum,
)
from shoal.parts.transform._select import ascending, kept_count, largest
from shoal.parts.transform.base import FLOATS, Buffer, Codec, check_number
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class FedZip(Codec):
    """Per layer: keep the `z` largest entries, cluster the values, code the cluster symbols.

    clusters: k-means with that many centroids, `iterations` Lloyd steps from `start` ("linspace"
    as in the paper, or "quantile", which one outlier cannot spoil). The cluster that 0 falls into
    is the base: exactly 0 as soon as the layer has a zero, so survivors of top-z below half the
    outer centroids vanish too. codec: "huffman" (at least 1 bit per entry), "address", "gap"
    (Golomb-Rice), or "auto": the shortest, layer by layer. Layers of at most `raw_entries` entries
    travel as they are; bias_z: the z of tensors with at most one axis (None: as all, 0: raw).
    A layer that is not finite decodes to NaN throughout; `compress` refuses it instead.
    Without error feedback a z below about 0.01 stalls training. Ratios saturate at the share of
    raw layers. Bytes: 6 + per layer 1, the centroids and the code; exact for every row.
    Source: Malekijoo et al. 2021, section 3 (arXiv 2102.01593); zero base cluster and prefix-free
    gaps are ours: the paper's gap lengths alone cannot be decoded.

    >>> codec = FedZip(z=0.5, raw_entries=0)
    >>> x = torch.tensor([-3., 0.1, -3., 0.2, 2., 0., 0.3, 2.])
    >>> payload, _ = codec.encode(x, None, torch.tensor(0))
    >>> codec.decode(payload)
    tensor([-3.,  0., -3.,  0.,  2.,  0.,  0.,  2.])
    """

    z: float = 0.01
    clusters: int = 3
    codec: str = "auto"
    bias_z: float | None = None
    raw_entries: int = 256
    iterations: int = 4
    start: str = "linspace"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        *({"z": 0.3, "codec": codec, "raw_entries": 4} for codec in ("auto", *CODECS)),
        {"z": 1.0, "clusters": 2, "raw_entries": 0},
        {"z": 0.4, "clusters": 16, "raw_entries": 0, "codec": "huffman"},
        {"z": 0.2, "clusters": 5, "raw_entries": 0, "start": "quantile", "bias_z": 0.0},
    )

    def __post_init__(self) -> None:
        part = "fedzip"
        check_number(part, "z", self.z, "0 < z <= 1", 0 < self.z <= 1)
        check_number(
            part,
            "clusters",
            self.clusters,
            f"2 to {MOST_CLUSTERS}",
            self.clusters in range(2, MOST_CLUSTERS + 1),
        )
        check_number(
            part,
            "codec",
            self.codec,
            "'auto' or one of " + ", ".join(CODECS),
            self.codec in ("auto", *CODECS),
        )
        check_number(
            part,
            "bias_z",
            self.bias_z,
            "None or 0 <= bias_z <= 1",
            self.bias_z is None or 0 <= self.bias_z <= 1,
        )
        check_number(part, "raw_entries", self.raw_entries, ">= 0", self.raw_entries >= 0)
        check_number(part, "iterations", self.iterations, ">= 1", self.iterations >= 1)
        check_number(
            part,
            "start",
            self.start,
            "'linspace' or 'quantile'",
            self.start in ("linspace", "quantile"),
        )

    def contraction(self, dim: int) -> float:
        """Never farther from x than the zero vector is."""
        return 1.0

    def _plan(self, dim: int) -> tuple[FlatSpec, list[tuple[Layer, float]]]:
        """The layout, and each layer with its z."""
        spec = self.spec or FlatSpec(("vector",), ((dim, 1),))
        plan = []
        for name, shape, size in zip(spec.names, spec.shapes, spec.sizes, strict=True):
            fraction = self.bias_z if len(shape) <= 1 and self.bias_z is not None else self.z
            coded = fraction > 0 and size > self.raw_entries
            plan.append((Layer(name, size, coded), fraction))
        return spec, plan

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Clustered, Any]:
        self._accept(x)
        spec, plan = self._plan(x.shape[-1])
        symbols, centroids, plain = [], [], []
        for part, (layer, fraction) in zip(x.split(spec.sizes, -1), plan, strict=True):
            if layer.coded:
                each, centers = self._cluster(part, kept_count(fraction, layer.size))
                symbols.append(each)
                centroids.append(centers)
            else:
                plain.append(part)
        lead = x.shape[:-1]
        payload = Clustered(
            symbols=torch.cat(symbols, -1) if symbols else x.new_empty(*lead, 0).to(torch.uint8),
            centroids=(
                torch.stack(centroids, -2) if centroids else x.new_empty(*lead, 0, self.clusters)
            ),
            plain=torch.cat(plain, -1) if plain else x.new_empty(*lead, 0),
            layers=tuple([layer for layer, _ in plan]),
            codec=self.codec,
            checksum=layout_checksum(spec),
        )
        return payload, state

    def _cluster(self, part: Vector, keep: int) -> tuple[Tensor, Tensor]:
        """Symbols uint8 [..., n] and centroids [..., clusters], base first, of one layer."""
        index = largest(part, keep)
        kept = part.gather(-1, index)
        zeros = part.shape[-1] - keep
        finite = kept.isfinite().all(-1, keepdim=True)
        kept = torch.where(finite, kept, torch.zeros_like(kept))
        # float64: prefix sums of a million float32 values would lose the small clusters.
        ordered, kept = ascending(kept).to(torch.float64), kept.to(torch.float64)
        centers = lloyd(ordered, zeros, self.clusters, self.iterations, self.start)
        centers = centers.to(part.dtype).to(torch.float64)
        base = (midpoints(centers) < 0).sum(-1, keepdim=True)
        hollow = (kept == 0).any(-1, keepdim=True) | (zeros > 0)
        centers = torch.where(
            hollow, centers.scatter(-1, base, 0.0), centers + 0.0
        )  # adding 0 turns -0 into 0, which is what an untagged base decodes to
        cluster = assign(kept, centers)
        symbol = torch.where(cluster == base, 0, cluster + (cluster < base)).to(torch.uint8)
        symbols = torch.zeros_like(part, dtype=torch.uint8).scatter_(-1, index, symbol)
        others = torch.arange(self.clusters - 1, device=part.device)
        order = torch.cat((base, others + (others >= base)), -1)
        centroids = centers.gather(-1, order)
        centroids[..., :1] = torch.where(finite, centroids[..., :1], torch.nan)
        return symbols, centroids.to(part.dtype)

    def decode(self, payload: Clustered) -> Vector:
        return payload.decode()

    def unpack(self, data: Buffer) -> Clustered:
        return unpack(data, self._bound(), self.codec)


def layout_of(tensors: Mapping[str, Tensor]) -> FlatSpec:
    """The layout of named float tensors, in their order."""
    if not tensors:
        raise UsageError("fedzip: no tensors given; need at least one")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UsageError(
                f"fedzip: {name!r} is {tensor.dtype}; need float32 or float64 (send it apart)"
            )
    return FlatSpec(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))


def compress(tensors: Mapping[str, Tensor], codec: FedZip | None = None) -> bytes:
    """Named tensors as bytes; UsageError unless every entry is finite.

    A mix of dtypes travels as float64 throughout.

    >>> delta = {"weight": torch.zeros(100, 100), "bias": torch.ones(10)}
    >>> len(compress(delta, FedZip(z=0.01))), decompress(compress(delta), delta)["bias"].sum()
    (59, tensor(10.))
    """
    spec = layout_of(tensors)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UsageError(f"fedzip: {name!r} has entries that are not finite (skip this update)")
    payload, _ = (
        (codec or FedZip())
        .bind(spec)
        .encode(spec.flatten(tensors), None, torch.zeros((), dtype=torch.int64, device="cpu"))
    )
    return payload.pack()


def decompress(data: Buffer, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `compress`; names, shapes, dtypes and devices are the template's.

    DecodeError on truncated or corrupted bytes and on bytes made for other names or shapes.
    """
    spec = layout_of(template)
    flat = unpack(data, spec, "auto").decode()
    if not flat.isfinite().all():
        raise DecodeError("fedzip: entries that are not finite (the sender's update was broken)")
    return {name: view.to(template[name]) for name, view in spec.views(flat).items()}


def layer_stats(data: Buffer, template: Mapping[str, Tensor]) -> tuple[LayerStats, ...]:
    """Codec, bytes and sparsity of each layer of a message."""
    return unpack(data, layout_of(template), "auto").stats()


class Compressor:
    """FedZip for named tensors outside of any run: bytes out, tensors back, statistics kept.

    stats: codec, bytes and sparsity of each layer of the last message made or read; () before the
    first. Errors are those of `compress` and `decompress`; both are ValueErrors.

    >>> delta = {"weight": torch.ones(20, 20)}
    >>> zip = Compressor(FedZip(z=0.05))
    >>> data = zip.encode(delta)
    >>> int(zip.decode(data, delta)["weight"].sum()), zip.stats[0].codec, zip.stats[0].nonzero
    (20, 'gap', 20)
    """

    def __init__(self, codec: FedZip | None = None) -> None:
        self.codec = codec or FedZip()
        self.stats: tuple[LayerStats, ...] = ()

    def encode(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Named finite float tensors as bytes, checksum included."""
        data = compress(tensors, self.codec)
        self.stats = layer_stats(data, tensors)
        return data

    def decode(self, data: Buffer, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, in the template's names, shapes and dtypes."""
        tensors = decompress(data, template)
        self.stats = layer_stats(data, template)
        return tensors
