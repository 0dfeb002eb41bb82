"""Message declaration: plain classes with annotations become frozen structs that can be sent.

    @message(tag=("round",))
    class Update:
        round: int
        delta: Tensor

Fields may be int, float, bool, str, bytes, Tensor, Packed, tuple, dict or another message. A
message's tag is the tuple of the fields that `tag` names; `recv` and `gather` select by it. What is
`checked` arrives as it was sent, or not at all: damaged on its way, it counts as lost.
Messages, and the tensors in them, are immutable once sent.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, get_type_hints, overload

import msgspec

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.base.ids import Tag

T = TypeVar("T")


class Segment(Protocol):
    """Something that is sent as one run of bytes and knows its length without making them."""

    def byte_count(self) -> int:
        """Exactly `len(self.pack())`."""
        ...

    def pack(self) -> bytes | memoryview: ...


class Message(msgspec.Struct, frozen=True):
    """Base of everything that crosses a link; use the `@message` decorator instead of this."""

    kind: ClassVar[str] = ""
    code: ClassVar[int] = 0
    tag_fields: ClassVar[tuple[str, ...]] = ()
    checked: ClassVar[bool] = False
    plain: ClassVar[bool] = True

    @property
    def tag(self) -> Tag:
        """What tells this message from others of its kind; () when the class declares no tag."""
        return tuple([getattr(self, name) for name in self.tag_fields])


class Packed:
    """A message field that its owner packs itself: a `Segment` here, bytes once it has travelled.

    In simulation the content arrives as it was sent; across a wire it arrives as bytes, and the
    receiver unpacks it. `content` must not change once sent.
    """

    __slots__ = ("content",)

    def __init__(self, content: Segment | bytes | memoryview) -> None:
        self.content = content

    def byte_count(self) -> int:
        content = self.content
        return content.byte_count() if hasattr(content, "byte_count") else len(content)  # type: ignore[union-attr,arg-type]

    def pack(self) -> bytes | memoryview:
        content = self.content
        return content.pack() if hasattr(content, "pack") else content  # type: ignore[union-attr,return-value]


_kinds: dict[int, type[Message]] = {}


def message_key(code: int, tag: Tag) -> int:
    """The signed 64 bits that stand for a kind and tag in digests and keyed draws."""
    return keyed.signed(keyed.fold(code, *tag)) if tag else code


def kind_of(code: int) -> type[Message] | None:
    """The declared class of a wire code, if this process knows it."""
    return _kinds.get(code)


def declared_kinds() -> tuple[type[Message], ...]:
    """Every message class that this process has declared, by name."""
    return tuple(sorted(_kinds.values(), key=lambda kind: kind.kind))


@overload
def message(declared: type[T]) -> type[T]: ...
@overload
def message(
    *, tag: tuple[str, ...] = (), checked: bool = False
) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True)
def message(
    declared: type | None = None, *, tag: tuple[str, ...] = (), checked: bool = False
) -> Any:
    """Turn an annotated class into a message.

    tag: the fields that make up its tag; checked: its frame carries a checksum (no more bytes; in
    simulation no time, on `live` some 0.3 ms per MB at each end), for what would do harm if it
    were damaged and still decoded, such as parameters that are averaged.

    >>> @message(tag=("round",))
    ... class Ping:
    ...     round: int
    >>> Ping(3).tag
    (3,)
    """
    if declared is None:
        return lambda cls: _declare(cls, tag, checked)
    return _declare(declared, tag, checked)


def _declare(declared: type, tag: tuple[str, ...], checked: bool) -> type[Message]:
    module = sys.modules.get(declared.__module__)
    names = inspect.get_annotations(declared)
    hints = get_type_hints(declared, vars(module) if module else None, include_extras=True)
    for name in tag:
        if name not in names:
            raise UsageError(
                f"message {declared.__qualname__}: tag names {name!r}, but the fields are "
                f"{tuple(names)} (use a field's name)"
            )
    fields = [
        (name, hints[name], declared.__dict__[name])
        if name in declared.__dict__
        else (name, hints[name])
        for name in names
    ]
    kind = f"{declared.__module__}.{declared.__qualname__}"
    code = keyed.word(kind) & 0xFFFFFFFF
    known = _kinds.get(code)
    if known is not None and known.kind != kind:
        raise UsageError(f"messages {kind} and {known.kind} share the code {code} (rename one)")
    namespace: dict[str, Any] = {
        name: value
        for name, value in vars(declared).items()
        if name not in names and name not in ("__dict__", "__weakref__", "__annotations__")
    }
    made: type[Message] = msgspec.defstruct(
        declared.__name__,
        fields,
        bases=(Message,),
        module=declared.__module__,
        namespace=namespace,
        frozen=True,
        array_like=True,
        forbid_unknown_fields=True,
    )  # type: ignore[assignment]
    made.__qualname__ = declared.__qualname__
    made.kind = kind
    made.code = code
    made.tag_fields = tag
    made.checked = checked
    made.plain = all(_is_plain(hints[name]) for name in names)
    if len(tag) == 0:
        made.tag = ()  # type: ignore[assignment,misc]
    elif len(tag) == 1:
        get = attrgetter(tag[0])
        made.tag = property(lambda self: (get(self),))  # type: ignore[assignment,misc]
    else:
        made.tag = property(attrgetter(*tag))  # type: ignore[assignment,misc]
    _kinds[code] = made
    return made


def _is_plain(hint: Any) -> bool:
    """True when a field can hold neither tensors nor segments, so that size needs no walk."""
    return hint in (int, float, bool, str, bytes)
