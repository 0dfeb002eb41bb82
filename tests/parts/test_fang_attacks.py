"""The attacks on Krum and on trimmed means: they do what they are for, and no less hidden."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts.aggregate.krum import Krum
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.parts.attack.krum_attack import KrumAttack
from shoal.parts.attack.trimmed_mean_attack import TrimmedMeanAttack
from shoal.rounds.attack import View
from shoal.tensor import keyed

KEY = keyed.key_of(2, "fang")


def honest(n: int = 12, dim: int = 20, worlds: int = 3) -> torch.Tensor:
    keys = keyed.grid(keyed.grid(keyed.grid(KEY, worlds), n), dim)
    middle = keyed.normal(keyed.grid(keyed.grid(keyed.fold(KEY, "middle"), worlds), dim))
    return (3.0 * middle.unsqueeze(1) + keyed.normal(keys)).double()


def sent(attack, x: torch.Tensor, liars: int) -> torch.Tensor:
    return attack(View(x, x[..., :liars, :], 0), keyed.grid(KEY, len(x)))


@pytest.mark.parametrize("liars", [2, 4])
def test_krum_takes_what_the_attack_on_krum_sends(liars: int) -> None:
    x = honest()
    lies = sent(KrumAttack(), x, liars)
    rows = torch.cat((x, lies), -2)
    chosen = Krum(liars)(rows, mask=torch.ones(rows.shape[:-1], dtype=torch.bool))
    torch.testing.assert_close(chosen, lies[:, 0])
    # Backwards in every coordinate, by the same in all.
    mean = x.mean(-2)
    step = (mean - lies[:, 0]) * mean.sign()
    assert (step > 0).all()
    torch.testing.assert_close(step, step[:, :1].expand_as(step))


def test_twice_as_far_krum_would_not_take_it() -> None:
    x, liars = honest(), 4
    mean = x.mean(-2, keepdim=True)
    farther = mean + 2.0 * (sent(KrumAttack(), x, liars) - mean)
    rows = torch.cat((x, farther), -2)
    chosen = Krum(liars)(rows, mask=torch.ones(rows.shape[:-1], dtype=torch.bool))
    # The search halves, so twice its strength was refused; unless the first bound was taken.
    assert not torch.isclose(chosen, farther[:, 0]).all(-1).any()


def test_a_trimmed_mean_is_pulled_beyond_what_absence_would_do() -> None:
    x, liars = honest(), 3
    lies = sent(TrimmedMeanAttack(), x, liars)
    least, largest, sign = x.amin(-2), x.amax(-2), x.mean(-2).sign()
    for lie in lies.unbind(-2):
        assert torch.where(sign > 0, lie <= least, lie >= largest).all()
    assert not torch.equal(lies[:, 0], lies[:, 1])
    rows = torch.cat((x, lies), -2)
    mask = torch.ones(rows.shape[:-1], dtype=torch.bool)
    pulled = TrimmedMean(liars)(rows, mask=mask)
    calm = TrimmedMean(liars)(x, mask=mask[..., :12])
    assert ((calm - pulled) * sign > 0).all()


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [((2.0, 4.0), 1.0, 2.0), ((-1.0, 4.0), -2.0, -1.0), ((-2.0, -4.0), -2.0, -1.0),
     ((1.0, -4.0), 1.0, 2.0)],
)  # fmt: skip
def test_lies_lie_between_the_edge_and_its_double_or_half(values, low: float, high: float) -> None:
    x = torch.tensor(values).view(1, 2, 1).expand(1, 2, 50).contiguous()
    lies = sent(TrimmedMeanAttack(), x, 1)
    assert float(lies.min()) >= low
    assert float(lies.max()) <= high
    assert float(lies.std()) > 0.1


def test_one_honest_peer_that_diverged_blinds_nobody() -> None:
    x = honest()
    broken = x.clone()
    broken[:, 0] = math.inf
    for attack in (KrumAttack(), TrimmedMeanAttack()):
        lies = sent(attack, broken, 2)
        assert lies.isfinite().all()
        torch.testing.assert_close(
            lies, attack(View(x[:, 1:], x[:, :2], 0), keyed.grid(KEY, len(x)))
        )
    nobody = torch.full_like(x, math.nan)
    assert sent(TrimmedMeanAttack(), nobody, 2).isfinite().all()
    assert sent(KrumAttack(), nobody, 2).isfinite().all()


def test_bad_settings() -> None:
    for b in (1.0, 0.5, -2.0, math.nan):
        with pytest.raises(UsageError, match="trimmed_mean_attack: b="):
            TrimmedMeanAttack(b)
