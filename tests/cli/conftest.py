"""The lab's fake catalogue, and its launcher in place of the engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))

from fake_lab import fake_launch, write_cards


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards, enrolled; an empty workspace; no engine."""
    folder = write_cards(tmp_path)
    monkeypatch.setenv("SHOAL_SYSTEMS", str(folder))
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoal.lab.launch.launch", fake_launch)
    return folder
