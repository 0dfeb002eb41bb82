"""What happens to a vector on its way: compression, quantising, error feedback, clip and noise."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Key, Vector


class Payload(Protocol):
    """An encoded vector: a frozen dataclass of tensors with leading axes `[...]`.

    A row of it (no leading axes) is a wire `Segment`: `byte_count() == len(pack())` exactly.
    """

    def size_bytes(self) -> Tensor:
        """Exact wire size of each row, int64 [...]; no packing needed."""
        ...

    def byte_count(self) -> int:
        """`int(size_bytes())` of a row."""
        ...

    def pack(self) -> bytes | memoryview:
        """The bytes of a row."""
        ...


class Transform(Protocol):
    """A codec for vectors. Stateless settings; state is explicit and returned."""

    def bind(self, spec: FlatSpec) -> Transform:
        """The transform for vectors of this layout; a per-layer codec learns its layers here."""
        ...

    def init(self, like: Vector) -> Any:
        """State (a tree; None when there is none) for vectors shaped like `like` [..., dim]."""
        ...

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Payload, Any]: ...

    def decode(self, payload: Payload) -> Vector:
        """The vector [..., dim] that the receiver sees."""
        ...

    def unpack(self, data: bytes | memoryview) -> Payload:
        """Inverse of a row's `pack`; raises DecodeError on anything malformed."""
        ...

    # Optional promises that the contract suite checks: unbiased, dense, stateful, adds_noise
    # (bools), and contraction(dim) -> float | None: E|decode(encode(x)) - x|^2 <= c |x|^2.
