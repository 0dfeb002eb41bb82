"""Every system and every part that discovery finds: its card, repeatable runs, one meaning on
every engine.

A new system is enrolled by being there. Each runs in the smallest form of its own scenario (see
`shoal.lab.fuzz`); what runs must agree on is in `shoal.testing.ladder`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.lab import discover
from shoal.lab.build import build, check
from shoal.lab.card import KINDS, System
from shoal.lab.cell import Cell, execute, make
from shoal.lab.experiment import Experiment
from shoal.lab.fuzz import INVARIANTS, Target, smallest, target
from shoal.lab.launch import is_strategy, launch, method_of
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Part, Scenario
from shoal.parts import find, names
from shoal.rounds.adversary import Knowledge
from shoal.tensor import keyed
from shoal.testing.ladder import (
    check_live,
    check_program,
    check_strategy,
    difference,
    tolerance,
)
from shoal.testing.pretend_device import PretendDevice
from shoal.world.record import Run

NAMES = discover.names()
PEERS, ROUNDS = 6, 3
LIVE_PEERS = 4
LIVE_LINKS = {"name": "links", "latency_s": 0.01}
SAMPLES = 240
LESS = {
    "steps": 4, "start_steps": 3, "update_steps": 3, "match_steps": 3, "min_steps": 3,
    "max_steps": 12, "samples": 100, "sample_steps": 4, "real_batch": 64, "ops": 12,
    "blob_bytes": 1 << 20, "block_bytes": 1 << 14,
}  # fmt: skip
"""Most of what a system may do by itself: settings that say how much of something it does."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kind_of(name: str) -> str:
    """The kind of what runs: a part's is that of the host that carries it."""
    card = discover.load(name)
    return discover.load(card.host).kind if card.kind == "part" else card.kind


def of_kind(*kinds: str) -> list[str]:
    runs = [name for name in NAMES if discover.load(name).make is not None]
    return [name for name in runs if kind_of(name) in kinds]


STRATEGIES, PROGRAMS = of_kind("strategy"), of_kind("program")


def less(card: System) -> dict[str, int]:
    """Settings of what the card makes that would have it do more than `LESS`."""
    made = fields(card.make) if is_dataclass(card.make) else ()
    given = {field.name: field.default for field in made if field.name in LESS}
    return {name: LESS[name] for name, most in given.items() if most and most > LESS[name]}


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that takes a moment: few peers and rounds, few digits, 8 hidden units."""
    card = discover.load(name)
    fixed = {**(discover.load(card.host).uses if card.host else {}), **card.uses}
    small: dict[str, Any] = {"rounds": ROUNDS}
    if "peers" not in fixed:
        small["peers"] = PEERS
    task = scenario_of(name).task
    if isinstance(task, Part):
        split = {k: v for k, v in task.settings if k in ("split", "alpha", "standardise")}
        small["task"] = {
            "name": "digits", **split, "hidden": [8],
            "train_samples": min(SAMPLES, dict(task.settings).get("train_samples", SAMPLES)),
        }  # fmt: skip
        small |= {key: value for key, value in fixed.items() if key.startswith("task.")}
    small |= less(card)
    exchange = fixed.get("exchange", {})
    if isinstance(exchange, dict) and exchange.get("sample", 0) > PEERS:
        small["exchange"] = {**exchange, "sample": PEERS // 2}
    return small | changes


# Cards.


@pytest.mark.parametrize("name", NAMES)
def test_card(name: str) -> None:
    text, card = discover.find(name), discover.load(name)
    assert isinstance(card, System)
    assert (card.name, card.kind, card.title) == (text.name, text.kind, text.title)
    assert text.family == Path(text.file).parent.name
    assert len(text.doc.split()) >= 10, "the module's text says what the system does"
    assert [claim.name for claim in card.claims] == [claim.name for claim in text.claims]
    assert tuple(card.arms) == text.arms
    assert card.make is not None or card.arms, "it makes nothing and compares nothing"
    assert card.make is None or (card.make.__doc__ or "").strip()
    if card.claims:
        assert card.source is not None, "claims without a publication"
        assert card.source.arxiv or card.source.doi, "a source that cannot be found"
        assert card.source.year
        assert all(claim.statement for claim in card.claims)
    if card.host:
        assert kind_of(name) in ("strategy", "program")


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_can_be_made(name: str) -> None:
    """Settings of all arms exist and fit, at both budgets; scenarios are whole."""
    for budget in ("small", "full"):
        cells = Experiment.of_system(name, budget, seed=0).cells()
        for cell in {cell.arm: cell for cell in cells}.values():
            check(cell.scenario)
            if discover.load(cell.system or "").kind != "study":
                what, _ = make(cell)
                assert is_strategy(what) or hasattr(what, "run") or hasattr(what, "bind")


def test_names_are_unique_and_families_are_folders() -> None:
    texts = discover.cards()
    assert max(Counter(card.name for card in texts).values()) == 1
    root = Path(discover.__file__).parents[1] / "systems"
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert {card.family for card in texts if card.root == root} == folders
    assert set(NAMES) == {card.name for card in texts}
    # Everything below is a loop over these; an empty one would pass.
    assert {"dpsgd", "fedavg"} <= set(STRATEGIES)
    assert "gossip" in PROGRAMS


# Runs.


def engines(name: str) -> tuple[str, ...]:
    return {"strategy": ("lockstep", "event"), "program": ("event",), "study": ("auto",)}[
        kind_of(name)
    ]


RUNS = [
    (name, engine) for name in of_kind("strategy", "program", "study") for engine in engines(name)
]


def digests(run: Run) -> tuple[Any, ...]:
    rows = [(row.name, row.peer, row.round, row.value.hex(), row.time_s) for row in run.rows]
    return run.trace_digest, run.state_digest, run.virtual_s, run.messages_sent, rows


@dataclass(frozen=True)
class Ran:
    """A system's smallest cell on an engine, and its run."""

    cell: Cell
    run: Run


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest) -> Ran:
    name, engine = request.param
    if kind_of(name) == "study":
        # Three processes of Gloo fail as six do, and each takes seconds to start.
        few = {"peers": 3} if name == "gloo-ring" else None
    else:
        few = tiny(name)
    cell = replace(smallest(name, few), engine=engine)
    return Ran(cell, execute(cell, launch))


def runs(*kinds: str) -> pytest.MarkDecorator:
    """Each system of these kinds on each of its engines, run once for all tests of it."""
    chosen = [pair for pair in RUNS if kind_of(pair[0]) in kinds]
    return pytest.mark.parametrize(
        "ran", chosen, ids=[f"{name}-{engine}" for name, engine in chosen], indirect=True
    )


@runs("strategy", "program", "study")
def test_runs_on_its_engines_and_repeats(ran: Ran) -> None:
    first, second = ran.run, execute(ran.cell, launch)
    assert ran.cell.engine in ("auto", first.engine)
    assert first.rows
    assert first.finished
    assert digests(first) == digests(second)
    if ran.cell.engine == "event":
        problems = [problem for problem in (rule(first) for rule in INVARIANTS) if problem]
        assert not problems
    if ran.cell.scenario.task is not None and ran.cell.engine != "auto":
        # Somebody learned something: the models are not the initial ones.
        assert first.series("loss")
        initial = build(ran.cell.scenario).task.init(keyed.key_of(ran.cell.seed, "init"))
        assert any(not torch.equal(params, initial) for params in first.final.values())


@runs("strategy", "program")
def test_gives_the_same_on_a_device(ran: Ran) -> None:
    """A GPU is used wherever there is one; here a device that is none stands in for it."""
    here = ran.run
    with PretendDevice() as device:
        world = ran.cell.scenario.with_settings({"engine.device": device.name})
        there = execute(replace(ran.cell, scenario=world), launch)
    assert here.trace_digest == there.trace_digest
    assert (here.bytes_sent, here.messages_delivered) == (
        there.bytes_sent,
        there.messages_delivered,
    )
    assert all(params.is_cpu for params in there.final.values())
    assert difference(here, there) <= tolerance(here)


# The agreement ladder.


def test_no_system_is_left_out_of_the_ladder() -> None:
    """What makes peers is enrolled by its kind; a study has none, and a new kind needs rungs."""
    assert set(KINDS) == {"strategy", "program", "part", "study"}
    made = [
        name
        for name in NAMES
        if discover.load(name).make is not None and discover.load(name).kind != "study"
    ]
    assert sorted(STRATEGIES + PROGRAMS) == sorted(made)
    assert not set(STRATEGIES) & set(PROGRAMS)


def ample(found: Target) -> tuple[Any, Any]:
    """Method and network of a strategy, its rounds so long that no arrival is near a deadline."""
    method = found.program.method
    return replace(method, round_s=4.0 * method.round_s), found.network


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_means_the_same_on_every_engine(name: str) -> None:
    # Distilling images takes hundreds of steps, each of which makes rounding errors larger.
    few = {"rounds": 1} if name == "fedlgd" else {}
    run = check_strategy(*ample(target(name, tiny(name, **few))))
    assert run.finished
    assert len(run.final) == run.peers


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_means_the_same_batched_or_not(name: str) -> None:
    found = target(name, tiny(name))
    run = check_program(found.program, found.network)
    assert run.finished
    assert run.messages_delivered > 0


@pytest.mark.live
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_gives_the_same_bits_over_sockets(name: str) -> None:
    found = target(name, tiny(name, links=LIVE_LINKS, round_s=20.0))
    attack = found.program.method.attack
    if attack is not None and attack.knowledge is Knowledge.ALL:
        # On real machines nobody knows everybody's vector; the rest of the method is climbed.
        found = target(name, tiny(name, links=LIVE_LINKS, round_s=20.0, attack="sign_flip"))
    program = found.program
    check_live(program, type(program).of(program.method), program.method.seed, found.network)


@pytest.mark.live
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_runs_over_sockets(name: str) -> None:
    changes = {"peers": LIVE_PEERS, "links": LIVE_LINKS, "topology": "full", "rounds": ROUNDS}
    cell = smallest(name, tiny(name, **changes))
    run = execute(replace(cell, engine="live"), launch)
    assert run.engine == "live"
    assert run.finished
    assert run.messages_delivered > 0
    assert all(problem is None for problem in (rule(run) for rule in INVARIANTS))
    if cell.scenario.task is not None:
        assert sorted(run.final) == list(range(LIVE_PEERS))


REPEAT = """
import json, sys
from dataclasses import replace
import torch
from shoal.lab.cell import execute
from shoal.lab.fuzz import smallest
from shoal.lab.launch import launch

torch.set_num_threads(1)
found = {}
for name, settings in json.loads(sys.argv[1]).items():
    run = execute(replace(smallest(name, settings), engine="event"), launch)
    rows = [(row.name, row.peer, row.round, row.value.hex(), row.time_s) for row in run.rows]
    found[name] = [run.trace_digest, run.state_digest, rows]
print(hash("shoal"), json.dumps(found))
"""


def test_the_hash_seed_changes_nothing() -> None:
    given = json.dumps({name: tiny(name) for name in ("dpsgd", "gossip")})
    answers = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run(
            [sys.executable, "-c", REPEAT, given], env=environment, capture_output=True,
            text=True, check=True, timeout=50,
        )  # fmt: skip
        answers.append(found.stdout.split(maxsplit=1))
    hashes, results = zip(*answers, strict=True)
    assert hashes[0] != hashes[1]
    assert results[0] == results[1]
    assert all(trace and state for trace, state, _ in json.loads(results[0]).values())


# Parts, as far as no system and no test of the engines carries them through the ladder.

WORLD = Scenario(
    "parts", peers=7, rounds=3, seed=2, eval_every=1,
    task={"name": "digits", "split": "dirichlet", "alpha": 1.0, "hidden": [8],
          "train_samples": SAMPLES},
    links={"name": "links", "latency_s": 0.02, "latency_spread": 0.3, "seed": 1},
    device={"name": "device", "flops_per_s": 1e8, "spread": 0.3},
)  # fmt: skip


def examples(role: str, first: int = 0) -> list[Any]:
    """(name, settings) of each example that the contract suites run a part with."""
    out = []
    for name in names(role):
        for place, settings in enumerate(find(role, name).examples[first:], first):
            out.append(pytest.param(name, settings, id=f"{name}-{place}"))
    return out


def climb(strategy: Any = None, **changes: Any) -> Run:
    strategy = strategy or find("strategy", "local_steps")(steps=2, batch_size=4)
    method, network, *_ = method_of(strategy, WORLD.with_settings(changes), WORLD.seed)
    return check_strategy(replace(method, round_s=4.0 * method.round_s), network)


@pytest.mark.parametrize(("name", "settings"), examples("aggregate"))
def test_aggregators_agree(name: str, settings: dict[str, Any]) -> None:
    climb(aggregator={"name": name, **settings}, byzantine=1, attack="sign_flip")


@pytest.mark.parametrize(("name", "settings"), examples("attack"))
def test_attacks_agree(name: str, settings: dict[str, Any]) -> None:
    climb(aggregator="median", byzantine=2, attack={"name": name, **settings})


@pytest.mark.parametrize(("name", "settings"), examples("transform", first=1))
def test_transforms_agree(name: str, settings: dict[str, Any]) -> None:
    climb(transform={"name": name, **settings})


@pytest.mark.parametrize(("name", "settings"), examples("strategy"))
def test_strategies_agree(name: str, settings: dict[str, Any]) -> None:
    strategy = find("strategy", name)(**settings)
    way = {"exchange": "star"} if getattr(strategy, "needs_hub", False) else {}
    climb(strategy, **way)


@pytest.mark.parametrize(("name", "settings"), examples("exchange"))
def test_exchanges_agree(name: str, settings: dict[str, Any]) -> None:
    peers = settings.get("peers", WORLD.peers)
    if name == "gossip":
        settings = {"topology": find("topology", "random_regular")(peers, degree=4), **settings}
    climb(peers=peers, exchange=find("exchange", name)(**settings))


@pytest.mark.parametrize(("name", "settings"), examples("topology"))
def test_topologies_agree(name: str, settings: dict[str, Any]) -> None:
    climb(peers=settings["peers"], rounds=2, topology={"name": name, **settings})
