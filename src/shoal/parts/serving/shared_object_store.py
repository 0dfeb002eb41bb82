"""Objects in memory that the processes of one machine share: written once, read where they lie.

The memory is an anonymous file (memfd) that its owner creates and nobody names: the kernel takes it
back when the last process that holds it is gone, however it went, so that nothing can be left over
after a kill. Others open it through the owner's entry in /proc. A key of 16 bytes is all that is
passed on.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.base.errors import ShoalError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = struct.Struct("<IHHII")
KEY_BYTES = _KEY.size
_PAGE = mmap.PAGESIZE
_HEADER = struct.Struct("<8sQQQ8s")
_MAGIC = b"shoalobj"
_CHECKED = 1 << 16
"""Numbers that are copied and looked at together, while they are in the processor's cache."""

DTYPES = ("float32", "float64")


class StoreFull(ShoalError):
    """All slots are taken: the sender has to wait until some are free again."""


class StoreGone(ShoalError):
    """The object is no more: its owner ended, or it was freed."""


class UpdateRefused(ShoalError, ValueError):
    """Numbers that no model can take: another shape, not finite, a negative weight."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a key says: the owner's process and descriptor, the arena, the slot and its use."""

    pid: int
    descriptor: int
    slot: int
    arena: int
    use: int

    @classmethod
    def of(cls, key: bytes) -> _Place:
        if len(key) != KEY_BYTES:
            raise UsageError(f"key of {len(key)} bytes; need {KEY_BYTES} (as `put` gave it)")
        pid, descriptor, slot, arena, use = _KEY.unpack(key)
        return cls(pid, descriptor, slot, arena, use)


class SharedObjectStore:
    """`slots` objects of one shape, in memory that other processes map; this process owns it.

    shape: of every object, a model's; dtype: "float32" or "float64", which is also what sums are
    accumulated in (narrower numbers are widened by the one copy that is made anyway). touch: have
    the system provide all pages now, so that the first use of a slot costs no page faults.

    An object is immutable once `put`; who reads it counts as a reference (`retain`, `release`), and
    at zero its slot is used again. Only the owner counts, so a reader that dies leaves nothing
    behind. Assumes Linux (memfd, /proc), and readers of the same user.

    >>> import torch
    >>> with SharedObjectStore(shape=3, slots=2) as store:
    ...     key = store.put(torch.tensor([1.0, 2.0, 3.0]))
    ...     len(key), store.get(key).tolist(), store.used
    (16, [1.0, 2.0, 3.0], 1)
    """

    def __init__(
        self, shape: int | Sequence[int], slots: int, dtype: str = "float32", *, touch: bool = True
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.size = int(np.prod(self.shape, dtype=np.int64))
        if dtype not in DTYPES:
            raise UsageError(f"SharedObjectStore: dtype={dtype!r}; need one of {', '.join(DTYPES)}")
        if self.size < 1 or not 1 <= slots <= 0xFFFF:
            raise UsageError(
                f"SharedObjectStore: shape={self.shape}, slots={slots}; need at least one number "
                f"and 1 to {0xFFFF} slots"
            )
        if not hasattr(os, "memfd_create"):
            raise UsageError("SharedObjectStore needs memfd_create (run it on Linux)")
        self.dtype = np.dtype(dtype)
        self.slots = slots
        stride = -(-self.size * self.dtype.itemsize // _PAGE) * _PAGE
        descriptor = os.memfd_create("shoal-objects")
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        if descriptor > 0xFFFF:
            self._file.close()
            raise UsageError(
                f"SharedObjectStore: descriptor {descriptor} does not fit a key (make the store "
                "before so many connections)"
            )
        os.ftruncate(descriptor, _PAGE + slots * stride)
        self._map = mmap.mmap(descriptor, _PAGE + slots * stride)
        _HEADER.pack_into(self._map, 0, _MAGIC, self.size, stride, slots, self.dtype.name.encode())
        self._arena = os.fstat(descriptor).st_ino & 0xFFFFFFFF
        self._pid, self._descriptor = os.getpid(), descriptor
        self._stride = stride
        if touch:
            np.frombuffer(self._map, np.uint8)[_PAGE::_PAGE] = 0
        # The slot used last is warm, so it is used first.
        self._free = list(range(slots))[::-1]
        self._uses = [0] * slots
        self._references = [0] * slots
        self.closed = False

    def __enter__(self) -> SharedObjectStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def used(self) -> int:
        """Slots that hold an object."""
        return self.slots - len(self._free)

    @property
    def free(self) -> int:
        """Slots that hold none."""
        return len(self._free)

    def reserve(self) -> bytes:
        """A slot to write a sum into: its key, with one reference. StoreFull without a free one."""
        if self.closed:
            raise StoreGone("the store is closed (make a new one)")
        if not self._free:
            raise StoreFull(
                f"all {self.slots} slots of {self._stride} bytes are taken (release some, wait, or "
                "raise slots)"
            )
        slot = self._free.pop()
        self._uses[slot] += 1
        self._references[slot] = 1
        return _KEY.pack(
            self._pid, self._descriptor, slot, self._arena, self._uses[slot] & 0xFFFFFFFF
        )

    def put(self, values: Tensor | np.ndarray) -> bytes:
        """Copy an update into shared memory, once; its key, with one reference.

        StoreFull when there is no room; UpdateRefused for another shape or kind of number than the
        model's, and for numbers that are not finite.
        """
        array = _array(values)
        if array.shape != self.shape or array.dtype.kind != "f":
            raise UpdateRefused(
                f"update of {array.dtype} {array.shape}; the model has {self.dtype} {self.shape} "
                "(send floating-point numbers of the model's shape)"
            )
        key = self.reserve()
        try:
            self._fill(_Place.of(key).slot, array.reshape(-1))
        except UpdateRefused:
            self.release(key)
            raise
        return key

    def _fill(self, slot: int, array: np.ndarray) -> None:
        into = self._slot(slot)
        for start in range(0, self.size, _CHECKED):
            part = into[start : start + _CHECKED]
            np.copyto(part, array[start : start + _CHECKED], casting="same_kind")
            # One pass: a sum of finite numbers is finite, unless it overflows.
            if not np.isfinite(part.sum()) and not np.isfinite(part).all():
                raise UpdateRefused("update with numbers that are not finite (send none)")

    def view(self, key: bytes) -> np.ndarray:
        """The object as a flat array over the shared memory itself. StoreGone when it was freed."""
        return self._slot(self._held(key))

    def get(self, key: bytes) -> Tensor:
        """The object as a tensor over the shared memory itself; not to be written into."""
        import torch

        return torch.from_numpy(self.view(key)).view(self.shape)

    def retain(self, key: bytes) -> None:
        """One more reference."""
        self._references[self._held(key)] += 1

    def release(self, key: bytes) -> None:
        """One reference less; at zero the slot is free."""
        slot = self._held(key)
        self._references[slot] -= 1
        if not self._references[slot]:
            self._free.append(slot)

    def close(self) -> None:
        """Give the memory back; who has it mapped keeps it until it lets go as well."""
        if self.closed:
            return
        self.closed = True
        self._file.close()
        _unmap(self._map)

    def _held(self, key: bytes) -> int:
        place = _Place.of(key)
        if (
            self.closed
            or (place.pid, place.arena) != (self._pid, self._arena)
            or place.slot >= self.slots
            or not self._references[place.slot]
            or place.use != self._uses[place.slot] & 0xFFFFFFFF
        ):
            raise StoreGone(f"object {key.hex()} is not here any more (retain it while in use)")
        return place.slot

    def _slot(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._map, self.dtype, self.size, _PAGE + slot * self._stride)


class Mapped:
    """Objects of other processes' stores, by key. It keeps the arena used last mapped.

    >>> with SharedObjectStore(shape=2, slots=1) as store, Mapped() as mapped:
    ...     key = store.put(np.array([1.0, 2.0], np.float32))
    ...     mapped.view(key).tolist()
    [1.0, 2.0]
    """

    def __init__(self) -> None:
        self._arena: tuple[int, int] | None = None
        self._map: mmap.mmap | None = None
        self._size = self._stride = self._slots = 0
        self._dtype = np.dtype("float32")

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def view(self, key: bytes) -> np.ndarray:
        """The object as a flat array over the shared memory itself.

        StoreGone when its owner is gone. Whether the slot still holds the object only the owner
        knows.
        """
        place = _Place.of(key)
        if (place.pid, place.arena) != self._arena:
            self._open(place)
        assert self._map is not None
        if place.slot >= self._slots:
            raise StoreGone(f"slot {place.slot} of {self._slots}; no such object")
        return np.frombuffer(self._map, self._dtype, self._size, _PAGE + place.slot * self._stride)

    def _open(self, place: _Place) -> None:
        self.close()
        try:
            descriptor = os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR)
        except OSError as error:
            raise StoreGone(
                f"the store of process {place.pid} cannot be opened: {error.strerror} (it ended, "
                "or belongs to another user)"
            ) from None
        try:
            status = os.fstat(descriptor)
            # The number may belong to another file, or another process, by now.
            if status.st_ino & 0xFFFFFFFF != place.arena or status.st_size < _PAGE:
                raise StoreGone(f"process {place.pid} has that store no more")
            opened = mmap.mmap(descriptor, status.st_size)
        finally:
            os.close(descriptor)
        magic, size, stride, slots, dtype = _HEADER.unpack_from(opened, 0)
        if magic != _MAGIC:
            opened.close()
            raise StoreGone(f"descriptor {place.descriptor} of {place.pid} is no object store")
        self._map, self._size, self._stride, self._slots = opened, size, stride, slots
        self._dtype = np.dtype(dtype.rstrip(b"\0").decode())
        self._arena = (place.pid, place.arena)

    def close(self) -> None:
        """Let go of the memory."""
        if self._map is not None:
            _unmap(self._map)
        self._map = self._arena = None


def arena_of(key: bytes) -> int:
    """Which store a key belongs to, as a number that later stores do not have.

    >>> arena_of(_KEY.pack(1, 2, 3, 4, 5))
    4
    """
    return _Place.of(key).arena


def _unmap(opened: mmap.mmap) -> None:
    # Where somebody still looks at it, it goes with the last array over it.
    with suppress(BufferError):
        opened.close()


def _array(values: Any) -> np.ndarray:
    """The numbers of a tensor or array where they lie; bfloat16, which NumPy lacks, is copied."""
    if isinstance(values, np.ndarray):
        return values
    import torch

    values = values.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
