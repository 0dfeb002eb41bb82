"""The commands in this process, on fake systems."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_lab import failing_launch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.cli.console import explain, table
from shoal.lab import plot
from shoal.lab.discover import cards
from shoal.lab.report import Report

pytestmark = pytest.mark.usefixtures("catalogue")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second each and have tests of their own."""
    monkeypatch.setattr(plot, "svg", lambda *args: "<svg></svg>")


def shoal(*arguments: str, code: int = 0) -> Result:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == code, found.output + repr(found.exception)
    return found


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_list_and_its_contract_for_scripts() -> None:
    found = {each["name"]: each for each in lines(shoal("list", "--json"))}
    assert found["alpha"] == {
        "name": "alpha",
        "family": "fakes",
        "kind": "strategy",
        "title": "Alpha averaging",
        "paper": "Writer et al. 2021: On Alpha averaging",
    }
    text = shoal("list", "--family", "fakes").stdout
    assert "beta-x" in text
    assert "Beta rays" in text


def test_show_and_cite() -> None:
    text = shoal("show", "alpha").stdout
    for part in ("rate = 0.3", "arXiv 2101.00001", "(expected: fails)", "nothing is trained"):
        assert part in text
    assert shoal("show", "alpha", "--cite").stdout.startswith("@article{alpha,\n  author = {Writer")
    assert lines(shoal("show", "beta-x", "--json"))[0]["settings"]["rate"] == "0.2"


def test_reproduce_and_its_contract_for_scripts() -> None:
    # 1, since a claim fails, even though its card expects that.
    found = lines(shoal("reproduce", "alpha", "beta-x", "--json", "--seed", "3", "-j", "1", code=1))
    assert [each["system"] for each in found] == ["alpha", "beta-x"]
    first = found[0]
    assert set(first) == {"system", "budget", "seconds", "report", "claims"}
    assert first["budget"] == "small"
    assert first["seconds"] > 0
    assert Report.load(first["report"]).seeds == (3, 4)
    claims = {each["name"]: each for each in first["claims"]}
    assert set(claims["faster"]) == {
        "name", "measured", "interval", "bound", "verdict", "clear", "expected",
    }  # fmt: skip
    assert claims["faster"]["verdict"] == "holds"
    assert claims["faster"]["bound"] == ">= 0.01"
    low, high = claims["faster"]["interval"]
    assert low <= claims["faster"]["measured"] <= high
    assert (claims["soon"]["verdict"], claims["soon"]["expected"]) == ("fails", "fails")
    assert claims["large"]["verdict"] == "out of scale"
    assert claims["large"]["measured"] is None
    assert claims["large"]["interval"] is None


def test_reproduce_exits_with_one_when_a_claim_fails_or_has_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = shoal("reproduce", "alpha", "--budget", "full", "-j", "1", code=1).stdout
    assert "fails" in text
    assert "expected holds" in text
    monkeypatch.setattr("shoal.lab.launch.launch", failing_launch)
    found = lines(shoal("reproduce", "alpha", "--json", "--fresh", "-j", "1", code=1))
    assert {c["verdict"] for c in found[0]["claims"]} == {"inconclusive", "out of scale"}


def test_run_a_file_with_arms(tmp_path: Path) -> None:
    (tmp_path / "first.toml").write_text(
        'title = "The first one"\nbase = "fakes.tiny"\nseeds = 2\nrounds = 4\n'
        "[arms]\nbeta-x = 'beta-x'\n"
        "[arms.quick]\nsystem = 'alpha'\nset = { rate = 0.9 }\nscenario = { peers = 5 }\n"
    )
    found = lines(shoal("run", "first.toml", "--json", "--set", "quick.rate=0.8"))
    report = Report.load(found[-1]["report"])
    assert report.title == "The first one"
    assert report.arms == ("beta-x", "quick")
    assert report.cell("quick").peers == 5
    assert report.cell("quick").cell["settings"] == {"rate": 0.8}  # type: ignore[index]
    assert {each["arm"] for each in found[:-1]} == {"beta-x", "quick"}
    again = shoal("run", "first.toml", "--peers", "7")
    assert "The first one" in again.stdout
    assert "report: " in again.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds = 3\n[arms.a]\nsystem = 'alhpa'\n", "bad.toml:3: arms.a.system = 'alhpa'"),
        ("rounds = 3\n[arms.a]\nsystm = 'alpha'\n", "bad.toml:3: arms.a.systm"),
        ("rounds = 3\nseeds = 'x'\n", "bad.toml:2: seeds = 'x'; need a whole number"),
        ("rounds = 3\n", "nothing to run"),
        ("base = 'fakes.tinny'\n", "did you mean 'fakes.tiny'"),
    ],
)
def test_wrong_files_exit_with_two(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    found = shoal("run", "bad.toml", code=2)
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_run_one_system_over_a_grid_in_processes() -> None:
    found = lines(
        shoal("run", "alpha", "--grid", "rate=0.1,0.5", "--seeds", "2", "-j", "2", "--json")
    )
    accuracy = {e["arm"]: e["value"] for e in found if e.get("metric") == "accuracy"}
    assert accuracy["alpha [rate=0.5]"] > accuracy["alpha [rate=0.1]"]
    assert Report.load(found[-1]["report"]).seeds == (0, 1)


def test_a_plain_run_leaves_the_report_of_a_reproduction_alone() -> None:
    kept = Path(
        lines(shoal("reproduce", "alpha", "--budget", "full", "--json", code=1))[0]["report"]
    )
    before = kept.read_text()
    plain = Path(lines(shoal("run", "alpha", "--peers", "5", "--json"))[-1]["report"])
    assert (kept.name, plain.name) == ("alpha-full.html", "alpha.html")
    assert kept.read_text() == before
    assert "Reproduction of alpha" in before
    assert "full budget" in before
    text = plain.read_text()
    assert "Run of alpha" in text
    assert "budget" not in text


def test_compare_on_a_named_scenario() -> None:
    found = lines(shoal("compare", "alpha", "beta-x", "--scenario", "fakes.tiny", "--json"))
    report = Report.load(found[-1]["report"])
    assert (report.arms, report.seeds) == (("alpha", "beta-x"), (0, 1, 2))
    assert report.cell("alpha").peers == 6
    assert shoal("compare", "alpha", "alpha", code=2)


def test_replay_and_export(tmp_path: Path) -> None:
    path = lines(shoal("run", "alpha", "--json"))[-1]["report"]
    assert "alpha, seed 0: same" in shoal("replay", path).stdout
    shoal("export", path, "--out", "peer.safetensors", "--peer", "3")
    assert load_file(tmp_path / "peer.safetensors")["weight"].shape == (2, 3)
    assert (
        "need a peer's number" in shoal("export", path, "--out", "x", "--peer", "m", code=2).stderr
    )
    file = Path(path).with_suffix(".json")
    data = json.loads(file.read_text())
    data["cells"][0]["state_digest"] = "f" * 32
    file.write_text(json.dumps(data))
    found = lines(shoal("replay", path, "--json", code=1))
    assert found[0]["same"] is False
    assert found[0]["differences"][0].startswith("state_digest: ffffffffffff became")


def test_data_says_what_is_there() -> None:
    found = {each["task"]: each for each in lines(shoal("data", "--json"))}
    assert found["digits"]["installed"] is True
    assert "scikit-learn" in shoal("data").stdout or found["digits"]["installed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "Did you mean 'list'"),
        (["show", "alhpa"], "did you mean 'alpha'"),
        (["reproduce"], "name systems, or give --all"),
        (["reproduce", "alpha", "--all"], "one of the two"),
        (["reproduce", "alpha", "--budget", "ful"], "did you mean 'full'"),
        (["reproduce", "alpha", "beta"], "did you mean 'beta-x'"),
        (["run", "alpha", "--engine", "evnt"], "did you mean 'event'"),
        (["run", "alpha", "--set", "rounds"], "need key=value"),
        (["run", "alpha", "--set", "ruonds=3"], "did you mean 'rounds'"),
        (["run", "alpha", "--grid", "rate=1,1"], "need different values"),
        (["run", "alpha", "--grid", "rate"], "--grid 'rate'; need key=value (such as --grid"),
        (["run", "gone.toml"], "gone.toml: cannot be read"),
        (["run", "alpha", "--jobs", "0"], "--jobs"),
        (["replay", "gone.json"], "cannot be read"),
    ],
)
def test_misuse_exits_with_two_and_says_how_to_do_better(
    arguments: list[str], message: str
) -> None:
    found = shoal(*arguments, code=2)
    assert message in found.stderr
    assert "Traceback" not in found.output


def test_errors_of_the_program_itself_are_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.lab.launch.launch", 3)
    found = shoal("run", "alpha", code=1)
    assert found.stderr.startswith(
        "internal error: TypeError: 'int' object is not callable (shoal/"
    )
    assert "please report it" in found.stderr
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["run", "alpha"]).exception, TypeError)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_errors_in_a_system_of_ones_own_say_the_line(catalogue: Path, jobs: str) -> None:
    file = catalogue / "fakes" / "alpha.py"
    last = "    layers: tuple[int, ...] = (8,)\n"
    wrong = f"{last}\n    def __post_init__(self):\n        self.missing()\n"
    file.write_text(file.read_text().replace(last, wrong))
    found = shoal("run", "alpha", "--seeds", "2", "--jobs", jobs, code=1)
    assert found.stderr.startswith("error: AttributeError: 'Method' object has no attribute")
    assert f"({file}:" in found.stderr
    assert "in __post_init__)" in found.stderr
    assert "report it" not in found.stderr


def test_a_place_that_cannot_be_written_to_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")

    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError("it ran")

    path = lines(shoal("run", "alpha", "--json"))[-1]["report"]
    found = shoal("export", path, "--out", "taken/model.safetensors", code=2)
    assert found.stderr.startswith("error: taken/model.safetensors: cannot be written: ")
    monkeypatch.setattr("shoal.lab.launch.launch", never)
    for words in (["run", "alpha"], ["compare", "beta-x"], ["reproduce", "alpha"]):
        found = shoal(*words, "--fresh", "--out", "taken", code=2)
        assert "reports cannot be written to taken: File exists" in found.stderr
        assert "--out" in found.stderr
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "taken" / "deep"))
    found = shoal("run", "alpha", code=2)
    assert "no folder for runs can be here" in found.stderr
    assert "SHOAL_HOME" in found.stderr


def test_what_is_no_fault_of_the_program_comes_with_a_repair(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error, text in (
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "error: /a/b: Permission de"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device (make"),
        (ModuleNotFoundError("no", name="torch.nn"), "error: the package torch is not installed"),
    ):
        assert explain(error) == 2
        assert capsys.readouterr().err.startswith(text)
    assert explain(ModuleNotFoundError("no", name="shoal.gone")) == 1
    assert capsys.readouterr().err.startswith("internal error: ModuleNotFoundError")


def test_only_what_is_stored_is_said_to_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(shoal("run", "alpha", "--json"))[-1]["report"]

    def stop(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shoal.lab.launch.launch", stop)
    assert "the same command goes on" in shoal("run", "alpha", "--fresh", code=130).stderr
    assert shoal("replay", path, code=130).stderr == "\nstopped\n"


def test_a_wide_table_continues_below_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads, rows = ("arm", "accuracy", "bytes"), [("one", "0.5", "3"), ("two", "0.25", "1,024")]
    table(heads, rows, right=True)
    assert "arm  accuracy  bytes\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "16")
    monkeypatch.setenv("NO_COLOR", "1")
    table(heads, rows, right=True)
    assert capsys.readouterr().out == (
        "arm  accuracy\none       0.5\ntwo      0.25\n\narm  bytes\none      3\ntwo  1,024\n"
    )
    # Rows whose first cell is empty cannot be told apart below: the last column is cut.
    table(("family", "name"), [("a", "long name of it"), ("", "another")])
    assert capsys.readouterr().out == "family  name\na       long na…\n        another\n"


def test_every_command_has_help_with_examples() -> None:
    listing = shoal("--help").stdout
    for name in ("list", "show", "run", "compare", "reproduce", "replay", "export", "data"):
        assert f"  {name} " in listing
        text = shoal(name, "--help").stdout
        assert f"\n  Examples:\n    shoal {name}" in text
    named = re.findall(r"--family (\w+)", shoal("list", "--help").stdout)
    assert named
    assert {each.family for each in cards()}.issuperset(named)
