"""A catalogue of two fake systems and an empty workspace."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_lab import write_cards


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards, enrolled beside the package's own."""
    folder = write_cards(tmp_path)
    monkeypatch.setenv("SHOAL_SYSTEMS", str(folder))
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    monkeypatch.chdir(tmp_path)
    return folder
