"""Class-wise merging of plain output layers: what somebody uses who has a network of his own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.screening.class_merge import ClassMerge, OwnTests
from shoal.tensor import keyed
from shoal.tensor.types import Index, Mask


@dataclass(frozen=True)
class HeadReport:
    """What became of n received heads. Those that were not tested have numbers of 0.

    head [d + 1, classes]: the own one afterwards; weights [n, classes]: what each column counted
    beside the own one, which counts 1; certainty [n]; chosen bool [n]: which were tested.
    """

    head: Tensor
    weights: Tensor
    certainty: Tensor
    chosen: Mask


@dataclass(frozen=True)
class Message:
    """A head [d + 1, classes] with what its sender says of itself.

    classes: those in its data, or how many there are; features: the fingerprint of the layers that
    the head belongs on.
    """

    head: Tensor
    classes: Sequence[int] | int
    features: int = 0


class Heads:
    """A peer's inbox of output layers, for layers below that are frozen and the same for all.

    features [samples, d] and labels [samples] are the own test samples, disjoint from those that
    the head was trained on; a head [d + 1, classes] has its biases in the last row. fingerprint:
    of the frozen layers; a message about others is refused. trained: the classes of the own
    training samples, each of which must be among the tests.

    >>> x, y = torch.eye(2), torch.tensor([0, 1])
    >>> good = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    >>> inbox = Heads(x, y, classes=2)
    >>> inbox.on_message(Message(good, classes=[0, 1]))
    >>> inbox.on_message(Message(-good, classes=[0, 1]))
    >>> inbox.integrate(good).weights
    tensor([[1., 1.],
            [0., 0.]], dtype=torch.float64)
    """

    def __init__(
        self, features: Tensor, labels: Index, classes: int, rule: ClassMerge | None = None, *,
        fingerprint: int = 0, trained: Sequence[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not len(labels) or features.shape[:-1] != labels.shape:
            raise UsageError(
                f"heads: {tuple(features.shape)} features and {tuple(labels.shape)} labels; need "
                "[samples, d] and [samples], at least one (keep some samples for testing)"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise UsageError(
                f"heads: labels from {int(labels.min())} to {int(labels.max())}; need 0 to "
                f"{classes - 1} (classes={classes})"
            )
        absent = sorted(set(trained or ()) - set(labels.tolist()))
        if absent:
            raise UsageError(
                f"heads: classes {absent} are trained on and not in the own tests, so that nobody "
                "can be judged on them (keep a sample of each class for testing)"
            )
        self._features, self._labels, self._classes = features, labels, classes
        self._rule = rule or ClassMerge()
        self._fingerprint, self._seed, self._times = fingerprint, seed, 0
        self._inbox: list[Message] = []

    def on_message(self, message: Message) -> None:
        """Take a message in; UsageError for one that cannot be used."""
        shape = (self._features.shape[-1] + 1, self._classes)
        if tuple(message.head.shape) != shape:
            raise UsageError(
                f"heads: a head of shape {tuple(message.head.shape)}; need {shape}, as the own one"
            )
        if message.features != self._fingerprint:
            raise UsageError(
                f"heads: a head on features {message.features:#x}; the own ones are "
                f"{self._fingerprint:#x} (all peers need the same frozen layers)"
            )
        if isinstance(message.classes, int):
            if not 1 <= message.classes <= self._classes:
                raise UsageError(
                    f"heads: a sender has {message.classes} classes; need 1 to {self._classes}"
                )
            if self._rule.classes == "announced":
                raise UsageError(
                    "heads: a sender gave a number of classes; the rule needs to know which (send "
                    "the classes, or use ClassMerge(classes='count'))"
                )
        elif not message.classes or not set(message.classes) <= set(range(self._classes)):
            raise UsageError(
                f"heads: a sender has classes {list(message.classes)}; need some of 0 to "
                f"{self._classes - 1}"
            )
        self._inbox.append(message)

    def integrate(self, own: Tensor) -> HeadReport:
        """The own head [d + 1, classes] merged with what came since the last time."""
        inbox, self._inbox = self._inbox, []
        count, (width, classes) = len(inbox), own.shape
        rows = torch.stack([own, *[m.head.to(own.dtype) for m in inbox]])[1:].flatten(1)
        x = torch.cat((self._features.to(own.dtype), own.new_ones(len(self._labels), 1)), -1)

        def outputs(heads: Tensor) -> Tensor:
            return x @ heads.view(*heads.shape[:-1], width, classes)

        mask = torch.ones_like(self._labels, dtype=torch.bool)
        tests = OwnTests(outputs, self._labels, mask, classes)
        here = torch.ones(count, dtype=torch.bool, device=own.device)
        column = torch.arange(classes, device=own.device).repeat(width)
        key = keyed.key_of(self._seed, "heads", self._times, device=own.device)
        self._times += 1
        head, found, place = self._rule.integrate(
            own.flatten(), rows, here, self._told(inbox, own), tests, column, key
        )
        kept = place >= 0
        weights = torch.zeros(count, classes, dtype=torch.float64, device=own.device)
        certainty, chosen = weights.new_zeros(count), torch.zeros_like(here)
        weights[place[kept]] = found.weights[kept]
        certainty[place[kept]] = found.certainty[kept]
        chosen[place[kept]] = True
        return HeadReport(head.view_as(own), weights, certainty, chosen)

    def _told(self, inbox: Sequence[Message], own: Tensor) -> Tensor:
        if self._rule.classes == "count":
            sizes = [m.classes if isinstance(m.classes, int) else len(m.classes) for m in inbox]
            return torch.tensor(sizes, dtype=torch.int64, device=own.device)
        told = torch.zeros(len(inbox), self._classes, device=own.device)
        for row, message in zip(told, inbox, strict=True):
            assert not isinstance(message.classes, int)
            row[list(message.classes)] = 1.0
        return told
