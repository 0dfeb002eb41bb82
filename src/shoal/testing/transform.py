"""The contract of a transform, for any implementation: run `check_transform` on your own.

    check_transform(TopK(fraction=0.1), FlatSpec(("w", "b"), ((8, 4), (4,))))

Every check raises AssertionError with the transform and what it broke.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.rounds.transform import Payload, Transform
from shoal.tensor import tree
from shoal.tensor.flat import FlatSpec
from shoal.tensor.keyed import grid, key_of, normal, uniform
from shoal.tensor.types import Key, Vector

_DTYPES = (torch.float32, torch.float64)


def check_transform(transform: Transform, spec: FlatSpec, *, seed: int = 0, rows: int = 2) -> None:
    """All checks below on `rows` stacked vectors of each kind and dtype.

    rows: at least 2. Keep spec.dim below a few hundred: malformed bytes are tried one by one.
    """
    bound = transform.bind(spec)
    keys = grid(key_of(seed, "check_transform"), rows)
    for dtype in _DTYPES:
        kinds = vectors(spec.dim, rows, seed, dtype)
        for name in kinds if dtype == torch.float32 else ("gaussian", "strided"):
            x = kinds[name]
            check_rows(bound, x, keys, name)
            check_error(bound, x, keys, name)
        check_axes(bound, kinds["gaussian"], keys)
        check_not_finite(bound, kinds["gaussian"], keys)
    gaussian = vectors(spec.dim, rows, seed, torch.float32)["gaussian"]
    check_malformed(bound, gaussian[0], keys[0])
    if getattr(transform, "unbiased", False):
        kinds = vectors(spec.dim, 1, seed, torch.float32)
        for name in ("gaussian", "one sign", "heavy tail", "sparse"):
            check_unbiased(bound, kinds[name][0], key_of(seed, "unbiased", name), name)


def vectors(dim: int, rows: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stacks [rows, dim] on which codecs fail: ties, zeros, outliers, one sign, strides."""
    entry = grid(grid(key_of(seed, "vectors"), rows), dim)
    gaussian = normal(entry, dtype=dtype)
    one_hot = torch.zeros_like(gaussian)
    one_hot[:, seed % dim] = -2.5
    return {
        "gaussian": gaussian,
        "zeros": torch.zeros_like(gaussian),
        "equal": torch.full_like(gaussian, 0.3),
        "one hot": one_hot,
        "one sign": gaussian.abs() + 1,
        "heavy tail": gaussian**5,
        "ties": gaussian.mul(2).round(),
        "huge": gaussian * 1e30,
        "strided": normal(entry.t().contiguous(), 1, dtype=dtype).t(),
        "sparse": gaussian * (uniform(entry, 2, dtype=dtype) < 0.1),
    }


def _run(bound: Transform, x: Vector, keys: Key) -> tuple[Payload, Vector]:
    before = x.clone()
    state = bound.init(x)
    kept, structure = tree.flatten(state)
    copies = [leaf.clone() for leaf in kept]
    payload, after = bound.encode(x, state, keys)
    decoded = bound.decode(payload)
    where = f"{bound} on {tuple(x.shape)}"
    assert torch.equal(x, before) or x.isnan().any(), f"{where}: encode changed its input"
    for leaf, copy in zip(kept, copies, strict=True):
        assert torch.equal(leaf, copy), f"{where}: encode changed the state in place"
    assert tree.flatten(after)[1] == structure, f"{where}: the state changed its structure"
    assert decoded.shape == x.shape, f"{where}: decoded to {tuple(decoded.shape)}"
    assert decoded.dtype == x.dtype, f"{where}: {x.dtype} became {decoded.dtype}"
    return payload, decoded


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def check_rows(bound: Transform, x: Vector, keys: Key, name: str) -> None:
    """A row has exact bytes, loses nothing in them, and is what it would be alone."""
    payload, decoded = _run(bound, x, keys)
    sizes = payload.size_bytes()
    assert sizes.shape == x.shape[:-1], f"{bound}: size_bytes has shape {tuple(sizes.shape)}"
    assert sizes.dtype == torch.int64, f"{bound}: size_bytes is {sizes.dtype}"
    for place, row in enumerate(tree.rows(payload, len(x))):
        data = bytes(row.pack())
        told = (int(sizes[place]), row.byte_count())
        assert told == (len(data), len(data)), f"{bound} on {name}: {len(data)} bytes, told {told}"
        again = bound.unpack(data)
        assert _same(bound.decode(again), decoded[place]), f"{bound} on {name}: bytes lose bits"
        assert bytes(again.pack()) == data, f"{bound} on {name}: unpack and pack gives others"
        single, alone = _run(bound, x[place], keys[place])
        apart = (alone.double() - decoded[place].double()).abs().amax()
        scale = x[place].double().abs().amax()
        assert apart <= 1e-6 * scale, f"{bound} on {name}: alone differs by {apart}"
        assert single.byte_count() == len(data), f"{bound} on {name}: alone has another size"


def check_axes(bound: Transform, x: Vector, keys: Key) -> None:
    """A second leading axis changes nothing, and neither does where in memory bytes lie."""
    payload, decoded = _run(bound, x, keys)
    deep, twice = _run(bound, x.unsqueeze(0), keys.unsqueeze(0))
    assert torch.allclose(twice[0], decoded, rtol=1e-6, atol=0.0), f"{bound}: [1, rows, dim]"
    assert torch.equal(deep.size_bytes()[0], payload.size_bytes()), f"{bound}: sizes of [1, rows]"
    data = bytes(tree.rows(payload, len(x))[0].pack())
    doubled = bytes([byte for byte in data for _ in range(2)])
    for buffer in (
        memoryview(b"\0" + data)[1:],
        memoryview(bytearray(data)),
        memoryview(doubled)[::2],
    ):
        assert _same(bound.decode(bound.unpack(buffer)), decoded[0]), f"{bound}: {buffer}"


def check_error(bound: Any, x: Vector, keys: Key, name: str, draws: int = 64) -> None:
    """E|decode(encode(x)) - x|^2 <= contraction(dim) |x|^2, where the transform declares it."""
    bound_of = getattr(bound, "contraction", None)
    share = bound_of(x.shape[-1]) if bound_of is not None else None
    if share is None:
        return
    keys = grid(keys, draws)
    stack = x.unsqueeze(1).expand(-1, draws, -1)
    _, decoded = _run(bound, stack, keys)
    errors = (decoded.double() - stack.double()).square().sum(-1)
    norms = x.double().square().sum(-1)
    spread = errors.std(-1) / math.sqrt(draws)
    limit = share * norms * (1 + 1e-4) + 1e-10 * norms + 5 * spread
    assert (errors.mean(-1) <= limit).all(), f"{bound} on {name}: error above {share} |x|^2"


def check_unbiased(bound: Transform, x: Vector, key: Key, name: str, draws: int = 1024) -> None:
    """The mean of decode(encode(x)) over many keys is x, within 5.5 standard errors per entry."""
    stack = x.expand(draws, -1)
    _, decoded = _run(bound, stack, grid(key, draws))
    values = decoded.double()
    mean = values.mean(0)
    # An entry that took one value only still has the chance of a rarer one behind it.
    reach = (values.amax() - values.amin()) / draws
    error = values.std(0) / math.sqrt(draws) * 5.5 + 12 * reach + 1e-5 * x.double().abs().amax()
    worst = ((mean - x.double()).abs() - error).amax()
    assert worst <= 0, f"{bound} on {name}: mean off by {worst} more than chance allows"


def check_not_finite(bound: Transform, x: Vector, keys: Key) -> None:
    """A broken vector stays visibly broken, has exact bytes, and leaves other rows alone."""
    clean = _run(bound, x, keys)[1]
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[0, x.shape[-1] // 2] = value
        payload, decoded = _run(bound, broken, keys)
        assert not decoded[0].isfinite().all(), f"{bound}: {value} became an ordinary vector"
        assert torch.equal(decoded[1:], clean[1:]), f"{bound}: {value} in row 0 changed row 1"
        row = tree.rows(payload, len(x))[0]
        data = bytes(row.pack())
        assert len(data) == row.byte_count() == int(payload.size_bytes()[0]), f"{bound}: {value}"
        assert _same(bound.decode(bound.unpack(data)), decoded[0]), f"{bound}: {value} in bytes"


def check_malformed(bound: Transform, x: Vector, key: Key, most: int = 250) -> None:
    """Truncated, extended and flipped bytes of a vector [dim] raise DecodeError or decode."""
    data = bytes(_run(bound, x, key)[0].pack())
    size = x.shape[-1]
    for length in range(0, len(data), max(1, len(data) // most)):
        assert not _decodes(bound, data[:length], size), f"{bound}: {length} of {len(data)} bytes"
    assert not _decodes(bound, data + b"\0", size), f"{bound}: accepts a byte too many"
    bits = 8 * len(data)
    for bit in range(0, bits, max(1, bits // most)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        _decodes(bound, bytes(flipped), size)
    for value in (0, 255):
        _decodes(bound, bytes([value]) * len(data), size)


def _decodes(bound: Transform, data: bytes, dim: int) -> bool:
    """Whether the bytes are accepted; then they must give a vector of the right shape."""
    decode: Callable[[Payload], Tensor] = bound.decode
    try:
        vector = decode(bound.unpack(data))
    except DecodeError:
        return False
    assert vector.shape == (dim,), f"{bound}: malformed bytes gave shape {tuple(vector.shape)}"
    return True
