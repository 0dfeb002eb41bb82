"""Links: the same draws from numbers and tensors, the right distributions, the queue formula."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.world.links import (
    LinkModel,
    Links,
    Measured,
    draw_normal,
    draw_uniform,
    fifo_finish,
    home,
    lan,
    wan,
)

ALL_ON = Links(
    latency_s=0.05, latency_spread=0.6, symmetric=False, jitter_s=0.01, uplink_bytes_per_s=1e6,
    downlink_bytes_per_s=4e6, bandwidth_spread=0.4, loss=0.3, seed=11,
)  # fmt: skip
MATRIX = ((0.0, 0.01, 0.02), (0.03, 0.0, 0.04), (0.05, 0.06, 0.0))
MODELS: list[LinkModel] = [
    Links(), ALL_ON, dataclasses.replace(ALL_ON, symmetric=True), lan(), wan(3), home(4),
    Links(latency_s=0.1, loss=1.0), Measured(MATRIX, jitter_s=0.001, loss=0.2, seed=2),
]  # fmt: skip
KEY = keyed.fold(0, "update", 7)
words = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(words, min_size=1, max_size=3))
def test_uniform_draws_are_bit_identical(seed: int, key: list[int]) -> None:
    tensors = [torch.tensor(word) for word in key]
    one = keyed.uniform(seed, "loss", *key)
    assert draw_uniform(seed, "loss", *key) == one
    assert draw_uniform(seed, "loss", *tensors).item() == one


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(words, min_size=1, max_size=3))
def test_normal_draws_agree_to_the_last_bits(seed: int, key: list[int]) -> None:
    tensors = [torch.tensor(word) for word in key]
    one = draw_normal(seed, "latency", *key)
    assert draw_normal(seed, "latency", *tensors).item() == pytest.approx(one, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("links", MODELS, ids=repr)
def test_numbers_and_tensors_agree(links: LinkModel) -> None:
    source = torch.arange(3).unsqueeze(-1)
    target = torch.tensor([[1, 2], [0, 2], [0, 1]])
    stamp = torch.tensor(keyed.signed(KEY))
    latency = links.latency_of_s(source, target)
    jitter = links.jitter_of_s(source, target, stamp)
    lost = links.lost(source, target, stamp)
    assert latency.shape == jitter.shape == lost.shape == (3, 2)
    assert latency.dtype == jitter.dtype == torch.float64
    assert lost.dtype == torch.bool
    for i in range(3):
        for k in range(2):
            pair = (i, int(target[i, k]))
            assert latency[i, k].item() == pytest.approx(links.latency_of_s(*pair), rel=1e-13)
            # The signed and the unsigned form of a message key are the same key.
            for key in (KEY, keyed.signed(KEY)):
                expected = links.jitter_of_s(*pair, key)
                assert isinstance(expected, float)
                assert jitter[i, k].item() == pytest.approx(expected, rel=1e-13)
                assert lost[i, k].item() is links.lost(*pair, key)
    for capacity in (links.uplink_of, links.downlink_of):
        stacked = capacity(torch.arange(3))
        assert stacked.dtype == torch.float64
        for i in range(3):
            assert stacked[i].item() == pytest.approx(capacity(i), rel=1e-13)


def test_many_losses_agree_exactly() -> None:
    links = Links(loss=0.3, seed=5)
    keys = torch.arange(3000)
    stacked = links.lost(4, 9, keys)
    assert stacked.tolist() == [links.lost(4, 9, key) for key in range(3000)]
    # 3,000 draws: five standard deviations are 0.042.
    assert abs(stacked.double().mean().item() - 0.3) < 0.042


def test_leading_axes_are_indices_too() -> None:
    index = torch.arange(12).reshape(2, 3, 2)
    for formula in (ALL_ON.uplink_of, lambda i: ALL_ON.latency_of_s(i, 3)):
        assert torch.equal(formula(index)[1, 2], formula(index[1, 2]))


def test_latencies_are_log_normal_over_pairs() -> None:
    pairs = torch.arange(200)
    latency = ALL_ON.latency_of_s(pairs.unsqueeze(-1), pairs)
    logs = latency.log()
    # 40,000 draws: the median's deviation is about 0.004, the sigma's 0.002.
    assert latency.median().item() == pytest.approx(0.05, rel=0.02)
    assert logs.std().item() == pytest.approx(0.6, rel=0.02)
    assert not torch.allclose(latency, latency.T)
    symmetric = dataclasses.replace(ALL_ON, symmetric=True)
    both = symmetric.latency_of_s(pairs.unsqueeze(-1), pairs)
    assert torch.equal(both, both.T)
    assert symmetric.latency_of_s(8, 3) == symmetric.latency_of_s(3, 8)
    assert ALL_ON.latency_of_s(8, 3) != ALL_ON.latency_of_s(3, 8)


def test_jitter_is_exponential_and_new_for_each_message() -> None:
    jitter = ALL_ON.jitter_of_s(1, 2, torch.arange(40_000))
    assert (jitter >= 0).all()
    assert jitter.isfinite().all()
    assert jitter.mean().item() == pytest.approx(0.01, rel=0.03)
    # An exponential's median is ln 2 of its mean.
    assert jitter.median().item() == pytest.approx(0.01 * math.log(2), rel=0.03)
    assert len(jitter.unique()) == 40_000


def test_bandwidths_are_log_normal_over_peers_and_keep_their_ratio() -> None:
    peers = torch.arange(20_000)
    up, down = ALL_ON.uplink_of(peers), ALL_ON.downlink_of(peers)
    assert up.median().item() == pytest.approx(1e6, rel=0.02)
    assert up.log().std().item() == pytest.approx(0.4, rel=0.03)
    torch.testing.assert_close(down / up, torch.full_like(up, 4.0))
    unlimited = Links(bandwidth_spread=0.5, uplink_bytes_per_s=1e6)
    assert unlimited.downlink_of(3) == math.inf
    assert (unlimited.downlink_of(peers) == math.inf).all()


def test_seeds_give_other_worlds() -> None:
    other = dataclasses.replace(ALL_ON, seed=12)
    assert ALL_ON.latency_of_s(1, 2) != other.latency_of_s(1, 2)
    assert ALL_ON.uplink_of(1) != other.uplink_of(1)
    assert ALL_ON.jitter_of_s(1, 2, 3) != other.jitter_of_s(1, 2, 3)


def test_extra_loss_is_independent_and_only_adds() -> None:
    links = Links(loss=0.2, seed=3)
    keys = torch.arange(20_000)
    base, more = links.lost(0, 1, keys), links.lost(0, 1, keys, extra=0.5)
    assert (base <= more).all()
    assert more.double().mean().item() == pytest.approx(0.6, abs=0.02)
    extra = torch.tensor([0.0, 0.5, 1.0]).unsqueeze(-1)
    per_link = links.lost(0, 1, keys, extra=extra)
    assert torch.equal(per_link[0], base)
    assert torch.equal(per_link[1], more)
    assert per_link[2].all()
    assert links.lost(0, 1, 5, extra=1.0) is True
    assert Links().lost(0, 1, 5) is False
    assert not Links().lost(torch.arange(4), 1, KEY).any()
    assert Links().lost(0, 1, torch.arange(50), extra=0.9).any()


@pytest.mark.parametrize(
    ("links", "plain", "sharing"),
    [
        (Links(), True, False),
        (Links(latency_s=1.0, seed=4, bandwidth_spread=0.5), True, False),
        (Links(latency_spread=0.1), False, False),
        (Links(jitter_s=0.1), False, False),
        (Links(loss=0.1), False, False),
        (Links(uplink_bytes_per_s=1e9), False, True),
        (Links(downlink_bytes_per_s=1e9), False, True),
        (Measured(MATRIX), False, False),
        (Measured(MATRIX, uplink_bytes_per_s=1e9), False, True),
        (lan(), False, True),
        (wan(), False, True),
        (home(), False, True),
    ],
)
def test_what_engines_may_skip(links: LinkModel, plain: bool, sharing: bool) -> None:
    assert links.plain is plain
    assert links.sharing is sharing
    assert hash(links) == hash(dataclasses.replace(links))  # type: ignore[type-var]


def test_presets_are_ordered() -> None:
    assert lan().latency_s < home().latency_s < wan().latency_s
    assert home().uplink_bytes_per_s * 8 == 20e6
    assert home().downlink_bytes_per_s * 8 == 100e6
    assert home(seed=3) == dataclasses.replace(home(), seed=3)


def test_measured_from_tuples_lists_and_file(tmp_path: Path) -> None:
    path = tmp_path / "latency.npy"
    np.save(path, np.asfortranarray(np.array(MATRIX, dtype=np.float32)))
    from_file = Measured(str(path))
    from_tuples = Measured(MATRIX)
    from_lists = Measured([list(row) for row in MATRIX])  # type: ignore[arg-type]
    assert from_lists == from_tuples
    assert hash(from_lists) == hash(from_tuples)
    assert from_file.peers == from_tuples.peers == 3
    for i in range(3):
        for j in range(3):
            assert from_tuples.latency_of_s(i, j) == MATRIX[i][j]
            assert from_file.latency_of_s(i, j) == pytest.approx(MATRIX[i][j], rel=1e-6)
    # Padding must not raise: its numbers are masked later.
    padded = from_tuples.latency_of_s(torch.tensor([[0, -1], [1, 2]]), torch.tensor([2, 0]))
    assert padded[0, 0].item() == 0.02
    assert padded[1].tolist() == [0.04, 0.05]


def test_measured_shares_the_other_formulas() -> None:
    measured = Measured(MATRIX, jitter_s=0.01, loss=0.3, uplink_bytes_per_s=1e6, seed=11)
    links = Links(jitter_s=0.01, loss=0.3, uplink_bytes_per_s=1e6, seed=11)
    assert measured.jitter_of_s(0, 1, KEY) == links.jitter_of_s(0, 1, KEY)
    assert measured.uplink_of(1) == links.uplink_of(1)
    keys = torch.arange(200)
    assert torch.equal(measured.lost(0, 1, keys), links.lost(0, 1, keys))


def test_measured_rejects_what_it_cannot_use(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (((0.0, 1.0),), "square"),
        (((0.0, 1.0), (1.0,)), "square"),
        (((0.0, math.nan), (1.0, 0.0)), "from peer 0 to 1 is nan"),
        (((0.0, 1.0), (-1.0, 0.0)), "from peer 1 to 0 is -1.0"),
        ((), "empty"),
        (str(tmp_path / "missing.npy"), "cannot be read"),
    ]
    for matrix, message in cases:
        with pytest.raises(UsageError, match=message):
            Measured(matrix)
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(UsageError, match="need \\[peers, peers\\]"):
        Measured(str(tmp_path / "flat.npy"))
    # A nan on the diagonal is how some tools say "itself".
    assert Measured(((math.nan, 1.0), (1.0, math.nan))).latency_of_s(0, 1) == 1.0
    for pair in ((0, 3), (3, 0), (-1, 0)):
        with pytest.raises(UsageError, match="covers 3 peers"):
            Measured(MATRIX).latency_of_s(*pair)
    with pytest.raises(UsageError, match="loss=2"):
        Measured(MATRIX, loss=2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latency_s": -1.0}, "latency_s=-1.0"),
        ({"latency_s": math.nan}, "latency_s=nan"),
        ({"latency_spread": math.inf}, "latency_spread=inf"),
        ({"jitter_s": -0.1}, "jitter_s=-0.1"),
        ({"bandwidth_spread": -0.1}, "bandwidth_spread=-0.1"),
        ({"uplink_bytes_per_s": 0.0}, "uplink_bytes_per_s=0.0"),
        ({"downlink_bytes_per_s": math.nan}, "downlink_bytes_per_s=nan"),
        ({"loss": 1.1}, "loss=1.1"),
        ({"loss": math.nan}, "loss=nan"),
    ],
)
def test_wrong_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Links(**wrong)


def fifo_by_loop(arrive: list[float], service: list[float], mask: list[bool]) -> list[float]:
    finish = [math.inf] * len(arrive)
    free = -math.inf
    for i in sorted((i for i in range(len(arrive)) if mask[i]), key=lambda i: (arrive[i], i)):
        free = finish[i] = max(arrive[i], free) + service[i]
    return finish


message = st.tuples(
    st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e6), st.just(math.inf)),
    st.one_of(st.just(0.0), st.floats(0, 1e4)),
    st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(message, max_size=12))
def test_fifo_against_a_loop(messages: list[tuple[float, float, bool]]) -> None:
    arrive, service, mask = ([m[i] for m in messages] for i in range(3))
    found = fifo_finish(
        torch.tensor(arrive, dtype=torch.float64),
        torch.tensor(service, dtype=torch.float64),
        torch.tensor(mask, dtype=torch.bool),
    )
    expected = torch.tensor(fifo_by_loop(arrive, service, mask), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-9)


def test_fifo_rows_are_independent_and_broadcast() -> None:
    generator = torch.Generator().manual_seed(3)
    arrive = torch.rand(2, 5, 9, generator=generator, dtype=torch.float64)
    service = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 5, 9, generator=generator) < 0.7
    together = fifo_finish(arrive, service, mask)
    for a in range(2):
        for b in range(5):
            assert torch.equal(together[a, b], fifo_finish(arrive[a, b], service[b], mask[a, b]))
    assert torch.equal(together, fifo_finish(arrive.mT.contiguous().mT, service, mask))


def test_fifo_edges() -> None:
    empty = torch.zeros(4, 0, dtype=torch.float64)
    assert fifo_finish(empty, empty).shape == (4, 0)
    inf = math.inf
    # Ties by index; an endless service lets nobody else through, also not the one that never came.
    ties = fifo_finish(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 0.5]))
    assert ties.tolist() == [4.0, 6.0, 0.5]
    stuck = fifo_finish(torch.tensor([0.0, 1.0, 2.0, inf]), torch.tensor([1.0, inf, 1.0, 1.0]))
    assert stuck.tolist() == [1.0, inf, inf, inf]
    nothing = fifo_finish(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([False]))
    assert nothing.tolist() == [inf]


def test_the_event_engine_need_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from shoal.world.device import Cost, Device\n"
        "from shoal.world.links import Measured, home\n"
        "links = home()\n"
        "links.latency_of_s(1, 2), links.jitter_of_s(1, 2, 3), links.lost(1, 2, 3, 0.5)\n"
        "links.uplink_of(1), Measured(((0.0,),)).latency_of_s(0, 0)\n"
        "Device(spread=0.5).seconds(1, Cost(flops=1.0))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
