"""Checksums of values as messages have them."""

from __future__ import annotations

import torch

from shoal.wire.checksum import checksum


def test_shape_type_and_names_count_and_the_order_of_names_does_not() -> None:
    flat, square = torch.arange(4.0), torch.arange(4.0).view(2, 2)
    assert checksum(flat) != checksum(square)
    assert checksum(flat) != checksum(flat.double())
    assert checksum({"a": flat, "b": square}) == checksum({"b": square, "a": flat})
