"""What is measured of the peers' models, and the same from both ways in."""

from __future__ import annotations

import pytest
import torch
from round_methods import DIM, Bare

from shoal.rounds.measure import Measure
from shoal.world.record import Row


def by_name(rows: list[Row], name: str) -> dict[tuple[int, int], float]:
    return {(row.round, row.peer): row.value for row in rows if row.name == name}


def model(value: float) -> torch.Tensor:
    return torch.full((DIM,), value, dtype=torch.float64)


def test_per_peer_metrics_and_spread_around_the_mean_model() -> None:
    measure = Measure(Bare(3))
    for peer, value in enumerate((1.0, 2.0, 6.0)):
        measure.params(peer, 0, 1.0 + peer, model(value))
    rows = measure.rows()
    assert by_name(rows, "loss") == {(0, 0): 3.0, (0, 1): 6.0, (0, 2): 18.0}
    assert by_name(rows, "mean_model_loss") == {(0, -1): pytest.approx(9.0)}
    # Squared distances to the mean 3: 3 * (4, 1, 9).
    assert by_name(rows, "consensus") == {(0, -1): pytest.approx(14.0)}
    assert by_name(rows, "drift") == {(0, -1): pytest.approx(27.0**0.5)}
    assert {row.time_s for row in rows if row.peer == -1} == {3.0}
    assert measure.rows() == []


def test_byzantine_peers_are_not_measured() -> None:
    measure = Measure(Bare(3), byzantine=(2,))
    for peer, value in enumerate((1.0, 3.0, 1e9)):
        measure.params(peer, 0, 1.0, model(value))
    rows = measure.rows()
    assert set(by_name(rows, "loss")) == {(0, 0), (0, 1)}
    assert by_name(rows, "mean_model_loss") == {(0, -1): 6.0}


def test_a_later_model_of_a_round_replaces_the_earlier() -> None:
    measure = Measure(Bare(1))
    measure.params(0, 4, 1.0, model(1.0))
    measure.params(0, 4, 2.0, model(5.0))
    assert by_name(measure.rows(), "loss") == {(4, 0): 15.0}


def test_one_model_that_all_share_is_evaluated_once() -> None:
    task = Bare(5)
    measure = Measure(task)
    shared = model(2.0)
    for peer in range(5):
        measure.params(peer, 0, 1.0, shared)
    rows = measure.rows()
    # The mean model, then the one model.
    assert task.evaluated == [1, 1]
    assert by_name(rows, "loss") == {(0, peer): 6.0 for peer in range(5)}
    assert by_name(rows, "consensus") == {(0, -1): 0.0}


def test_some_peers_stand_for_all_but_the_mean_is_everybody_s() -> None:
    measure = Measure(Bare(20), evaluated=4, seed=3)
    for peer in range(20):
        measure.params(peer, 0, 1.0, model(float(peer)))
    rows = measure.rows()
    chosen = set(by_name(rows, "loss"))
    assert len(chosen) == 4
    assert by_name(rows, "mean_model_loss") == {(0, -1): pytest.approx(28.5)}
    other = Measure(Bare(20), evaluated=4, seed=4)
    other.stacked(
        0, torch.ones(20), torch.ones(20, dtype=torch.bool), torch.zeros(20, DIM).double()
    )
    assert set(by_name(other.rows(), "loss")) != chosen


def test_stacked_models_are_measured_as_single_ones() -> None:
    present = torch.tensor([True, False, True, True])
    params = torch.stack([model(v) for v in (1.0, 9.0, 2.0, 6.0)])
    times = torch.tensor([1.0, 2.0, 3.0, 2.5])
    together, single = Measure(Bare(4), byzantine=(3,)), Measure(Bare(4), byzantine=(3,))
    for round in range(3):
        together.stacked(round, times, present, params + round)
        for peer in range(4):
            if present[peer]:
                single.params(peer, round, float(times[peer]), params[peer] + round)
    assert together.rows() == single.rows()


def test_costly_measures_are_taken_once_of_the_last_mean_model() -> None:
    asked: list[list[float]] = []

    def flat(task: object, params: torch.Tensor) -> dict[str, float]:
        asked.append(params.tolist())
        return {"flatness": 7.0}

    measure = Measure(Bare(2), of_mean=(flat,))
    for round in range(12):
        for peer in range(2):
            measure.params(peer, round, float(round), model(float(round + peer)))
    rows = measure.rows()
    assert asked == [[11.5] * DIM]
    assert by_name(rows, "flatness") == {(11, -1): 7.0}
    assert [row.round for row in rows] == sorted(row.round for row in rows)
