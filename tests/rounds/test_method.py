"""The phases of a round: who counts how much, what is kept, what a peer goes on with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from round_methods import DIM, Counting, State, counting
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event.simulation import simulate
from shoal.lab.launch import launch_seeds
from shoal.lab.scenario import Part, Scenario
from shoal.parts import find
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.rounds import method as phases
from shoal.rounds.adapter import Rounds
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops
from shoal.world.faults import Crash, Round
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run


def mixing_of(rows: int, slots: int, seed: int) -> Tensor:
    weights = torch.rand(
        rows, slots + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return weights / weights.sum(-1, keepdim=True)


def test_keys_of_a_round_are_those_that_the_peers_draw() -> None:
    method = counting(5, seed=3)
    drawn = {}

    class Drawing:
        async def run(self, peer: Any) -> None:
            drawn[peer.id] = peer.key("round", 7)

    simulate(Drawing(), Network(5), seed=3)
    assert [drawn[peer] for peer in range(5)] == list(method.keys(7))


@given(slots=st.integers(0, 6), seed=st.integers(0, 99), data=st.data())
def test_a_lost_neighbour_s_weight_goes_to_the_own_row(
    slots: int, seed: int, data: st.DataObject
) -> None:
    mixing = mixing_of(3, slots, seed)
    flags = data.draw(st.lists(st.booleans(), min_size=3 * slots, max_size=3 * slots))
    heard = torch.tensor(flags, dtype=torch.bool).view(3, slots)
    mask = torch.cat((torch.ones(3, 1, dtype=torch.bool), heard), -1)
    after, weight = phases.weights_of(mask, mixing, None)
    assert torch.equal(after, mask)
    assert weight is not None
    torch.testing.assert_close(weight.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(weight[:, 1:], torch.where(heard, mixing[:, 1:], 0.0))
    lost = torch.where(heard, 0.0, mixing[:, 1:]).sum(-1)
    torch.testing.assert_close(weight[:, 0], mixing[:, 0] + lost)


def test_taught_weights_come_before_mixing_and_none_has_nothing_to_say() -> None:
    mask = torch.tensor([True, True, False, True])
    taught = torch.tensor([2.0, 0.0, 5.0, 3.0])
    after, weight = phases.weights_of(mask, mixing_of(1, 3, 0)[0], taught)
    assert after.tolist() == [True, False, False, True]
    assert weight is not None
    assert weight.tolist() == [2.0, 0.0, 0.0, 3.0]
    assert phases.weights_of(mask, None, None)[1] is None


def payloads(method: Any, *vectors: Tensor) -> tuple[Any, ...]:
    codec = method.transform.init(vectors[0])
    return tuple(method.transform.encode(v, codec, keyed.key_of(0))[0] for v in vectors)


def test_combine_weighs_vectors_and_extras_alike() -> None:
    method = counting()
    own, near, gone = (torch.full((DIM,), x, dtype=torch.float64) for x in (1.0, 4.0, 100.0))
    mask = torch.tensor([True, True, False])
    extras = tuple({"size": torch.tensor(x)} for x in (10.0, 20.0, 1e9))
    vector, count, extra = phases.combine(
        own, payloads(method, near, gone), mask, None, torch.tensor([1.0, 2.0, 7.0]), extras, method
    )
    assert vector.tolist() == pytest.approx([3.0] * DIM)
    assert int(count) == 2
    assert extra["size"].item() == pytest.approx(50 / 3)
    # By the exchange's weights, with the lost one's share kept.
    vector, _, extra = phases.combine(
        own, payloads(method, near, gone), mask, torch.tensor([0.2, 0.5, 0.3]), None, extras, method
    )
    assert vector.tolist() == pytest.approx([2.5] * DIM)
    assert extra["size"].item() == pytest.approx(15.0)


def test_who_heard_nobody_with_anything_to_say_keeps_its_own() -> None:
    method = counting()
    own, near = torch.full((DIM,), 1.0), torch.full((DIM,), 4.0)
    extras = ({"size": torch.tensor(10.0)}, {"size": torch.tensor(20.0)})
    vector, count, extra = phases.combine(
        own,
        payloads(method, near),
        torch.tensor([True, True]),
        None,
        torch.zeros(2),
        extras,
        method,
    )
    assert vector.tolist() == [1.0] * DIM
    assert int(count) == 0
    assert extra["size"].item() == 10.0


def test_combine_has_leading_axes() -> None:
    method = counting()
    own, near = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    mask = torch.rand(2, 5, 2) < 0.7
    mask[..., 0] = True
    mixing = mixing_of(5, 1, 1).float().expand(2, 5, 2)
    vector, count, _ = phases.combine(own, payloads(method, near), mask, mixing, None, (), method)
    for i in range(2):
        for j in range(5):
            single, number, _ = phases.combine(
                own[i, j], payloads(method, near[i, j]), mask[i, j], mixing[i, j], None, (), method
            )
            torch.testing.assert_close(vector[i, j], single)
            assert int(count[i, j]) == int(number)


def test_a_thawed_state_is_the_frozen_one() -> None:
    state = (State(torch.randn(DIM), torch.tensor(3.0)), {"error": torch.randn(2)}, None)
    items = phases.freeze(state)
    assert all(isinstance(value, Tensor) for value in items.values())
    like = (State(torch.zeros(DIM), torch.tensor(0.0)), {"error": torch.zeros(2)}, None)
    thawed = phases.thaw(like, items.get)
    assert torch.equal(thawed[0].params, state[0].params)
    assert torch.equal(thawed[0].worked, state[0].worked)
    assert torch.equal(thawed[1]["error"], state[1]["error"])


def test_reports_and_deadlines_of_rounds() -> None:
    method = counting(rounds=10, report_every=4)
    assert [r for r in range(10) if method.reports(r)] == [3, 7, 9]
    assert method.deadline(0) == 3.0
    assert method.deadline(4, hop=0, hops=2) == 13.5
    assert method.deadline(4, hop=1, hops=2) == method.deadline(4) == 15.0


def test_waves_of_a_graph_that_stays_are_made_once() -> None:
    method = counting()
    first = method.waves(0)
    assert method.waves(1) is first
    assert first[0].sources == ((1, 3), (0, 2), (1, 3), (0, 2))
    assert first[0].targets == first[0].sources
    assert first[0].mixing is not None
    torch.testing.assert_close(first[0].mixing.sum(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 0}, "at least one round"),
        ({"byzantine": (1,)}, "byzantine peers without an attack"),
        (
            {"byzantine": (0, 1, 2, 3), "attack": find("attack", "sign_flip")()},
            "leave one honest",
        ),
    ],
)
def test_methods_that_cannot_run_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        counting(**change)


def worked(run: Run, peer: int) -> list[tuple[int, float]]:
    return [(row.round, row.value) for row in run.series("worked", peer)]


def crashed(store: str, every: int) -> Run:
    method = counting(checkpoint_every=every)
    fault = Crash(who=(0,), at=Round(4), until=Round(6), store=store)
    network = Network(4, links=Links(latency_s=0.05), faults=(fault,))
    return simulate(Rounds.of(method), network)


@pytest.mark.parametrize(
    ("store", "every", "before"),
    [("kept", 1, 4), ("kept", 3, 3), ("kept", 0, 0), ("lost", 1, 0)],
)
def test_a_peer_goes_on_from_its_last_checkpoint(store: str, every: int, before: int) -> None:
    """It dies as round 4 begins, misses 5, and takes part again from round 6 on."""
    run = crashed(store, every)
    found = worked(run, 0)
    early = [(round, float(round + 1)) for round in range(4)]
    late = [(round, float(before + round - 5)) for round in range(6, 10)]
    assert found == early + late
    assert worked(run, 1) == [(round, float(round + 1)) for round in range(10)]


def test_a_restart_joins_the_schedule_where_it_is() -> None:
    """Restarted at 13 s, where round 4 (12 to 15 s) is due."""
    method = counting(checkpoint_every=1)
    fault = Crash(who=(0,), at=0.02, until=13.0)
    network = Network(4, links=Links(latency_s=0.05), faults=(fault,))
    rounds = [round for round, _ in worked(simulate(Rounds.of(method), network), 0)]
    assert rounds == list(range(4, 10))


def test_counting_moves_as_a_hand_computed_round() -> None:
    """So that the tests above are about what they say they are."""
    run = simulate(Rounds.of(counting(rounds=1)), Network(4, links=Links(latency_s=0.05)))
    assert Counting().init(torch.zeros(DIM)).worked == 0.0
    # Peer 0 holds 1, its neighbours 1 and 3 hold 2 and 4; a third each on a ring.
    assert run.final[0].tolist() == pytest.approx([7 / 3] * DIM)


@pytest.mark.parametrize(("split", "times"), [("iid", 1), ("dirichlet", 3)])
def test_work_is_counted_once_for_seeds_that_work_alike(
    split: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(*args: Any) -> float:
        counted.append(args)
        return count_flops(*args)

    monkeypatch.setattr(phases, "count_flops", count)
    task = Part("digits", {"split": split, "hidden": (8,), "train_samples": 240})
    world = Scenario("alike", peers=4, rounds=2, task=task)
    steps, seeds = LocalSteps(epochs=1), [0, 1, 2]
    runs = launch_seeds(steps, [replace(world, seed=seed) for seed in seeds], seeds)
    assert len(counted) == times
    for run, seed in zip(runs, seeds, strict=True):
        alone = launch_seeds(steps, [replace(world, seed=seed)], [seed])[0]
        assert run.flops == alone.flops > 0
        assert run.virtual_s == alone.virtual_s
