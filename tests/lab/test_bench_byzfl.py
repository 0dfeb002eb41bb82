"""The bench beside ByzFL, against a plain twin of that package in its own interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.lab.bench import Row, _byzfl, aggregators, byzfl
from shoal.lab.bench._run import BenchFailed
from shoal.parts import names

TWIN = Path(__file__).with_name("twin")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_against(twin: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    monkeypatch.setenv(_byzfl.PYTHON, sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(twin))
    return {row.name: row for row in byzfl.measure(True, lambda text: None)}


def test_every_shared_rule_gives_what_its_definition_says_and_one_that_does_not_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in TWIN.rglob("*.py"):
        # Of all the twin's rules, its median is wrong.
        text = file.read_text().replace("x.quantile(0.5, dim=0)\n", "x.mean(0)\n")
        there = tmp_path / file.relative_to(TWIN)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(text)
    found = rows_against(tmp_path, monkeypatch)
    apart = {name: row for name, row in found.items() if "results apart" in name}
    assert len(apart) == 2 * 18
    assert {name.split(",")[0] for name, row in apart.items() if not row.holds} == {"median"}
    off = {name: row for name, row in found.items() if name.endswith("off double precision")}
    assert {name.split(",")[0] for name in off} == {"median"}
    for row in off.values():
        # Who differs is told: not ours.
        assert (row.value or 0) < 1e-6 < (row.reference_value or 0)
    races = {n: row for n, row in found.items() if row.reference == "ByzFL" and n not in off}
    assert len(races) == 2 * 20
    for row in races.values():
        assert row.value is not None
        assert row.value > 0
        assert row.bound == "<= 20/19"
    overall = [row for name, row in found.items() if name.startswith("geometric mean")]
    assert [row.bound for row in overall] == [">= 2", ">= 2"]
    assert sum("once" in name for name in found) == 2 * 3
    in_place = {name: row for name, row in found.items() if row.reference == "ByzFL in place"}
    assert {name.split(",")[0] for name in in_place} == {"ARC's rows", "clipping's rows", "ARC"}
    for name, row in in_place.items():
        whole = races[name.removesuffix(": its copy not counted")]
        assert (row.reference_value or 0) < (whole.reference_value or 0)


def test_an_interpreter_that_cannot_says_why(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    script.chmod(0o755)
    with (
        _byzfl.ByzFL(str(script), tmp_path) as there,
        pytest.raises(BenchFailed, match="no such package"),
    ):
        there.load(torch.zeros(2, 2))


def test_without_byzfl_our_own_figures_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_byzfl.PYTHON, raising=False)
    monkeypatch.setattr(_byzfl, "find_spec", lambda name: None)
    found = list(byzfl.measure(True, lambda text: None))
    assert [row.reference for row in found if row.value is None] == [_byzfl.REASON] * 2
    assert sum(row.unit == "ms CPU" and row.reference is None for row in found) == 2 * 20


def test_slopes_and_their_rules() -> None:
    assert aggregators.slope([(10, 3.0), (20, 6.0), (40, 12.0)]) == pytest.approx(1.0)
    assert aggregators.slope([(10, 3.0), (100, 3.0)]) == pytest.approx(0.0)
    assert set(aggregators.IN_ROWS) | set(aggregators.LINEAR) <= set(names("aggregate"))
    assert aggregators.told("krum", 3).byzantine == aggregators.FAULTY
    assert aggregators.told("trimmed_mean", 3).trim == aggregators.FAULTY
    assert aggregators.told("variance_corrected", 3).layout.dim == 3
