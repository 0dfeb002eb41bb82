"""One private step beside Opacus 1.6: clipped gradients of a batch, noise on their sum, a step.

The same model in float32, the same records, one thread, by turns. Opacus is handed its batch; here
the step also draws it, with every record drawn, and gathers it. It clips from stored gradients of
single records, and by norms alone ("ghost clipping"). Without noise both end at the same model,
which a row shows before anything is timed.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.lab.bench._row import Note, Row, missing
from shoal.lab.bench._timing import alternate
from shoal.parts.models.base import Model
from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.models.transformer import Transformer
from shoal.parts.strategy.private_steps import PrivateSteps
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard
from shoal.tensor import keyed

CLASSES = 10
SETTINGS = PrivateSteps(lr=0.1, sampling=1.0, clip=1.0, noise=1.0)
TURNS, TURN_STEPS = 9, 10


@dataclass(frozen=True)
class Case:
    """A model and how large its batch is; whole: samples are whole numbers, as words are."""

    name: str
    model: Model
    features: tuple[int, ...]
    batch: int
    whole: bool = False

    def task(self) -> ModuleTask:
        torch.manual_seed(1)
        shape = (self.batch, *self.features)
        x = torch.randint(CLASSES, shape) if self.whole else torch.randn(shape)
        y = torch.randint(CLASSES, shape if self.whole else (self.batch,))
        split = Shard(torch.arange(self.batch).unsqueeze(0), torch.tensor([self.batch]))
        module = self.model.build(self.features, CLASSES)
        return task_of(module, "cross_entropy", (x, y), (x, y), split)


CASES = (
    Case("MLP 784-128-10, 64 records", MLP(hidden=(128,)), (1, 28, 28), 64),
    Case("CNN with norms, 64 records", CNN(group_norm=4), (1, 28, 28), 64),
    Case("transformer, width 64, 32 records of 32", Transformer(), (32,), 32, whole=True),
)
_TINY = (
    Case("MLP 16-8-10, 6 records", MLP(hidden=(8,)), (16,), 6),
    Case("transformer, width 8, 4 records of 5", Transformer(width=8, layers=1, heads=2), (5,), 4,
         whole=True),
)  # fmt: skip


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    turns, steps = (1, 1) if tiny else (TURNS, TURN_STEPS)
    there = importlib.util.find_spec("opacus") is not None
    for case in _TINY if tiny else CASES:
        task = case.task()
        params = task.init(keyed.key_of(1)).unsqueeze(0)
        contestants: dict[str, Callable[[], object]] = {"ours": Ours(task, params)}
        if there:
            yield Row.of(
                f"{case.name}: models apart after a step without noise, of the step",
                apart(task, params), "", bound="<= 0.001",
            )  # fmt: skip
            for name, ghost in (("Opacus", False), ("Opacus, ghost clipping", True)):
                contestants[name] = Theirs(task, params, ghost=ghost)
        else:
            yield missing(f"{case.name}: Opacus", "opacus is not installed (the extra dev has it)")
        loops = {name: repeated(each, steps) for name, each in contestants.items()}
        times = alternate(loops, turns, lambda text, case=case: note(f"{case.name}: {text}"), steps)
        ours = times.pop("ours").cpu * 1e3
        if not times:
            yield Row.of(f"a step, {case.name}", ours, "ms CPU")
        for name, theirs in times.items():
            yield Row.of(
                f"a step, {case.name}: beside {name}", ours, "ms CPU",
                against=(name, theirs.cpu * 1e3),
            )  # fmt: skip


def repeated(step: Callable[[], object], times: int) -> Callable[[], object]:
    """The step, so many times."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


class Ours:
    """Private steps of one peer, one after the other."""

    def __init__(self, task: ModuleTask, params: Tensor, settings: PrivateSteps = SETTINGS) -> None:
        self.strategy, self.task = settings, task
        self.state = self.strategy.init(params.clone())
        self.shard = task.shard(torch.arange(1))
        self.round = 0

    def __call__(self) -> Tensor:
        key = keyed.fold(keyed.key_of(2), torch.arange(1), self.round)
        here = torch.ones(1, dtype=torch.bool)
        step = Step(self.round, self.task, self.shard, key, here)
        self.state, parcel = self.strategy.local(self.state, step)
        self.round += 1
        return parcel.vector[0]


class Theirs:
    """The same by Opacus, on the same module."""

    def __init__(
        self, task: Any, params: Tensor, settings: PrivateSteps = SETTINGS, *,
        ghost: bool = False,
    ) -> None:  # fmt: skip
        from opacus import GradSampleModule
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self.x, self.y = task.x, task.y
        self.module: nn.Module = copy.deepcopy(task.module)
        with torch.no_grad():
            for name, value in task.spec.views(params[0]).items():
                self.module.get_parameter(name).copy_(value)
        own = torch.optim.SGD(self.module.parameters(), lr=settings.lr)
        rules: dict[str, Any] = {
            "noise_multiplier": settings.noise, "max_grad_norm": settings.clip,
            "expected_batch_size": len(self.x),
        }  # fmt: skip
        loss: Any = nn.CrossEntropyLoss()
        wrapped: Any
        if ghost:
            kind: Any = GradSampleModuleFastGradientClipping
            wrapped = kind(self.module, max_grad_norm=settings.clip, use_ghost_clipping=True)
            self.optimiser: Any = DPOptimizerFastGradientClipping(own, **rules)
            loss = DPLossFastGradientClipping(wrapped, self.optimiser, loss)
        else:
            wrapped, self.optimiser = GradSampleModule(self.module), DPOptimizer(own, **rules)
        self.wrapped, self.loss, self.ghost = wrapped, loss, ghost

    def __call__(self) -> Tensor:
        with warnings.catch_warnings():
            # torch's words to whoever hooks a backward pass whose inputs need no gradient.
            warnings.simplefilter("ignore")
            self.optimiser.zero_grad()
            output = self.wrapped(self.x)
            flat, y = output.reshape(-1, CLASSES), self.y.reshape(-1)
            if self.ghost:
                self.loss(flat, y, shape=self.y.shape if self.y.dim() > 1 else None).backward()
            else:
                functional.cross_entropy(flat, y).backward()
            self.optimiser.step()
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])


def apart(task: ModuleTask, params: Tensor, *, ghost: bool = False) -> float:
    """How far both models are from each other after a step without noise, over what it moved."""
    quiet = replace(SETTINGS, noise=0.0)
    ours, theirs = Ours(task, params, quiet)(), Theirs(task, params, quiet, ghost=ghost)()
    return float((ours - theirs).norm() / (theirs - params[0]).norm())
