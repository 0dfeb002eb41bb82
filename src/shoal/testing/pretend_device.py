"""A device that is none: finds out on any machine what would break, or wait, on a GPU.

Tensors on it claim to be on `pretend:0`, compute on the processor, and raise where those of a
GPU would: an operation on tensors of two devices, `numpy()`, a GPU index into the processor's
memory. So what runs here without an error mixes no devices, and its numbers are the processor's
bit for bit. Every time the program would have to wait for a GPU is counted.

>>> import torch
>>> with PretendDevice() as device:
...     x = torch.arange(3, device=device.name)
...     total = int((x * 2).sum())
...     try:
...         x + torch.arange(3)
...     except RuntimeError as error:
...         print(error)
Expected all tensors to be on the same device, but found pretend:0 and cpu (aten.add.Tensor)
>>> total, device.waits.total()
(6, 1)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.base.errors import UsageError
from shoal.tensor import tree

KIND = "pretend"
"""The device type; torch keeps one place for a type that it does not know, and this takes it."""

_ROOT = str(Path(__file__).parents[1])

# Operations whose result, or its size, must be known to the processor.
_WAITS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount", "_linalg_check_errors", "_linalg_eigh", "histc",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"copy_", "_to_copy"}
# These take a number from the processor's memory although torch does not call them pointwise.
_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill", "fill_", "lerp", "lerp_"}


class PretendTensor(Tensor):
    """A tensor that claims to be on `pretend:0`. `inner` holds its numbers."""

    inner: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        where = {}
        if inner.layout == torch.strided:
            where = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, layout=inner.layout, device=f"{KIND}:0", **where
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)

    @property
    def layout(self) -> torch.layout:  # type: ignore[override]
        return self.inner.layout

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        # torch's own copies the storage, and here there is none.
        made = memo.get(id(self))
        if made is None:
            made = PretendTensor(self.inner.detach().clone())
            made.requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                made._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = made
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        active = PretendDevice.active
        if active is not None:
            active.note("tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {KIND}:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()


class PretendDevice(TorchDispatchMode):
    """While it is open, `pretend:0` is a device like any other.

    name: what to pass as `device`. waits: how often the program would have stood still until the
    device had finished, by operation and place; a copy to the device without `non_blocking=True`
    is one. uploads: copies to the device that did not wait. Both are `collections.Counter`.
    """

    name = f"{KIND}:0"
    active: PretendDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        register()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __enter__(self) -> PretendDevice:
        if PretendDevice.active is not None:
            raise RuntimeError("PretendDevice: one is open already")
        PretendDevice.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PretendDevice.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch loads its compiler, which takes seconds, to keep it off each operation.
        return False

    def note(self, what: str, *, waits: bool = True) -> None:
        """Count a wait, or a copy that did not wait, and where Shoal asked for it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(_ROOT) and file != __file__:
                break
            frame = frame.f_back
        place = "" if frame is None else f" at {file[len(_ROOT) + 1 :]}:{frame.f_lineno}"
        (self.waits if waits else self.uploads)[what + place] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any], meter: PretendDevice | None) -> Any:
    """One operation: check its devices, count what it waits for, compute on the processor."""
    far: list[PretendTensor] = []
    near: list[Tensor] = []
    inner = [_inner(value, far, near) for value in args]
    inner_named = {key: _inner(value, far, near) for key, value in kwargs.items()}
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if not far and (target is None or target.type != KIND):
        return func(*args, **kwargs)
    name = _name(func)
    if name not in _COPIES:
        _check(func, name, args, far, near)
    if meter is not None:
        _count(meter, name, args, kwargs, near)
    if target is not None:
        inner_named["device"] = torch.device("cpu")
    out = func(*inner, **inner_named)
    if torch.Tag.inplace_view in func.tags:
        # The wrapper's own sizes must follow.
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    stays = KIND if target is None else target.type
    if name == "copy_" and not isinstance(args[0], PretendTensor):
        stays = "cpu"
    return _outer(out, stays == KIND, far if _writes(func) else ())


def _inner(value: Any, far: list[PretendTensor], near: list[Tensor]) -> Any:
    """An argument as the processor takes it; notes the tensors in it, by where they are."""
    if isinstance(value, PretendTensor):
        far.append(value)
        return value.inner
    if isinstance(value, Tensor):
        near.append(value)
    elif isinstance(value, (list, tuple)):
        return type(value)([_inner(each, far, near) for each in value])
    return value


def _outer(value: Any, wrap: bool, written: Sequence[PretendTensor]) -> Any:
    """A result as the caller sees it; an argument that was written into stays itself."""
    if isinstance(value, Tensor):
        for each in written:
            if each.inner is value:
                return each
        return PretendTensor(value) if wrap else value
    if isinstance(value, (list, tuple)):
        return type(value)([_outer(each, wrap, written) for each in value])
    return value


def _check(func: Any, name: str, args: Any, far: list[Any], near: list[Tensor]) -> None:
    """Raise where a GPU would because operands are on two devices."""
    if not far or not near:
        return
    numbers = torch.Tag.pointwise in func.tags or name in _NUMBERS
    if name in _INDEXING:
        if isinstance(args[0], PretendTensor):
            # Positions may come from the processor, numbers may not, unless it is just one.
            values = args[2:3] if len(args) > 2 else ()
            if all(not isinstance(v, Tensor) or isinstance(v, PretendTensor) or not v.dim()
                   for v in values):  # fmt: skip
                return
    elif (
        numbers
        and all(not tensor.dim() for tensor in near)
        and not (_writes(func) and not isinstance(args[0], PretendTensor))
    ):
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found {KIND}:0 and cpu ({func})"
    )


def _count(
    meter: PretendDevice, name: str, args: Any, kwargs: dict[str, Any], near: list[Tensor]
) -> None:
    """Note what this operation waits for."""
    if name in _COPIES:
        source = args[1] if name == "copy_" else args[0]
        into = args[0] if name == "copy_" else kwargs.get("device")
        to_far = isinstance(into, PretendTensor) or (
            into is not None and not isinstance(into, Tensor) and torch.device(into).type == KIND
        )
        same = into is None or to_far == isinstance(source, PretendTensor)
        if same:
            return
        free = bool(kwargs.get("non_blocking", args[2] if name == "copy_" and args[2:] else False))
        if to_far:
            meter.note("upload", waits=not free)
        else:
            meter.note("download")
    elif name in _WAITS:
        meter.note(name)
    elif name == "repeat_interleave":
        if kwargs.get("output_size") is None:
            meter.note(name)
    elif name in _INDEXING:
        _count_indexing(meter, name, args, near)


def _count_indexing(meter: PretendDevice, name: str, args: Any, near: list[Tensor]) -> None:
    places = [place for place in args[1] if isinstance(place, Tensor)]
    if any(not isinstance(place, PretendTensor) for place in places):
        meter.note(f"upload ({name})")
    masks = [p for p in places if p.dtype in (torch.bool, torch.uint8)]
    # One value for all that a mask names is a masked_fill, which need not know how many they are.
    one = name != "index" and len(args) > 2 and not args[2].dim() and args[3:4] != (True,)
    if any(isinstance(mask, PretendTensor) for mask in masks) and not one:
        meter.note(f"mask ({name})")


@cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


@cache
def _writes(func: Any) -> bool:
    """Whether the operation writes into an argument."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


_library: list[torch.library.Library] = []


def register() -> None:
    """Make the device type known to torch; once in a process.

    Before the process's first backward pass, when torch counts the devices that it has queues for:
    a test suite that differentiates elsewhere calls this as it starts.
    """
    if _library:
        return
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        raise UsageError(
            f"PretendDevice: torch {torch.__version__} knows no devices written in Python (use 2.9 "
            "or newer)"
        ) from None
    _setup_privateuseone_for_python_backend(KIND)
    # `torch.tensor(..., device=...)` makes its copy below the reach of any mode.
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _library.append(library)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Tensor:
    if PretendDevice.active is not None and isinstance(target, PretendTensor):
        PretendDevice.active.note("upload", waits=not non_blocking)
    into = target.inner if isinstance(target, PretendTensor) else target
    into.copy_(source.inner if isinstance(source, PretendTensor) else source)
    return target


def check_device(function: Callable[..., Any], *args: Any) -> PretendDevice:
    """AssertionError unless `function` gives the same numbers there as on the processor.

    args: trees of tensors on the processor (see `shoal.tensor.tree`); the result is one, and all of
    it must be where the arguments were. Returns the device, closed, with what was counted.

    >>> check_device(lambda x: x.sort().values[:2], torch.tensor([3.0, 1.0, 2.0])).waits.total()
    0
    """
    here, structure = tree.flatten(function(*args))
    with PretendDevice() as device:
        away = [tree.map_tree(lambda leaf: leaf.to(device.name), arg) for arg in args]
        device.waits.clear()
        there, other = tree.flatten(function(*away))
    assert structure == other, "device: another structure of the result"
    for place, (near, far) in enumerate(zip(here, there, strict=True)):
        assert isinstance(far, PretendTensor), f"device: tensor {place} of the result is on cpu"
        kinds = [f"{each.dtype} {tuple(each.shape)}" for each in (near, far)]
        assert kinds[0] == kinds[1], f"device: tensor {place} is {kinds[1]}, not {kinds[0]}"
        if near.layout == torch.strided:
            gap = near != far.inner
            unlike = gap & ~((near != near) & (far.inner != far.inner))
            assert not unlike.any(), (
                f"device: {int(unlike.sum())} of {unlike.numel()} numbers of tensor {place} differ"
            )
    return device
