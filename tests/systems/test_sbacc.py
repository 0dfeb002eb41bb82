"""SBACC: any module over coded shares, in virtual time and on sockets; the trials behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.explore import Trial, generate
from shoal.lab.fuzz import target
from shoal.lab.launch import launch
from shoal.lab.rows import Rows
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Scenario
from shoal.parts.coding.berrut_code import BerrutCode
from shoal.parts.coding.coded_inference import CodedInference
from shoal.systems.coding import _sbacc_claims as measured
from shoal.systems.coding import sbacc_trials as trials
from shoal.systems.coding.sbacc import SBACC, everything_answered_is_near, shares_are_shares
from shoal.systems.coding.sbacc_trials import Point, sbacc_trials
from shoal.tensor.threads import one_thread
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

WORKERS = 15
CODE = BerrutCode(2, WORKERS, code_dim=7)
NETWORK = Network(WORKERS + 1, links=Links(latency_s=0.01))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    with one_thread():
        yield


def inputs(count: int, *features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, *features), generator=generator)


def module(*layers: nn.Module) -> nn.Module:
    """With weights that are the same in every run."""
    made = nn.Sequential(*layers)
    for place, weight in enumerate(made.parameters()):
        generator = torch.Generator().manual_seed(place)
        weight.data = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
    return made


def convolutions() -> nn.Module:
    return module(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def last(run: Run, name: str) -> float:
    return run.series(name)[-1].value


def of(run: Run, name: str) -> list[float]:
    return [row.value for row in run.series(name)]


# Any module.


def test_a_module_on_images_with_liars() -> None:
    program = CodedInference(
        convolutions(), inputs(24, 1, 8, 8), CODE, batches=2, liars=frozenset({3, 9}),
        targets=torch.arange(24) % 3,
    )  # fmt: skip
    run = simulate(program, NETWORK, seed=1)
    assert run.finished
    assert of(run, "answers") == [WORKERS] * 2
    assert [dict(row.labels)["who"] for row in run.series("left_out")] == ["3 9", "3 9"]
    assert of(run, "wrongly_left_out") == [0.0, 0.0]
    assert of(run, "trusted") == [1.0, 1.0]
    assert last(run, "coded_error") < 0.2
    assert last(run, "answered") == 1.0
    # The same without looking for liars is worth nothing.
    plain = replace(program, code=replace(CODE, code_dim=None))
    assert last(simulate(plain, NETWORK, seed=1), "coded_error") > 1.0


def test_coded_outputs_are_what_the_code_gives_without_peers() -> None:
    """The wire, the blocks and the padding change nothing: 23 samples in blocks of 12."""
    net, x = module(nn.Linear(6, 4), nn.Tanh()), inputs(23, 6)
    run = simulate(CodedInference(net, x, CODE), NETWORK, seed=0)
    padded = torch.cat([x, x[-1:]]).reshape(2, -1)
    shares = CODE.encode(padded).float().view(WORKERS, 12, 6)
    with torch.no_grad():
        answers = net(shares.reshape(-1, 6)).view(WORKERS, -1)
        Y = CODE.decode(range(WORKERS), answers).Y.view(24, 4)[:23]
        gap = (Y - net(x)).norm() / net(x).double().norm()
    assert last(run, "coded_error") == pytest.approx(float(gap), rel=1e-4)


def test_who_is_gone_or_answers_nonsense_is_left_out() -> None:
    faults = (Crash(who=(2,), at=0.0), Crash(who=(5,), at=0.0))
    program = CodedInference(
        module(nn.Linear(6, 4), nn.Tanh()), inputs(24, 6), CODE, batches=3,
        liars=frozenset({7}), wait_s=2.0,
    )  # fmt: skip
    run = simulate(program, replace(NETWORK, faults=faults), seed=0)
    assert of(run, "answers") == [WORKERS - 2] * 3
    # In blocks of 4 samples an honest worker may be taken for a liar, too; that costs little.
    assert all("7" in dict(row.labels)["who"].split() for row in run.series("left_out"))
    assert max(of(run, "wrongly_left_out")) <= 2
    assert last(run, "coded_error") < 0.2
    overflow = replace(program, liars=frozenset({4, 7}), magnitude=1e38)
    run = simulate(overflow, NETWORK, seed=0)
    assert max(of(run, "wrongly_left_out")) <= 2
    assert last(run, "coded_error") < 0.2


def test_answers_that_are_complex_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodedInference, "_lie", lambda self, peer, values, batch: values + 1j)
    program = CodedInference(
        module(nn.Linear(6, 4), nn.Tanh()), inputs(24, 6), CODE, liars=frozenset({7})
    )
    run = simulate(program, NETWORK, seed=0)
    assert of(run, "answers") == [WORKERS - 1]
    assert last(run, "coded_error") < 0.2


def test_when_nobody_answers_nothing_is_claimed() -> None:
    faults = tuple(Crash(who=(worker,), at=0.0) for worker in range(2, WORKERS + 1))
    program = CodedInference(
        module(nn.Linear(6, 4)), inputs(4, 6), CODE, targets=torch.zeros(4, dtype=torch.int64),
        wait_s=1.0,
    )  # fmt: skip
    run = simulate(program, replace(NETWORK, faults=faults), seed=0)
    assert run.finished
    assert last(run, "answers") == 1.0
    assert last(run, "answered") == 0.0
    assert last(run, "coded_accuracy") == 0.0
    assert not run.series("coded_error")


def test_a_master_that_crashes_goes_on_from_the_batches_it_has() -> None:
    program = CodedInference(
        module(nn.Linear(6, 4), nn.Tanh()), inputs(24, 6), CODE, batches=4, wait_s=1.0
    )  # fmt: skip
    calm = simulate(program, NETWORK, seed=0)
    middle = calm.virtual_s * 0.6
    again = simulate(
        program, replace(NETWORK, faults=(Crash(who=(0,), at=middle, until=middle + 0.5),)), seed=0
    )
    assert last(again, "answered") == 1.0
    assert last(again, "coded_error") == last(calm, "coded_error")
    assert 4 <= len(again.series("answers")) < 8


def test_batched_and_single_computations_agree() -> None:
    program = CodedInference(
        convolutions(), inputs(24, 1, 8, 8), CODE, batches=2, liars=frozenset({3}), wait_s=1.0
    )
    runs = [
        simulate(program, NETWORK, seed=0, settings=EventSettings(batching=b, strict=True))
        for b in ("off", "lazy")
    ]
    assert runs[0].trace_digest == runs[1].trace_digest
    a, b = (last(run, "coded_error") for run in runs)
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.live
def test_the_same_over_sockets() -> None:
    program = CodedInference(
        convolutions(), inputs(24, 1, 8, 8), CODE, batches=2, liars=frozenset({3, 9}),
        targets=torch.arange(24) % 3, wait_s=20.0,
    )  # fmt: skip
    off = simulate(program, NETWORK, seed=1, settings=EventSettings(batching="off"))
    live = run_live(program, NETWORK, seed=1, settings=LiveSettings(horizon_s=60.0))
    assert live.finished
    for name in ("answers", "left_out", "trusted", "coded_accuracy", "agreement"):
        assert of(live, name) == of(off, name), name
    assert last(live, "coded_error") == pytest.approx(last(off, "coded_error"), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batches": 0}, "batches=0 of 4 samples"),
        ({"batches": 5}, "batches=5 of 4 samples"),
        ({"wait_s": 0.0}, "wait_s=0.0"),
        ({"magnitude": math.inf}, "magnitude=inf"),
    ],
)
def test_inference_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CodedInference(module(nn.Linear(6, 4)), inputs(4, 6), CODE, **changes)


def test_the_code_must_be_for_so_many_workers() -> None:
    program = CodedInference(module(nn.Linear(6, 4)), inputs(4, 6), CODE)
    with pytest.raises(UsageError, match="5 peers; need 16"):
        simulate(program, Network(5), seed=0)


# The system.


def world(**changes: Any) -> Scenario:
    return scenario_of("sbacc").with_settings({"task.hidden": [32], **changes})


def test_digits_over_31_workers_with_3_liars() -> None:
    run = launch(SBACC(liars=3), world(), seed=0)
    assert run.finished
    assert last(run, "central_accuracy") > 0.9
    assert last(run, "coded_accuracy") >= last(run, "central_accuracy") - 0.01
    assert of(run, "left_out") == [3.0] * 3
    assert of(run, "wrongly_left_out") == [0.0] * 3
    plain = launch(SBACC(liars=3, locate=False), world(), seed=0)
    assert last(plain, "coded_accuracy") < last(run, "coded_accuracy") - 0.1
    # The model is the one that is evaluated, and everybody has it.
    assert run.series("accuracy")[-1].value == pytest.approx(last(run, "central_accuracy"))
    assert len(run.final) == 32


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="liars=-1"):
        SBACC(liars=-1)
    with pytest.raises(UsageError, match="second kind"):
        SBACC(second=True)
    with pytest.raises(UsageError, match="1 workers"):
        launch(SBACC(), world(peers=2), seed=0)
    with pytest.raises(UsageError, match="liars=7"):
        launch(SBACC(liars=7), world(peers=6), seed=0)
    with pytest.raises(UsageError, match="need a model of real inputs"):
        launch(SBACC(), world(task={"name": "quadratics"}), seed=0)
    assert SBACC(locate=False, second=True).code(31).dct is None
    assert SBACC(group=4, code_dim=9).code(20) == BerrutCode(4, 20, code_dim=9)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_breaks_it(seed: int) -> None:
    small = {"task": {"name": "digits", "hidden": [8], "train_samples": 240}}
    aim = target("sbacc", small | {"liars": 1, "wait_s": 1.0, "steps": 5, "peers": 9})
    trial = Trial(lambda: aim.program, aim.network, aim.horizon_s, aim.invariants)
    faults = generate(seed, aim.network.peers, window_s=3.0)
    _, problem = trial.run(seed, faults, True)
    assert not problem


def test_the_invariants_can_be_broken() -> None:
    def run(*rows: tuple[str, float]) -> Run:
        made = [Row(name, value, 0.0) for name, value in rows]
        return Run(engine="event", seed=0, peers=4, rows=made)

    assert shares_are_shares(run(("answered", 1.0), ("answers", 3.0))) is None
    assert shares_are_shares(run(("answered", 1.1)))
    assert shares_are_shares(run(("answers", 4.0)))
    assert everything_answered_is_near(run(("trusted", 1.0), ("coded_error", 0.4))) is None
    assert everything_answered_is_near(run(("trusted", 1.0), ("coded_error", 4.0)))
    assert everything_answered_is_near(run(("trusted", 0.0), ("coded_error", 4.0))) is None


# The trials.


@pytest.fixture(scope="module")
def few() -> Rows:
    """A few trials of four functions, at the settings of the curve and three more."""
    chosen = tuple(
        Point(size, liars, magnitude, 0)
        for size in (11, 15, 21, 25)
        for liars, magnitude in ((0, 1.0), (3, 0.1), (3, 1.0), (3, 10.0))
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(trials, "points", lambda: chosen)
    names = ("sigmoid", "sin", "relu", "layer")
    runs = {
        (name, 0): sbacc_trials(scenario_of("sbacc"), function=name, trials=20) for name in names
    }
    patch.undo()
    return Rows(runs, names, [0])


def test_liars_are_found_where_they_stand_out(few: Rows) -> None:
    for name in ("sigmoid", "sin", "relu"):
        run = few.runs[name, 0]
        assert max(measured.value(run, "located", Point(k, 3, 10.0, 0)) for k in (15, 21)) >= 0.9
        assert measured.value(run, "located", Point(21, 0, 1.0, 0)) >= 0.9
        assert measured.value(run, "error", Point(21, 3, 10.0, 0)) < 0.1
        assert measured.value(run, "plain", Point(21, 3, 10.0, 0)) > 1.0
        assert measured.single(run, "sbacc") < 0.5 * measured.single(run, "bacc")
        assert measured.single(run, "clean", 4) > measured.single(run, "clean", 0)
    # Below the precision noise nothing can be seen, and so it is reported.
    assert measured.value(few.runs["relu", 0], "located", Point(15, 3, 0.1, 0)) <= 0.1
    assert measured.single(few.runs["layer", 0], "sbacc") < 0.2


def test_what_it_is_compared_with(few: Rows) -> None:
    for run in few.runs.values():
        # 6 copies of every input outvote 3 liars unless all lie about the same.
        assert measured.single(run, "replication") < 1e-12
        assert measured.single(run, "uncoded") > measured.single(run, "sbacc")
    # ReLU is no polynomial, so that Lagrange coding is not exact; near one, at these nodes.
    assert 1e-3 < measured.single(few.runs["relu", 0], "lagrange") < 0.1


def test_measures_of_rows_that_are_missing_are_nan(few: Rows) -> None:
    rows = Rows({("sigmoid", 0): few.runs["sigmoid", 0]}, ("sigmoid", "sin"), [0])
    assert math.isnan(measured.located_sine(rows)[0])
    assert math.isnan(measured.value(few.runs["sin", 0], "located", Point(99, 3, 1.0, 0)))


def test_measures_are_of_the_worst() -> None:
    run = Run(engine="study", seed=0, peers=1)
    for size in (11, 15, 21, 25):
        for liars in (1, 2, 3):
            for magnitude in (1.0, 10.0, 100.0):
                labels = Point(size, liars, magnitude, 0).labels()
                good = 0.9 if (liars, magnitude) == (2, 10.0) else 1.0
                run.rows.append(Row("located", good if size == 15 else 0.1, 0.0, labels=labels))
                error = 0.02 * liars if size == 15 else 1.0
                run.rows.append(Row("error", error, 0.0, labels=labels))
                run.rows.append(Row("plain", 0.5, 0.0, labels=labels))
    run.rows.append(Row("clean", 0.04, 0.0, labels=(("missing", "0"),)))
    rows = Rows({("sigmoid", 0): run, ("sin", 0): run}, ("sigmoid", "sin"), [0])
    expected: dict[Callable[[Rows], dict[int, float]], float] = {
        measured.located_sigmoid: 0.9, measured.located_sine: 1.0, measured.over_clean: 1.5,
        measured.over_plain: 0.12, measured.over_plain_fewer: 0.08,
    }  # fmt: skip
    for measure, number in expected.items():
        assert measure(rows)[0] == pytest.approx(number)


def test_trials_that_cannot_be() -> None:
    scenario = scenario_of("sbacc")
    with pytest.raises(UsageError, match="function='tan'"):
        sbacc_trials(scenario, function="tan")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="trials=0"):
        sbacc_trials(scenario, trials=0)
    with pytest.raises(UsageError, match="N=25"):
        sbacc_trials(scenario, N=25)
    with pytest.raises(UsageError, match="needs a model with a hidden layer"):
        sbacc_trials(scenario.with_settings({"task": {"name": "quadratics"}}), function="layer")
