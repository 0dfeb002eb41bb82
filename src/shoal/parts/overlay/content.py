"""Content that names itself: blocks, their identifiers (CIDs), and blobs split into blocks.

An identifier holds the SHA-256 of a block, so that whoever has it can check what strangers send.
A blob is a manifest, which is a block too, and lists the blocks of the blob: versions of a blob
that share blocks share them in every store and on every wire. Sources: the CID specification of
Multiformats (version 1); IPLD's flat layout of chunked files.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from shoal.base.errors import DecodeError, UsageError
from shoal.kernel.peer import Store

RAW = 0x55
MANIFEST = 0x300000
"""From the range that Multicodec keeps free for private use."""
BLOCK_BYTES = 1 << 18
DIGEST_BYTES = 32
_VERSION = 1
_SHA_256 = b"\x12\x20"
_HEAD = struct.Struct("<8sQI")
_MAGIC = b"ShoalMf1"
_MOST_CHILDREN = 1 << 15


@dataclass(frozen=True, order=True)
class Cid:
    """The identifier of a block. codec: what the block is (Multicodec); digest: its SHA-256.

    >>> str(Cid.of(b"hello world"))
    'bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e'
    >>> Cid.parse(str(Cid.of(b"hello world"))) == Cid.of(b"hello world")
    True
    """

    digest: bytes
    codec: int = RAW

    @classmethod
    def of(cls, block: bytes, codec: int = RAW) -> Cid:
        """The identifier of these bytes."""
        return cls(hashlib.sha256(block).digest(), codec)

    def names(self, block: bytes) -> bool:
        """Whether these are the bytes that it identifies."""
        return hashlib.sha256(block).digest() == self.digest

    def pack(self) -> bytes:
        """Version, codec and multihash."""
        return bytes([_VERSION]) + _varint(self.codec) + _SHA_256 + self.digest

    @classmethod
    def unpack(cls, data: bytes) -> Cid:
        """Inverse of `pack`; DecodeError for another version or hash, or a wrong length."""
        if data[:1] != bytes([_VERSION]):
            raise DecodeError(f"cid: {data[:4].hex()}... is no version-1 identifier")
        codec = shift = 0
        place = 1
        while True:
            if place >= len(data) or shift > 28:
                raise DecodeError("cid: the codec is cut short or too long")
            codec |= (data[place] & 0x7F) << shift
            shift += 7
            place += 1
            if data[place - 1] < 0x80:
                break
        digest = data[place + len(_SHA_256) :]
        if data[place : place + len(_SHA_256)] != _SHA_256 or len(digest) != DIGEST_BYTES:
            raise DecodeError("cid: the hash is not SHA-256 of 32 bytes")
        cid = cls(digest, codec)
        if cid.pack() != data:
            raise DecodeError("cid: the codec is not written in its shortest form")
        return cid

    def __str__(self) -> str:
        """Multibase: the letter b, then lower-case base32 without padding."""
        return "b" + base64.b32encode(self.pack()).decode().rstrip("=").lower()

    @classmethod
    def parse(cls, text: str) -> Cid:
        """From its text form; DecodeError for anything else."""
        body = text[1:].upper()
        if text[:1] != "b" or text != text.lower():
            raise DecodeError(f"cid: {text[:16]!r} is not in lower-case base32 (multibase 'b')")
        try:
            data = base64.b32decode(body + "=" * (-len(body) % 8))
        except ValueError:
            raise DecodeError(f"cid: {text[:16]!r} is no base32") from None
        cid = cls.unpack(data)
        if str(cid) != text:
            raise DecodeError(f"cid: {text[:16]!r} has bits beyond its end")
        return cid


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@dataclass(frozen=True)
class Manifest:
    """The blocks of a blob, in order; all have `block_bytes` bytes but the last.

    >>> manifest, blocks = Manifest.split(b"x" * 600, block_bytes=256)
    >>> len(manifest.children), [len(block) for block in blocks]
    (3, [256, 256, 88])
    >>> Manifest.unpack(manifest.pack()) == manifest
    True
    """

    size_bytes: int
    block_bytes: int
    children: tuple[Cid, ...]

    @classmethod
    def split(
        cls, blob: bytes | memoryview, block_bytes: int = BLOCK_BYTES
    ) -> tuple[Manifest, list[bytes]]:
        """A blob's manifest and its blocks."""
        count = -(-len(blob) // block_bytes) if block_bytes > 0 else -1
        if not 0 <= count <= _MOST_CHILDREN:
            raise UsageError(
                f"Manifest: block_bytes={block_bytes} for {len(blob)} bytes; need a positive "
                f"number that gives at most {_MOST_CHILDREN} blocks"
            )
        view = memoryview(blob)
        blocks = [bytes(view[at : at + block_bytes]) for at in range(0, len(blob), block_bytes)]
        return cls(len(blob), block_bytes, tuple(map(Cid.of, blocks))), blocks

    @cached_property
    def cid(self) -> Cid:
        """The blob's identifier."""
        return Cid.of(self.pack(), MANIFEST)

    def length(self, place: int) -> int:
        """Bytes of one block."""
        return min(self.block_bytes, self.size_bytes - place * self.block_bytes)

    def pack(self) -> bytes:
        """The manifest as a block."""
        head = _HEAD.pack(_MAGIC, self.size_bytes, self.block_bytes)
        return head + b"".join(child.digest for child in self.children)

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """Inverse of `pack`; DecodeError for anything else."""
        digests = data[_HEAD.size :]
        if len(data) < _HEAD.size or len(digests) % DIGEST_BYTES:
            raise DecodeError(f"manifest: {len(data)} bytes are no manifest")
        magic, size, block_bytes = _HEAD.unpack_from(data)
        count = len(digests) // DIGEST_BYTES
        if magic != _MAGIC or block_bytes < 1 or count > _MOST_CHILDREN:
            raise DecodeError("manifest: not a manifest, or with too many blocks")
        if -(-size // block_bytes) != count:
            raise DecodeError(f"manifest: {size} bytes are not {count} blocks of {block_bytes}")
        children = tuple(
            Cid(digests[at : at + DIGEST_BYTES]) for at in range(0, len(digests), DIGEST_BYTES)
        )
        return cls(size, block_bytes, children)


class Blocks:
    """Blocks in memory up to a limit; the ones not used for longest and not pinned give way.

    >>> blocks = Blocks(most_bytes=1000)
    >>> root = blocks.add_blob(b"x" * 600, block_bytes=256)
    >>> blocks.blob(root) == b"x" * 600
    True
    """

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        if most_bytes < 1:
            raise UsageError(f"Blocks: most_bytes={most_bytes}; need a positive number of bytes")
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._held: dict[Cid, bytes] = {}
        self._pins: dict[Cid, int] = {}

    def get(self, cid: Cid) -> bytes | None:
        """A block, None if it is not here."""
        block = self._held.pop(cid, None)
        if block is not None:
            self._held[cid] = block
        return block

    def __contains__(self, cid: Cid) -> bool:
        return cid in self._held

    def add(self, cid: Cid, block: bytes) -> None:
        """Keep a block whose bytes were checked; UsageError when pinned ones leave no room."""
        if cid in self._held:
            return
        for old in list(self._held) if self.held_bytes + len(block) > self._most_bytes else ():
            if not self._pins.get(old):
                self.held_bytes -= len(self._held.pop(old))
            if self.held_bytes + len(block) <= self._most_bytes:
                break
        if self.held_bytes + len(block) > self._most_bytes:
            raise UsageError(
                f"Blocks: no room for {len(block)} bytes beside {self.held_bytes} pinned ones; the "
                f"limit is {self._most_bytes} (raise most_bytes, or unpin a blob)"
            )
        self._held[cid] = block
        self.held_bytes += len(block)

    def pin(self, cids: Iterable[Cid]) -> None:
        """Never drop these, whether they are here or still to come."""
        for cid in cids:
            self._pins[cid] = self._pins.get(cid, 0) + 1

    def unpin(self, cids: Iterable[Cid]) -> None:
        """Take one pin back from each."""
        for cid in cids:
            self._pins[cid] -= 1
            if not self._pins[cid]:
                del self._pins[cid]

    # Blobs.

    def add_blob(self, blob: bytes, block_bytes: int = BLOCK_BYTES) -> Cid:
        """Split a blob and keep and pin all of it; its identifier."""
        manifest, blocks = Manifest.split(blob, block_bytes)
        self.pin((manifest.cid, *manifest.children))
        self.add(manifest.cid, manifest.pack())
        for cid, block in zip(manifest.children, blocks, strict=True):
            self.add(cid, block)
        return manifest.cid

    def manifest(self, root: Cid) -> Manifest | None:
        """A blob's manifest, None if it is not here or the identifier is that of another block."""
        block = self.get(root) if root.codec == MANIFEST else None
        return None if block is None else Manifest.unpack(block)

    def blob(self, root: Cid) -> bytes | None:
        """A blob, None while something of it is missing."""
        manifest = self.manifest(root)
        if manifest is None:
            return None
        blocks = [self.get(child) for child in manifest.children]
        return None if None in blocks else b"".join(blocks)  # type: ignore[arg-type]

    async def save(self, store: Store, root: Cid) -> None:
        """Write a blob's blocks that are not in the durable store yet, all or none."""
        manifest = self.manifest(root)
        blocks = {} if manifest is None else {c: self.get(c) for c in (root, *manifest.children)}
        if manifest is None or None in blocks.values():
            raise UsageError(f"save: {root} is not here as a whole (fetch it first)")
        await store.commit(
            {f"block {cid}": b for cid, b in blocks.items() if store.get(f"block {cid}") is None}
        )

    def restore(self, store: Store, root: Cid) -> bool:
        """Take the blocks of a blob that the durable store has and pin the blob; False when some
        are missing or damaged: fetch those."""
        data = store.get(f"block {root}")
        if data is None or root.codec != MANIFEST or not root.names(data):
            return False
        manifest = Manifest.unpack(data)
        self.pin((root, *manifest.children))
        self.add(root, data)
        for cid in manifest.children:
            block = store.get(f"block {cid}")
            if block is not None and cid.names(block):
                self.add(cid, block)
        return all(cid in self for cid in manifest.children)

    def drop_blob(self, root: Cid) -> None:
        """Unpin a blob that was added or fetched; other blobs keep the blocks they share."""
        manifest = self.manifest(root)
        if manifest is not None:
            self.unpin((root, *manifest.children))
