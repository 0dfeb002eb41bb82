"""SybilWall: its scores, its gossip, its graph reach, and what its arms and claims mean."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.lockstep import run_lockstep
from shoal.lab.build import build, check
from shoal.lab.launch import launch
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts import find
from shoal.parts.aggregate.fools_gold import FoolsGold
from shoal.parts.attack.sybils import Sybils
from shoal.parts.exchange.gossip import Gossip
from shoal.parts.tasks.digits import Digits
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.sybil_graph import SybilGraph
from shoal.rounds.method import Method
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard
from shoal.systems.robust import _sybilwall_claims as claims
from shoal.systems.robust import sybilwall as system
from shoal.systems.robust._sybilwall_gossip import Table, drawn, heard_of
from shoal.systems.robust._sybilwall_node import (
    HistoryFilter,
    State,
    SybilWall,
    first_column,
    weighted_median,
)
from shoal.systems.robust._sybilwall_seals import (
    SignedWall,
    edge_of,
    seal_holds,
    sealed,
)
from shoal.systems.robust.scenarios import SCENARIOS
from shoal.tensor import keyed, tree
from shoal.tensor.flat import FlatSpec
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

KEY = keyed.key_of(5, "sybilwall")
WALL = SybilWall(peers=6, width=4)


def normal(*shape: int, word: str = "x") -> torch.Tensor:
    key = keyed.fold(KEY, word)
    for size in shape:
        key = keyed.grid(key, size)
    return keyed.normal(key, dtype=torch.float64)


# Scores: invariants (1) and (2).


def by_hand(history: np.ndarray, kappa: float) -> np.ndarray:
    """FoolsGold as its algorithm is written, one pair at a time."""
    n = len(history)
    cosine = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                lengths = np.linalg.norm(history[i]) * np.linalg.norm(history[j])
                cosine[i, j] = history[i] @ history[j] / lengths
    most = cosine.max(1)
    pardoned = cosine.copy()
    for i in range(n):
        for j in range(n):
            if most[j] > most[i]:
                pardoned[i, j] *= most[i] / most[j]
    alpha = np.clip(1 - pardoned.max(1), 0, 1)
    alpha = alpha / alpha.max()
    alpha[alpha > 0.99] = 0.99
    with np.errstate(divide="ignore"):
        return np.clip(kappa * (np.log(alpha / (1 - alpha)) + 0.5), 0, 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(2, 6), st.integers(0, 1000), st.sampled_from([0.3, 1.0, 3.0]))
def test_scores_are_the_algorithm_s(n: int, dim: int, seed: int, kappa: float) -> None:
    history = np.random.default_rng(seed).normal(size=(n, dim))
    everybody = torch.ones(n, dtype=torch.bool)
    found = HistoryFilter(kappa=kappa).scores(torch.tensor(history), everybody)
    np.testing.assert_allclose(found.numpy(), by_hand(history, kappa), atol=1e-9)
    # The rule for rows in hand is the same function.
    rule = FoolsGold(kappa).scores(torch.tensor(history), everybody)
    torch.testing.assert_close(found, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_that_are_the_same_count_nothing_and_strangers_fully(dtype: torch.dtype) -> None:
    basis, _ = torch.linalg.qr(normal(5, 5))
    history = torch.cat((basis[:4], basis[:1])).to(dtype)
    score = WALL.scores(history, torch.ones(5, dtype=torch.bool))
    assert score.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # Who is not known neither counts nor counts against anybody.
    known = torch.tensor([True, True, True, True, False])
    assert WALL.scores(history, known).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.integers(0, 1000))
def test_scores_know_neither_lengths_nor_names(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    history = torch.tensor(rng.normal(size=(n, 5)))
    known = torch.tensor(rng.random(n) < 0.8)
    score = WALL.scores(history, known)
    scale = torch.tensor(10.0 ** rng.uniform(-3, 3, n)).unsqueeze(-1)
    torch.testing.assert_close(WALL.scores(history * scale, known), score, atol=1e-9, rtol=1e-9)
    order = torch.tensor(rng.permutation(n))
    torch.testing.assert_close(WALL.scores(history[order], known[order]), score[order])
    assert bool((score >= 0).all() & (score <= 1).all())
    assert bool((score[~known] == 0).all())


@pytest.mark.parametrize(("dtype", "vast"), [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_alike_histories_show_however_long_they_are(dtype: torch.dtype, vast: float) -> None:
    history = torch.eye(6, dtype=dtype)
    history[3:] = history[3] * vast
    known = torch.ones(6, dtype=torch.bool)
    assert WALL.scores(history, known).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_all_alike_count_nothing_and_opposites_are_no_sybils() -> None:
    alike = torch.ones(3, 4)
    assert WALL.scores(alike, torch.ones(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]
    # Negative cosines alone: with the diagonal left out these would have become equal.
    apart = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
    assert WALL.scores(apart, torch.ones(3, dtype=torch.bool)).tolist() == [1.0, 1.0, 1.0]


# Gossip: invariants (3) and (4).


def test_near_histories_are_sent_exp_lam_times_as_often() -> None:
    known = torch.tensor([True, True, True, True])
    distance, via = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 8, 8, 3])
    keys = keyed.grid(KEY, 60_000)
    count = Counter(
        drawn(
            known.expand(60_000, 4), distance.expand(60_000, 4), via.expand(60_000, 4),
            torch.full((60_000, 1), 3), 0.8, keys,
        )[:, 0].tolist()
    )  # fmt: skip
    assert set(count) == {0, 1, 2}
    assert count[0] / count[1] == pytest.approx(2.2255, rel=0.04)
    assert count[1] / count[2] == pytest.approx(math.exp(0.8), rel=0.06)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_nothing_goes_back_to_whom_it_is_from_or_about(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = torch.tensor(rng.random(n) < 0.7)
    distance, via = (torch.tensor(rng.integers(1, high, n)) for high in (5, n))
    to = torch.tensor(rng.integers(-1, n, 4))
    place = drawn(known, distance, via, to, 0.8, keyed.fold(KEY, seed))
    for aim, chosen in zip(to.tolist(), place.tolist(), strict=True):
        allowed = [j for j in range(n) if known[j] and j != aim and via[j] != aim and aim >= 0]
        assert (chosen in allowed) if allowed else chosen == -1


def table_of(*entries: tuple[int, int, int, float], peers: int = 6) -> Table:
    """(about, round, distance, what its history is full of)."""
    history = torch.zeros(peers, 4)
    number = torch.zeros(peers, dtype=torch.int64)
    table = Table(history, number - 1, number, number - 1)
    for about, round, distance, value in entries:
        table.history[about] = value
        table.round[about], table.distance[about] = round, distance
        table.via[about] = 5
    return table


def told(table: Table, *entries: tuple[int, int, int, float], now: int = 9, own: int = 0) -> Table:
    about, round, distance, value = (list(column) for column in zip(*entries, strict=True))
    said = {
        "about": torch.tensor(about), "round": torch.tensor(round),
        "distance": torch.tensor(distance),
        "history": torch.tensor(value).unsqueeze(-1).expand(-1, 4),
    }  # fmt: skip
    who = torch.arange(1, 1 + len(about))
    heard = torch.ones(len(about), dtype=torch.bool)
    return heard_of(table, said, heard, who, torch.tensor([own]), now)


def test_news_are_kept_and_what_was_seen_is_not_overwritten() -> None:
    table = table_of((2, 5, 1, 1.0), (3, 5, 2, 1.0))
    after = told(table, (2, 9, 2, 7.0), (3, 6, 3, 7.0), (4, 1, 4, 7.0))
    assert after.history[:, 0].tolist() == [0, 0, 1, 7, 7, 0]
    assert after.distance.tolist() == [0, 0, 1, 3, 4, 0]
    assert after.round.tolist() == [-1, -1, 5, 6, 1, -1]
    assert after.via.tolist() == [-1, -1, 5, 2, 3, -1]
    # Older than what is known, about this peer, first-hand, from the future, about nobody.
    same = told(
        table, (3, 5, 2, 7.0), (0, 9, 2, 7.0), (4, 3, 1, 7.0), (4, 10, 2, 7.0), (9, 1, 2, 7.0)
    )
    assert torch.equal(same.history, table.history)
    assert torch.equal(same.distance, table.distance)


def test_of_several_about_one_the_newest_then_the_nearest_then_the_first_counts() -> None:
    empty = table_of()
    assert told(empty, (4, 3, 2, 1.0), (4, 5, 3, 2.0), (4, 4, 2, 3.0)).history[4, 0] == 2
    assert told(empty, (4, 3, 3, 1.0), (4, 3, 2, 2.0)).history[4, 0] == 2
    assert told(empty, (4, 3, 2, 1.0), (4, 3, 2, 2.0)).history[4, 0] == 1
    assert told(empty, (4, 1, 2, float("nan"))).distance[4] == 0


def test_histories_of_another_shape_are_refused() -> None:
    said = {"about": torch.tensor([4]), "round": torch.tensor([1]), "distance": torch.tensor([2])}
    with pytest.raises(UsageError, match="a history of 3 numbers"):
        heard_of(
            table_of(), {**said, "history": torch.ones(1, 3)}, torch.ones(1, dtype=torch.bool),
            torch.tensor([1]), torch.tensor([0]), 3,
        )  # fmt: skip


# A round at one node: what histories hold, and invariant (5).


class _Flat:
    spec = FlatSpec(("body.weight", "head.weight", "head.bias"), ((3,), (2, 2), (2,)))


def step_of(round: int, key: torch.Tensor = KEY) -> Step:
    """A round of one peer, or of as many as there are keys."""
    shard = Shard(torch.zeros(*key.shape, 1).long(), torch.ones(key.shape))
    everybody = torch.ones(key.shape, dtype=torch.bool)
    return Step(round, _Flat(), shard, key, everybody, peers=6)  # type: ignore[arg-type]


def heard_by(
    rule: HistoryFilter, state: State, models: torch.Tensor, who: list[int], **extra
) -> State:
    """The node (peer 0) after hearing models [k + 1, dim], its own first."""
    mask = torch.ones(len(models), dtype=torch.bool)
    mask[1:] = torch.tensor([p >= 0 for p in who])
    step = step_of(extra.pop("now", 0))
    said = {"source": torch.tensor([0, *who]), **extra}
    trained = replace(state, params=models[0], before=state.params)
    heard = rule.combine(trained, models, mask, mask.double(), said, step)
    return rule.apply(trained, heard, step)


def fitted(**settings) -> HistoryFilter:
    return HistoryFilter(**settings).fitted(_Flat.spec, 6)


def test_what_each_history_adds_up() -> None:
    start, models = normal(9, word="start"), normal(2, 3, 9, word="models")
    claimed = normal(2, 3, 9, word="claims")
    for history in ("relative", "update", "sum", "latest"):
        rule = fitted(history=history)
        state = rule.init(start)
        befores = []
        for round in range(2):
            befores.append(state.params)
            extra = {"before": claimed[round]} if history == "update" else {}
            state = heard_by(rule, state, models[round], [2, 4], now=round, **extra)
        expected = {
            "relative": models[0, 2] + models[1, 2] - befores[0] - befores[1],
            "update": (models - claimed).sum(0)[2],
            "sum": models.sum(0)[2],
            "latest": models[1, 2],
        }[history]
        torch.testing.assert_close(state.history[4], expected)
        assert state.distance.tolist() == [0, 0, 1, 0, 1, 0]
        assert state.round.tolist() == [-1, -1, 1, -1, 1, -1]
        assert bool((state.history[[0, 1, 3, 5]] == 0).all())


def test_who_was_not_heard_stays_as_it_was() -> None:
    rule = fitted()
    state = heard_by(rule, rule.init(normal(9)), normal(3, 9, word="a"), [2, 4])
    models = normal(3, 9, word="b")
    after = heard_by(rule, state, models, [2, -1], now=1)
    assert after.round.tolist() == [-1, -1, 1, -1, 0, -1]
    assert torch.equal(after.history[4], state.history[4])
    bad = models.clone()
    bad[1, 0] = float("nan")
    broken = heard_by(rule, state, bad, [2, -1], now=1)
    assert torch.equal(broken.history[2], state.history[2])
    torch.testing.assert_close(broken.params, models[0])


def test_first_sight_begins_a_history_of_its_own() -> None:
    rule = fitted(history="sum")
    state = rule.init(normal(9))
    distance = torch.tensor([0, 3, 3, 3, 3, 3])
    hearsay = replace(state, history=torch.ones_like(state.history), distance=distance)
    models = normal(2, 9, word="c")
    after = heard_by(rule, hearsay, models, [2])
    torch.testing.assert_close(after.history[2], models[1])
    assert after.distance.tolist() == [0, 3, 1, 3, 3, 3]


def test_a_history_that_overflows_leaves_others_their_scores() -> None:
    rule = fitted(history="sum")
    state, models = rule.init(normal(9)), normal(3, 9, word="e")
    models[1] = torch.finfo(models.dtype).max * models[1].sign()
    for now in range(3):
        state = heard_by(rule, state, models, [2, 4], now=now)
    assert state.history.isfinite().all()
    assert state.score[4] > 0.5


def test_the_output_layer_alone_can_be_compared() -> None:
    assert first_column(_Flat.spec, "output") == 3
    rule = fitted(layer="output", history="sum")
    models = normal(2, 9, word="d")
    state = heard_by(rule, rule.init(normal(9)), models, [1])
    assert state.history.shape == (6, 6)
    torch.testing.assert_close(state.history[1], models[1, 3:])


def test_stale_hearsay_expires_on_request() -> None:
    rule = SybilWall(keep_rounds=2).fitted(_Flat.spec, 6)
    state = rule.init(normal(9))
    history = torch.zeros(6, 9, dtype=torch.float64)
    history[[2, 4]] = 1.0
    known = {"round": torch.tensor([-1, -1, 3, -1, 3, -1]), "via": state.via, "history": history}
    state = replace(state, distance=torch.tensor([0, 0, 1, 0, 2, 0]), **known)
    for now, score in ((5, 0.0), (6, 1.0)):
        found = rule.scores(state.history, rule._known(state.round, state.distance, now))
        assert float(found[2]) == score
    assert rule.address(state, torch.tensor([3]), step_of(9))["about"].tolist() == [2]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 1000), st.sampled_from(["mean", "krum"]))
def test_weights_are_shares_and_the_own_is_no_less_than_equal(k: int, seed: int, mix: str) -> None:
    rng = np.random.default_rng(seed)
    rule = HistoryFilter(mix=mix).fitted(FlatSpec(("w",), ((8,),)), 7)
    rows = torch.eye(k + 1, 8, dtype=torch.float64)
    here = torch.tensor([True, *(rng.random(k) < 0.8)])
    score = torch.where(here, torch.tensor([1.0, *rng.random(k)]), 0.0)
    weight = rule._mixed(rows * here.unsqueeze(-1), here, score)[: k + 1]
    assert float(weight.sum()) == pytest.approx(1.0)
    assert bool((weight >= 0).all())
    assert float(weight[0]) >= 1 / (k + 1) - 1e-12
    if mix == "mean":
        torch.testing.assert_close(weight, score / score.sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_half_of_the_weight_lies_on_each_side_of_the_weighted_median(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, weight = torch.tensor(rng.normal(size=(k, 3))), torch.tensor(rng.random(k) + 1e-3)
    found = weighted_median(rows, weight)
    below = (weight.unsqueeze(-1) * (rows < found)).sum(0)
    above = (weight.unsqueeze(-1) * (rows > found)).sum(0)
    assert bool((below <= weight.sum() / 2 + 1e-12).all())
    assert bool((above <= weight.sum() / 2 + 1e-12).all())


def test_rows_are_computed_as_if_each_were_alone() -> None:
    rule = SybilWall(history="latest").fitted(_Flat.spec, 6)
    state = rule.init(normal(3, 9))
    models = normal(3, 4, 9, word="m")
    source = torch.tensor([[0, 1, 2, 3], [1, 0, -1, 5], [4, 5, 1, 0]])
    mask, step = source >= 0, step_of(2, keyed.grid(KEY, 3))
    extra = {
        "source": source, "about": torch.tensor([[0, 4, 4, 5], [0, 3, 2, 2], [0, 2, 2, 3]]),
        "round": torch.tensor([[0, 0, 1, 1]] * 3), "distance": torch.tensor([[0, 2, 3, 2]] * 3),
        "history": normal(3, 4, 9, word="h"),
    }  # fmt: skip
    whole = rule.combine(state, models, mask, mask.double(), extra, step)
    for i in range(3):
        own = tree.select(state, i)
        alone = rule.combine(
            own, models[i], mask[i], mask[i].double(), {n: v[i] for n, v in extra.items()}, step
        )
        torch.testing.assert_close(whole.vector[i], alone.vector)
        for name, value in alone.extra.items():
            torch.testing.assert_close(whole.extra[name][i], value, msg=name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SybilWall(kappa=0.0), "kappa=0.0"),
        (lambda: SybilWall(kappa=float("inf")), "kappa=inf"),
        (lambda: SybilWall(lam=0.0), "lam=0.0"),
        (lambda: SybilWall(history="all"), "need one of relative, update, sum, latest"),
        (lambda: SybilWall(layer="first"), "layer='first'"),
        (lambda: SybilWall(mix="max"), "mix='max'"),
        (lambda: SybilWall(keep_rounds=-1), "keep_rounds=-1"),
        (lambda: SybilWall().init(torch.zeros(3)), "for how many peers"),
        (lambda: system.sybilwall(gossip=False, signed=True), "nothing to sign"),
        (lambda: system.sybil_attack(Ring(8), 2, 1, "dense"), "which is sparse"),
        (lambda: system.sybil_attack(Ring(8), 2, 1, "sparse", joins_at=0), "joins_at=0"),
    ],
)
def test_misuse_says_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# On a graph: invariant (6), engines, floods.


def network(peers: int, **more) -> Network:
    return Network(peers, links=Links(latency_s=0.02), device=Device(flops_per_s=1e8), **more)


def method_of(rule: HistoryFilter, graph, rounds: int, **attack) -> Method:
    honest = graph.peers - len(attack.get("byzantine", ()))
    task = Digits(
        peers=graph.peers, hidden=(), holders=tuple(range(honest)), split="dirichlet", alpha=1.0,
        train_samples=240,
    )  # fmt: skip
    codec = find("transform", "identity")().bind(task.spec)
    mean = find("aggregate", "mean")()
    return Method(rule, task, Gossip(graph), mean, codec, rounds, 5.0, seed=3, **attack)


def test_every_history_gets_round_a_ring_and_none_looks_nearer_than_it_is() -> None:
    peers, rounds = 8, 40
    task = Digits(peers=peers, hidden=(), train_samples=80)
    rule = SybilWall(epochs=1).fitted(task.spec, peers)
    graph = networkx.cycle_graph(peers)
    far = dict(networkx.all_pairs_shortest_path_length(graph))
    around = torch.tensor([[p, (p - 1) % peers, (p + 1) % peers] for p in range(peers)])
    start = task.init(KEY)
    state = rule.init(start.expand(peers, -1))
    known = torch.zeros(rounds, peers)
    for round in range(rounds):
        keys = keyed.fold(keyed.grid(KEY, peers), round)
        shard = task.shard(torch.arange(peers))
        step = Step(round, task, shard, keys, torch.ones(peers, dtype=torch.bool), peers=peers)
        # Training is of no matter here: every peer moves in a direction of its own.
        moved = state.params + normal(peers, 650).float()
        state = replace(state, before=state.params, params=moved)
        said = rule.address(state, around[:, 1:], step)
        # Slot 1 of a receiver is the peer before it, whose second target it is.
        extra = {
            name: torch.stack(
                (torch.zeros_like(v[:, 0]), v[around[:, 1], 1], v[around[:, 2], 0]), 1
            )
            for name, v in said.items()
        }
        mask = torch.ones(peers, 3, dtype=torch.bool)
        rows = state.params[around]
        heard = rule.combine(state, rows, mask, mask.double(), {**extra, "source": around}, step)
        state = rule.apply(state, heard, step)
        known[round] = (state.distance > 0).sum(-1)
        for p in range(peers):
            for j in range(peers):
                stored = int(state.distance[p, j])
                assert stored == 0 or stored >= far[p][j]
                assert (stored == 1) == (far[p][j] == 1)
    assert bool((known[1:] >= known[:-1]).all())
    assert known[-1].tolist() == [peers - 1] * peers
    assert int(known[2].max()) < peers - 1


GRAPH = SybilGraph(12, sybils=4, edges_per_sybil=4, kind="dense", degree=3)
ATTACK = {"attack": Sybils(samples=20), "byzantine": (8, 9, 10, 11)}


@pytest.mark.parametrize(
    "rule",
    [SybilWall(epochs=1), SybilWall(epochs=1, history="update", layer="output", mix="median"),
     HistoryFilter(epochs=1, mix="krum"), SignedWall(epochs=1)],
)  # fmt: skip
def test_engines_agree_under_attack(rule: HistoryFilter) -> None:
    check_strategy(method_of(rule, GRAPH, 3, **ATTACK), network(12))


def test_sybils_may_tell_false_histories() -> None:
    loud = {**ATTACK, "attack": Sybils(samples=20, gossip="false")}
    check_strategy(method_of(SybilWall(epochs=1), GRAPH, 3, **loud), network(12))
    state = State(
        *[torch.zeros(2, 3)] * 2, history=normal(2, 5, 3), round=torch.ones(2, 5).long(),
        distance=torch.ones(2, 5).long(), via=torch.ones(2, 5).long(), score=torch.ones(2, 5),
        trust=torch.ones(2),
    )  # fmt: skip
    said = {"about": torch.tensor([[1], [2]]), "history": normal(2, 1, 3, word="said")}
    lie = Sybils(gossip="false").tells(said, state)
    longest = state.history.norm(dim=-1).argmax(-1)
    assert torch.equal(lie["history"][:, 0], state.history[torch.arange(2), longest])
    assert torch.equal(lie["about"], said["about"])
    assert not Sybils().tells(said, state)["history"].any()
    assert Sybils(gossip="truth").tells(said, state) == said
    with pytest.raises(UsageError, match="gossips histories"):
        Sybils(gossip="false").tells(said, object())


def test_sybils_that_flood_in_late_are_nobody_before() -> None:
    world = system.sybil_attack(Ring(8), 4, 4, "dense", joins_at=2, seed=1)
    scenario = replace(SCENARIOS["digits_sybils"], rounds=4, eval_every=1).with_settings(
        {**world, "task.train_samples": 240, "attack": {"name": "sybils", "samples": 20}}
    )
    late = launch(SybilWall(epochs=1), scenario, seed=1)
    before = launch(
        SybilWall(epochs=1), scenario.with_settings({"faults": [], "byzantine": 0, "peers": 8,
        "topology": {"name": "from_edges", "edges": ring_edges(8), "mixing": "uniform"}}), seed=1,
    )  # fmt: skip

    def at(run: Run, round: int) -> list[float]:
        return [row.value for row in run.series("loss") if row.round == round and 0 <= row.peer < 8]

    assert at(late, 1) == pytest.approx(at(before, 1), rel=1e-5)
    assert at(late, 3) != pytest.approx(at(before, 3), rel=1e-3)
    assert late.series("known", 0)[1].value < late.series("known", 0)[3].value


def ring_edges(peers: int) -> tuple[tuple[int, int], ...]:
    return tuple((p, p + 1) for p in range(peers - 1)) + ((0, peers - 1),)


def test_one_node_s_two_sybils_give_each_other_away_and_gossip_finds_those_apart() -> None:
    """Two Sybils on a ring of 6, far from each other: only gossip brings their faces together."""
    # 0 and 3 have one Sybil each.
    edges = (*ring_edges(6), (0, 6), (3, 7))
    scenario = SCENARIOS["digits_sybils"].with_settings(
        {
            "rounds": 20, "peers": 8, "byzantine": (6, 7), "task.holders": list(range(6)),
            "topology": {"name": "from_edges", "edges": edges, "mixing": "uniform"},
            "task.train_samples": 240, "attack.samples": 60,
        }
    )  # fmt: skip
    scores = {}
    for gossip in (True, False):
        rule = system.sybilwall(gossip=gossip)
        kept: list[State] = []

        class Watched(type(rule)):  # type: ignore[misc]
            def apply(self, state, heard, step, kept=kept):
                after = super().apply(state, heard, step)
                kept.append(after)
                return after

        launch(Watched(**vars(rule)), scenario, seed=2)
        scores[gossip] = float(kept[-1].score[0, 6])
    assert scores[False] > 0.5
    assert scores[True] == 0.0


# Signed histories.


def test_a_seal_says_who_saw_what_and_nothing_else() -> None:
    history = normal(5)
    seal = sealed(4, 2, 7, history, edge_of(4, 2))
    assert seal_holds(seal, 4, 7, history)
    assert not seal_holds(seal, 4, 8, history)
    assert not seal_holds(seal, 3, 7, history)
    assert not seal_holds(seal, 4, 7, history + 1e-12)
    for place in (0, 7, 20, 100):
        broken = bytearray(seal)
        broken[place] ^= 1
        assert not seal_holds(bytes(broken), 4, 7, history)
    # 3 is no neighbour of 4: it has no certificate, and that of another edge is of no use.
    assert not seal_holds(sealed(4, 3, 7, history, edge_of(4, 2)), 4, 7, history)
    assert not seal_holds(sealed(4, 3, 7, history, edge_of(3, 4)), 4, 7, history)
    assert not seal_holds(sealed(4, 4, 7, history, edge_of(4, 4)), 4, 7, history)
    assert not seal_holds(bytes(len(seal)), 4, 7, history)


def outcome(rule: HistoryFilter, gossip: str) -> list[State]:
    """The honest peers' states after some rounds on a graph with Sybils that tell such things."""
    kept: list[State] = []

    class Watched(type(rule)):  # type: ignore[misc]
        def apply(self, state, heard, step):
            kept.append(super().apply(state, heard, step))
            return kept[-1]

    attack = {**ATTACK, "attack": Sybils(samples=20, gossip=gossip)}
    run_lockstep([method_of(Watched(**vars(rule)), GRAPH, 5, **attack)], [network(12)])
    return kept


def test_signed_truth_is_the_truth_and_signed_lies_are_silence() -> None:
    plain, signed = SybilWall(epochs=1), SignedWall(epochs=1)
    for gossip in ("drop", "truth"):
        a, b = outcome(plain, gossip)[-1], outcome(signed, gossip)[-1]
        torch.testing.assert_close(a.history[:8], b.history[:8])
        assert torch.equal(a.distance[:8], b.distance[:8])
    lied, refused = outcome(plain, "false")[-1], outcome(signed, "false")[-1]
    liars = torch.tensor([8, 9, 10, 11])
    assert bool(torch.isin(lied.via[:8], liars)[lied.distance[:8] > 1].any())
    told = refused.distance[:8] > 1
    assert bool(told.any())
    # What a liar passed on is there only where its lie was true by chance: the longest history.
    fair = outcome(signed, "drop")[-1]
    shared = told & (fair.distance[:8] > 1) & ~torch.isin(refused.via[:8], liars)
    assert bool(shared.any())
    for peer, about in told.nonzero().tolist():
        if int(refused.via[peer, about]) in (8, 9, 10, 11):
            seal = bytes(refused.seal[peer, about].tolist())
            history = refused.history[peer, about]
            assert seal_holds(seal, about, int(refused.round[peer, about]), history)


def test_who_gives_no_certificate_is_not_listened_to() -> None:
    rule = SignedWall().fitted(_Flat.spec, 6)
    state = rule.init(normal(9))
    models = normal(3, 9, word="e")
    edge = torch.tensor([list(bytes(64)), list(edge_of(2, 0)), list(edge_of(4, 3))])
    extra = {
        "edge": edge.to(torch.uint8), "seal": torch.zeros(3, 136, dtype=torch.uint8),
        "about": torch.full((3,), -1), "round": torch.full((3,), -1),
        "distance": torch.zeros(3).long(), "history": torch.zeros(3, 9).double(),
    }  # fmt: skip
    after = heard_by(rule, state, models, [2, 4], **extra)
    assert after.distance.tolist() == [0, 0, 1, 0, 0, 0]
    torch.testing.assert_close(after.params, models[:2].mean(0))


# The card.


def test_arms_are_whole_worlds() -> None:
    base = SCENARIOS["digits_sybils"]
    for rule in (*claims.BASELINES, "server", "wall"):
        for world in system.WORLDS:
            arm = system._arm(rule, world)
            if arm.system == "dpsgd" or rule == "wall":
                check(base.with_settings(dict(arm.scenario)))
            assert len(arm.scenario["byzantine"]) == system.WORLDS[world][0]
    told = system._arm("krum", "dense").scenario["aggregator"]
    graph = build(base.with_settings(dict(system._arm("krum", "dense").scenario))).topology
    most = max(sum(p >= system.HONEST for p in graph.neighbors(i)) for i in range(system.HONEST))
    assert told == {"name": "krum", "byzantine": most}


def rows_of(values: dict[str, float], metric: str = "attack_success") -> Rows:
    runs = {
        (arm, 0): Run("lockstep", 0, 2, rows=[Row(metric, value, 1.0, 0, -1)])
        for arm, value in values.items()
    }
    return Rows(runs, values, [0])


def test_claims_measure_what_they_say() -> None:
    success = {f"{rule} {world}": 0.5 for rule in claims.BASELINES for world in claims.SCENARIOS}
    success |= {f"wall {world}": 0.1 for world in claims.SCENARIOS}
    success |= {"median sparse": 0.9, "wall sparse": 0.15}
    success |= {"wall 1 sybil": 0.8, "wall 2 sybils": 0.3, "wall 10 sybils": 0.2}
    rows = rows_of(success)
    assert claims.worst_case(rows)[0] == pytest.approx(0.15 - 0.5)
    assert claims.few_and_many(rows)[0] == pytest.approx(0.3 - 0.2)
    accuracy = {f"wall {world}": 0.8 for world in ("calm", *claims.SCENARIOS)}
    accuracy |= {"wall dense 2": 0.74, "wall calm": 0.83}
    rows = rows_of(accuracy, "untouched_accuracy")
    assert claims.accuracy_range(rows)[0] == pytest.approx(0.09)


def test_a_server_keeps_everybodys_histories() -> None:
    scenario = SCENARIOS["digits_sybils"]
    arm = system._arm("server", "dense")
    world = scenario.with_settings({**arm.scenario, "rounds": 2, "task.train_samples": 300})
    run = launch(system.sybilwall(**arm.set, epochs=1), world, seed=1)
    assert isinstance(world, Scenario)
    assert run.series("attack_success")
    assert run.messages_sent == 2 * 2 * 60
