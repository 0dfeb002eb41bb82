"""Devices: the roofline, the spread over peers, numbers and tensors alike."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.world.device import Cost, Device

MEDIAN = Device(flops_per_s=2e9, bytes_per_s=1e9, overhead_s=0.25, store_s=0.5)
SPREAD = Device(flops_per_s=2e9, bytes_per_s=1e9, overhead_s=0.25, store_s=0.5, spread=0.7, seed=3)


def test_the_slower_of_arithmetic_and_memory_counts() -> None:
    assert MEDIAN.seconds(0, Cost(flops=4e9)) == 2.25
    assert MEDIAN.seconds(0, Cost(flops=4e9, bytes=1e9)) == 2.25
    assert MEDIAN.seconds(0, Cost(flops=4e9, bytes=3e9)) == 3.25
    assert MEDIAN.seconds(0, Cost(flops=4e9, bytes=3e9, seconds=1.5)) == 4.75
    assert MEDIAN.seconds(0, Cost()) == 0.25
    assert Device().seconds(0, Cost(bytes=1e15)) == 0.0
    assert MEDIAN.store_seconds(0) == 0.5


def test_a_fault_multiplies() -> None:
    assert MEDIAN.seconds(5, Cost(flops=4e9), slow=3.0) == 6.75
    assert MEDIAN.store_seconds(5, slow=3.0) == 1.5
    slow = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert MEDIAN.seconds(torch.arange(2), Cost(flops=4e9), slow).tolist() == [2.25, 9.0]


@pytest.mark.parametrize("device", [MEDIAN, SPREAD], ids=["median", "spread"])
def test_numbers_and_tensors_agree(device: Device) -> None:
    peers = torch.arange(6).reshape(2, 3)
    cost = Cost(flops=1e9, bytes=2e9, seconds=0.1)
    stacked = device.seconds(peers, cost)
    assert stacked.shape == (2, 3)
    assert stacked.dtype == torch.float64
    for peer, seconds in zip(peers.flatten().tolist(), stacked.flatten().tolist(), strict=True):
        assert seconds == pytest.approx(device.seconds(peer, cost), rel=1e-13)
    stored = device.store_seconds(peers)
    assert stored[1, 2].item() == pytest.approx(device.store_seconds(5), rel=1e-13)


def test_unequal_work_in_one_call() -> None:
    flops = torch.tensor([0.0, 2e9, 8e9], dtype=torch.float64)
    found = MEDIAN.seconds(torch.arange(3), Cost(flops=flops, bytes=2e9))  # type: ignore[arg-type]
    assert found.tolist() == [2.25, 2.25, 4.25]


def test_slowness_is_log_normal_with_median_one() -> None:
    slowness = SPREAD.slowness(torch.arange(20_000))
    assert slowness.median().item() == pytest.approx(1.0, rel=0.03)
    assert slowness.log().std().item() == pytest.approx(0.7, rel=0.02)
    assert SPREAD.slowness(4) == SPREAD.slowness(4)
    assert SPREAD.slowness(4) != Device(spread=0.7, seed=4).slowness(4)
    assert MEDIAN.slowness(4) == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flops_per_s": 0.0}, "flops_per_s=0.0"),
        ({"bytes_per_s": math.nan}, "bytes_per_s=nan"),
        ({"spread": -1.0}, "spread=-1.0"),
        ({"overhead_s": math.inf}, "overhead_s=inf"),
        ({"store_s": -0.5}, "store_s=-0.5"),
    ],
)
def test_wrong_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Device(**wrong)
