"""DP-BREM: sensitivity, robustness and noise as the accountant and the paper assume them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.parts.attack.alie import believable
from shoal.parts.attack.label_flip import LabelFlip
from shoal.parts.privacy.momentum_accountant import momentum_epsilon
from shoal.parts.privacy.poisson_sampling import drawn, sampled_gradient
from shoal.parts.strategy.private_momentum import PrivateMomentum, State, clipped
from shoal.parts.strategy.secure_momentum import SecureMomentum
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch, Shard
from shoal.systems.privacy._dp_brem_claims import DELTA, NOISE, ROUNDS, SIZES, P
from shoal.systems.privacy._dp_brem_secure import compared
from shoal.systems.privacy.dp_brem import ATTACKS, RULES, SYSTEM, dp_brem, epsilons
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network

CLIENTS = 5


def digits(peers: int = CLIENTS, **more: Any) -> Any:
    return Digits(peers=peers, hidden=(), train_samples=150, **more)


def step_of(task: Any, round: int = 0) -> Step:
    everybody = torch.arange(CLIENTS)
    keys = keyed.fold(keyed.key_of(4), everybody, round)
    return Step(round, task, task.shard(everybody), keys, torch.ones(CLIENTS, dtype=torch.bool))


def vectors(word: int, rows: int, dim: int) -> torch.Tensor:
    keys = keyed.grid(keyed.grid(keyed.key_of(word), rows), dim)
    return keyed.normal(keys, dtype=torch.float64)


def combined(strategy: PrivateMomentum, center: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The hub's next sum."""
    mask = torch.ones(len(rows), dtype=torch.bool)
    state = State(torch.zeros_like(center), torch.zeros_like(center), center)
    task = digits(1)
    step = Step(0, task, task.shard(0), keyed.key_of(8), torch.tensor(True))
    return strategy.combine(state, rows, mask, mask.double() / len(rows), {}, step).vector


def test_samples_are_drawn_one_by_one() -> None:
    keys = keyed.grid(keyed.key_of(1), 20_000)
    index = (torch.arange(40) + 100).expand(20_000, -1)
    found = drawn(Shard(index, torch.full((20_000,), 30)), keys, 0.2)
    # Sizes are binomial: a batch of a fixed size would have one.
    counts = torch.bincount(found.size, minlength=31)[1:13].double().numpy()
    chances = stats.binom.pmf(range(1, 13), 30, 0.2)
    assert stats.chisquare(counts, chances * counts.sum() / chances.sum()).pvalue > 1e-3
    held = torch.arange(40) < found.size.unsqueeze(-1)
    chosen = torch.zeros(20_000, 40).scatter_(1, found.index - 100, held.float())
    assert not chosen[:, 30:].any(), "what is no sample is never drawn"
    rates = chosen[:, :30].mean(0)
    assert float((rates - 0.2).abs().max()) < 4.5 * math.sqrt(0.16 / 20_000)
    both = (chosen[:, :29] * chosen[:, 1:30]).mean(0)
    assert float((both - 0.04).abs().max()) < 4.5 * math.sqrt(0.04 / 20_000)


def test_labels_go_with_their_samples() -> None:
    task = digits()
    shard = LabelFlip().poison(task, task.shard(torch.arange(CLIENTS)), keyed.key_of(0))
    found = drawn(shard, keyed.grid(keyed.key_of(2), CLIENTS), 0.5)
    assert found.labels is not None
    held = torch.arange(found.index.shape[-1]) < found.size.unsqueeze(-1)
    assert torch.equal(found.labels[held], (9 - task.y[found.index])[held])


def test_a_gradient_is_that_of_the_drawn_records_over_the_expected_number() -> None:
    task = digits()
    step = step_of(task)
    params = task.init(keyed.key_of(1)).expand(CLIENTS, -1)
    found = sampled_gradient(task, params, step.shard, step.key, 0.3, 0.5)
    for peer in range(CLIENTS):
        own = drawn(task.shard(peer), step.key[peer], 0.3)
        total = torch.zeros(task.spec.dim)
        for sample in own.index[: int(own.size)]:
            one = Batch(task.x[sample][None], task.y[sample][None], torch.tensor([True]))
            gradient = task.grad(params[peer], one)
            total += gradient * min(1.0, 0.5 / float(gradient.norm()))
        expected = total / (0.3 * int(task.shard(peer).size))
        torch.testing.assert_close(found[peer], expected, rtol=1e-4, atol=1e-6)


class Without:
    """A task in which one record's gradient is zero, and which draws the same records."""

    def __init__(self, task: Any, sample: int) -> None:
        self.task, self.image = task, task.x[sample]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def clipped_grad_sum(self, params: Any, batch: Batch, clip: float) -> Any:
        same = (batch.x == self.image).flatten(-3).all(-1)
        return self.task.clipped_grad_sum(params, replace(batch, mask=batch.mask & ~same), clip)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_record_moves_each_release_as_little_as_the_accountant_assumes(beta: float) -> None:
    """Public sums are those of the run with the record, as in adaptive composition."""
    task, p, clip = digits(), 0.2, 1.0
    strategy = PrivateMomentum(
        lr=1.0, sampling=p, record_clip=clip, client_clip=0.3, momentum=beta, noise=0.05
    )
    sensitivity, tight = clip / (p * int(task.shard(1).size)), 0.0
    heard = torch.ones(CLIENTS, dtype=torch.bool)
    for place in range(4):
        sample = int(task.shard(1).index[place])
        tasks: list[Any] = [task, Without(task, sample)]
        params = task.init(keyed.key_of(1))
        hub = strategy.init(params)
        states = [strategy.init(params.expand(CLIENTS, -1)) for _ in tasks]
        memory = 0.0
        for round in range(25):
            step = step_of(task, round)
            sums = []
            for which, here in enumerate(tasks):
                given = {"center": hub.center.expand(CLIENTS, -1)}
                work = replace(step, task=here, given=given)
                state = strategy.adopt(states[which], hub.params.expand(CLIENTS, -1), work)
                states[which], parcel = strategy.local(state, work)
                zero = torch.zeros_like(params)
                sums.append(strategy.noisy_sum(hub.center, parcel.vector, heard, zero))
            own = drawn(task.shard(1), step.key[1], p)
            bit = float(sample in own.index[: int(own.size)].tolist())
            memory = beta * memory + (1 - beta) * bit
            moved = float((sums[0] - sums[1]).norm())
            assert moved <= sensitivity * memory * (1 + 1e-4) + 1e-7
            if memory:
                tight = max(tight, moved / (sensitivity * memory))
            center = hub.center + sums[0] / CLIENTS
            hub = State(hub.params - center, hub.momentum, center)
    assert tight > 0.3, "the bound is of the right size"


@given(word=st.integers(0, 999), clip=st.floats(0.1, 3), scale=st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_clipping_brings_nothing_further_apart(word: int, clip: float, scale: float) -> None:
    a, b = scale * vectors(word, 2, 4)
    here = torch.tensor([True])
    short = clipped(a[None], clip, here) - clipped(b[None], clip, here)
    assert float(short.norm()) <= float((a - b).norm()) * (1 + 1e-12)
    assert float(clipped(a[None], clip, here).norm()) <= clip * (1 + 1e-12)


def test_without_clip_noise_and_momentum_it_is_fedsgd() -> None:
    task = digits(split="sizes")
    strategy = PrivateMomentum(
        lr=0.4, sampling=1.0, record_clip=1e6, client_clip=math.inf, momentum=0.0
    )
    step = step_of(task)
    params = task.init(keyed.key_of(1))
    _, parcel = strategy.local(strategy.init(params.expand(CLIENTS, -1)), step)
    hub = strategy.init(params)
    mask = torch.ones(CLIENTS, dtype=torch.bool)
    heard = strategy.combine(hub, parcel.vector, mask, mask.double() / CLIENTS, {}, step)
    moved = strategy.apply(hub, heard, replace(step, active=mask[0])).params
    gradients = []
    for peer in range(CLIENTS):
        shard = task.shard(peer)
        batch = next(iter(task.epoch(shard, keyed.key_of(9), int(shard.size))))
        gradients.append(task.grad(params, batch))
    expected = params - 0.4 * torch.stack(gradients).mean(0)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


@given(word=st.integers(0, 999), liars=st.integers(1, 4), length=st.floats(0.1, 1e6))
@settings(max_examples=50, deadline=None)
def test_liars_move_the_sum_by_two_clips_each_over_n(word: int, liars: int, length: float) -> None:
    strategy = PrivateMomentum(client_clip=0.5)
    rows, center = vectors(word, 9, 5), vectors(word + 1, 1, 5)[0]
    lies = rows.clone()
    lies[:liars] = length * vectors(word + 2, liars, 5)
    moved = combined(strategy, center, lies) - combined(strategy, center, rows)
    assert float(moved.norm()) <= 2 * liars * 0.5 / 9 * (1 + 1e-9)


@pytest.mark.parametrize("rule", ["centred", "median", "sign", "entries"])
def test_rows_that_are_not_finite_are_absent(rule) -> None:
    strategy = PrivateMomentum(rule=rule, client_clip=0.5)
    rows, center = vectors(1, 5, 3), torch.zeros(3, dtype=torch.float64)
    bad = torch.cat((rows, torch.full((1, 3), math.nan), torch.full((1, 3), math.inf)))
    found = combined(strategy, center, bad.double())
    torch.testing.assert_close(found, combined(strategy, center, rows))


@pytest.mark.parametrize(("rule", "share"), [("centred", 4), ("entries", 4), ("median", 1)])
def test_noise_at_the_hub_is_sized_for_one_record(rule, share: int) -> None:
    """sigma R on a sum, which is then divided by n; on a median it is not."""
    quiet = PrivateMomentum(rule=rule, record_clip=2.0)
    loud = replace(quiet, noise=0.3)
    rows, center = vectors(1, 4, 40_000), torch.zeros(40_000).double()
    noise = combined(loud, center, rows) - combined(quiet, center, rows)
    assert float(noise.std()) == pytest.approx(0.3 * 2.0 / share, rel=0.02)
    assert stats.kstest((noise / noise.std()).numpy(), "norm").pvalue > 1e-3


def test_local_noise_is_each_clients_own_and_the_hub_adds_none() -> None:
    task = digits()
    quiet = PrivateMomentum(momentum=0.0, record_clip=2.0, noise=0.0)
    loud = replace(quiet, noise=0.3, local_noise=True)
    step = step_of(task)
    start = quiet.init(task.init(keyed.key_of(1)).expand(CLIENTS, -1))
    noise = loud.local(start, step)[1].vector - quiet.local(start, step)[1].vector
    assert float(noise.std()) == pytest.approx(0.6, rel=0.05)
    assert float(torch.corrcoef(noise)[0, 1:].abs().max()) < 0.15
    rows, center = vectors(1, 4, 3), torch.zeros(3).double()
    assert torch.equal(combined(loud, center, rows), combined(quiet, center, rows))


def test_momentum_is_kept_at_the_client() -> None:
    task = digits()
    strategy = PrivateMomentum(momentum=0.75, sampling=0.5)
    params = task.init(keyed.key_of(1)).expand(CLIENTS, -1)
    state, expected = strategy.init(params), torch.zeros_like(params)
    plain = replace(strategy, momentum=0.0)
    for round in range(4):
        step = replace(step_of(task, round), given={"center": torch.zeros_like(params)})
        gradient = plain.local(plain.init(params), step)[1].vector
        expected = 0.75 * expected + 0.25 * gradient
        state, parcel = strategy.local(strategy.adopt(state, params, step), step)
        torch.testing.assert_close(parcel.vector, expected, rtol=1e-5, atol=1e-7)


EXAMPLES = [
    (cls, place) for cls in (PrivateMomentum, SecureMomentum) for place in range(len(cls.examples))
]


@pytest.mark.parametrize(("cls", "place"), EXAMPLES)
def test_every_engine_does_the_same(cls: type[PrivateMomentum], place: int) -> None:
    peers = CLIENTS + 1
    task = Digits(peers=peers, hidden=(), train_samples=120)
    method = Method(
        cls(**cls.examples[place]), task, find("exchange", "star")(peers, hub_works=False),
        find("aggregate", "mean")(), find("transform", "identity")().bind(task.spec), 3, 5.0,
        seed=2,
    )  # fmt: skip
    world = Network(peers, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))
    check_strategy(method, world, live=place == 0)


def test_without_trust_the_model_is_the_same() -> None:
    found = compared(3, rounds=3)
    assert 0 < found.gap < 1e-3
    assert found.rejected == (2,)
    assert found.short == ()
    # A coarser unit shows, so the bound is no empty one.
    assert compared(3, rounds=2, bits=4).gap > 1e-3


def test_arms_have_the_noise_that_their_epsilon_takes() -> None:
    for (epsilon, beta), s in NOISE.items():
        spent = momentum_epsilon(s, P, ROUNDS, beta, DELTA)
        assert 0.99 * epsilon <= spent <= epsilon
    task = Digits(peers=21, hidden=(), seed=1)
    assert sorted(set(task.shard(torch.arange(21)).size.tolist())) == list(SIZES)
    for name, arm in SYSTEM.arms.items():
        strategy = PrivateMomentum(**arm.set)
        rule = name.split(",")[0]
        assert (strategy.noise == 0) == rule.startswith("free")
        assert strategy.local_noise == RULES[rule].get("local_noise", False)


def test_builder_meets_its_target() -> None:
    arm = dp_brem([50, 80], target_epsilon=4.0, delta=1e-3, rounds=60)
    spent = epsilons([50, 80], arm.set["noise"], 0.1, 60, 0.9, 1e-3)
    assert spent[0] == pytest.approx(4.0, rel=1e-6)
    assert spent[1] < 3.0
    assert arm.scenario["peers"] == 3
    assert dp_brem([50], sigma=0.5).set["noise"] == 0.5


def test_a_delta_that_allows_to_publish_a_record_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="delta=0.02 is not below 1 / 50 records"):
        dp_brem([50, 80], sigma=1.0, delta=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dp_brem([50]), "give one of them"),
        (lambda: dp_brem([50], sigma=1.0, target_epsilon=1.0), "give one of them"),
        (lambda: dp_brem([], sigma=1.0), "need a client"),
        (lambda: dp_brem([50], sigma=1.0, p=0.0), "sampling=0.0"),
        (lambda: dp_brem([50], target_epsilon=1.0, p=1.5), "p=1.5"),
        (lambda: dp_brem([50], sigma=1.0, C=0.0), "client_clip=0.0"),
        (lambda: dp_brem([50], target_epsilon=1e-9), "epsilon=1e-09; from"),
        (lambda: PrivateMomentum(momentum=1.0), "momentum=1.0"),
        (lambda: PrivateMomentum(record_clip=math.inf), "record_clip=inf"),
        (lambda: PrivateMomentum(noise=-1.0), "noise=-1.0"),
        (lambda: PrivateMomentum(rule="sign", noise=0.1), "one record may turn every sign"),
        (lambda: PrivateMomentum(records=0), "records=0; need at least 1"),
        (lambda: PrivateMomentum(secrets="seed"), "secrets='seed'"),  # type: ignore[arg-type]
        (lambda: PrivateMomentum(rule="mean"), "rule='mean'"),  # type: ignore[arg-type]
        (lambda: SecureMomentum(client_clip=math.inf), "need the rule 'centred'"),
        (lambda: SecureMomentum(noise=0.0), "deviation=0.0"),
        (lambda: SecureMomentum(threshold=0), "threshold=0"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_alie_goes_four_times_as_far_as_a_majority_believes() -> None:
    assert ATTACKS["alie"]["z"] == pytest.approx(-4 * believable(15, 5), abs=1e-3)
