"""The system that the page on adding one shows is a whole one: found, run, judged, on a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doc_pages import blocks
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.lab import discover, pages

PAGE = "docs/adding-a-system.md"


@pytest.fixture
def enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's file in a folder of its own, as the page says."""
    family = tmp_path / "my_systems" / "own"
    family.mkdir(parents=True)
    code = next(block.code for block in blocks(PAGE) if block.language == "python")
    (family / "soft_average.py").write_text(code + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_SYSTEMS", str(tmp_path / "my_systems"))
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    return tmp_path


def shoal(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return result.exit_code, result.stdout


def test_it_is_found_without_being_imported(enrolled: Path) -> None:
    card = discover.find("soft-average")
    assert card.family == "own"
    assert [claim.name for claim in card.claims] == ["cooperation", "spread"]
    assert card.arms == ("soft", "hard", "alone")
    code, said = shoal("list", "--family", "own", "--json")
    assert code == 0
    assert json.loads(said)["name"] == "soft-average"


def test_its_claims_are_measured_and_hold(enrolled: Path) -> None:
    code, said = shoal("reproduce", "soft-average", "--budget", "small", "-j", "1", "--json")
    claims = {claim["name"]: claim for claim in json.loads(said)["claims"]}
    assert code == 0
    assert claims["cooperation"]["verdict"] == "holds"
    assert claims["cooperation"]["measured"] <= 0.85
    assert claims["spread"]["measured"] >= 1.5


def test_it_gets_a_page(enrolled: Path) -> None:
    card = discover.find("soft-average")
    page = pages.system_page(card, discover.load("soft-average"), None)
    assert "| alone | `local-only` | `steps=3` |" in page
    assert "| soft | `soft-average` | - |" in page
    assert "pull: float = 0.5" in page
    assert "def local" not in page
