"""Scenarios and faults as data: round trips, precedence, draws by key, error texts with places."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.lab.build import build, check, edges
from shoal.lab.experiment import Experiment
from shoal.lab.faults import FaultSetting, Round, read_fault
from shoal.lab.launch import network_of
from shoal.lab.run import run
from shoal.lab.scenario import EngineSettings, Part, Scenario, parse_settings, typed
from shoal.lab.toml_file import load_toml, parse_toml
from shoal.world import faults as world

moments = st.one_of(st.floats(0, 100, allow_nan=False), st.builds(Round, st.integers(0, 100)))
faults = st.builds(
    FaultSetting,
    st.sampled_from(["crash", "loss", "slow", "join", "corrupt"]),
    count=st.integers(0, 8),
    by=st.sampled_from(["", "storm"]),
    spare=st.sampled_from([(), (0,)]),
    at=moments,
)
parts = st.one_of(
    st.none(),
    st.builds(
        Part,
        st.sampled_from(["ring", "star"]),
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.one_of(st.integers(), st.booleans(), st.lists(st.integers(), max_size=3)),
        ),
    ),
)
scenarios = st.builds(
    Scenario,
    st.text(max_size=8),
    peers=st.integers(9, 40),
    rounds=st.one_of(st.none(), st.integers(1, 99)),
    seconds=st.one_of(st.none(), st.floats(0.1, 1e6)),
    seed=st.integers(0, 2**40),
    byzantine=st.one_of(st.integers(0, 9), st.sets(st.integers(0, 8)).map(tuple)),
    topology=parts,
    attack=parts,
    faults=st.lists(faults, max_size=3).map(tuple),
    engine=st.builds(EngineSettings, st.sampled_from(["lazy", "off"]), st.booleans()),
)


@given(scenarios)
def test_json_round_trip(scenario: Scenario) -> None:
    import json

    again = Scenario.from_json(json.loads(json.dumps(scenario.to_json())))
    assert again == scenario
    assert hash(again) == hash(scenario)
    assert again.digest() == scenario.digest()


def test_digest_is_equal_in_processes_with_different_hash_seeds() -> None:
    code = (
        "from shoal.lab.scenario import Scenario, Part;"
        "print(Scenario('x', peers=9, rounds=2, task=Part('digits', {'b': 1, 'a': (1, 2)}),"
        " byzantine=3).digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_changes_start_a_new_part_or_change_the_old_one() -> None:
    base = Scenario(rounds=2, topology=Part("random_regular", {"degree": 4}))
    assert base.with_settings({"topology": "ring"}).topology == Part("ring")
    assert base.with_settings({"topology.degree": 2}).topology == Part(
        "random_regular", {"degree": 2}
    )
    both = base.with_settings({"topology": "torus", "topology.wrap": False})
    assert both.topology == Part("torus", {"wrap": False})
    assert base.with_settings({"engine.strict": True}).engine == EngineSettings(strict=True)
    assert base.with_settings({"topology": None}).topology is None


def test_byzantine_counts_are_placed_by_key_and_nested() -> None:
    few = Scenario(peers=50, seed=4, byzantine=5).byzantine_peers()
    more = Scenario(peers=50, seed=4, byzantine=9).byzantine_peers()
    other = Scenario(peers=50, seed=5, byzantine=5).byzantine_peers()
    assert len(few) == 5
    assert set(few) < set(more)
    assert few != other
    assert Scenario(peers=5, byzantine=(3, 1)).byzantine_peers() == (1, 3)


@given(faults, st.integers(9, 30), st.integers(0, 99))
def test_resolved_faults_name_as_many_peers_as_said(
    fault: FaultSetting, peers: int, seed: int
) -> None:
    found = fault.resolved(peers, seed)
    assert found.who is not None
    assert len(set(found.who)) == fault.count
    assert not set(found.who) & set(fault.spare)
    assert found == fault.resolved(peers, seed)
    assert read_fault(found.to_json(), str, ()) == found
    explicit = found.explicit()
    assert explicit.who == found.who
    assert (explicit.kind, explicit.at) == (fault.kind, fault.at)


def test_faults_with_one_word_meet_the_same_peers() -> None:
    first = FaultSetting("crash", fraction=0.3, by="storm", at=1.0).resolved(20, 7, 0)
    second = FaultSetting("slow", fraction=0.3, by="storm", at=2.0).resolved(20, 7, 1)
    other = FaultSetting("slow", fraction=0.3, at=2.0).resolved(20, 7, 1)
    assert first.who == second.who != other.who
    assert len(first.who or ()) == 6


def test_every_kind_of_the_world_can_be_written() -> None:
    for kind in world.KINDS:
        table = {"kind": kind, "who": [1], "at": {"round": 2}}
        if kind not in ("join", "leave"):
            table["until"] = {"round": 5}
        fault = read_fault(table, str, ()).explicit()
        assert fault == world.from_data(table)


def test_live_objects_are_allowed_but_have_no_json_form() -> None:
    task = object()
    scenario = Scenario(rounds=1, task=task)
    assert scenario.live == ("task",)
    assert build(scenario.with_settings({"peers": 3})).task is task
    with pytest.raises(UsageError, match="task is a live object"):
        scenario.to_json()


def test_parts_get_what_the_scenario_knows() -> None:
    scenario = Scenario(
        peers=12, rounds=1, seed=3, topology=Part("random_regular", {"degree": 4}),
        exchange="gossip",
        links=Part("wan", {"loss": 0.1}), device={"flops_per_s": 1e9}, byzantine=2,
        faults=(FaultSetting("crash", count=2),),
    )  # fmt: skip
    pieces = build(scenario)
    assert (pieces.topology.peers, pieces.topology.seed) == (12, 3)
    assert pieces.exchange.topology == pieces.topology
    assert pieces.links.loss == 0.1
    assert pieces.links.latency_s == pytest.approx(0.075)
    assert pieces.device.flops_per_s == 1e9
    assert len(pieces.byzantine) == 2
    assert len(pieces.faults[0].who) == 2
    pairs, hub = edges(scenario)
    assert len(pairs) == 12 * 4 // 2
    assert hub is None


def test_a_run_needs_a_horizon() -> None:
    with pytest.raises(UsageError, match=r"neither rounds nor seconds.*set rounds = 50"):
        build(Scenario(peers=3))


BAD_FILES = [
    ("peers = 0", 1, "peers = 0; need at least 1 (raise peers)"),
    ("# c\nrounds = 3\npeeers = 2", 3, "no such setting (did you mean 'peers'?)"),
    ("peers = 'many'", 1, "'many'; need a whole number"),
    ("seconds = -1.0", 1, "need more than 0 seconds"),
    ("[engine]\nbatching = 'no'", 2, "need one of 'lazy', 'off'"),
    ("engine = { strct = true }", 1, "did you mean 'strict'?"),
    ("[topology]\nname = 'rnig'", 2, "did you mean 'ring'?"),
    ("[topology]\nname = 'random_regular'\n\ndegre = 4", 4, "did you mean 'degree'?"),
    ("[topology]\nname = 'random_regular'\ndegree = 'x'", 3, "need a whole number"),
    ("peers = 4\n[topology]\nname = 'random_regular'\ndegree = 9", 2, "degree < peers"),
    ("[task]\nalpha = 0.1", 1, "needs a name"),
    ("[links]\nname = 'wam'", 2, "did you mean 'wan'?"),
    ("peers = 3\nbyzantine = [1, 7]", 2, "need ids from 0 to 2"),
    ("x = = 1", 1, "this is not TOML"),
    ("peers = 2\nname = '", 2, "this is not TOML"),
    ("[[faults]]\nkind = 'crsh'\ncount = 1", 2, "did you mean 'crash'?"),
    ("[[faults]]\nkind = 'crash'\ncount = 1\n[[faults]]\nkind = 'loss'\ncount = 1\nfactor = 2", 7,
     "a loss has no such setting"),
    ("[[faults]]\nkind = 'loss'\ncount = 1\nprobability = 1.5", 4, "need a number in [0, 1]"),
    ("[[faults]]\nkind = 'crash'\nwho = [1]\nfraction = 0.1", 3, "exactly one of who, count"),
    ("[[faults]]\nkind = 'crash'\ncount = 1\nat = { rond = 3 }", 4, "seconds or { round = n }"),
    ("[[faults]]\nkind = 'hold'\ncount = 1", 1, "moment of release"),
    ("[[faults]]\nkind = 'crash'\ncount = 1\nat = 5\nuntil = 4", 5, "not after"),
    ("faults = [\n { kind = 'crash', count = 1 },\n { kind = 'crash', count = -1 },\n]", 1,
     "need 0 or more"),
]  # fmt: skip


def _read(text: str) -> None:
    file = parse_toml(text, "world.toml")
    check(Scenario.from_json(file.data, file.where), file.where)


@pytest.mark.parametrize(("text", "line", "message"), BAD_FILES)
def test_errors_of_files_give_line_value_rule_and_repair(
    text: str, line: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        _read(text)
    assert str(caught.value).startswith(f"world.toml:{line}:")
    assert message in str(caught.value)


def test_lines_are_found_around_strings_comments_and_nesting() -> None:
    text = (
        "# [task]\n"
        'name = """\n[links]\npeers = 3\n"""\n'
        "peers = 5  # rounds = 4\n"
        "[task]\n"
        'name = "x # y = [1"\n'
        "sizes = [\n  1,\n  2,\n]\n"
        "inner.deep = 1\n"
        "[[faults]]\nkind = 'crash'\n"
        "[[faults]]\nkind = 'loss'\n"
        "[faults.at]\nround = 3\n"
    )
    file = parse_toml(text, "f")
    assert file.data["task"]["name"] == "x # y = [1"
    expected = {
        ("name",): 2, ("peers",): 6, ("task",): 7, ("task", "name"): 8, ("task", "sizes"): 9,
        ("task", "inner", "deep"): 13, ("faults", 0, "kind"): 15, ("faults", 1, "kind"): 17,
        ("faults", 1, "at", "round"): 19,
    }  # fmt: skip
    for path, line in expected.items():
        assert file.where(path) == f"f:{line}", path
    assert file.where(("task", "unknown")) == "f:7"
    assert file.where(("nowhere",)) == "f"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.toml: cannot be read"):
        load_toml(tmp_path / "gone.toml")


def test_set_values_are_typed_by_the_field() -> None:
    assert typed("peers", "12") == ("peers", 12)
    assert typed("round_s", "2") == ("round_s", 2.0)
    assert typed("round_s", "none") == ("round_s", None)
    assert typed("name", "12") == ("name", "12")
    assert typed("byzantine", "1,4") == ("byzantine", (1, 4))
    assert typed("batching", "off") == ("engine.batching", "off")
    assert typed("task.hidden", "[8, 8]") == ("task.hidden", [8, 8])
    assert typed("topology", "ring") == ("topology", "ring")
    with pytest.raises(UsageError, match="need a whole number"):
        typed("peers", "many")
    with pytest.raises(UsageError, match="need key=value"):
        parse_settings(["peers"])


def test_engine_settings_may_be_a_table() -> None:
    assert Scenario(engine={"strict": True}).engine == EngineSettings(strict=True)
    with pytest.raises(UsageError, match=r"engine\.strikt = True; there is no such setting"):
        Scenario(engine={"strikt": True})


def test_nat_boxes_are_part_of_a_scenario() -> None:
    world = Scenario("nat", peers=5, seconds=1.0, nats={"symmetric": 2, "full cone": 1})
    assert Scenario.from_json(world.to_json()) == world
    network = network_of(world, build(world))
    assert sorted(box.name for box in network.nats) == ["full cone", "symmetric", "symmetric"]
    with pytest.raises(UsageError, match="did you mean 'symmetric'"):
        world.with_settings({"nats": {"symetric": 1}})
    with pytest.raises(UsageError, match="there are 5 peers"):
        world.with_settings({"nats": {"symmetric": 4, "full cone": 3}})


def test_nat_boxes_of_a_file_have_settings() -> None:
    head = "peers = 4\nseconds = 1\n[nats]\nsymmetric = 2\n"
    file = parse_toml(head + "public = 1\nlifetime_s = 30\nmessages = true", "world.toml")
    world = Scenario.from_json(file.data, file.where)
    again = Scenario.from_json(world.to_json())
    assert again == world
    assert again.digest() == world.digest()
    boxes = network_of(again, build(again)).nats
    assert [(box.name, box.lifetime_s, box.messages) for box in boxes] == [
        ("symmetric", 30, True)
    ] * 2
    for wrong, place, says in (
        ("lifetime_s = 0", 5, "need a positive number"),
        ("messages = 1", 5, "true or false"),
        ("public = 3", 3, "there are 4 peers"),
        ("public = true", 5, "need 0 to 4 peers"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            _read(head + wrong)
        assert str(caught.value).startswith(f"world.toml:{place}:")


def test_attacks_that_see_everybody_are_refused_between_processes() -> None:
    scenario = Scenario(
        peers=4, rounds=1, task="digits", topology="full", attack="alie", byzantine=1,
        engine=EngineSettings(processes=2),
    )  # fmt: skip
    with pytest.raises(UsageError, match="a process has only its own"):
        run("dpsgd", scenario, engine="live")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peers": "abc"}, "Scenario: peers = 'abc'; need a whole number"),
        ({"peers": 6.5}, "Scenario: peers = 6.5; need a whole number"),
        ({"rounds": True}, "Scenario: rounds = True; need a whole number"),
        ({"seed": "a"}, "Scenario: seed = 'a'; need a whole number"),
        ({"seconds": "long"}, "Scenario: seconds = 'long'; need a number"),
        ({"initial": "same"}, "Scenario: initial = 'same'; need one of"),
    ],
)
def test_wrong_types_from_python_are_refused_at_once(settings: dict, message: str) -> None:
    with pytest.raises(UsageError) as found:
        Scenario(**settings)
    assert str(found.value).startswith(message)


def test_numbers_of_numpy_are_numbers() -> None:
    peers, seconds = np.int64(5), np.float64(2.5)
    assert Scenario(peers=peers, seconds=seconds) == Scenario(peers=5, seconds=2.5)  # type: ignore[arg-type]


class _Half:
    """A strategy that was not finished."""

    def init(self, params: object) -> object:
        return params


class _Idle:
    async def run(self, peer: object) -> None:
        return


@pytest.mark.parametrize(
    ("what", "world", "seed", "message"),
    [
        (_Half(), Scenario(peers=2, rounds=1), 0, "this strategy lacks local, apply, params"),
        (_Idle, Scenario(peers=2, rounds=1), 0, "_Idle is a class; need an object of it"),
        (3, Scenario(peers=2, rounds=1), 0, "3 cannot be run: it has neither"),
        (_Idle(), {"peers": 3}, 0, "run: scenario = {'peers': 3}; need a Scenario"),
        (_Idle(), Scenario(peers=2, rounds=1), "a", "run: seed = 'a'; need a whole number"),
    ],
)
def test_what_cannot_be_run_says_why(what: object, world: Any, seed: Any, message: str) -> None:
    with pytest.raises(UsageError) as found:
        run(what, world, seed)
    assert message in str(found.value)


def test_a_rule_is_not_told_of_more_liars_than_there_are_peers() -> None:
    world = Scenario(
        peers=6, rounds=1, task="digits", topology="ring",
        aggregator=Part("krum", {"byzantine": 40}),
    )  # fmt: skip
    with pytest.raises(UsageError, match="byzantine=40 with 6 peers; need at most 5"):
        run("dpsgd", world)


def test_arms_need_names() -> None:
    with pytest.raises(UsageError, match="need a name for each"):
        Experiment(["dpsgd"], Scenario(peers=2, rounds=1))  # type: ignore[arg-type]
