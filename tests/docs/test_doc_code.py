"""The code of the pages runs, and what the tutorials promise about it holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doc_pages import PAGES, module_of, script
from sklearn.linear_model import LogisticRegression

import shoal
from shoal.testing.ladder import difference, tolerance

ENGINES = ("lockstep", "event", "live")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; modules made from pages are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("page_"):
            del sys.modules[name]


def name_of(page: str) -> str:
    return "page_" + re.sub(r"\W", "_", page.removesuffix(".md"))


@pytest.mark.live
@pytest.mark.parametrize("page", [page for page in PAGES if script(page).strip()])
def test_code_of_page_runs(page: str, workspace: Path) -> None:
    # The page on adding a system shows a file of the catalogue; running it makes the card.
    module_of(script(page), name_of(page), workspace)


def agree(what: object, world: shoal.Scenario) -> None:
    """Event twin of live (no batching), live and lockstep end in the same models."""
    exact = world.with_settings({"engine": {"batching": "off", "strict": True}})
    twin = shoal.run(what, exact, engine="event")
    runs = {engine: shoal.run(what, world, engine=engine) for engine in ENGINES}
    assert all(run.finished for run in runs.values())
    assert len(twin.final) == world.peers
    for peer, params in twin.final.items():
        assert torch.equal(runs["live"].final[peer], params)
    assert runs["live"].state_digest == twin.state_digest != ""
    for engine in ("lockstep", "event"):
        assert runs[engine].bytes_sent == twin.bytes_sent
        assert difference(runs[engine], twin) <= tolerance(twin)


@pytest.mark.live
def test_first_strategy_is_short_and_the_same_on_three_engines(workspace: Path) -> None:
    page = "docs/first-strategy.md"
    text = script(page, 0, 1)
    body = text[text.index("@dataclass") :]
    assert len([line for line in body.split("\n") if line.strip()]) <= 20
    module = module_of(text, name_of(page), workspace)
    world = shoal.Scenario(
        peers=6, rounds=4, task="digits", topology="ring", links="home", round_s=20.0
    )
    agree(module.SoftAverage(), world)
    with_seed = shoal.run(module.SoftAverage(), world, seed=1)
    assert difference(with_seed, shoal.run(module.SoftAverage(), world)) > 0.01


@pytest.mark.live
def test_own_module_and_tensors_are_the_same_on_three_engines(workspace: Path) -> None:
    page = "docs/own-model-and-data.md"
    module = module_of(script(page, 0, 2), name_of(page), workspace)
    world = shoal.Scenario(
        peers=module.PEERS, rounds=3, task=module.task, links="home", round_s=20.0,
        topology={"name": "random_regular", "degree": 4},
    )  # fmt: skip
    agree(shoal.Arm("dpsgd", set={"lr": 0.5, "epochs": 1}), world)
    # It learns what no line can separate: every peer beats a linear model of all the data.
    longer = world.with_settings({"rounds": 40, "eval_every": 40})
    run = shoal.run(shoal.Arm("dpsgd", set={"lr": 0.5, "epochs": 1}), longer)
    linear = LogisticRegression().fit(*module.train).score(*module.test)
    assert min(row.value for row in run.series("accuracy")) > linear + 0.05


def test_refused_modules_get_the_repair_that_the_page_names(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/own-model-and-data.md"
    text = "import shoal\n" + script(page, 0, 2) + script(page, 4, 5).lstrip("\n")
    module_of(text, name_of(page), workspace)
    said = capsys.readouterr().out
    assert "use nn.GroupNorm" in said
    assert "set p=0" in said
