"""Messages as bytes: a fixed prefix, a msgpack header, raw segments. No pickle, no code.

    prefix    32 bytes: magic "Sh", version, flags, kind code, request, checksum, header length,
              body length
    header    msgpack array of the message's fields; a tensor stands there as its type and shape
    segments  raw little-endian tensor bytes and packed payloads

Header and segments start at multiples of 8, so that a received tensor is a view, not a copy. A view
whose memory does not start at a multiple of 64 is copied once: BLAS kernels peel by alignment, so
a dot product of the same numbers at another address may differ in its last bits.
The checksum is the CRC-32 of all other bytes in messages that are declared `checked`, else 0. Links
protect their bytes by themselves; it finds a bit that flips elsewhere (memory, a proxy, the fault
`corrupt`): any damage of up to 32 bits in a row, and all other damage but once in 2^32. It is no
defence against anybody who means it.

Everything a frame claims is checked against the limits and against its own length before any
memory is taken for it.
"""

from __future__ import annotations

import struct
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec

from shoal.base.errors import DecodeError, MessageTooLarge, UndeclaredMessage, WireError
from shoal.base.limits import DEFAULT, Limits
from shoal.wire.message import Message, Packed, kind_of

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | bytearray | memoryview

PREFIX = struct.Struct("<2sBBIqIIQ")
_CHECK = struct.Struct("<I")
_CHECK_AT = 16
MAGIC = b"Sh"
VERSION = 2
_TENSOR = 1
_SEGMENT = 2
_PLACE = struct.Struct("<IQ")
ALIGNMENT = 64
"""Where torch puts its own tensors, and what makes results independent of a tensor's address."""

_local = threading.local()


def _tensors() -> Any:
    """`shoal.wire.tensors`, or None: while nobody has loaded torch there are no tensors.

    So a program without tensors need not wait for torch, and a stranger cannot make it load torch.
    """
    global _module
    if _module is None and "torch" in sys.modules:
        from shoal.wire import tensors

        _module = tensors
    return _module


_module: ModuleType | None = None


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor; does not load torch to find out."""
    tensors = _tensors()
    return tensors is not None and isinstance(value, tensors.Tensor)


def _pad(length: int) -> int:
    return (length + 7) & ~7


def _hook(value: Any) -> msgspec.msgpack.Ext:
    parts: list[Any] = _local.parts
    index = len(parts)
    tensors = _tensors()
    if tensors is not None and isinstance(value, tensors.Tensor):
        length, form = tensors.describe(value)
        parts.append((value, length))
        return msgspec.msgpack.Ext(_TENSOR, _PLACE.pack(index, length) + form)
    if isinstance(value, Packed):
        length = value.byte_count()
        parts.append((value, length))
        return msgspec.msgpack.Ext(_SEGMENT, _PLACE.pack(index, length))
    raise UndeclaredMessage(
        f"{type(value).__name__} cannot be sent; fields are int, float, bool, str, bytes, Tensor, "
        "Packed, tuple, dict or messages"
    )


_encoder = msgspec.msgpack.Encoder(enc_hook=_hook)
_encode_plain = _encoder.encode


def _refuse(message: Message, error: Exception) -> UndeclaredMessage:
    return UndeclaredMessage(
        f"{type(message).__name__} cannot be sent: {error} (integers have 64 bits, text is UTF-8)"
    )


def size_of(message: Message) -> int:
    """Bytes of the message's frame, without packing its segments."""
    try:
        if message.plain:
            return 32 + ((len(_encode_plain(message)) + 7) & ~7)
        if not isinstance(message, Message):
            raise UndeclaredMessage(
                f"{type(message).__name__} is no message (declare it with @message)"
            )
        _local.parts = parts = []
        total = PREFIX.size + _pad(len(_encoder.encode(message)))
    except (OverflowError, UnicodeEncodeError) as error:
        raise _refuse(message, error) from None
    for _, length in parts:
        total += (length + 7) & ~7
    return total


def _raw(part: Any) -> Buffer:
    return part.pack() if isinstance(part, Packed) else _tensors().raw(part)


def encode(message: Message, request: int = 0) -> list[Buffer]:
    """The frame as buffers for a gathering write; tensor segments are not copied.

    Tensors stay borrowed until the bytes are written: do not change them in place before that.
    """
    if not isinstance(message, Message):
        raise UndeclaredMessage(
            f"{type(message).__name__} is no message (declare it with @message)"
        )
    _local.parts = parts = []
    try:
        header = _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise _refuse(message, error) from None
    body: list[Buffer] = []
    body_bytes = 0
    for part, length in parts:
        raw = _raw(part)
        if len(raw) != length:
            raise UndeclaredMessage(
                f"{type(part).__name__} announced {length} bytes and packed {len(raw)}"
            )
        body.append(raw)
        body_bytes += length
        if gap := _pad(length) - length:
            body.append(b"\0" * gap)
            body_bytes += gap
    gap = _pad(len(header)) - len(header)
    code, short, padded = message.code, len(header), header + b"\0" * gap
    prefix = PREFIX.pack(MAGIC, VERSION, 0, code, request, 0, short, body_bytes)
    if message.checked:
        check = crc32(padded, crc32(prefix))
        for part in body:
            check = crc32(part, check)
        prefix = PREFIX.pack(MAGIC, VERSION, 0, code, request, check, short, body_bytes)
    return [prefix + padded, *body]


class Prefix(msgspec.Struct, frozen=True):
    """What the first 32 bytes of a frame say."""

    code: int
    request: int
    check: int
    header_bytes: int
    body_bytes: int
    rest_bytes: int
    """how many bytes follow the prefix"""


def read_prefix(data: Buffer, limits: Limits = DEFAULT) -> Prefix:
    """Check and read the first 32 bytes of a frame."""
    if len(data) < PREFIX.size:
        raise DecodeError(f"frame: {len(data)} bytes; a prefix has {PREFIX.size}")
    magic, version, flags, code, request, check, header, body = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise DecodeError(f"frame: starts with {magic!r}, not {MAGIC!r}: no Shoal peer")
    if version != VERSION or flags:
        raise DecodeError(
            f"frame: version {version} flags {flags}; this build reads version {VERSION}"
        )
    if header > limits.header_bytes:
        raise MessageTooLarge(f"frame: header of {header} bytes; limit {limits.header_bytes}")
    if PREFIX.size + header + body > limits.frame_bytes:
        raise MessageTooLarge(f"frame: {header + body} bytes; limit {limits.frame_bytes}")
    return Prefix(code, request, check, header, body, _pad(header) + body)


def decode(
    data: Buffer, limits: Limits = DEFAULT, prefix: Prefix | None = None
) -> tuple[Message, int]:
    """A whole frame to (message, request); tensors are views of `data`.

    prefix: what `read_prefix` found in it, if that was called already. Raises DecodeError for
    anything malformed, and for kinds that this process does not declare.
    """
    if prefix is None:
        prefix = read_prefix(data, limits)
    if len(data) != PREFIX.size + prefix.rest_bytes:
        raise DecodeError(
            f"frame: {len(data)} bytes; its prefix says {PREFIX.size + prefix.rest_bytes}"
        )
    kind = kind_of(prefix.code)
    if kind is None:
        raise DecodeError(f"frame: kind {prefix.code:#010x} is not declared here (import it)")
    view = memoryview(data)
    if kind.checked or prefix.check:
        _compare(kind, view, prefix.check)
    end = PREFIX.size + prefix.header_bytes
    _local.body = body = _Body(view[_pad(end) :])
    try:
        message = _decoder(kind).decode(view[PREFIX.size : end])
        body.finish()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise DecodeError(f"frame: {kind.__name__}: {error}") from None
    except WireError:
        raise
    except Exception as error:
        # A message class may check its own fields; whatever it raises, the frame is at fault.
        raise DecodeError(f"frame: {kind.__name__}: {type(error).__name__}: {error}") from error
    finally:
        _local.body = None
    return message, prefix.request


def _compare(kind: type[Message], frame: memoryview, check: int) -> None:
    if not kind.checked:
        raise DecodeError(f"frame: {kind.__name__} with a checksum, which it does not have")
    after = _CHECK_AT + _CHECK.size
    found = crc32(frame[after:], crc32(bytes(_CHECK.size), crc32(frame[:_CHECK_AT])))
    if found != check:
        raise DecodeError(f"frame: {kind.__name__}: checksum {check:#010x} on {found:#010x}")


class _Body:
    """Hands out segments in order, each exactly once, until nothing is left."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._next = 0
        self._offset = 0

    def take(self, index: int, length: int) -> memoryview:
        if index != self._next:
            raise DecodeError(f"frame: segment {index} out of order")
        end = self._offset + length
        if end > len(self._view):
            raise DecodeError(f"frame: segment {index} of {length} bytes runs over the end")
        piece = self._view[self._offset : end]
        self._offset = _pad(end)
        self._next += 1
        return piece

    def finish(self) -> None:
        if self._offset != len(self._view):
            raise DecodeError("frame: segments left over")


def _extension(code: int, data: memoryview) -> Tensor | Packed:
    if len(data) < _PLACE.size:
        raise DecodeError("frame: truncated segment description")
    index, length = _PLACE.unpack_from(data)
    if code == _SEGMENT and len(data) == _PLACE.size:
        return Packed(_local.body.take(index, length))
    if code != _TENSOR or len(data) < _PLACE.size + 1 or (len(data) - _PLACE.size - 1) % 8:
        raise DecodeError(f"frame: unknown extension {code}")
    tensors = _tensors()
    if tensors is None:
        raise DecodeError("frame: a tensor, but no message with tensors is declared here")
    form = tensors.read_form(data[_PLACE.size :], length)
    return tensors.view(_local.body.take(index, length), *form)


def _typed(kind: type, value: Any) -> Any:
    # Of all types of fields, only these two are not msgspec's own.
    if isinstance(value, kind):
        return value
    raise DecodeError(f"frame: expected {kind.__name__}, got {type(value).__name__}")


_decoders: dict[type[Message], msgspec.msgpack.Decoder[Any]] = {}


def _decoder(kind: type[Message]) -> msgspec.msgpack.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(
            kind, dec_hook=_typed, ext_hook=_extension
        )
    return decoder
