"""The pretend device raises and waits where a GPU does; the rules are those of torch on CUDA."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shoal.testing.pretend_device import PretendDevice, PretendTensor, check_device

NEAR = torch.arange(6.0).view(2, 3)
PLACES = torch.tensor([1, 0])

# (what, function of a tensor there, whether torch on CUDA allows it)
RULES = [
    ("two devices", lambda x: x + NEAR, False),
    ("two devices in place", lambda x: x.add_(NEAR), False),
    ("a result into the processor's memory", lambda x: torch.add(x, x, out=NEAR.clone()), False),
    ("a number of the processor's", lambda x: x + NEAR[0, 0], True),
    ("a number of the processor's written to", lambda x: NEAR[0, 0].clone().add_(x[0, 0]), False),
    ("a number there beside a vector here", lambda x: NEAR + x[0, 0], False),
    ("where with a mask here", lambda x: torch.where(NEAR > 1, x, x), False),
    ("where with a Python number", lambda x: torch.where(x > 1, x, 0.0), True),
    ("masked_fill with a number here", lambda x: x.masked_fill(x > 1, torch.tensor(0.0)), True),
    ("positions here", lambda x: x[PLACES], True),
    ("positions there into memory here", lambda x: NEAR[(x[0] > 0).long()], False),
    ("index_select", lambda x: x.index_select(0, PLACES), False),
    ("index_copy", lambda x: x.index_copy(0, PLACES, x), False),
    ("gather", lambda x: x.gather(1, PLACES.view(2, 1)), False),
    ("scatter", lambda x: x.scatter(1, PLACES.view(2, 1), 0.0), False),
    ("index_add", lambda x: x.index_add(0, PLACES, x), False),
    ("take_along_dim", lambda x: x.take_along_dim(PLACES.view(2, 1), 1), False),
    ("cat", lambda x: torch.cat((x, NEAR)), False),
    ("stack", lambda x: torch.stack((x, NEAR)), False),
    ("product", lambda x: x @ NEAR.mT, False),
    ("product there", lambda x: x @ x.mT, True),
    ("copying here", lambda x: NEAR.clone().copy_(x), True),
    ("copying there", lambda x: x.copy_(NEAR), True),
    ("assigning", lambda x: x.__setitem__(0, NEAR[0]), True),
    ("assigning by positions", lambda x: x.__setitem__(PLACES, NEAR), False),
    ("numpy", lambda x: x.numpy(), False),
    ("numpy through asarray", np.asarray, False),
    ("comparing", lambda x: torch.equal(x, NEAR), False),
    ("a module here", lambda x: nn.Linear(3, 2)(x), False),
    ("a module there", lambda x: nn.Linear(3, 2).to(x.device)(x), True),
]


@pytest.mark.parametrize(("function", "allowed"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_devices_mix_as_on_a_gpu(function: Any, allowed: bool) -> None:
    with PretendDevice() as device:
        x = NEAR.to(device.name)
        if allowed:
            function(x)
        else:
            with pytest.raises(
                (RuntimeError, TypeError), match=r"same device|numpy|but got tensor"
            ):
                function(x)


WAITS = [
    ("item", lambda x: x[0, 0].item(), 1),
    ("bool", lambda x: bool((x > 0).all()), 1),
    ("float", lambda x: float(x.sum()), 1),
    ("tolist", lambda x: x.tolist(), 1),
    ("cpu", lambda x: x.cpu(), 1),
    ("equal", lambda x: torch.equal(x, x), 1),
    ("nonzero", lambda x: x.nonzero(), 1),
    ("mask", lambda x: x[x > 1], 1),
    ("mask with a number", lambda x: x.__setitem__(x > 1, 0.0), 0),
    ("bincount", lambda x: torch.bincount(x.long().flatten()), 1),
    ("repeat", lambda x: torch.repeat_interleave(x[0], x[1].long()), 1),
    ("repeat of known size", lambda x: torch.repeat_interleave(
        x[0], x[0].long(), output_size=3), 0),
    ("positions here", lambda x: x[PLACES], 1),
    ("positions there", lambda x: x[(x[:, 0] > 0).long()], 0),
    ("made there", lambda x: torch.arange(9, device=x.device), 0),
    ("sent there", lambda x: torch.tensor([1, 2], device=x.device), 1),
    ("sent from numpy", lambda x: torch.as_tensor(np.ones(2), device=x.device), 1),
    ("sent without waiting", lambda x: NEAR.to(x.device, non_blocking=True), 0),
    ("already there", lambda x: x.to(x.device), 0),
    ("arithmetic", lambda x: (x * 2).sum(-1).sort().values.double(), 0),
    ("fill", lambda x: torch.zeros_like(x).masked_fill_(x > 2, 1.0), 0),
]  # fmt: skip


@pytest.mark.parametrize(("function", "waits"), [w[1:] for w in WAITS], ids=[w[0] for w in WAITS])
def test_waits_are_counted(function: Any, waits: int) -> None:
    with PretendDevice() as device:
        x = NEAR.to(device.name)
        device.waits.clear()
        function(x)
        assert device.waits.total() == waits, device.waits


def test_tensors_say_where_they_are_and_behave_as_tensors() -> None:
    with PretendDevice() as device:
        x = NEAR.to(device.name)
        assert (x.device, x.is_cpu, x.device.type) == (torch.device(device.name), False, "pretend")
        row = x[1]
        row.zero_()
        assert x.tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]
        assert row._base is x
        assert row.data_ptr() == x.data_ptr() + 12
        twin = copy.deepcopy(x)
        twin.zero_()
        assert x[0, 1] == 1.0
        module = copy.deepcopy(nn.Linear(3, 2).to(device.name))
        assert all(isinstance(p, nn.Parameter) for p in module.parameters())
        gradient = torch.func.vmap(torch.func.grad(lambda v: (v * v).sum()))(x)
        assert isinstance(gradient, PretendTensor)
        assert gradient.cpu().equal(2 * x.cpu())
        assert torch.zeros(2).device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        x + NEAR


def test_a_difference_and_a_result_left_behind_are_found() -> None:
    check_device(lambda x: (x, {"nan": x / 0}), NEAR)
    with pytest.raises(AssertionError, match="numbers of tensor 0 differ"):
        check_device(lambda x: x if x.is_cpu else x + 1, NEAR)
    with pytest.raises(AssertionError, match="is on cpu"):
        check_device(lambda x: x.cpu(), NEAR)
    with pytest.raises(AssertionError, match="structure"):
        check_device(lambda x: x if x.is_cpu else (x, x), NEAR)
    with pytest.raises(RuntimeError, match="open already"), PretendDevice(), PretendDevice():
        pass
