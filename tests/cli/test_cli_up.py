"""`shoal up`: what it refuses, and its screen."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from time import monotonic

import pytest
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "live"))

from up_processes import environment

from shoal.cli._up_screen import Screen, chosen
from shoal.cli.app import app
from shoal.engine.live import control
from shoal.engine.live.fleet import FleetSettings
from shoal.engine.live.joining import Status
from shoal.lab.cell import Cell
from shoal.lab.run import scenario_of
from shoal.lab.up import Up

LIARS = (
    "--set", "topology=full", "--set", "task=digits", "--set", "byzantine=1", "--set",
    "attack=min_max",
)  # fmt: skip


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = environment(tmp_path)
    for name in ("SHOAL_HOME", "SHOAL_SYSTEMS"):
        monkeypatch.setenv(name, found[name])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_misuse_is_refused_before_any_process_starts(workspace: Path) -> None:
    for words, said in (
        (("0", "beats"), "up 0: need at least 1 process"),
        (("3", "baets"), "did you mean 'beats'?"),
        (("4", "beats", "--peers", "3"), "up: 4 processes for 3 peers; need 1 to 3"),
        (("2", "beats", "--listen", "0.0.0.0:7000"), "need an address at which the others reach"),
        (("2", "beats", "--listen", "7000"), "--listen 7000; need HOST:PORT"),
        (("2", "beats", "--listen", "192.0.2.1:0"), "cannot listen on 192.0.2.1"),
        (("2", "beats", "--set", "baets=1"), "did you mean 'beats'?"),
        (("2", "beats", "--arm", "other"), "there is no such arm"),
        (("2", "beats", "--allow", "foes.txt"), "--allow foes.txt: No such file"),
        (("4", "dpsgd", *LIARS), "attack min_max: it sees the vectors of all honest peers"),
        (("x", "beats"), "Invalid value for 'N'"),
    ):
        done = CliRunner().invoke(app, ["up", *words])
        assert done.exit_code == 2, (words, done.output)
        assert said in done.stderr, (words, done.stderr)
        assert not list(workspace.rglob("peer-*")), "nothing is left behind"


def test_help_has_examples() -> None:
    text = CliRunner().invoke(app, ["up", "--help"]).output
    assert "shoal up 8 dpsgd --set topology=ring" in text
    assert "--restart" in text


def test_restarts_have_pauses_and_a_limit() -> None:
    settings = FleetSettings(restarts=3, backoff_s=0.5, backoff_most_s=4.0)
    assert [settings.pause_s(deaths) for deaths in (1, 2, 3, 4, 5, 10_000)] == [
        0.5, 1.0, 2.0, 4.0, 4.0, 4.0,
    ]  # fmt: skip


def up_of(count: int, folder: Path) -> Up:
    scenario = scenario_of("beats").with_settings({"peers": count + 1, "rounds": 40})
    return Up(Cell("beats", 0, scenario, system="beats", engine="live"), count, folder / "run")


def told(state: str, round: int, rejoined: bool = False) -> control.Told:
    status = Status(
        0, state, ("127.0.0.1", 7000), 3, round, 12.0, 10, 10, 1_234_567, 9_876_543_210, rejoined
    )
    return control.Told(status, [], [])


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_screen_fits(workspace: Path, width: int, height: int) -> None:
    up = up_of(40, workspace)
    from shoal.engine.live.lives import Life

    for post in up.fleet.posts:
        post.pid, post.heard_s = 1_000_000 + post.peer, monotonic() - 123.0
        post.lives.append(Life(post.peer))
        post.lives[-1].take(told("running", 11, rejoined=post.peer == 3))
        post.state = "running"
    up.fleet.posts[37].state = "pausing"
    up.fleet.posts[38].state = "died"
    up.fleet.posts[38].restarts = 5
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(Screen(up, console).draw())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    text = "\n".join(lines)
    head = "beats  40 of 41 peers here  round 12 of 40"
    for part in (head, "rejoined", "died", "again in 0 s", "1.23 MB", "9.88 GB", "more; of all: "):
        assert part in text, text
    assert [line.split("  ")[0] for line in lines[-3:]] == ["logs", "join", "Ctrl-C stops all"]
    # Rows are whole: one for each peer that is shown.
    shown, hidden = chosen(up.fleet.posts, height - 10)
    assert sum("1000" in line for line in lines) == len(shown) == 40 - hidden
    assert {37, 38} <= {post.peer for post in shown}
