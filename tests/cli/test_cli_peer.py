"""`shoal peer`: what it prints, what it refuses, and that it ends when it is told to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "live"))

from fake_router import Router
from typer.testing import CliRunner
from up_processes import environment

from shoal.cli.app import app
from shoal.engine.live import LiveSettings, join
from shoal.lab import torch_device
from shoal.wire.identity import Identity
from shoal.world.record import Run

LIARS = (
    "--set", "topology=full", "--set", "task=digits", "--set", "byzantine=1", "--set",
    "attack=min_max",
)  # fmt: skip

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]


def peer(folder: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-m", "shoal", "peer", *words], cwd=folder,
        env=environment(folder), capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip


def test_a_key_is_made_once_and_its_name_printed(tmp_path: Path) -> None:
    first = peer(tmp_path, "--key", "me.key", "--show-name")
    again = peer(tmp_path, "--key", "me.key", "--show-name")
    assert first.returncode == again.returncode == 0
    assert first.stdout == again.stdout
    assert len(first.stdout.strip()) == 56
    public = peer(tmp_path, "--key", "me.key", "--show-public-key")
    assert bytes.fromhex(public.stdout.strip()) == Identity.load(tmp_path / "me.key").public
    assert (tmp_path / "me.key").stat().st_mode & 0o077 == 0


def test_misuse_is_refused_with_the_rule_and_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    earlier = signal.getsignal(signal.SIGTERM)
    (tmp_path / "friends.txt").write_text("# mine\nalice\n")
    (tmp_path / "run.json").write_text("{}")
    for words, said in (
        ((), "FILE_OR_NAME is missing (such as `shoal peer dpsgd`)"),
        (("baets",), "did you mean 'beats'?"),
        (("beats", "--listen", "here"), "--listen here; need HOST:PORT (such as 192.168.1.5:7000)"),
        (("beats", "--bootstrap", "127.0.0.1:99999"), "--bootstrap 127.0.0.1:99999; need HOST:"),
        (("beats", "--allow", "friends.txt"), "friends.txt:2: 'alice' is no peer's name"),
        (("beats", "--allow", "foes.txt"), "--allow foes.txt: No such file"),
        (("beats", "--set", "baets=3"), "did you mean 'beats'?"),
        (("beats", "--arm", "other"), "there is no such arm; need one of beats"),
        (("beats", "--id", "3"), "peer=3; need 0 to 2"),
        (("run.json",), "this is no run.json that `shoal up` wrote"),
        (("run.json", "--seed", "1"), "a run is described there wholly"),
        (("beats", "--carriers", "tcp,udp"), "--carriers tcp,udp; need tcp, quic or tcp,quic"),
        (("beats", "--upnp", "on"), 'upnp=\'on\' (use "off", "auto", or the IPv4 address of the'),
        (("beats", "--listen", "192.0.2.1:7000"), "cannot listen on 192.0.2.1:7000"),
        (("dpsgd", "--peers", "4", *LIARS), "attack min_max: it sees the vectors of all honest"),
    ):
        try:
            done = CliRunner().invoke(app, ["peer", *words])
        finally:
            signal.signal(signal.SIGTERM, earlier)
        assert done.exit_code == 2, (words, done)
        assert said in done.stderr, (words, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stdout == ""
    # And as a process.
    found = peer(tmp_path, "beats", "--listen", "here")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: --listen here; need HOST:PORT ")


def test_a_peer_alone_prints_what_it_measured(tmp_path: Path) -> None:
    words = ("beats", "--peers", "1", "--set", "beats=2")
    plain = peer(tmp_path, *words, options=("-X", "importtime"))
    assert plain.returncode == 0, plain.stderr
    lines = dict(line.split(": ") for line in plain.stdout.splitlines())
    assert lines["finished"] == "True"
    assert lines["heard"] == "0"
    assert "peer 0: running at 127.0.0.1:" in plain.stderr
    # A program without tensors does not wait for torch.
    loaded = {line.rpartition("|")[2].strip() for line in plain.stderr.splitlines()}
    assert "shoal.kernel.runtime" in loaded
    assert "torch" not in loaded or torch_device._has_driver()
    found = peer(tmp_path, *words, "--json")
    objects = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.stderr == ""
    states = list(dict.fromkeys(o["state"] for o in objects if o["event"] == "status"))
    assert states[-2:] == ["done", "stopping"] or states[-1] == "done"
    assert [o["value"] for o in objects if o.get("name") == "heard"] == [0.0, 0.0]
    assert objects[-1]["event"] == "end"
    assert objects[-1]["finished"] is True


def test_the_router_is_asked_and_told_when_it_is_over(tmp_path: Path) -> None:
    words = ("beats", "--peers", "1", "--set", "beats=2", "--carriers", "tcp,quic")
    with Router().in_thread() as router:
        found = peer(tmp_path, *words, "--upnp", router.place)
        assert found.returncode == 0, found.stderr
        assert "peer 0: running at 8.8.4.4:" in found.stderr
        assert "of the router at 8.8.4.4" in found.stderr
        assert router.asked.count("AddPortMapping") == 1
        assert router.open == {}
        peer(tmp_path, *words)
        assert router.asked.count("AddPortMapping") == 1


def test_carriers_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[LiveSettings] = []

    def joined(*args: object, settings: LiveSettings, **more: object) -> Run:
        passed.append(settings)
        return Run("live", 0, 1, finished=True)

    monkeypatch.setattr(join, "join_live", joined)
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        for text in ("tcp", "quic", "quic,tcp"):
            words = ["peer", "dpsgd", "--peers", "1", "--set", "topology=full", "--carriers", text]
            assert CliRunner().invoke(app, words).exit_code == 0
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert [each.carriers for each in passed] == [("tcp",), ("quic",), ("tcp", "quic")]


def test_it_ends_when_its_standard_input_is_closed(tmp_path: Path) -> None:
    words = ["beats", "--peers", "2", "--set", "beats=400", "--json", "--until-eof"]
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", "peer", *words], cwd=tmp_path, env=environment(tmp_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        first = json.loads(process.stdout.readline())
        assert first["event"] == "status"
        process.stdin.close()
        rest = [json.loads(line) for line in process.stdout]
        code = process.wait(60)
    assert code == 0
    assert rest[-1]["event"] == "end"
    assert rest[-1]["finished"] is False
