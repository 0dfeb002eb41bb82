"""Mechanisms that send integers: laws against closed forms, draws against laws, sums, bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.privacy.modular_sum import ModularSum
from shoal.parts.transform._bits import from_bits, join, pack_integers, to_bits, unpack_integers
from shoal.parts.transform.clip_entries import ClipEntries
from shoal.parts.transform.fixed_point import FixedPoint
from shoal.parts.transform.pbm import Pbm
from shoal.parts.transform.rqm import Rqm
from shoal.tensor.flat import FlatSpec
from shoal.tensor.keyed import fold, grid, key_of

KEY = key_of(11, "rqm")

rqms = st.builds(
    Rqm, clip=st.floats(0.1, 10), levels=st.integers(3, 40), extension=st.floats(0.01, 10),
    keep=st.floats(0.02, 0.98),
)  # fmt: skip
pbms = st.builds(
    Pbm, clip=st.floats(0.1, 10), levels=st.integers(2, 40), theta=st.floats(0.01, 0.5)
)


def inputs(codec: Rqm | Pbm, points: int = 13) -> torch.Tensor:
    return torch.linspace(-codec.clip, codec.clip, points, dtype=torch.float64)


def enumerated(codec: Rqm, x: float) -> np.ndarray:
    """The law by going through all 2^(levels - 2) sets of kept levels."""
    values, inner = codec.values().numpy(), codec.levels - 2
    law = np.zeros(codec.levels)
    for kept in itertools.product((False, True), repeat=inner):
        chance = codec.keep ** sum(kept) * (1 - codec.keep) ** (inner - sum(kept))
        index = [0, *[i + 1 for i in range(inner) if kept[i]], codec.levels - 1]
        lower = max(i for i in index if values[i] <= x)
        upper = min(i for i in index if values[i] > x)
        up = (x - values[lower]) / (values[upper] - values[lower])
        law[upper] += chance * up
        law[lower] += chance * (1 - up)
    return law


@given(codec=st.one_of(rqms, pbms))
@settings(max_examples=60, deadline=None)
def test_laws_sum_to_one_and_have_the_entry_as_mean(codec: Rqm | Pbm) -> None:
    x = inputs(codec)
    law = codec.pmf(x)
    assert (law >= 0).all()
    assert (law.sum(-1) - 1).abs().max() <= 1e-12
    # Relative to the outermost level, in whose units rounding happens.
    scale = float(codec.values().abs().max())
    assert ((law * codec.values()).sum(-1) - x).abs().max() <= 1e-12 * max(1.0, scale)
    # Symmetric: the law of -x is that of x from behind.
    assert torch.allclose(codec.pmf(-x), law.flip(-1), rtol=0, atol=1e-12)


@given(
    codec=st.builds(
        Rqm, clip=st.floats(0.1, 3), levels=st.integers(3, 9), extension=st.floats(0.05, 3),
        keep=st.floats(0.05, 0.95),
    ),
    share=st.floats(-1, 1),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_law_is_that_of_all_sets_of_kept_levels(codec: Rqm, share: float) -> None:
    x = share * codec.clip
    found = codec.pmf(torch.tensor(x, dtype=torch.float64)).numpy()
    assert np.abs(found - enumerated(codec, x)).max() <= 1e-12


def test_three_levels_by_hand() -> None:
    codec = Rqm(clip=1.0, levels=3, extension=1.0, keep=0.5)
    assert codec.values().tolist() == [-2.0, 0.0, 2.0]
    at_clip = codec.pmf(torch.tensor(1.0, dtype=torch.float64))
    assert at_clip.tolist() == pytest.approx([0.125, 0.25, 0.625], abs=1e-15)
    assert float((at_clip * codec.values()).sum()) == pytest.approx(1.0, abs=1e-15)


@given(levels=st.integers(3, 40), clip=st.floats(0.1, 5), share=st.floats(-1, 1))
@settings(max_examples=40, deadline=None)
def test_all_levels_and_no_extension_is_stochastic_rounding(
    levels: int, clip: float, share: float
) -> None:
    x = torch.tensor(share * clip, dtype=torch.float64)
    place = (float(x) + clip) / (2 * clip) * (levels - 1)
    low = min(int(place), levels - 2)
    expected = np.zeros(levels)
    expected[low], expected[low + 1] = 1 - (place - low), place - low
    for codec in (
        Rqm(clip=clip, levels=levels, extension=0.0, keep=1.0, private=False),
        Rqm(clip=clip, levels=levels, extension=1e-9 * clip, keep=1 - 1e-9),
    ):
        assert np.abs(codec.pmf(x).numpy() - expected).max() <= 1e-6


def test_law_of_pbm_is_binomial() -> None:
    codec = Pbm(clip=2.0, levels=12, theta=0.3)
    x = inputs(codec)
    chance = 0.5 + 0.3 * x.numpy()[:, None] / 2.0
    expected = stats.binom.logpmf(np.arange(12), 11, chance)
    assert np.abs(codec.log_pmf(x).numpy() - expected).max() <= 1e-11


@pytest.mark.parametrize(
    "codec",
    [
        Rqm(),
        Rqm(clip=1.0, levels=3, extension=1.0, keep=0.5),
        Rqm(clip=1.0, levels=64, extension=0.2, keep=0.1),
        Pbm(),
        Pbm(levels=100, theta=0.45),
    ],
)
@pytest.mark.parametrize("share", [-1.0, -0.37, 0.0, 0.2, 1.0])
def test_draws_follow_the_law(codec: Rqm | Pbm, share: float) -> None:
    count = 200_000
    x = torch.full((count,), share * codec.clip, dtype=torch.float64)
    codes = codec.draw(x, grid(fold(KEY, "draws"), count))
    seen = np.bincount(codes.numpy(), minlength=codec.levels)
    expected = codec.pmf(x[:1])[0].numpy() * count
    # Codes that are rarely expected are counted together, as the test needs.
    rare = expected < 10
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    if len(seen) > 1:
        assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.001


def test_a_million_draws_follow_the_law() -> None:
    codec, count = Rqm(), 1_000_000
    x = torch.full((count,), 0.7, dtype=torch.float64)
    seen = np.bincount(codec.draw(x, grid(KEY, count)).numpy(), minlength=16)
    expected = codec.pmf(x[:1])[0].numpy() * count
    assert stats.chisquare(seen, expected * count / expected.sum()).pvalue > 0.001


def test_coordinates_are_independent() -> None:
    """A kept set that is drawn once per vector would correlate its entries."""
    codec, count = Rqm(), 20_000
    keys = grid(KEY, count)
    payload, _ = codec.encode(torch.zeros(count, 2), None, keys)
    first, second = payload.codes.double().T
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 4 / math.sqrt(count)


@given(place=st.integers(1, 14), seed=st.integers(0, 2**31), off=st.floats(-3e-7, 3e-7))
@settings(max_examples=50, deadline=None)
def test_rounding_around_a_level_changes_no_code(place: int, seed: int, off: float) -> None:
    codec = Rqm(clip=2.9, extension=0.1)
    level = codec.values()[place : place + 1]
    key = grid(key_of(seed), 1)
    assert torch.equal(codec.draw(level, key), codec.draw(level + off * codec.reach, key))


def test_an_entry_on_a_level_stays_there_when_that_level_is_kept() -> None:
    codec = Rqm(clip=1.0, levels=9, extension=1.0, keep=1.0, private=False)
    on_level = codec.values()[2:7]
    codes = codec.draw(on_level, grid(KEY, 5))
    assert codes.tolist() == [2, 3, 4, 5, 6]


@given(
    codec=st.one_of(rqms, pbms), clients=st.integers(1, 9), dim=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_masked_sums_are_sums_and_decode_to_the_mean(
    codec: Rqm | Pbm, clients: int, dim: int, seed: int
) -> None:
    x = torch.randn(clients, dim, generator=torch.Generator().manual_seed(seed)).double()
    payload, _ = codec.encode(x, None, grid(key_of(seed), clients))
    group = ModularSum(codec.levels, clients)
    masked = group.masked(payload.codes, key_of(seed, "secret"))
    assert ((masked >= 0) & (masked < 1 << group.bits)).all()
    total = group.total(masked)
    assert torch.equal(total, payload.codes.to(torch.int64).sum(0))
    mean = codec.decode(payload).mean(0)
    scale = float(codec.values().abs().max())
    assert (codec.decode_sum(total, clients) - mean).abs().max() <= 1e-12 * max(1.0, scale)
    assert type(codec)(levels=codec.levels, clients=clients).width == group.bits


def test_a_masked_vector_says_nothing() -> None:
    """Uniform over the group, whatever the codes are; and less than all rows add up to noise."""
    group = ModularSum(levels=4, clients=5)
    assert group.bits == 4
    masked = group.masked(torch.zeros(5, 4000, dtype=torch.uint8), KEY)
    for part in (masked[0], masked[4], group.total(masked[:4])):
        counts = np.bincount(part.numpy(), minlength=16)
        assert stats.chisquare(counts).pvalue > 0.001
    assert group.total(masked).sum() == 0


def test_bytes_are_four_bits_an_entry_or_those_of_the_sum() -> None:
    x = torch.zeros(1000)
    assert Rqm().encode(x, None, KEY)[0].byte_count() == 1 + 500
    assert Rqm(clients=40).encode(x, None, KEY)[0].byte_count() == 1 + 1250
    assert Pbm(levels=16, clients=40).width == math.ceil(math.log2(40 * 15 + 1)) == 10


def test_clipping_comes_first_and_is_all_that_biases() -> None:
    codec = Rqm(clip=1.0, extension=0.5)
    far = codec.encode(torch.tensor([5.0, -7.0]), None, KEY)[0]
    at = codec.encode(torch.tensor([1.0, -1.0]), None, KEY)[0]
    assert torch.equal(far.codes, at.codes)
    plain = ClipEntries(clip=1.0)
    assert plain.decode(plain.encode(torch.tensor([5.0, 0.3]), None, KEY)[0]).tolist() == (
        pytest.approx([1.0, 0.3])
    )


def test_gaussian_noise_has_its_deviation() -> None:
    codec = ClipEntries(clip=1.0, noise=0.7)
    sent = codec.decode(codec.encode(torch.full((40_000,), 9.0), None, KEY)[0])
    assert float(sent.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(sent.std()) == pytest.approx(0.7, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rqm(clip=0.0), "rqm: clip=0.0; need a finite number > 0"),
        (lambda: Rqm(clip=math.nan), "clip=nan"),
        (lambda: Rqm(levels=2), "levels=2; need 3 to 256"),
        (lambda: Rqm(extension=0.0), r"extension=0.0.*betray"),
        (lambda: Rqm(extension=-1.0), "extension=-1.0; need a finite number"),
        (lambda: Rqm(keep=1.0), r"keep=1.0.*betray"),
        (lambda: Rqm(keep=0.0), "keep=0.0; need a chance"),
        (lambda: Rqm(keep=1.5, private=False), "keep=1.5; need a chance"),
        (lambda: Rqm(clients=0), "clients=0; need 1 to 1000000"),
        (lambda: Pbm(theta=0.6), "theta=0.6; need a number above 0"),
        (lambda: Pbm(levels=1), "levels=1; need 2 to 256"),
        (lambda: ClipEntries(noise=-1.0), "noise=-1.0; need a finite number >= 0"),
        (lambda: Rqm().pmf(torch.tensor(1.6)), "x=1.6.*need finite entries from -1.5 to 1.5"),
        (lambda: Rqm().pmf(torch.tensor(math.nan)), "x=nan"),
        (lambda: Rqm().decode_sum(torch.zeros(1), 0), "clients=0; need at least 1"),
        (lambda: ModularSum(1, 3), "levels=1"),
        (lambda: ModularSum(4, 2).masked(torch.full((2, 1), 4), KEY), "from 4 to 4"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_malformed_bytes_are_refused() -> None:
    codec = Rqm(levels=5).bind(FlatSpec(("x",), ((4,),)))
    for data, message in (
        (b"\0", "1 bytes; need 3"),
        (b"\4\0\0", "flags 4"),
        (b"\0\7\0", "largest code 7 of 5"),
        (b"\2\1\0", "without numbers"),
    ):
        with pytest.raises(DecodeError, match=message):
            codec.unpack(data)


@given(
    codec=st.builds(FixedPoint, clip=st.floats(0.1, 10), levels=st.integers(3, 70_000)),
    place=st.floats(-1, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fixed_point_rounds_to_a_neighbour_and_is_right_on_average(
    codec: FixedPoint, place: float
) -> None:
    x = torch.tensor([place * codec.clip], dtype=torch.float64)
    law = codec.pmf(x)[0]
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(law @ codec.values()) == pytest.approx(float(x), abs=1e-8 * codec.clip)
    draws = codec.draw(x.expand(4000), grid(KEY, 4000)).to(torch.int64)
    seen = law[draws.unique()]
    assert (seen > 0).all()
    assert int(draws.max() - draws.min()) <= 1
    share = float((draws == draws.max()).double().mean())
    expected = float(law[draws.max()])
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 4000) + 1e-6


@pytest.mark.parametrize("levels", [3, 255, 256, 257, 65_535, (1 << 24) - 1])
def test_fixed_point_sums_are_exact(levels: int) -> None:
    codec = FixedPoint(clip=2.0, levels=levels, clients=50)
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).expand(50, -1)
    payload, _ = codec.encode(x, None, grid(KEY, 50))
    assert payload.codes.dtype == (torch.uint8 if levels <= 256 else torch.int32)
    total = payload.codes.to(torch.int64).sum(0)
    assert int(total.max()) < 1 << codec.width
    assert codec.width % 8 == 0
    mean = codec.decode(payload).mean(0)
    assert torch.allclose(codec.decode_sum(total, 50), mean, rtol=0, atol=1e-12)
    ends = codec.decode(payload)[:, [0, -1]]
    assert torch.allclose(ends, torch.tensor([-2.0, 2.0], dtype=torch.float64).expand(50, -1))
    zero = codec.decode(codec.encode(torch.zeros(9), None, KEY)[0])
    assert not zero.any() or levels % 2 == 0
    with pytest.raises(UsageError, match="3 to 16777215"):
        FixedPoint(levels=1 << 24)


@pytest.mark.parametrize("width", [8, 16, 24, 32, 40, 56])
def test_whole_bytes_are_packed_as_bits_are(width: int) -> None:
    numbers = grid(KEY, 33).numpy() & ((1 << width) - 1)
    packed = pack_integers(numbers, width)
    assert packed == join([to_bits(numbers, width)])
    octets = np.frombuffer(packed, np.uint8)
    found = unpack_integers(octets, width, 33, "test")
    assert (found == numbers).all()
    slow = from_bits(np.unpackbits(octets, bitorder="little"), width, 33)
    assert found.dtype == slow.dtype
    for wrong in (octets[:-1], np.append(octets, np.uint8(0))):
        with pytest.raises(DecodeError):
            unpack_integers(wrong, width, 33, "test")
