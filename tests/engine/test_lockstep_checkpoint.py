"""A lockstep run that is killed and goes on leaves the bits of one that was never stopped."""

from __future__ import annotations

import logging
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.engine.executor import Local
from shoal.engine.lockstep import Checkpoint, LockstepSettings, checkpoint, run_lockstep
from shoal.engine.lockstep.lockstep import Lockstep
from shoal.parts import find, names
from shoal.rounds.measure import Measure
from shoal.rounds.method import Method
from shoal.world.device import Device
from shoal.world.faults import Crash, Fault, Hold, Join, Leave, Loss, Partition, Round, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

PEERS, ROUNDS = 10, 8
LINKS = Links(
    latency_s=0.05, latency_spread=0.3, jitter_s=0.01, loss=0.05, uplink_bytes_per_s=2e4,
    downlink_bytes_per_s=4e4, seed=1,
)  # fmt: skip
FAULTS: tuple[Fault, ...] = (
    Crash(who=(1, 2), at=7.3, until=13.0),
    Crash(who=(0, 3), at=9.5, until=16.0, store="lost"),
    Crash(who=(5,), at=Round(3), until=Round(5)),
    # A second and a third life: what came before must not be forgotten.
    Crash(who=(1, 5), at=Round(6), until=Round(7), store="lost"),
    Join(who=(4,), at=Round(2)),
    Leave(who=(7,), at=14.2, grace_s=0.5),
    Hold(who=(6,), at=4.0, until=7.9),
    Loss(who=(9,), at=3.0, until=20.0, probability=0.5),
    Partition(who=(0, 1, 2), at=Round(2), until=Round(4)),
    Slow(who=(8,), at=5.0, until=9.0, factor=3.0),
)


def gossip(**settings):
    graph = find("topology", "random_regular")(PEERS, degree=4, seed=1)
    return find("exchange", "gossip")(graph, **settings)


def star(**settings):
    return find("exchange", "star")(PEERS, **settings)


def feedback():
    return find("transform", "error_feedback")("top_k")


def alie():
    return find("attack", "alie")()


def example(role: str, name: str) -> Callable[[], Any]:
    """A part with the first of its example settings."""
    cls = find(role, name)
    return lambda: cls(**cls.examples[0])


@dataclass(frozen=True)
class Case:
    """What differs from D-PSGD under every fault that lockstep knows; parts are made in time."""

    exchange: Callable[[], Any]
    strategy: str = "local_steps"
    transform: Callable[[], Any] | None = None
    rule: str = "mean"
    attack: Callable[[], Any] | None = None
    faults: tuple[Fault, ...] = FAULTS
    links: Links = LINKS
    store_every: int = 0


CASES = {
    "gossip": Case(gossip),
    "two hops, error feedback": Case(
        lambda: gossip(steps=2), transform=feedback, strategy="momentum_step", store_every=2
    ),
    "attack": Case(lambda: gossip(weighted=False), rule="trimmed_mean", attack=alie),
    "star": Case(
        lambda: star(sample=6), transform=feedback, strategy="local_updates", store_every=1
    ),
    "star without stores": Case(star),
    "calm star": Case(star, faults=(), links=Links(latency_s=0.01)),
}


@cache
def data(seed: int) -> Any:
    return find("tasks", "digits")(peers=PEERS, hidden=(6,), seed=seed)


def execute(
    case: Case, seeds: int, kept: Checkpoint | None = None,
    after: Callable[[int], None] | None = None,
) -> list[Run]:  # fmt: skip
    """Everything but the data made anew, as another process would make it."""
    methods, measures = [], []
    cls = find("strategy", case.strategy)
    strategy, rule = cls(**cls.examples[0]), find("aggregate", case.rule)()
    for seed in range(seeds):
        task = data(seed)
        attack = case.attack() if case.attack else None
        bad = (2 + seed, 8) if attack else ()
        transform = (case.transform or find("transform", "identity"))().bind(task.spec)
        method = Method(
            strategy, task, case.exchange(), rule, transform, ROUNDS, 3.0, seed, attack, bad, 3,
            case.store_every,
        )  # fmt: skip
        methods.append(method)
        measures.append(Measure(task, seed=seed, byzantine=bad, evaluated=4))
    device = Device(flops_per_s=1e6, spread=0.3, overhead_s=0.05, store_s=0.02)
    network = Network(PEERS, links=case.links, device=device, faults=case.faults)
    return run_lockstep(
        methods, [network] * seeds, measures=measures, progress=after, checkpoint=kept
    )


@cache
def undisturbed(name: str, seeds: int) -> list[Run]:
    return execute(CASES[name], seeds)


def begun() -> Lockstep:
    """An engine that has run nothing."""
    task = data(0)
    method = Method(
        find("strategy", "local_steps")(), task, star(), find("aggregate", "mean")(),
        find("transform", "identity")().bind(task.spec), 1, 1.0,
    )  # fmt: skip
    return Lockstep([method], [Network(PEERS)], LockstepSettings(), [Measure(task)], Local())


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the engine may catch."""


def die_after(round: int) -> Callable[[int], None]:
    def after(done: int) -> None:
        if done == round:
            raise Killed

    return after


def assert_same(found: list[Run], expected: list[Run]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for field in fields(Run):
            if field.name not in ("wall_s", "cpu_s", "final"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
        assert [type(row.value) for row in ours.rows] == [type(row.value) for row in theirs.rows]
        assert all(torch.equal(ours.final[p], theirs.final[p]) for p in theirs.final)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving may take all the time it wants."""
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)


def keep(folder: Path, key: str = "key") -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / "run.pt", key, every_s=0.0)


@pytest.mark.parametrize(
    ("name", "seeds"), [*((name, 3) for name in CASES), ("star", 1), ("calm star", 1)]
)
def test_every_round_is_one_to_go_on_from(name: str, seeds: int, tmp_path: Path) -> None:
    case, kept = CASES[name], keep(tmp_path)
    expected = undisturbed(name, seeds)
    assert not case.faults or sum(run.dropped.get("dead", 0) for run in expected)

    def after(done: int) -> None:
        if done < ROUNDS:
            shutil.copy(kept.path, tmp_path / f"{done}.pt")

    # Saving changes nothing.
    assert_same(execute(case, seeds, kept, after), expected)
    for round in range(1, ROUNDS):
        again = Checkpoint(tmp_path / f"{round}.pt", "key", every_s=1e9)
        told: list[int] = []
        assert_same(execute(case, seeds, again, told.append), expected)
        assert (again.resumed, told[0]) == (round, round)


def way_of(name: str) -> Callable[[], Any]:
    """An exchange on which this strategy runs."""
    return star if getattr(find("strategy", name), "needs_hub", False) else gossip


PARTS = {
    **{f"strategy {name}": Case(way_of(name), strategy=name) for name in names("strategy")},
    **{f"transform {name}": Case(gossip, transform=example("transform", name))
       for name in names("transform")},
    **{f"attack {name}": Case(gossip, rule="trimmed_mean", attack=example("attack", name))
       for name in names("attack")},
    "exchange first_come": Case(lambda: find("exchange", "first_come")(PEERS, byzantine=2)),
    "exchange isolated": Case(lambda: find("exchange", "isolated")(PEERS)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_every_part_keeps_all_that_it_remembers_in_its_state(name: str, tmp_path: Path) -> None:
    kept = keep(tmp_path)
    with pytest.raises(Killed):
        execute(PARTS[name], 2, kept, die_after(ROUNDS // 2))
    again = keep(tmp_path)
    assert_same(execute(PARTS[name], 2, again), execute(PARTS[name], 2))
    assert again.resumed == ROUNDS // 2


@pytest.mark.parametrize("name", ["two hops, error feedback", "star"])
def test_killed_again_and_again(name: str, tmp_path: Path) -> None:
    for round in range(1, ROUNDS):
        kept = keep(tmp_path)
        with pytest.raises(Killed):
            # A process that goes on from round 3 is told so before it dies after round 4.
            execute(CASES[name], 2, kept, die_after(round))
        assert kept.resumed == max(0, round - 1)
    kept = keep(tmp_path)
    assert_same(execute(CASES[name], 2, kept), undisturbed(name, 2))
    assert kept.resumed == ROUNDS - 1
    assert list(kept.path.parent.iterdir()) == [kept.path]


def test_what_was_spent_before_counts(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        execute(CASES["gossip"], 1, keep(tmp_path), die_after(5))
    state = torch.load(keep(tmp_path).path, weights_only=True)
    torch.save({**state, "spent_s": (1000.0, 500.0)}, keep(tmp_path).path)
    run = execute(CASES["gossip"], 1, keep(tmp_path))[0]
    assert 1000.0 < run.wall_s < 1060.0
    assert 500.0 < run.cpu_s < 560.0


def test_everything_that_rounds_may_change_is_kept_or_made_anew() -> None:
    """A new attribute must be put into one of the lists, or a resumed run may differ."""
    anew = {
        "Lockstep": {
            "first", "worlds", "settings", "executor", "shared", "total", "hub", "hub_rows",
            "fresh", "shards", "device", "hubs_there", "keys_there", "peers_there", "everyone",
            "hubs", "_meshes", "given", "own_mix",
        },
        "World": {
            "method", "network", "measure", "offset", "rows", "run", "timeline", "peers", "key",
            "_wires", "_slots", "_asked", "_spans",
        },
        "Timeline": {"faults", "_absent"},
        "Wires": {"network", "_latency_s", "uplink", "downlink"},
        "Measure": {"task", "_final", "_each", "_of_peers", "_chosen", "_honest", "_open"},
    }  # fmt: skip
    kept = {
        "Lockstep": {"state", "codec", "hub_state", "adopted", "saved"},
        "World": set(checkpoint.KEPT["world"]),
        "Timeline": {*checkpoint.KEPT["timeline"], "_seen", "_moments"},
        "Wires": {"up_free", "queued"},
        "Measure": {"taken", "last"},
    }
    engine = begun()
    world = engine.worlds[0]
    for owner in (engine, world, world.timeline, world._wires, world.measure):
        name = type(owner).__name__
        assert kept[name] <= set(vars(owner)) <= kept[name] | anew[name], name
        assert not kept[name] & anew[name]


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "foreign":
        path.write_bytes(b"something else")
    elif how == "foreign tensors":
        torch.save([torch.zeros(3)], path)
    elif how == "a missing part":
        state = torch.load(path, weights_only=True)
        del state["worlds"][-1]["timeline"]["_seen"]
        torch.save(state, path)
    elif how == "another torch":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "format": "shoal checkpoint 1, torch 1.0"}, path)
    elif how == "code":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "code in an archive":
        torch.save({"format": checkpoint.FORMAT, "key": "key", "round": Bomb()}, path)
    else:
        middle = whole.find(b"/data/", len(whole) // 3) + 200
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])


class Bomb:
    """Goes off when it is unpickled."""

    went_off = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "went_off", True)


@pytest.mark.parametrize(
    "how",
    ["empty", "half", "foreign", "foreign tensors", "a missing part", "another torch", "code",
     "code in an archive", "a bit"],
)  # fmt: skip
def test_a_file_that_cannot_be_used_costs_a_line(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep(tmp_path)
    with pytest.raises(Killed):
        execute(CASES["star"], 2, kept, die_after(4))
    damaged(kept.path, how)
    again = keep(tmp_path)
    assert_same(execute(CASES["star"], 2, again), undisturbed("star", 2))
    assert again.resumed == 0
    assert not Bomb.went_off
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{kept.path}: this checkpoint is ignored, ")
    assert record.getMessage().endswith("; starting from round 0")
    assert "\n" not in record.getMessage()
    # The run went on to save checkpoints of its own.
    final = keep(tmp_path)
    execute(CASES["star"], 2, final)
    assert final.resumed == ROUNDS - 1


def test_other_code_or_settings_start_from_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        execute(CASES["gossip"], 1, keep(tmp_path, "old"), die_after(4))
    kept = keep(tmp_path, "new")
    execute(CASES["gossip"], 1, kept)
    assert kept.resumed == 0
    assert "it was made by other code or settings" in caplog.text


def test_a_full_disk_costs_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    kept = keep(tmp_path)
    assert_same(execute(CASES["gossip"], 1, kept), undisturbed("gossip", 1))
    (record,) = caplog.records
    assert "No space left on device; the run goes on without checkpoints" in record.getMessage()
    assert list(kept.path.parent.iterdir()) == []


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    kept = keep(tmp_path)
    with pytest.raises(Killed):
        execute(CASES["gossip"], 1, kept, die_after(4))
    part = kept.path.with_suffix(".123.part")
    part.write_bytes(b"half of it")
    again = keep(tmp_path)
    assert_same(execute(CASES["gossip"], 1, again), undisturbed("gossip", 1))
    assert again.resumed == 4
    assert not part.exists()


def test_time_decides_when_and_saving_takes_little_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: a round takes 1 s, saving 0.25 s, and 2% of the time is for that."""
    clock, saved = [0.0], []

    class Clock:
        def __init__(self, wall_s: float = 0.0, cpu_s: float = 0.0) -> None:
            self.began, self.cpu_s = clock[0] - wall_s, cpu_s

        @property
        def wall_s(self) -> float:
            return clock[0] - self.began

    def write(state: dict[str, Any]) -> None:
        saved.append((state["round"], clock[0]))
        clock[0] += 0.25

    monkeypatch.setattr(checkpoint, "SHARE", 0.02)
    monkeypatch.setattr(checkpoint, "Stopwatch", Clock)
    engine = begun()
    kept = Checkpoint(tmp_path / "run.pt", "key")
    monkeypatch.setattr(kept, "_write", write)
    _, watch = kept.resume(engine)
    for round in range(60):
        clock[0] += 1.0
        kept.offer(engine, round, watch)
    # After 10 s, then whenever 12.5 s have gone by.
    assert [round for round, _ in saved] == [9, 22, 35, 48]
    # The first save of a large state waits for its expected cost.
    monkeypatch.setattr(checkpoint, "EXPECTED_BYTES_PER_S", 1e3)
    kept = Checkpoint(tmp_path / "run.pt", "key")
    kept.resume(engine)
    assert kept._wait_s > 50 * 4 * PEERS * data(0).spec.dim / 1e3


def test_a_state_that_changes_its_structure_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine_state = {"x": torch.zeros(2)}
    kept = keep(tmp_path)
    engine = begun()
    _, watch = kept.resume(engine)
    engine.state = engine_state
    kept.offer(engine, 1, watch)
    kept.offer(engine, 2, watch)
    assert len(caplog.records) == 1
    assert "structure" in caplog.text
    assert not kept.path.exists()
