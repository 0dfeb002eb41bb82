"""Masks: uniform numbers modulo a power of two, as many as wanted from 32 secret bytes.

The key stream of a cipher, taken as 32-bit words (64-bit ones where a sum needs more), is added to
a vector piece by piece, so that a mask never lies in memory as a whole. AES-256 in counter mode is
what processors have instructions for; ChaCha20 is for those that have not.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.base.errors import UsageError

Cipher = Literal["aes", "chacha20"]
Mask = tuple[bytes, int]
"""A secret of 32 bytes, and 1 (added) or -1 (subtracted)."""

SECRET_BYTES = 32
PIECE_BYTES = 1 << 17
"""Of the key stream at a time: it stays in the cache until it is added."""

_ZEROS = memoryview(bytes(PIECE_BYTES))


def _encryptor(secret: bytes, cipher: Cipher) -> Any:
    # Not at the top: the library takes long to import.
    from cryptography.hazmat.primitives.ciphers import Cipher as Pair
    from cryptography.hazmat.primitives.ciphers import algorithms, modes

    if len(secret) != SECRET_BYTES:
        raise UsageError(f"mask: a secret of {len(secret)} bytes; need {SECRET_BYTES}")
    # A secret makes one stream and no other, so that the counter may begin at 0.
    nonce = bytes(16)
    if cipher == "aes":
        return Pair(algorithms.AES(secret), modes.CTR(nonce)).encryptor()
    if cipher == "chacha20":
        return Pair(algorithms.ChaCha20(secret, nonce), None).encryptor()
    raise UsageError(f"mask: cipher={cipher!r}; need 'aes' or 'chacha20'")


def stream(secret: bytes, size: int, cipher: Cipher = "aes") -> bytes:
    """The first `size` bytes of a secret's key stream.

    >>> stream(bytes(32), 4).hex(), stream(bytes(32), 4, "chacha20").hex()
    ('dc95c078', '76b8e0ad')
    """
    return _encryptor(secret, cipher).update(bytes(size))


def add_mask(total: NDArray[Any], secret: bytes, sign: int, cipher: Cipher = "aes") -> None:
    """Add (sign 1) or subtract (-1) a mask, in place: total uint32 or uint64 [dim], wrapping.

    >>> x = np.arange(3, dtype=np.uint32)
    >>> add_mask(x, bytes(32), 1)
    >>> add_mask(x, bytes(32), -1)
    >>> x
    array([0, 1, 2], dtype=uint32)
    """
    if total.dtype not in (np.uint32, np.uint64) or sign not in (1, -1):
        raise UsageError(f"add_mask: {total.dtype}, sign={sign}; need uint32 or uint64 and 1 or -1")
    encryptor, size = _encryptor(secret, cipher), total.dtype.itemsize
    scratch = bytearray(PIECE_BYTES + 16)
    words = np.frombuffer(scratch, total.dtype.newbyteorder("<"), PIECE_BYTES // size)
    combine = np.add if sign == 1 else np.subtract
    for start in range(0, len(total), len(words)):
        piece = total[start : start + len(words)]
        encryptor.update_into(_ZEROS[: piece.nbytes], scratch)
        combine(piece, words[: len(piece)], out=piece)


def add_masks(codes: Tensor, masks: tuple[Mask, ...], bits: int, cipher: Cipher = "aes") -> Tensor:
    """codes [dim], whole numbers, plus all masks, modulo 2^bits: int64 [dim] on the processor.

    bits: at most 62. Uniform if a single one of the masks is unknown.
    """
    if not 1 <= bits <= 62:
        raise UsageError(f"add_masks: bits={bits}; need 1 to 62")
    word = np.uint32 if bits <= 32 else np.uint64
    # Wraps modulo 2^32 or 2^64, of which 2^bits is a divisor.
    total = codes.cpu().to(torch.int64).numpy().astype(word)
    for secret, sign in masks:
        add_mask(total, secret, sign, cipher)
    total &= word((1 << bits) - 1)
    return torch.from_numpy(total.astype(np.int64))
