"""The store on disk: killed at any point, cut short, damaged, out of space, in two hands."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from store_writer import check, items

from shoal.base.errors import SimulationError, UsageError
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.live import store as store_module
from shoal.engine.live.store import DiskStore
from shoal.wire.message import message
from shoal.world.network import Network

pytestmark = pytest.mark.live
WRITER = str(Path(__file__).with_name("store_writer.py"))


class Reads:
    """Says which commit it finds."""

    async def run(self, peer: Any) -> None:
        peer.record("newest", int.from_bytes(peer.store.get("a"), "little"))


@message
class Point:
    x: int
    values: torch.Tensor


def _killed(folder: Path, after_s: float) -> int:
    """Let a writer work and kill it; the last commit that it said had returned, -1 for none."""
    with subprocess.Popen([sys.executable, WRITER, str(folder)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            first = child.stdout.read(8)
            time.sleep(after_s)
        finally:
            child.send_signal(signal.SIGKILL)
        told = first + child.stdout.read()
    return int.from_bytes(told[-8:], "little") if len(told) >= 8 else -1


def _kills(folder: Path, times: int, seed: int) -> None:
    draws, last = random.Random(seed), -1
    for _ in range(times):
        told = _killed(folder, draws.uniform(0.0, 0.05))
        assert told > last, "every process commits before it is killed"
        last = check(DiskStore(str(folder), 0).load())
        # What it could not say any more may have returned; one more may have been under way.
        assert told <= last <= told + 1


def test_kills_during_commits_lose_and_tear_nothing(tmp_path: Path) -> None:
    _kills(tmp_path, 10, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hundreds_of_kills_during_commits_lose_and_tear_nothing(tmp_path: Path) -> None:
    _kills(tmp_path, 200, seed=2)


def _written(folder: Path, commits: int) -> tuple[Path, list[int]]:
    """A store's file, and its length after each commit."""
    store, ends = DiskStore(str(folder), 0), []
    store.load()
    for number in range(commits):
        store.commit(items(number))
        ends.append(store.path.stat().st_size)
    return store.path, ends


def test_a_file_cut_anywhere_holds_its_last_whole_commit_or_says_that_it_holds_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, ends = _written(tmp_path, 4)
    data, draws = path.read_bytes(), random.Random(3)
    cuts = {*ends, *(end + d for end in ends[:-1] for d in (1, 30, 40, 41)), ends[-1] - 1, 0, 3, 8}
    for length in sorted(cuts | {draws.randrange(ends[-1]) for _ in range(150)}):
        path.write_bytes(data[:length])
        caplog.clear()
        store = DiskStore(str(tmp_path), 0)
        whole = sum(end <= length for end in ends) - 1
        if whole < 0:
            with pytest.raises(UsageError, match="damaged"):
                store.load()
            continue
        assert check(store.load()) == whole
        assert bool(caplog.records) == bool(store.repaired) == (length not in ends)
        # And it goes on from there.
        store.commit(items(whole + 1))
        assert check(DiskStore(str(tmp_path), 0).load()) == whole + 1


def test_a_flipped_bit_gives_an_error_or_the_commit_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, ends = _written(tmp_path, 4)
    data, draws = path.read_bytes(), random.Random(4)
    heads = [end + place for end in (8, *ends[:-1]) for place in range(0, 40, 3)]
    errors = 0
    for place in [*range(8), *heads, *(draws.randrange(ends[-1]) for _ in range(150))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        store = DiskStore(str(tmp_path), 0)
        if place < 8 or any(end <= place < end + 40 for end in (8, *ends)) or place < ends[-2]:
            with pytest.raises(UsageError, match=r"peer-0.store.*damaged"):
                store.load()
            errors += 1
            continue
        # Only the last commit's own content is left out, as a write that was cut off.
        assert check(store.load()) == 2
        assert "does not match its digest" in caplog.text
    assert errors > 50


def test_zeros_at_the_end_are_a_write_that_never_reached_the_disk(tmp_path: Path) -> None:
    path, _ = _written(tmp_path, 3)
    path.write_bytes(path.read_bytes() + bytes(100))
    store = DiskStore(str(tmp_path), 0)
    assert check(store.load()) == 2
    assert "zeros" in store.repaired


def test_a_commit_costs_what_it_writes_and_the_file_stays_bounded(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path), 0)
    store.load()
    store.commit({"large": bytes(8 << 20)})
    inode = store.path.stat().st_ino
    written = store.path.stat().st_size
    for number in range(200):
        store.commit({"small": number.to_bytes(8, "little")})
    assert store.path.stat().st_ino == inode, "the file was rewritten"
    assert store.path.stat().st_size - written < 200 * 400
    sizes = []
    for number in range(12):
        store.commit({"large": bytes([number]) * (8 << 20)})
        sizes.append(store.path.stat().st_size)
    assert max(sizes) < 4 * (8 << 20)
    assert sizes != sorted(sizes), "the past is thrown away now and then"
    found = DiskStore(str(tmp_path), 0).load()
    assert found == {"large": bytes([11]) * (8 << 20), "small": (199).to_bytes(8, "little")}


def test_tensors_and_messages_come_back(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path), 3)
    store.load()
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    store.commit({"t": values, "m": Point(7, values[0]), "b": b"", "e": torch.zeros(0, 2)})
    store.commit({"b": b"x"})
    found = DiskStore(str(tmp_path), 3).load()
    assert torch.equal(found["t"], values)
    assert found["m"].x == 7
    assert torch.equal(found["m"].values, values[0])
    assert found["b"] == b"x"
    assert found["e"].shape == (0, 2)
    with pytest.raises(UsageError, match="a store keeps bytes"):
        store.commit({"n": 3})


def test_file_and_directory_are_forced_to_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(store_module.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    store = DiskStore(str(tmp_path / "new"), 0)
    store.load()
    store.commit({"a": b"1"})
    assert done == ["folder", "file", "rename", "folder"]
    store.commit({"a": b"2"})
    assert done[4:] == ["file"]


@contextmanager
def _files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path), 0)
    store.load()
    store.commit({"a": b"first", "kept": bytes(1000)})
    with _files_of_at_most(20_000):
        for size in (50_000, 50_001):  # An append, and then the attempt to begin a new file.
            with pytest.raises(SimulationError, match="File too large"):
                store.commit({"a": bytes(size)})
            assert store.path.stat().st_size < 2000
            assert DiskStore(str(tmp_path), 0).load() == {"a": b"first", "kept": bytes(1000)}
        store.commit({"a": b"second"})
        store.commit({"b": b"third"})
    found = DiskStore(str(tmp_path), 0)
    assert found.load() == {"a": b"second", "kept": bytes(1000), "b": b"third"}
    assert not found.repaired
    assert [each.name for each in tmp_path.iterdir()] == ["peer-0.store"]


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    first, second = DiskStore(str(tmp_path), 0), DiskStore(str(tmp_path), 0)
    first.load()
    second.load()
    first.commit({"a": b"1"})
    with pytest.raises(SimulationError, match="by another process"):
        second.commit({"a": b"2"})
    second.load()
    second.commit({"a": b"3"})
    with pytest.raises(SimulationError, match="by another process"):
        first.commit({"a": b"4"})
    assert DiskStore(str(tmp_path), 0).load() == {"a": b"3"}


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "peer-0.store").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        DiskStore(str(tmp_path), 0).load()


def test_a_run_goes_on_from_the_last_whole_commit_and_reports_it(tmp_path: Path) -> None:
    path, ends = _written(tmp_path, 2)
    os.truncate(path, ends[-1] - 5)
    run = run_live(Reads(), Network(1), settings=LiveSettings(store_dir=str(tmp_path)))
    assert [row.value for row in run.series("newest")] == [0.0]
    (lost,) = run.happenings
    assert "peer 0 lost the end of its store: the last commit has" in lost.what


def test_the_log_says_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, ends = _written(tmp_path, 2)
    os.truncate(path, ends[-1] - 5)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        DiskStore(str(tmp_path), 0).load()
    assert str(path) in caplog.text
    assert "going on from the commit before" in caplog.text
