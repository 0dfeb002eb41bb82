"""Secret draws: other ones each time, of the same law, wherever noise is to protect somebody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from shoal import parts
from shoal.base.errors import UsageError
from shoal.parts.privacy.poisson_sampling import drawn
from shoal.parts.privacy.secret_keys import draw_keys
from shoal.parts.privacy.tree_noise import TreeNoise
from shoal.parts.strategy.private_momentum import PrivateMomentum, State
from shoal.parts.strategy.private_steps import PrivateSteps
from shoal.parts.strategy.secure_momentum import SecureMomentum
from shoal.parts.tasks.digits import Digits
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard
from shoal.tensor import keyed

PEERS = 3


def step_of(task: Digits, round: int = 0) -> Step:
    keys = keyed.fold(keyed.key_of(5), torch.arange(PEERS), "round", round)
    return Step(round, task, task.shard(torch.arange(PEERS)), keys, torch.ones(PEERS).bool())


def test_secret_keys_are_uniform_and_never_the_same() -> None:
    key = keyed.grid(keyed.key_of(1), 3)
    first, second = (draw_keys(key, 4000, "system") for _ in range(2))
    assert first.shape == (3, 4000)
    assert first.dtype == torch.int64
    assert not (first == second).any()
    assert stats.kstest(keyed.uniform(first).flatten().numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(keyed.normal(second).double().flatten().numpy(), "norm").pvalue > 1e-4
    assert draw_keys(key, 5).equal(keyed.grid(key, 5))
    assert draw_keys(key[:0], 5, "system").shape == (0, 5)


NOISY: dict[str, dict[str, Any]] = {
    "clip_and_noise": {"clip": 2.0, "noise_multiplier": 0.5},
    "clip_entries": {"clip": 2.0, "noise": 1.0},
    "discrete_gaussian": {"clip": 2.0, "noise_multiplier": 0.5, "unit": 0.01},
    "rqm": {}, "pbm": {},
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_messages_with_secret_noise_differ_and_have_its_law(name: str) -> None:
    codec = parts.find("transform", name)(**NOISY[name])
    secret = replace(codec, secrets="system")
    x = torch.full((2000,), 0.02)
    key = keyed.key_of(4)

    def sent(codec: Any) -> torch.Tensor:
        return codec.decode(codec.encode(x, None, key)[0])

    assert sent(codec).equal(sent(codec))
    first, second = sent(secret), sent(secret)
    assert not first.equal(second)
    assert not first.equal(sent(codec))
    assert stats.ks_2samp(first.numpy(), sent(codec).numpy()).pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.15
    with pytest.raises(UsageError, match="secrets='seed'; need 'run'"):
        replace(codec, secrets="seed")


def test_records_are_drawn_in_secret() -> None:
    shard = Shard(torch.arange(1000), torch.tensor(1000))
    key = keyed.key_of(2)
    sizes = [int(drawn(shard, key, 0.3, "system").size) for _ in range(50)]
    assert len(set(sizes)) > 5
    assert stats.binomtest(sum(sizes), 50_000, 0.3).pvalue > 1e-4
    first, second = (drawn(shard, key, 0.3, "system") for _ in range(2))
    assert set(first.index[: first.size].tolist()) != set(second.index[: second.size].tolist())


@pytest.mark.parametrize(
    "settings", [{}, {"draws": "parts", "sampling": 0.5, "mechanism": "tree"}]
)  # fmt: skip
def test_private_steps_with_secret_draws(settings: dict) -> None:
    task = Digits(peers=PEERS, hidden=(), train_samples=90)
    strategy = PrivateSteps(noise=2.0, clip=0.5, lr=1.0, records=30, **settings)
    secret, quiet = replace(strategy, secrets="system"), replace(strategy, noise=0.0)
    state, step = strategy.init(task.init(keyed.key_of(1)).expand(PEERS, -1).clone()), step_of(task)
    known = [strategy.local(state, step)[1].vector for _ in range(2)]
    hidden = [secret.local(state, step)[1].vector for _ in range(2)]
    assert known[0].equal(known[1])
    assert not torch.isclose(hidden[0], hidden[1], atol=1e-6).all(-1).any()
    assert not torch.isclose(hidden[0], known[0], atol=1e-6).all(-1).any()
    if settings:
        # The same records: what is left is noise of 2.0 * 0.5.
        noise = (quiet.local(state, step)[1].vector - hidden[0]) * (0.5 * 30)
        assert float(noise.std()) == pytest.approx(1.0, rel=0.05)
    assert TreeNoise(4, 1.0, "system").secrets == "system"


def test_the_hub_s_noise_in_secret() -> None:
    task = Digits(peers=PEERS, hidden=(), train_samples=90)
    params = task.init(keyed.key_of(1)).expand(PEERS, -1).clone()
    rows = torch.zeros(PEERS, 4, params.shape[-1])
    mask = torch.ones(PEERS, 4, dtype=torch.bool)
    zero = torch.zeros_like(params)
    state, share = State(params, zero, zero), mask.float() / 4

    def heard(strategy: PrivateMomentum) -> torch.Tensor:
        return strategy.combine(state, rows, mask, share, {}, step_of(task)).vector

    known, secret = PrivateMomentum(noise=4.0), PrivateMomentum(noise=4.0, secrets="system")
    assert heard(known).equal(heard(known))
    first, second = heard(secret), heard(secret)
    assert not (first == second).any(-1).all()
    assert float(torch.cat((first, second)).std()) == pytest.approx(1.0, rel=0.05)
    state, step = known.init(params), step_of(task)
    assert not secret.local(state, step)[1].vector.equal(secret.local(state, step)[1].vector)
    with pytest.raises(UsageError, match="shares and noise are drawn by key"):
        SecureMomentum(secrets="system")
