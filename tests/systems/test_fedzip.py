"""FedZip in training: bytes on the wire, error feedback, and the measures behind its claims."""

from __future__ import annotations

import math

import pytest
import torch

import shoal
from shoal.lab.rows import Rows
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Scenario
from shoal.parts.transform.error_feedback import ErrorFeedback
from shoal.parts.transform.fedzip import Compressor, FedZip
from shoal.systems.compression import fedzip as system
from shoal.world.record import Row, Run

WORLD = Scenario(
    "small", peers=4, rounds=3, exchange={"name": "star"},
    task={"name": "digits", "split": "dirichlet", "alpha": 0.5, "hidden": [40, 30]},
)  # fmt: skip
# 64-40-30-10: three weight tensors and three biases; 300 weights are more than 256 entries.
DIM = 64 * 40 + 40 + 40 * 30 + 30 + 30 * 10 + 10


def test_settings_reach_the_transform_with_and_without_feedback() -> None:
    plain = system.fedzip(z=0.2, clusters=5)
    assert isinstance(plain, FedZip)
    assert (plain.z, plain.clusters, plain.raw_entries) == (0.2, 5, 256)
    wrapped = system.fedzip(z=0.2, feedback=True)
    assert isinstance(wrapped, ErrorFeedback)
    assert dict(wrapped.settings)["z"] == 0.2
    for wrong in ({"z": 0.0}, {"z": 1.5}, {"codec": "zip"}, {"z": 2.0, "feedback": True}):
        with pytest.raises(ValueError, match="fedzip"):
            system.fedzip(**wrong)


@pytest.mark.parametrize("feedback", [False, True])
def test_engines_send_the_same_bytes_and_strict_wire_packs_them(feedback: bool) -> None:
    arm = shoal.Arm(
        system="fedzip", set={"z": 0.05, "feedback": feedback},
        scenario={"engine": {"strict": True}},
    )  # fmt: skip
    lockstep = shoal.run(arm, WORLD, engine="lockstep")
    event = shoal.run(arm, WORLD, engine="event")
    assert lockstep.bytes_sent == event.bytes_sent
    assert lockstep.bytes_by_kind == event.bytes_by_kind
    for peer in (0, 1):
        torch.testing.assert_close(lockstep.final[peer], event.final[peer], rtol=1e-4, atol=1e-5)


def test_updates_shrink_and_models_do_not() -> None:
    raw = shoal.run("fedavg-updates", WORLD)
    small = shoal.run(shoal.Arm(system="fedzip", set={"raw_entries": 0}), WORLD)
    assert raw.bytes_by_kind["Model"] == small.bytes_by_kind["Model"]
    assert raw.bytes_by_kind["Update"] >= 3 * 3 * 4 * DIM
    assert raw.bytes_by_kind["Update"] > 40 * small.bytes_by_kind["Update"]


def test_the_card_runs_in_its_own_scenario() -> None:
    world = scenario_of("fedzip").with_settings({"rounds": 2, "task.hidden": [16]})
    for arm in (shoal.load("fedzip").arms["z=0.001 feedback"], shoal.Arm(system="fedzip")):
        run = shoal.run(shoal.Arm(system="fedzip", set=arm.set), world)
        assert run.bytes_by_kind["Update"] > 0


def test_named_tensors_through_the_compressor() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = {
        "conv": torch.randn(8, 3, 5, 5, generator=generator),
        "bias": torch.randn(8, generator=generator),
    }
    zip = Compressor(FedZip(z=0.05))
    assert zip.stats == ()
    data = zip.encode(delta)
    made = zip.stats
    back = zip.decode(data, delta)
    assert zip.stats == made
    assert [each.name for each in made] == ["conv", "bias"]
    assert len(data) == 6 + sum(each.size_bytes for each in made)
    assert torch.equal(back["bias"], delta["bias"])
    assert int(back["conv"].count_nonzero()) == made[0].nonzero <= 30
    # What is left of each cluster is its mean, so the message of the result is itself.
    assert torch.equal(zip.decode(Compressor(FedZip(z=0.05)).encode(back), delta)["conv"],
                       back["conv"])  # fmt: skip


def test_the_compressor_refuses_what_it_cannot_give_back() -> None:
    delta = {"w": torch.arange(600.0).view(20, 30)}
    zip = Compressor()
    data = zip.encode(delta)
    for broken in (data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:], b""):
        with pytest.raises(ValueError, match="fedzip"):
            zip.decode(broken, delta)
    with pytest.raises(ValueError, match="layout"):
        zip.decode(data, {"w": torch.zeros(30, 20)})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="'w'"):
            zip.encode({"w": torch.full((20, 30), value)})


@pytest.mark.parametrize(("share", "bits"), [(0.3, 1.18), (0.01, 0.0908), (0.0028, 0.0306),
                                             (0.001, 0.0124)])  # fmt: skip
def test_entropy_of_the_source(share: float, bits: float) -> None:
    assert system.entropy_bits(share) == pytest.approx(bits, rel=0.005)
    x = system.three_symbols(share, seed=1, entries=100_000)
    assert int(x.count_nonzero()) == round(share * 100_000)
    assert set(x.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float(x.sum())) < 4 * math.sqrt(share * 100_000)


def test_a_real_update_has_the_layers_of_the_model_and_beats_deflate() -> None:
    update = system.real_update(0)
    assert sum(tensor.numel() for tensor in update.values()) == 85_002
    assert any(bool(tensor.any()) for tensor in update.values())
    rows = Rows({}, (), (0,))
    assert system.against_deflate(rows)[0] < 1
    assert system.against_single_codes(rows)[0] <= 1


def fake(curves: dict[str, list[float]], updates: dict[str, int]) -> Rows:
    """Runs with an evaluation per round; each round takes 1,000 bytes down and `updates` up."""
    runs = {}
    for arm, accuracies in curves.items():
        up, rows = updates[arm], []
        for i, accuracy in enumerate(accuracies):
            rows.append(Row("accuracy", accuracy, float(i), i))
            rows.append(Row("bytes_sent", float((1000 + up) * (i + 1)), float(i), i))
        kinds = {"Update": up * len(accuracies), "Model": 1000 * len(accuracies)}
        runs[arm, 0] = Run(engine="fake", seed=0, peers=10, rows=rows, bytes_by_kind=kinds)
    return Rows(runs, tuple(curves), (0,))


def card(**changed: tuple[list[float], int]) -> Rows:
    """Every arm of the card; the named ones with their own curve and bytes."""
    arms = {arm: ([0.1, 0.5, 0.8], 100) for arm in system.SYSTEM.arms}
    arms["raw"], arms["8-bit"] = ([0.3, 0.6, 0.9], 4000), ([0.3, 0.6, 0.9], 1000)
    arms |= changed
    return fake({a: c for a, (c, _) in arms.items()}, {a: u for a, (_, u) in arms.items()})


def test_only_settings_that_save_a_factor_of_100_count() -> None:
    assert math.isnan(system.hundredfold(card())[0])
    rows = card(**{"z=0.2": ([0.9] * 3, 100), "z=0.01": ([0.8, 0.85, 0.88], 40)})
    assert system.hundredfold(rows)[0] == pytest.approx(-0.02)
    assert system.uplink_ratio(rows, "z=0.01", 0) == pytest.approx(100)


def test_top_k_must_be_allowed_as_many_bytes() -> None:
    assert system.over_top_k(card())[0] == 0.0
    ahead = card(**{"top-k 0.01": ([0.1, 0.5, 0.85], 100)})
    assert system.over_top_k(ahead)[0] == pytest.approx(-0.05)
    unfair = card(**{"top-k 0.01": ([0.1, 0.5, 0.6], 99)})
    assert math.isnan(system.over_top_k(unfair)[0])


def test_curves_are_compared_at_equal_uplink_bytes() -> None:
    rows = card(**{"z=0.2": ([0.5, 0.7, 0.7], 500)})
    assert system.uplink_curve(rows, "z=0.2", 0) == [(500.0, 0.5), (1000.0, 0.7), (1500.0, 0.7)]
    # 8-bit has 0.3 after 1,000 bytes; its later points lie beyond what the sweep sends.
    assert system.over_eight_bits(rows)[0] == pytest.approx(0.5)
    slow = card(**{arm: ([0.1, 0.1, 0.2], 400) for arm in system.SWEEP})
    assert system.over_eight_bits(slow)[0] == pytest.approx(-0.2)


def test_comparisons_with_other_codecs_keep_to_their_bytes() -> None:
    rows = card(dgc=([0.9] * 3, 50), signs=([0.7] * 3, 100), **{"z=0.01": ([0.85] * 3, 50)})
    assert system.over_deep_gradient(rows)[0] == pytest.approx(-0.05)
    assert system.over_signs(rows)[0] == pytest.approx(0.15)
