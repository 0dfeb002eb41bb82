"""Which device a run uses: a GPU wherever there is one, and always named in what is stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.lab import torch_device
from shoal.lab.build import build, surroundings
from shoal.lab.cell import Cell
from shoal.lab.experiment import Experiment
from shoal.lab.replay import replay
from shoal.lab.scenario import Scenario
from shoal.lab.torch_device import resolved
from shoal.testing.pretend_device import PretendDevice

WORLD = Scenario(
    "device", peers=4, rounds=2, topology="ring",
    task={"name": "digits", "hidden": [4], "train_samples": 200},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch_device._automatic.cache_clear()
    yield
    torch_device._automatic.cache_clear()


def with_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """A machine with or without a GPU that can be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch_device, "_usable", lambda name: {"cuda": "cuda:0"}.get(name, name))


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda:0"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, there: bool, expected: str
) -> None:
    with_gpu(monkeypatch, there)
    assert WORLD.engine.device == "auto"
    assert resolved("auto") == expected
    assert surroundings(WORLD)["device"] == expected
    cell = Cell("arm", 0, WORLD, "dpsgd")
    assert cell.scenario.engine.device == expected
    assert cell.to_json()["scenario"]["engine"]["device"] == expected
    assert Cell.from_json(cell.to_json()) == cell
    assert resolved("cpu") == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps", "meta", "pretend:0", ""])
def test_what_cannot_be_used_is_refused_with_the_reason(device: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu, or a device") as found:
        resolved(device)
    assert repr(device) in str(found.value)
    with pytest.raises(UsageError, match=r"engine\.device"):
        Experiment(
            arms={"dpsgd": "dpsgd"}, scenario=WORLD, overrides={"engine.device": device}
        ).cells()
    with pytest.raises(UsageError, match=r"engine\.device"):
        build(WORLD.with_settings({"engine.device": device}))


def test_reports_that_name_no_device_were_made_on_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Cell("arm", 0, WORLD.with_settings({"engine.device": "cpu"}), "dpsgd").to_json()
    del old["scenario"]["engine"]
    with_gpu(monkeypatch, True)
    assert Cell.from_json(old).scenario.engine.device == "cpu"


def test_an_experiment_on_a_device_and_its_replay() -> None:
    with PretendDevice() as device:
        there = Experiment(
            arms={"dpsgd": "dpsgd"}, scenario=WORLD, overrides={"engine.device": device.name}
        ).run(store=None)
        cell = there.cells[0].cell
        assert cell is not None
        assert cell["scenario"]["engine"]["device"] == device.name
        assert all(comparison.same for comparison in replay(there))
    here = Experiment(
        arms={"dpsgd": "dpsgd"}, scenario=WORLD, overrides={"engine.device": "cpu"}
    ).run(store=None)
    assert here.cells[0].state_digest == there.cells[0].state_digest
    # On a machine without that device a replay says so.
    with pytest.raises(UsageError, match="pretend:0"):
        list(replay(there))
