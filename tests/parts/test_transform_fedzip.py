"""FedZip against its closed forms, scikit-learn's k-means and the entropy bound."""

from __future__ import annotations

import math
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.transform._cluster import assign, lloyd
from shoal.parts.transform.fedzip import (
    FedZip,
    compress,
    decompress,
    layer_stats,
    layout_of,
)
from shoal.tensor import tree
from shoal.tensor.flat import FlatSpec

KEY = torch.tensor(0)


def sparse(n: int, share: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, generator=generator) < share
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    return mask * sign


def message(x: torch.Tensor, **settings) -> tuple[bytes, torch.Tensor]:
    codec = FedZip(**settings).bind(FlatSpec(("layer",), ((len(x), 1),)))
    data = codec.encode(x, None, KEY)[0].pack()
    return data, codec.decode(codec.unpack(data))


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
def test_codec_is_within_twelve_percent_of_the_entropy(share: float) -> None:
    x = sparse(1_000_000, share)
    q = float((x != 0).float().mean())
    data, decoded = message(x, z=q)
    assert torch.equal(decoded, x)
    entropy = -q * math.log2(q) - (1 - q) * math.log2(1 - q) + q
    bits = 8 * len(data) / len(x)
    assert entropy <= bits <= 1.12 * entropy
    assert bits <= 1.32


def test_ratio_above_900_in_real_bytes() -> None:
    x = sparse(1_000_000, 0.0028)
    data, decoded = message(x, z=float((x != 0).double().mean()))
    assert torch.equal(decoded, x)
    assert 4 * len(x) / len(data) >= 900


@pytest.mark.parametrize("share", [0.3, 0.01])
def test_five_million_entries_a_second(share: float) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = sparse(1_000_000, share)
    best = math.inf
    try:
        for _ in range(4):
            start = time.process_time()
            message(x, z=share)
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert 1e6 / best >= 5e6


LAYERS = st.sampled_from(
    ["zeros", "equal", "one sign", "gaussian", "ties", "sparse", "two values", "one outlier"]
)


def layer(kind: str, n: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    outlier = x.clone()
    outlier[seed % n] = 1e6
    return {
        "zeros": torch.zeros(n),
        "equal": torch.full((n,), -0.7),
        "one sign": x.abs() + 1,
        "gaussian": x,
        "ties": x.round(),
        "sparse": sparse(n, 0.1, seed),
        "two values": torch.where(x > 0, 2.0, -5.0),
        "one outlier": outlier,
    }[kind]


@given(
    kind=LAYERS,
    n=st.integers(1, 70),
    z=st.floats(0.01, 1),
    clusters=st.integers(2, 16),
    codec=st.sampled_from(["auto", "huffman", "address", "gap"]),
    start=st.sampled_from(["linspace", "quantile"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_code_is_exact(kind, n, z, clusters, codec, start, seed) -> None:
    x = layer(kind, n, seed)
    bound = FedZip(z, clusters, codec, raw_entries=0, start=start).bind(
        FlatSpec(("layer",), ((n, 1),))
    )
    payload, _ = bound.encode(x, None, KEY)
    data = payload.pack()
    assert payload.byte_count() == len(data) == 6 + payload.stats()[0].size_bytes
    assert codec in ("auto", payload.stats()[0].codec)
    decoded = bound.decode(payload)
    assert torch.equal(bound.decode(bound.unpack(data)), decoded)
    assert int((decoded != 0).sum()) <= max(1, round(z * n))
    assert decoded.unique().numel() <= clusters
    assert (decoded - x).norm() <= x.norm() * (1 + 1e-6)


def test_auto_takes_the_shortest_of_the_three() -> None:
    for share in (0.5, 0.1, 0.01, 1e-4):
        x = sparse(20_000, share)
        sizes = [len(message(x, z=1.0, codec=codec)[0]) for codec in ("huffman", "address", "gap")]
        assert len(message(x, z=1.0)[0]) == min(sizes)


def test_exact_bytes_of_a_small_layer() -> None:
    x = torch.zeros(12)
    x[3], x[10] = 2.0, -1.0
    # Both codes list two entries: 6 header + 1 tag + 2 centroids, then each code's own bits.
    assert len(message(x, z=1.0, raw_entries=0, codec="huffman")[0]) == 6 + 9 + 3 + 2  # 14 bits
    assert len(message(x, z=1.0, raw_entries=0, codec="address")[0]) == 6 + 9 + 4 + 2  # 10 bits
    # Gaps 3 and 6: r = 2 gives 2*3 + 0 + 1 bits, and two bits for the clusters.
    assert len(message(x, z=1.0, raw_entries=0, codec="gap")[0]) == 6 + 9 + 9 + 2


def test_top_z_keeps_the_exact_number_and_breaks_ties_downwards() -> None:
    for n in (1, 2, 7, 50, 51):
        for z in (0.01, 0.1, 0.5, 0.99, 1.0):
            _, decoded = message(torch.ones(n), z=z, raw_entries=0)
            keep = max(1, round(z * n))
            assert decoded.tolist() == [1.0] * keep + [0.0] * (n - keep)


def test_clusters_of_the_specification() -> None:
    x = torch.tensor([-3.0, -3, 0, 0, 0, 2, 2])
    _, decoded = message(x, z=1.0, raw_entries=0)
    assert torch.equal(decoded, x)
    centers = lloyd(x.double(), 0, 3, 4)
    assert centers.tolist() == [-3, 0, 2]
    assert assign(x.double(), centers).tolist() == [0, 0, 1, 1, 1, 2, 2]


@given(seed=st.integers(0, 500), zeros=st.integers(0, 60), clusters=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_lloyd_inertia_never_increases(seed: int, zeros: int, clusters: int) -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)).double().sort().values
    x = x**3
    everything = torch.cat((x, torch.zeros(zeros).double()))
    last = math.inf
    for iterations in range(8):
        centers = lloyd(x, zeros, clusters, iterations)
        inertia = (everything[:, None] - centers).square().amin(1).sum().item()
        assert (centers.diff() >= 0).all()
        assert inertia <= last * (1 + 1e-12)
        last = inertia
    nearest = (everything[:, None] - centers).abs().argmin(1)
    assert torch.equal(assign(everything, centers), nearest)


def test_lloyd_agrees_with_scikit_learn() -> None:
    for seed in range(5):
        x = torch.randn(300, generator=torch.Generator().manual_seed(seed)).double().sort().values
        everything = torch.cat((x, torch.zeros(200).double())).numpy()[:, None]
        start = np.linspace(everything.min(), everything.max(), 3)[:, None]
        oracle = KMeans(3, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd")
        expected = oracle.fit(everything).cluster_centers_[:, 0]
        assert lloyd(x, 200, 3, 300).numpy() == pytest.approx(expected, abs=1e-10)


def test_survivors_below_half_the_outer_centroid_become_zero() -> None:
    x = torch.zeros(1000)
    x[:10], x[10:20], x[20:40] = 10.0, -10.0, 1.0
    _, decoded = message(x, z=0.04)
    assert torch.equal(decoded, torch.where(x.abs() == 10, x, 0.0))


def test_one_outlier_owns_a_cluster_unless_the_start_is_quantiles() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    x[7] = 1e4
    far = [message(x, z=0.1, start=start)[1] - x for start in ("linspace", "quantile")]
    mask = torch.arange(5000) != 7
    assert (far[0][mask] == -x[mask]).all()
    assert far[1][mask].norm() < 0.9 * x[mask].norm()


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "conv.bias": torch.randn(8, generator=generator),
        "head.weight": torch.randn(30, 50, generator=generator, dtype=torch.float64),
    }


def test_named_tensors_come_back_with_names_shapes_and_dtypes() -> None:
    delta = tensors()
    data = compress(delta, FedZip(z=0.05))
    back = decompress(data, delta)
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == {
        name: (t.shape, t.dtype) for name, t in delta.items()
    }
    assert torch.equal(back["conv.bias"], delta["conv.bias"])
    assert int(back["head.weight"].count_nonzero()) <= 75
    stats = layer_stats(data, delta)
    assert [s.codec for s in stats][1] == "raw"
    assert sum(s.size_bytes for s in stats) + 6 == len(data)
    assert all(s.entries == delta[s.name].numel() for s in stats)
    again, _ = (
        FedZip(z=0.05).bind(layout_of(delta)).encode(layout_of(delta).flatten(delta), None, KEY)
    )
    assert again.stats() == stats
    assert stats[2].bits_per_entry < 2
    assert stats[2].sparsity >= 0.95


def test_other_templates_and_broken_bytes_are_refused() -> None:
    delta = tensors()
    data = compress(delta)
    others = (
        {"a": delta["conv.weight"]},
        {**delta, "conv.bias": torch.zeros(9)},
        {("x" + name): value for name, value in delta.items()},
        {**delta, "head.weight": torch.zeros(50, 30)},
    )
    for other in others:
        with pytest.raises(DecodeError):
            decompress(data, other)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="fedzip"):
            decompress(data[:length], delta)
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="fedzip"):
            decompress(bytes(flipped), delta)


def test_forged_checksums_do_not_get_past_the_structure() -> None:
    delta = {"w": sparse(400, 0.05).view(20, 20)}
    spec = layout_of(delta)
    seed = zlib.crc32(repr((spec.names, spec.shapes)).encode())
    rng = np.random.default_rng(0)
    refused = 0
    for codec in ("huffman", "address", "gap"):
        data = compress(delta, FedZip(z=0.05, codec=codec))
        for _ in range(400):
            body = bytearray(data[6:])
            body[rng.integers(len(body))] = rng.integers(256)
            if rng.random() < 0.3:
                del body[rng.integers(len(body)) :]
            check = zlib.crc32(body, zlib.crc32(data[:2], seed))
            forged = data[:2] + struct.pack("<I", check) + bytes(body)
            try:
                back = decompress(forged, delta)
                assert back["w"].shape == (20, 20)
            except DecodeError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_updates_that_are_not_finite_are_refused(value: float) -> None:
    delta = tensors()
    delta["conv.weight"][0, 0, 0, 0] = value
    with pytest.raises(UsageError, match=r"'conv\.weight'"):
        compress(delta)
    codec = FedZip().bind(layout_of(delta))
    payload, _ = codec.encode(layout_of(delta).flatten(delta), None, KEY)
    assert codec.decode(payload)[:288].isnan().all()
    assert codec.decode(payload)[288:].isfinite().all()
    with pytest.raises(DecodeError, match="not finite"):
        decompress(payload.pack(), delta)


@pytest.mark.parametrize(
    "settings",
    [
        {"z": 0.0},
        {"z": 1.01},
        {"z": math.nan},
        {"clusters": 1},
        {"clusters": 17},
        {"codec": "zip"},
        {"bias_z": -0.1},
        {"raw_entries": -1},
        {"iterations": 0},
        {"start": "random"},
    ],
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        FedZip(**settings)


def test_unusable_tensors() -> None:
    with pytest.raises(UsageError, match="at least one"):
        compress({})
    with pytest.raises(UsageError, match=r"'steps' is torch\.int64"):
        compress({"steps": torch.zeros(3, dtype=torch.int64)})


def test_biases_can_stay_raw_or_have_their_own_share() -> None:
    delta = {"w": torch.randn(40, 40), "b": torch.randn(600)}
    raw = layer_stats(compress(delta, FedZip(bias_z=0.0)), delta)
    assert [s.codec for s in raw][1] == "raw"
    assert raw[1].size_bytes == 1 + 4 * 600
    own = layer_stats(compress(delta, FedZip(z=0.01, bias_z=0.5)), delta)
    assert own[0].nonzero <= 16
    assert own[1].nonzero > 50


def test_sizes_of_a_stack_are_those_of_its_rows() -> None:
    delta = tensors()
    spec = layout_of(delta)
    x = torch.stack(
        [
            spec.flatten({k: sparse(v.numel(), q).view(v.shape) for k, v in delta.items()})
            for q in (0.0, 0.002, 0.1, 0.9)
        ]
    ).view(2, 2, -1)
    codec = FedZip(z=1.0, raw_entries=8).bind(spec)
    payload, _ = codec.encode(x, None, KEY)
    sizes = payload.size_bytes()
    chosen = set()
    for i, outer in enumerate(tree.rows(payload, 2)):
        for j, row in enumerate(tree.rows(outer, 2)):
            assert len(row.pack()) == int(sizes[i, j]) == row.byte_count()
            chosen |= {s.codec for s in row.stats()}
    assert chosen >= {"huffman", "gap", "raw"}
    with pytest.raises(UsageError, match="one row at a time"):
        payload.pack()
