"""The address book: records in any order, forged ones, ids and keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.live.book import Book, Conflict, Record, signed
from shoal.engine.live.joining import Joining
from shoal.wire.identity import Identity

RUN = bytes(range(16))
OWNERS = [Identity.from_seed(bytes([n]) * 32) for n in range(4)]


@dataclass(frozen=True)
class Said:
    """What an owner says, before it is signed."""

    owner: int
    peer: int
    version: int
    port: int = 7000
    state: str = "here"

    def record(self, run: bytes = RUN) -> Record:
        owner = OWNERS[self.owner]
        first = min(self.version, 5)
        plain = Record(
            self.peer, "10.0.0.1", self.port, owner.public, self.version, first, self.state, b""
        )
        return signed(plain, run, owner)


OWN = [Said(n, n, v, 7000 + v).record() for n in range(3) for v in range(1, 5)]


@given(st.permutations(OWN), st.lists(st.sampled_from(OWN), max_size=8))
def test_any_order_and_any_repetition_end_in_the_same_book(order: list, more: list) -> None:
    book = Book(RUN, 4)
    for record in [*order, *more]:
        book.take([record])
    assert book.addresses() == dict.fromkeys(range(3), ("10.0.0.1", 7004))
    assert book.take(order) == []


def test_what_is_not_signed_for_this_run_by_its_key_is_left_out() -> None:
    good = Said(1, 1, 3).record()
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    wrong = {
        "host": "10.0.0.9", "port": 7009, "peer": 2, "version": 9, "incarnation": 1,
        "state": "done", "public": OWNERS[2].public, "signature": bytes(64),
    }  # fmt: skip
    for name, value in wrong.items():
        assert Book(RUN, 4).take([Record(**{**fields, name: value})]) == [], name
    assert Book(RUN, 4).take([Said(1, 1, 3).record(run=bytes(16))]) == []
    assert Book(RUN, 4).take([Said(1, 4, 3).record()]) == []
    assert Book(RUN, 4).take([Said(1, 1, 3, state="elsewhere").record()]) == []
    assert Book(RUN, 4).take([Said(1, 1, 3, port=0).record()]) == []
    assert Book(RUN, 4, {OWNERS[2].name}).take([good]) == []
    assert Book(RUN, 4, {OWNERS[1].name}).take([good]) == [1]


def test_an_id_belongs_to_its_first_key_and_a_key_to_one_id() -> None:
    book = Book(RUN, 3)
    assert book.take([Said(1, 1, 3).record()]) == [1]
    assert book.take([Said(2, 1, 9).record()]) == []
    assert book.take([Said(1, 2, 9).record()]) == []
    assert book.seat(OWNERS[1].public, -1) == 1
    assert book.seat(OWNERS[2].public, 1) == Conflict(1)
    assert book.seat(OWNERS[1].public, 2) == Conflict(2)
    assert book.seat(OWNERS[2].public, 3) == Conflict(3)
    assert book.seat(OWNERS[2].public, -1) == 0
    assert book.seat(OWNERS[3].public, -1) == 2
    assert book.seat(OWNERS[2].public, -1) == 0
    assert book.seat(OWNERS[0].public, -1) is None


def test_ids_that_are_kept_go_only_to_those_that_ask_for_them() -> None:
    book = Book(RUN, 4, kept=2)
    assert book.seat(OWNERS[2].public, -1) == 2
    assert book.seat(OWNERS[0].public, 0) == 0
    assert book.seat(OWNERS[3].public, -1) == 3
    assert book.seat(OWNERS[1].public, -1) is None
    assert book.seat(OWNERS[1].public, 1) == 1
    with pytest.raises(UsageError, match="kept=-1; need 0 or more"):
        Joining(kept=-1)


def test_a_book_has_a_size() -> None:
    with pytest.raises(UsageError, match="5000 peers; need 1 to 4096"):
        Book(RUN, 5000)
