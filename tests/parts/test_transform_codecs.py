"""Each transform against the closed form of its paper, written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.transform.base import made, plain_settings, raw
from shoal.parts.transform.chain import Chain
from shoal.parts.transform.clip_and_noise import ClipAndNoise
from shoal.parts.transform.deep_gradient import DeepGradient
from shoal.parts.transform.error_feedback import ErrorFeedback
from shoal.parts.transform.identity import Identity
from shoal.parts.transform.lossy import Lossy
from shoal.parts.transform.qsgd import Qsgd
from shoal.parts.transform.quantise import Quantise
from shoal.parts.transform.sign_sgd import SignSGD
from shoal.parts.transform.ternary import Ternary
from shoal.parts.transform.top_k import TopK
from shoal.tensor.flat import FlatSpec
from shoal.tensor.keyed import fold, grid, key_of, normal, uniform
from shoal.wire.message import Packed

KEY = key_of(5, "codecs")


def vector(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sent(codec, x: torch.Tensor, key: torch.Tensor = KEY) -> torch.Tensor:
    return codec.decode(codec.encode(x, codec.init(x), key)[0])


def test_identity_copies_nothing() -> None:
    x = vector(10)
    payload, _ = Identity().encode(x, None, KEY)
    data = payload.pack()
    assert isinstance(data, memoryview)
    assert np.frombuffer(data, np.uint8).ctypes.data == x.data_ptr()
    codec = Identity().bind(FlatSpec(("x",), ((10,),)))
    # A new tensor is aligned and writable, as receive buffers are: its bytes are used in place.
    buffer = raw(x.clone())
    back = codec.unpack(buffer).values
    assert back.data_ptr() == np.frombuffer(buffer, np.uint8).ctypes.data
    # Read-only bytes are copied, or a write to the vector would change an immutable object.
    frozen = bytes(data)
    codec.unpack(frozen).values.zero_()
    assert codec.unpack(frozen).values.tolist() == back.tolist() == x.tolist()
    assert Packed(buffer).byte_count() == payload.byte_count() == 40
    assert codec.unpack(x.double().numpy().tobytes()).values.dtype == torch.float64
    with pytest.raises(DecodeError, match="39 bytes; need 40"):
        codec.unpack(buffer[:39])


def test_top_k_matches_a_stable_sort() -> None:
    for seed in range(20):
        x = (vector(57, seed) * 2).round()
        for fraction in (0.001, 0.1, 0.5, 0.77, 1.0):
            keep = max(1, round(fraction * 57))
            order = np.argsort(-x.abs().numpy(), kind="stable")[:keep]
            expected = torch.zeros(57)
            expected[order] = x[order]
            payload, _ = TopK(fraction).encode(x, None, KEY)
            assert torch.equal(TopK(fraction).decode(payload), expected)
            assert payload.byte_count() == 4 * keep + math.ceil(keep * 6 / 8)


def test_top_k_refuses_positions_out_of_range_or_order() -> None:
    codec = TopK(0.3).bind(FlatSpec(("x",), ((10,),)))
    data = bytearray(codec.encode(vector(10), None, KEY)[0].pack())
    for positions in ((3, 3, 4), (5, 4, 6), (1, 2, 10)):
        number = sum(place << (4 * i) for i, place in enumerate(positions))
        data[12:] = number.to_bytes(2, "little")
        with pytest.raises(DecodeError, match="ascend"):
            codec.unpack(bytes(data))


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantise_follows_its_definition(bits: int) -> None:
    x = vector(101, bits)
    low, high = float(x.min()), float(x.max())
    step = (high - low) / (2**bits - 1)
    place = (x.double() - low) / step
    nearest = sent(Quantise(bits, rounding="nearest"), x)
    assert torch.allclose(nearest.double(), low + place.round() * step, atol=1e-5)
    draws = uniform(grid(fold(KEY, "quantise"), 101))
    codes = place.floor() + (draws < place - place.floor())
    assert torch.allclose(sent(Quantise(bits), x).double(), low + codes * step, atol=1e-5)
    payload, _ = Quantise(bits).encode(x, None, KEY)
    assert payload.byte_count() == 8 + math.ceil(101 * bits / 8)
    assert bytes(payload.pack())[8:] == sum(
        int(code) << (bits * i) for i, code in enumerate(payload.codes)
    ).to_bytes(math.ceil(101 * bits / 8), "little")


def test_levels_are_met_exactly_whatever_the_draw() -> None:
    x = torch.arange(16.0)
    for seed in range(50):
        assert torch.equal(sent(Quantise(4), x, key_of(seed)), x)
    assert torch.equal(sent(Quantise(3), torch.full((9,), 0.1)), torch.full((9,), 0.1))


def test_layers_have_their_own_scales() -> None:
    spec = FlatSpec(("small", "large"), ((50,), (50,)))
    x = torch.cat((vector(50) * 1e-3, vector(50, 1) * 1e3))
    for name, settings in (
        ("quantise", (("bits", 4),)),
        ("qsgd", (("levels", 7),)),
        ("sign_sgd", ()),
        ("ternary", ()),
    ):
        layered = made(name, (*settings, ("per_layer", True)), spec)
        # Draws belong to positions, so the first layer is what it would be as a vector alone.
        assert torch.equal(sent(layered, x)[:50], sent(made(name, settings), x[:50]))
        numbers = 2 if name == "quantise" else 1
        plain, _ = made(name, settings, spec).encode(x, None, KEY)
        payload, _ = layered.encode(x, None, KEY)
        assert payload.byte_count() == plain.byte_count() + 4 * numbers


def test_qsgd_follows_its_definition_and_variance() -> None:
    x = vector(64)
    norm = x.double().norm()
    for levels in (1, 4, 127):
        codec = Qsgd(levels)
        keys = grid(KEY, 4000)
        decoded = sent(codec, x.expand(4000, -1), keys).double()
        codes = decoded * levels / norm
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert (codes.sign() * x.sign() >= 0).all()
        share = x.abs().double() / norm * levels
        chance = share - share.floor()
        exact = ((chance * (1 - chance)).sum() * (norm / levels) ** 2).item()
        measured = (decoded - x).square().sum(1).mean().item()
        assert measured == pytest.approx(exact, rel=0.08)
        payload, _ = codec.encode(x, None, KEY)
        assert payload.byte_count() == 4 + 64 * math.ceil(math.log2(2 * levels + 1)) // 8


def test_sign_error_is_the_closed_form() -> None:
    x = vector(33).double()
    error = (sent(SignSGD(), x) - x).square().sum()
    expected = x.square().sum() - x.abs().sum() ** 2 / 33
    assert error == pytest.approx(float(expected), rel=1e-12)
    assert SignSGD().encode(x.float(), None, KEY)[0].byte_count() == 4 + 5
    assert sent(SignSGD(), torch.tensor([0.0, -0.0, -2.0])).tolist() == pytest.approx(
        [2 / 3, 2 / 3, -2 / 3]
    )


def test_ternary_variance_is_the_closed_form() -> None:
    x = vector(40).double()
    decoded = sent(Ternary(), x.expand(6000, -1), grid(KEY, 6000))
    scale = x.abs().max()
    assert set((decoded / scale).unique().tolist()) == {-1.0, 0.0, 1.0}
    expected = scale * x.abs().sum() - x.square().sum()
    measured = (decoded - x).square().sum(1).mean()
    assert measured == pytest.approx(float(expected), rel=0.05)
    assert Ternary().encode(x.float(), None, KEY)[0].byte_count() == 4 + 8
    x[0] = 100.0
    clipped = sent(Ternary(clip_deviations=2.5), x)
    assert clipped[0] == pytest.approx(2.5 * float(x.std(correction=0)), rel=1e-6)


def test_ternary_bytes_are_base_three() -> None:
    codec = Ternary().bind(FlatSpec(("x",), ((6,),)))
    x = torch.tensor([1.0, -1, 0, 1, 1, -1])
    data = bytes(codec.encode(x, None, KEY)[0].pack())
    assert list(data[4:]) == [2 + 0 * 3 + 1 * 9 + 2 * 27 + 2 * 81, 0]
    for last in (243, 3):
        with pytest.raises(DecodeError, match="corrupted"):
            codec.unpack(data[:5] + bytes([last]))


def test_clip_and_noise_moments() -> None:
    x = vector(50) * 10
    clipped = sent(ClipAndNoise(clip=2.0, noise_multiplier=0.0), x)
    assert torch.allclose(clipped, x * 2 / x.norm(), atol=1e-6)
    small = x / x.norm()
    assert torch.equal(sent(ClipAndNoise(clip=2.0, noise_multiplier=0.0), small), small)
    keys = grid(KEY, 4000)
    noise = sent(ClipAndNoise(2.0, noise_multiplier=0.5), x.expand(4000, -1), keys) - clipped
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(1.0, rel=0.01)
    correlation = torch.corrcoef(noise.T) - torch.eye(50)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4000)
    huge = sent(ClipAndNoise(1.0, noise_multiplier=0.0), torch.full((4,), 1e38))
    assert huge.tolist() == pytest.approx([0.5] * 4)


def test_error_feedback_loses_nothing_in_the_long_run() -> None:
    for inner, settings in (
        ("top_k", {"fraction": 0.05}),
        ("sign_sgd", {}),
        ("fedzip", {"z": 0.1, "raw_entries": 4}),
    ):
        codec = ErrorFeedback(inner, settings=settings).bind(FlatSpec(("x",), ((60, 1),)))
        state = codec.init(torch.zeros(60))
        arrived = torch.zeros(60)
        total = torch.zeros(60)
        for turn in range(60):
            x = vector(60, turn) + 0.3
            payload, state = codec.encode(x, state, fold(KEY, turn))
            arrived += codec.decode(payload)
            total += x
            assert torch.allclose(arrived + state.residual, total, atol=2e-3)
        assert (arrived - total).norm() < 0.5 * total.norm(), inner


def test_error_feedback_forgets_a_broken_round() -> None:
    codec = ErrorFeedback("sign_sgd")
    x = vector(8)
    broken = x.clone()
    broken[2] = math.nan
    _, state = codec.encode(broken, codec.init(x), KEY)
    assert torch.equal(state.residual, torch.zeros(8))


def test_deep_gradient_matches_the_written_out_recursion() -> None:
    codec = DeepGradient(fraction=0.2, momentum=0.9)
    state = codec.init(torch.zeros(10))
    u, v = np.zeros(10), np.zeros(10)
    for turn in range(30):
        x = vector(10, turn).double()
        payload, state = codec.encode(x, state, KEY)
        u = 0.9 * u + x.numpy()
        v = v + u
        top = np.argsort(-np.abs(v), kind="stable")[:2]
        expected = np.zeros(10)
        expected[top] = v[top]
        u[top] = v[top] = 0
        assert codec.decode(payload).numpy() == pytest.approx(expected, abs=1e-12)
        assert state.unsent.numpy() == pytest.approx(v, abs=1e-12)
    _, state = DeepGradient(0.1, momentum=0.0, clip=1.0).encode(
        torch.full((10,), 5.0), codec.init(torch.zeros(10)), KEY
    )
    assert float(state.unsent.max()) == pytest.approx(1 / math.sqrt(10))


def test_chain_is_one_stage_after_the_other() -> None:
    x = vector(30) * 9
    chain = Chain((("clip_and_noise", {"noise_multiplier": 0.1}), ("quantise", {"bits": 4})))
    noisy = x / x.norm() + 0.1 * normal(grid(fold(fold(KEY, 0), "clip_and_noise"), 30))
    expected = sent(Quantise(4), noisy, fold(KEY, 1))
    assert torch.allclose(sent(chain, x), expected, atol=1e-6)
    assert chain.encode(x, chain.init(x), KEY)[0].byte_count() == 8 + 15
    assert chain.adds_noise
    assert not chain.unbiased
    assert Chain((("identity", ()), ("top_k", {"fraction": 0.5}))).contraction(30) == 0.5


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TopK(0.0), "fraction=0.0"),
        (lambda: TopK(math.nan), "fraction=nan"),
        (lambda: Quantise(9), "bits=9"),
        (lambda: Quantise(rounding="up"), "rounding='up'"),
        (lambda: Qsgd(0), "levels=0"),
        (lambda: Ternary(clip_deviations=-1.0), "clip_deviations"),
        (lambda: ClipAndNoise(clip=0.0), "clip=0.0"),
        (lambda: ClipAndNoise(noise_multiplier=math.inf), "noise_multiplier=inf"),
        (lambda: DeepGradient(momentum=1.0), "momentum=1.0"),
        (lambda: ErrorFeedback("top_q"), "did you mean 'top_k'"),
        (lambda: ErrorFeedback("clip_and_noise"), "would undo"),
        (lambda: ErrorFeedback("error_feedback"), "own memory"),
        (lambda: ErrorFeedback("top_k", settings={"k": 3}), "no setting 'k'"),
        (lambda: ErrorFeedback("top_k", settings=(3,)), "pairs"),
        (lambda: Chain(()), "one or more"),
        (lambda: Chain((("top_k", {}), ("quantise", {}))), "only the last"),
    ],
)
def test_settings_that_cannot_work(make, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()


def test_vectors_that_cannot_be_encoded() -> None:
    codec = TopK().bind(FlatSpec(("x",), ((4,),)))
    for x, told in (
        (torch.zeros(5), "bound to 4"),
        (torch.zeros(4, dtype=torch.int64), "int64"),
        (torch.zeros(2, 0), "dim >= 1"),
        (torch.zeros(4, dtype=torch.bfloat16), "bfloat16"),
    ):
        with pytest.raises(UsageError, match=told):
            codec.encode(x, None, KEY)
    with pytest.raises(UsageError, match="bind"):
        TopK().unpack(b"")


def test_settings_become_plain_tuples() -> None:
    assert plain_settings([["top_k", {"b": [1], "a": {}}]]) == (
        ("top_k", (("a", ()), ("b", (1,)))),
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lossy_loses_its_share_of_coordinates_and_keeps_the_others(share: float) -> None:
    x = 1.0 + vector(5000).abs()
    got = sent(Lossy(share), x)
    lost = got == 0
    assert lost.float().mean().item() == pytest.approx(share, abs=0.03)
    assert torch.equal(got[~lost], x[~lost])
    if 0 < share < 1:
        assert not torch.equal(lost, sent(Lossy(share), x, key_of(6)) == 0)
    with pytest.raises(UsageError, match="share="):
        Lossy(1.5)
