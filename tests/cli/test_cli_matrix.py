"""`shoal compare --aggregators`: small real matrices through the command, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.lab import plot
from shoal.lab.store import Store

SMALL = (
    "--set=rounds=2", "--set=task.hidden=[]", "--set=task.train_samples=700", "--set=lr=0.3",
    "--set=task.standardise=true", "--set=task.split=iid", "--set=links=none",
    "--set=device=none", "--peers=7", "--seeds=1", "-q",
)  # fmt: skip


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and no pictures, which take a second each and have tests of their own."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "svg", lambda *args: "<svg></svg>")


def compare(*arguments: str, code: int = 0) -> Result:
    found = CliRunner().invoke(app, ["compare", *arguments])
    assert found.exit_code == code, found.output + repr(found.exception)
    return found


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_server_under_attack_end_to_end() -> None:
    arguments = (
        "fedavg", "--aggregators", "mean,median,krum", "--attacks", "gaussian,sign_flip:scale=50",
        "--byzantine", "0.3,0.45", "--breakdown", "--json", *SMALL,
    )  # fmt: skip
    found = lines(compare(*arguments))
    fields = {(f["field"], f["rule"], f["liars"]): f for f in found if "field" in f}
    assert fields["gaussian", "median", 2]["value"] > 0.5
    assert fields["sign_flip(scale=50)", "mean", 2]["value"] < 0.4
    assert fields["gaussian", "krum", 2]["told"] == 2
    refused = fields["gaussian", "krum", 3]
    assert refused["refused"] == "krum cannot stand 3 liars among 7 vectors; 2 at most"
    assert refused["value"] is None
    summary = {s["summary"]: s for s in found if "summary" in s}
    assert summary["mean"]["clean_cost"] == 0.0
    assert summary["median"]["worst"] > summary["mean"]["worst"]
    assert (summary["krum"]["ran"], summary["krum"]["fields"]) == (2, 4)
    ends = {b["breakdown"]: b for b in found if "breakdown" in b}
    assert {rule: end["liars"] for rule, end in ends.items()} == {"mean": 1, "median": 4, "krum": 3}
    assert ends["krum"]["refused"]
    page = Path(found[-1]["report"])
    assert page.name == "robustness-of-fedavg.html"
    for suffix in (".html", ".json", ".md", ".csv"):
        assert "krum" in page.with_suffix(suffix).read_text()
    # All of it is stored now.
    with Store() as store:
        before = store.count()
        assert lines(compare(*arguments)) == found
        assert store.count() == before == 18


def test_a_graph_in_two_worlds_as_tables() -> None:
    found = compare(
        "dpsgd", "--aggregators", "median", "--attacks", "dissensus", "--byzantine", "0.15",
        "--grid", "task.label_noise=0,0.2", *SMALL,
    )  # fmt: skip
    assert "dpsgd [task.label_noise=0]: summary" in found.stdout
    assert "dpsgd [task.label_noise=0.2]: worst case over the attacks" in found.stdout
    assert "15% (1)" in found.stdout
    assert "robustness-of-dpsgd.html" in found.stdout


def test_a_server_and_a_graph_unless_somebody_says_otherwise() -> None:
    found = lines(
        compare("--aggregators=mean", "--attacks=zero", "--byzantine=0.3", "--json", *SMALL)
    )
    assert {f["world"] for f in found if "field" in f} == {"fedavg", "dpsgd"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fedavg", "--aggregators", "krumm"], "--aggregators krumm: no such aggregator; did you"),
        (["fedavg", "--attacks", "alei"], "--attacks alei: no such attack; did you mean 'alie'"),
        (["fedavg", "--aggregators", "median,"], "--aggregators: a name is empty"),
        (["fedavg", "--byzantine", "1"], "--byzantine 1; need shares from 0 to below 1"),
        (["fedavg", "--byzantine", "some"], "--byzantine some; need shares, such as 0.1,0.2"),
        (["fedavg", "--told", "3"], "belong to a matrix"),
        (["fedavg", "--breakdown"], "belong to a matrix"),
        (["fedavg", "--aggregators", "krum", "--below", "0.2"], "with --breakdown alone"),
        (["modest", "--aggregators", "krum"], "modest is a program"),
        (["monna", "--aggregators", "krum"], "monna is a part"),
        (["fedavg", "--aggregators", "krum", "--set", "attack=zero"], "what the matrix goes"),
        ([], "name systems"),
        (["--aggregators", "krum", "--scenario", "gone.toml"], "gone.toml: cannot be read"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    assert message in compare(*arguments, code=2).stderr
