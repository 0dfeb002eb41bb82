"""Membership by losses: against a loop over pairs, on models that know their data by heart."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts.measure.membership import Membership
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.quadratics import Quadratics
from shoal.rounds.task import Batch
from shoal.tensor import keyed


def trained(task: Digits, steps: int) -> torch.Tensor:
    params = task.init(keyed.key_of(0))
    own = task.shard(torch.arange(task.peers))
    index = torch.cat([own.index[p, : int(own.size[p])] for p in range(task.peers)])
    batch = Batch(task.x[index], task.y[index], torch.ones(len(index)).bool())
    for _ in range(steps):
        params = params - 0.5 * task.grad(params, batch)
    return params


def test_numbers_are_those_of_all_pairs() -> None:
    task = Digits(peers=3, train_samples=40, hidden=(16,))
    params = trained(task, 60)

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(task.module, task.spec.views(params), (x,))
        return torch.nn.functional.cross_entropy(output, y, reduction="none")

    own = task.shard(torch.arange(3))
    index = torch.cat([own.index[p, : int(own.size[p])] for p in range(3)])
    members, others = losses(task.x[index], task.y[index]), losses(task.test_x, task.test_y)
    below = (members[:, None] < others[None]).double().mean()
    found = Membership(false_positives=0.1)(task, params)
    assert found["membership_auc"] == pytest.approx(float(below), abs=1e-4)
    threshold = others.sort().values[36]
    expected = float((members < threshold).double().mean())
    assert found["membership_tpr"] == pytest.approx(expected, abs=0.03)


def test_what_is_known_by_heart_is_told_and_what_was_not_learned_is_not() -> None:
    task = Digits(peers=2, train_samples=30, hidden=(64,))
    learned = Membership()(task, trained(task, 400))
    fresh = Membership()(task, trained(task, 0))
    assert learned["membership_auc"] > 0.75
    assert abs(fresh["membership_auc"] - 0.5) < 0.12
    # A model that says the same of everything tells nothing: ties count half.
    assert Membership()(task, torch.zeros(task.spec.dim)) == {
        "membership_auc": 0.5, "membership_tpr": 0.0,
    }  # fmt: skip


def test_poisoned_labels_are_those_that_were_learned() -> None:
    noisy = Digits(peers=2, train_samples=30, hidden=(64,), label_noise=0.5)
    found = Membership()(noisy, trained(noisy, 0))
    assert 0 < found["membership_auc"] < 1


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"false_positives=1\.0"):
        Membership(false_positives=1.0)
    with pytest.raises(UsageError, match="Quadratics has no samples"):
        Membership()(Quadratics(peers=2), torch.zeros(6))
