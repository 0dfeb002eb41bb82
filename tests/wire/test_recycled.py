"""Memory of received frames that is used again, and never while somebody holds it."""

from __future__ import annotations

import gc
import threading

import numpy as np
import torch

from shoal.wire.frame import place
from shoal.wire.recycled import Recycled


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_only_when_no_view_of_it_is_left() -> None:
    recycled = Recycled()
    lease = recycled.take(200_000)
    where = address(lease)
    tensor = torch.frombuffer(lease.data[64:], dtype=torch.uint8)[10:20]
    del lease
    gc.collect()
    other = recycled.take(200_000)
    assert address(other) != where
    tensor.fill_(7)
    other[:] = 0
    assert tensor.sum() == 70
    del tensor
    gc.collect()
    assert address(recycled.take(200_000)) == where


def test_idle_memory_is_bounded_and_other_sizes_make_room() -> None:
    recycled = Recycled(most_bytes=1 << 20)
    leases = [recycled.take(1 << 18) for _ in range(8)]
    del leases
    assert recycled.idle_bytes == 1 << 20
    lease = recycled.take(1 << 19)
    del lease
    assert recycled.idle_bytes == 1 << 19
    large = recycled.take(1 << 21)
    del large
    assert recycled.idle_bytes <= 1 << 20


def test_threads_never_get_the_same_memory() -> None:
    recycled, wrong = Recycled(), []

    def work(number: int) -> None:
        for turn in range(300):
            lease = recycled.take(70_000)
            lease[:100] = number
            if turn % 3 == 0:
                recycled.take(70_000)[:100] = 255
            if not (lease[:100] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_frames_of_any_length_have_their_body_at_a_multiple_of_64() -> None:
    for total in (33, 65_535, 65_536, 1_000_000):
        for body in (32, 40, 104):
            view = place(total, body)
            assert len(view) == total
            assert (address(np.frombuffer(view, np.uint8)) + body) % 64 == 0
