"""What a run's key and a report say about the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.lab.environment import code_digest


def test_other_systems_are_other_code_and_without_them_it_is_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOAL_SYSTEMS", raising=False)
    before = code_digest()
    (tmp_path / "mine.py").write_text("SPEED = 1\n")
    monkeypatch.setenv("SHOAL_SYSTEMS", str(tmp_path))
    assert code_digest() != before
    monkeypatch.delenv("SHOAL_SYSTEMS")
    assert code_digest() == before
