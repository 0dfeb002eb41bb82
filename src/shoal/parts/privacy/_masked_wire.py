"""What a hub and its clients say to each other in a masked round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.parts.privacy.masked_peer import Advert
from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers
from shoal.wire.identity import SIGNATURE_BYTES
from shoal.wire.message import Packed, message

KEY_BYTES = 32


@message(tag=("round",), checked=True)
class Begin:
    """The hub's parameters, and what its strategy gives beside them; none at the end."""

    round: int
    params: Tensor
    extra: dict[str, Tensor]


@message(tag=("round",), checked=True)
class Advertise:
    """A client's two public keys and the commitment to its own mask, signed where rounds are."""

    round: int
    keys: bytes


@message(tag=("round",), checked=True)
class Book:
    """What a client's neighbours advertised, in their order."""

    round: int
    peers: tuple[int, ...]
    keys: bytes


@message(tag=("round",), checked=True)
class Deal:
    """Sealed shares for each of the peers."""

    round: int
    peers: tuple[int, ...]
    sealed: bytes


@message(tag=("round",), checked=True)
class Dealt:
    """Sealed shares from each of the peers."""

    round: int
    peers: tuple[int, ...]
    sealed: bytes


@message(tag=("round",), checked=True)
class Masked:
    """A client's vector, weight and all, under its masks."""

    round: int
    codes: Packed


@message(tag=("round",), checked=True)
class Standing:
    """To the witnesses: whose vectors came, a bit for each client of the round."""

    round: int
    survivors: bytes


@message(tag=("round",), checked=True)
class Vouched:
    """A witness's signature of them."""

    round: int
    signature: bytes


@message(tag=("round",), checked=True)
class Agreed:
    """A `Question` to all clients at once: the survivors, and which witnesses signed them."""

    round: int
    survivors: bytes
    witnesses: bytes
    signatures: bytes


@message(tag=("round",), checked=True)
class Question:
    """Whose vectors came, and whose did not, among a client's neighbours that shared."""

    round: int
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]


@message(tag=("round",), checked=True)
class Reveal:
    """Shares of the own masks of some, and of the keys of others, one after the other."""

    round: int
    seeds: tuple[int, ...]
    keys: tuple[int, ...]
    shares: bytes


class Row:
    """Masked entries as they travel: int64 [entries], `bits` bits each."""

    def __init__(self, codes: Tensor, bits: int) -> None:
        self.codes, self.bits = codes, bits

    def byte_count(self) -> int:
        return packed_bytes(len(self.codes), self.bits)

    def pack(self) -> bytes:
        return pack_integers(self.codes.cpu().numpy(), self.bits)


def row_of(packed: Packed, entries: int, bits: int) -> Tensor | None:
    """int64 [entries], None for another length."""
    content = packed.content
    if isinstance(content, Row):
        return content.codes if len(content.codes) == entries else None
    octets = np.frombuffer(bytes(content), np.uint8)  # type: ignore[arg-type]
    if len(octets) != packed_bytes(entries, bits):
        return None
    try:
        codes = unpack_integers(octets, bits, entries, "masked sum")
    except DecodeError:
        return None
    return torch.from_numpy(codes.astype(np.int64))


def together(pieces: Mapping[int, bytes]) -> tuple[tuple[int, ...], bytes]:
    """Pieces of equal length by peer as a message has them."""
    peers = tuple(sorted(pieces))
    return peers, b"".join(pieces[peer] for peer in peers)


def apart(peers: Sequence[int], data: bytes, size: int) -> dict[int, bytes] | None:
    """Inverse of `together`; None where the length does not fit, or a peer comes twice."""
    if len(data) != size * len(peers) or len(set(peers)) != len(peers):
        return None
    return {peer: data[size * i : size * (i + 1)] for i, peer in enumerate(peers)}


def advert_of(entry: bytes) -> tuple[Advert, bytes] | None:
    """Three fields of 32 bytes, and the signature of them or nothing."""
    if len(entry) not in (entry_bytes(signs=False), entry_bytes(signs=True)):
        return None
    fields = [entry[KEY_BYTES * i : KEY_BYTES * (i + 1)] for i in range(3)]
    return Advert(*fields), entry[3 * KEY_BYTES :]


def entry_bytes(*, signs: bool) -> int:
    """Of one client in `Advertise` and `Book`."""
    return 3 * KEY_BYTES + SIGNATURE_BYTES * signs
