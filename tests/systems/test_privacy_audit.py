"""The audit: scores against closed forms, bugs that are found, and claims that are not exceeded."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.build import build
from shoal.lab.rows import Rows
from shoal.parts.privacy.audit_bounds import gaussian_epsilon
from shoal.parts.strategy.private_steps import PrivateSteps
from shoal.rounds.strategy import Step
from shoal.systems.privacy import audit
from shoal.systems.privacy._audit_momentum import momentum_of, momentum_runs
from shoal.systems.privacy._audit_training import Canaries, many_runs, one_run
from shoal.systems.privacy.audit import momentum_claim, planted, privacy_audit
from shoal.tensor import keyed
from shoal.world.record import Row, Run

WORLD = replace(discover.scenario("privacy.digits_audit"), rounds=6)
KEY = keyed.key_of(5, "audit")


@pytest.fixture(scope="module")
def world() -> Canaries:
    return Canaries.of(build(WORLD).task, 12, 40)


def numbers(run: Run) -> dict[str, float]:
    return {row.name: row.value for row in run.rows}


@pytest.mark.parametrize(
    ("settings", "uses"),
    [
        ({"noise": 3.0, "sampling": 1.0}, 8),
        ({"noise": 2.0, "sampling": 0.25, "draws": "parts"}, 2),
        # The first term of a tree of four: three nodes, twice.
        ({"noise": 3.0, "sampling": 0.25, "draws": "parts", "mechanism": "tree"}, 6),
    ],
)
def test_the_attack_is_the_best_there_is_on_gaussian_releases(
    world: Canaries, settings: dict, uses: int
) -> None:
    """Log-likelihood ratios of `uses` releases, each of which the canary moves by one clip: they
    are normal, with means of half of the squared shift, up and down."""
    strategy = PrivateSteps(lr=0.5, records=12, **settings)
    scores = many_runs(world, strategy, 8, 1000, KEY)
    square = uses / strategy.noise**2
    for value, sign in ((True, 1), (False, -1)):
        some = scores.steps[scores.included == value]
        error = math.sqrt(square / len(some))
        assert some.mean() == pytest.approx(sign * square / 2, abs=5 * error)
        assert some.std() == pytest.approx(math.sqrt(square), rel=0.12)
        assert stats.kstest((some - sign * square / 2) / math.sqrt(square), "norm").pvalue > 1e-3
    assert stats.binomtest(int(scores.included.sum()), 1000).pvalue > 1e-3
    # What the ledger claims is above the exact curve of such releases, and near it.
    exact = gaussian_epsilon(math.sqrt(square), 1e-5)
    assert exact <= strategy.epsilon(8, 1e-5) <= 1.25 * exact


def test_scores_of_sampled_records_are_likelihood_ratios(world: Canaries) -> None:
    """E exp(score) is 1 without the canary, and E exp(-score) is 1 with it."""
    strategy = PrivateSteps(lr=0.5, records=12, noise=1.5, sampling=0.3)
    scores = many_runs(world, strategy, 6, 2000, KEY)
    for some in (scores.steps[~scores.included], -scores.steps[scores.included]):
        ratios = np.exp(some)
        assert ratios.mean() == pytest.approx(1.0, abs=5 * ratios.std() / math.sqrt(len(ratios)))
    assert scores.steps[scores.included].mean() > 0 > scores.steps[~scores.included].mean()


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_the_attack_on_momentum_is_the_best_there_is(world: Canaries, beta: float) -> None:
    """A record that is in all rounds moves release t by 1 - beta^t of what one can, in the same
    direction where models hardly move."""
    strategy = momentum_of(2.0, 1.0, beta, 12, lr=1e-4)
    scores = momentum_runs(world, strategy, 8, 1000, KEY)
    square = sum((1 - beta**t) ** 2 for t in range(1, 9)) / 2.0**2
    for value, sign in ((True, 1), (False, -1)):
        some = scores.steps[scores.included == value]
        assert some.mean() == pytest.approx(
            sign * square / 2, abs=5 * math.sqrt(square / len(some))
        )
        assert some.std() == pytest.approx(math.sqrt(square), rel=0.12)
        assert stats.kstest((some - sign * square / 2) / math.sqrt(square), "norm").pvalue > 1e-3
    exact = gaussian_epsilon(math.sqrt(square), 1e-5)
    claimed = momentum_claim(2.0, 1.0, 8, beta, 1e-5, "none")
    assert exact <= claimed <= 1.25 * exact
    wrong = momentum_claim(2.0, 1.0, 8, beta, 1e-5, "one release")
    assert wrong == pytest.approx(claimed, rel=0.02) if beta == 0 else wrong < 0.4 * exact


def test_whether_a_canary_is_there_does_not_show_in_the_number_of_records(world: Canaries) -> None:
    strategy = replace(momentum_of(1.0, 1.0, 0.5, 12, lr=1e-4), noise=0.0)
    one = replace(world, canaries=world.canaries[:1], y=world.y[:1])
    shard = one.shard(torch.tensor([[True], [False]]))
    params = world.task.init(KEY).expand(2, -1)
    step = Step(0, world.task, shard, keyed.grid(KEY, 2), torch.ones(2).bool())
    _, parcel = strategy.local(strategy.init(params), step)
    own = one.gradients(params, slice(0, 1), 1.0)[0]
    torch.testing.assert_close(parcel.vector[0] - parcel.vector[1], own / 12 / 2)


def test_without_noise_every_coin_is_told(world: Canaries) -> None:
    strategy = PrivateSteps(lr=0.5, records=12, noise=0.0)
    many = many_runs(world, replace(strategy, sampling=1.0), 3, 60, KEY)
    assert (many.steps[many.included] > many.steps[~many.included].max()).all()
    once = one_run(world, replace(strategy, sampling=1.0), 6, KEY)
    assert ((once.steps > 0.5) == once.included).all()
    assert np.abs(once.steps - once.included).max() < 0.1


def test_runs_do_not_depend_on_how_many_there_are(world: Canaries) -> None:
    strategy = PrivateSteps(lr=0.5, records=12, noise=1.0, sampling=0.5)
    few, many = (many_runs(world, strategy, 3, runs, KEY) for runs in (10, 30))
    assert (few.included == many.included[:10]).all()
    np.testing.assert_allclose(few.steps, many.steps[:10], rtol=1e-3, atol=1e-4)


def test_canaries_are_others_samples_with_other_labels(world: Canaries) -> None:
    assert not set(world.canaries.tolist()) & set(world.others.tolist())
    assert (world.task.y[world.canaries] != world.y).all()
    coins = torch.tensor([[True, False] * 20, [False] * 40])
    shard = world.shard(coins)
    assert shard.size.tolist() == [32, 12]
    assert shard.labels is not None
    assert shard.index[0, 12:32].tolist() == world.canaries[::2].tolist()
    assert shard.labels[0, 12:32].tolist() == world.y[::2].tolist()
    assert shard.labels[1, :12].tolist() == world.task.y[world.others].tolist()


def test_bright_canaries_hardly_overlap() -> None:
    task = build(WORLD).task
    world = Canaries.bright(task, 12, 130)
    assert len(world.task.x) == len(task.x) + 130
    x = world.task.x[world.canaries].flatten(1)
    assert ((x > 0).sum(1) == 1).all()
    pairs = {(int(row.argmax()), int(label)) for row, label in zip(x, world.y, strict=True)}
    assert len(pairs) == 130
    assert world.task.x[world.others].equal(task.x[world.others])
    params = world.task.init(keyed.key_of(1)).unsqueeze(0)
    own = world.gradients(params, slice(0, 130), 1.0).double()
    cosines = (own @ own.T - torch.eye(130)).abs()
    pixel = x.argmax(1)
    # Of different features the bias alone is shared.
    assert cosines[pixel[:, None] != pixel].max() < 0.02
    real = Canaries.of(task, 12, 130)
    own = real.gradients(params, slice(0, 130), 1.0).double()
    assert (own @ own.T - torch.eye(130)).abs().mean() > 10 * cosines.mean()


def test_planted_bugs_are_what_they_say() -> None:
    claimed = PrivateSteps(noise=2.0, sampling=0.1)
    assert planted(claimed, "none") == claimed
    assert planted(claimed, "less noise") == replace(claimed, noise=0.5)
    assert planted(claimed, "all records").sampling == 1.0
    bare = planted(claimed, "no clipping")
    assert bare.clip > 1e5
    assert bare.clip * bare.noise == pytest.approx(2.0)


LONG = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {"bug": "all records", "noise": 1.5, "sampling": 0.1, "runs": 600},
        pytest.param({"bug": "less noise", "noise": 8.0, "runs": 3000}, marks=LONG),
        pytest.param({"bug": "no clipping", "noise": 12.0, "runs": 1500}, marks=LONG),
    ],
)
def test_bugs_are_found_and_gone_without_them(settings: dict) -> None:
    world = replace(WORLD, rounds=20)
    wrong = numbers(privacy_audit(world, canaries=30, **settings))
    assert wrong["bound"] > wrong["claimed"]
    right = numbers(privacy_audit(world, canaries=30, **{**settings, "bug": "none", "runs": 300}))
    assert right["claimed"] == wrong["claimed"]
    assert max(right[name] for name in audit.BOUNDS) <= right["claimed"]


def test_a_run_repeats_and_tells_what_its_card_needs() -> None:
    one, two = (privacy_audit(WORLD, noise=3.0, runs=200, canaries=40) for _ in range(2))
    assert one.rows == two.rows
    assert set(numbers(one)) == {"claimed", *audit.BOUNDS, "accuracy"}
    other = privacy_audit(replace(WORLD, seed=1), noise=3.0, runs=200, canaries=40)
    assert numbers(other)["bound"] != numbers(one)["bound"] or other.rows != one.rows
    free = numbers(privacy_audit(WORLD, noise=0.0, runs=200, canaries=40))
    assert free["claimed"] == math.inf
    assert free["bound"] > 2
    assert free["one_run_bound"] > 1
    parts = privacy_audit(WORLD, noise=3.0, runs=100, sampling=0.25, draws="parts", canaries=40)
    assert numbers(parts)["one_run_bound"] == 0.0


def made(arms: dict[str, dict[str, float]]) -> Rows:
    runs = {
        (arm, 0): Run("study", 0, 2, rows=[Row(name, value, 0.0) for name, value in each.items()])
        for arm, each in arms.items()
    }
    return Rows(runs, arms, (0,))


def test_claims_measure_what_they_say() -> None:
    right = {"claimed": 2.0, "bound": 0.5, "gaussian_bound": 1.5, "loss_bound": 0.0}
    wrong = {"claimed": 1.0, "bound": 1.2, "one_run_bound": 1.3, "gaussian_bound": 3.0}
    arms = {arm: dict(right) for arm in audit.RIGHT} | {arm: dict(wrong) for arm in audit.WRONG}
    assert audit.worst_excess(made(arms))[0] == pytest.approx(-0.5)
    assert audit.least_found(made(arms))[0] == pytest.approx(0.2)
    assert audit.least_found_once(made(arms))[0] == pytest.approx(0.3)
    assert audit.share_proved(made(arms))[0] == pytest.approx(0.75)
    arms["tree"]["one_run_bound"] = 2.5
    arms["no clipping"]["bound"] = 0.4
    assert audit.worst_excess(made(arms))[0] == pytest.approx(0.5)
    assert audit.least_found(made(arms))[0] == pytest.approx(-0.6)
    bars = audit.proved_bars(made(arms))
    assert bars["one_run_bound"][0] == ("tree", 2.5)
    missing = Rows({}, tuple(arms), (0,))
    assert math.isnan(audit.worst_excess(missing)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bug": "typing"}, "bug='typing'; need one of none, less noise"),
        ({"runs": 4}, "runs=4"),
        ({"records": 5000}, "5000 records and 1 canaries"),
        ({"canaries": 5000}, "5000 canaries; need samples of real numbers"),
        ({"records": 21, "sampling": 0.1, "draws": "parts"}, "a multiple of 10"),
        ({"bug": "one release"}, "nothing else can have"),
        ({"mechanism": "momentum", "bug": "no clipping"}, "'poisson' and no bug"),
        ({"mechanism": "momentum", "draws": "parts", "sampling": 0.1}, "momentum needs draws"),
    ],
)
def test_errors_name_the_setting(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        privacy_audit(WORLD, **settings)


def test_a_world_without_canaries_is_refused() -> None:
    with pytest.raises(UsageError, match="set peers = 2"):
        privacy_audit(replace(WORLD, peers=1))
    with pytest.raises(UsageError, match="task = 'digits'"):
        privacy_audit(replace(WORLD, task=None))
    parts = PrivateSteps(sampling=0.25, draws="parts", records=12)
    with pytest.raises(UsageError, match="records that are drawn"):
        one_run(Canaries.of(build(WORLD).task, 12, 4), parts, 2, KEY)
