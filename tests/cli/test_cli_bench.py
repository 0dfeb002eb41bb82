"""`shoal bench`: its contract for scripts and its exit codes, on benches made up here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.lab import bench
from shoal.lab.bench import Row, missing
from shoal.lab.bench._run import BenchFailed

KEYS = {"name", "value", "unit", "reference", "reference_value", "ratio", "bound", "holds"}


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    asked: list[tuple[str, bool]] = []

    def run(name: str, *, tiny: bool = False, note: Any = None) -> Iterator[Row]:
        asked.append((name, tiny))
        yield Row.of(f"{name}: fine", 2.0, "s", against=("loop", 4.0), bound="<= 1")
        if name == "scale":
            yield Row.of("scale: too slow", 1234.5, "s", bound="<= 3")
        if name == "live":
            yield Row.of(
                "live: a line's name of more than eighty letters, as the benches of collectives "
                "have them", 123456.0, "deliveries/s", against=("someone else's", 654321.0),
                bound="<= 20/19",
            )  # fmt: skip
        if name == "collective":
            yield Row.of("kill (fails: [/its/own/words.cc:5] closed)", 0.5, "s", bound="<= 1")
        if name == "startup":
            raise BenchFailed("bench startup broke down:\nValueError: no")
        if name == "asynchronous":
            yield missing("asynchronous: absent", "not installed", ">= 1")

    monkeypatch.setattr(bench, "run", run)
    return asked


def shoal(*arguments: str, code: int = 0) -> Result:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == code, found.output + repr(found.exception)
    return found


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_and_names(made_up: list[tuple[str, bool]]) -> None:
    rows = lines(shoal("bench", "kernel", "asynchronous", "kernel", "--json"))
    assert made_up == [("kernel", False), ("asynchronous", False)]
    assert all(set(row) == KEYS for row in rows)
    assert rows[0] == {
        "name": "kernel: fine", "value": 2.0, "unit": "s", "reference": "loop",
        "reference_value": 4.0, "ratio": 0.5, "bound": "<= 1", "holds": True,
    }  # fmt: skip
    assert rows[-1]["value"] is None
    assert rows[-1]["holds"] is None


def test_a_bound_that_does_not_hold_ends_with_one(made_up: list[tuple[str, bool]]) -> None:
    rows = lines(shoal("bench", "scale", "--json", code=1))
    assert [row["holds"] for row in rows] == [True, False]
    text = shoal("bench", "scale", code=1).stdout
    for part in ("scale: too slow", "1,234", "fails", "holds", "Many peers"):
        assert part in text


def test_rows_are_whole_in_a_pipe_and_keep_their_verdict_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    piped = shoal("bench", "live").stdout.splitlines()
    assert any("as the benches of collectives have them" in row and "holds" in row for row in piped)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = shoal("bench", "live").stdout.splitlines()
    assert max(map(len, narrow)) <= 80
    assert any(row.rstrip().endswith("holds") and "123,456" in row for row in narrow)


def test_a_bench_that_breaks_down_leaves_the_others_their_turn(
    made_up: list[tuple[str, bool]],
) -> None:
    found = shoal("bench", "startup", "kernel", "--tiny", code=1)
    assert "ValueError: no" in found.stderr
    assert "kernel: fine" in found.stdout
    assert made_up == [("startup", True), ("kernel", True)]


def test_what_others_say_is_no_markup() -> None:
    assert "[/its/own/words.cc:5] closed" in " ".join(shoal("bench", "collective").output.split())


def test_without_names_all_run(made_up: list[tuple[str, bool]]) -> None:
    shoal("bench", "--json", code=1)
    assert [name for name, _ in made_up] == list(bench.names())


def test_misuse_runs_nothing(made_up: list[tuple[str, bool]]) -> None:
    found = shoal("bench", "kernel", "kernle", code=2)
    assert "no bench 'kernle'; did you mean 'kernel'?" in found.stderr
    assert made_up == []


def test_help_has_examples() -> None:
    assert "shoal bench kernel star-mlp" in shoal("bench", "--help").stdout
