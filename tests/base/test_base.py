"""Errors, limits, units, digests and scalar keyed draws."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base import errors, keyed
from shoal.base.digest import TraceDigest, bytes_digest
from shoal.base.errors import UsageError
from shoal.base.limits import Limits
from shoal.base.units import FOREVER, to_ns, to_s


def drawn_tree() -> dict[str, str]:
    """Child to parent, as the module's docstring draws them."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    for line in lines:
        bare = line.lstrip(" │├└─")
        name, depth = bare.split()[0], len(line) - len(bare)
        if depth > 4:
            parents[name] = above[max(d for d in above if d < depth)]
        above = {d: n for d, n in above.items() if d < depth} | {depth: name}
    return parents


def test_the_drawn_tree_of_errors_is_the_tree_of_classes() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.ShoalError)
    }
    drawn = drawn_tree()
    assert {*drawn, "ShoalError"} == set(classes)
    for name, parent in drawn.items():
        assert classes[name].__bases__[0].__name__ == parent, name


def test_notices_to_stop_pass_through_except_exception() -> None:
    for kind in (errors.Cancelled, errors.Leaving):
        assert issubclass(kind, BaseException)
        assert not issubclass(kind, Exception)


@pytest.mark.parametrize("name", list(vars(Limits())))
@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_positive(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}; need a positive number"):
        Limits(**{name: value})
    assert getattr(Limits(**{name: 1 << 20}), name) == 1 << 20


def test_a_window_holds_some_chunks() -> None:
    with pytest.raises(UsageError, match="window_bytes=7; need 1048576"):
        Limits(window_bytes=7)


@given(st.integers(-(10**15), 10**15))
def test_nanoseconds_survive_seconds(microseconds: int) -> None:
    assert to_ns(to_s(microseconds * 1000)) == pytest.approx(microseconds * 1000, abs=512)


@given(st.integers(-(10**6), 10**6))
def test_decimal_times_are_exact(milliseconds: int) -> None:
    """Deadlines that a program writes down as 0.1 * 3 and 0.3 are the same moment."""
    assert to_ns(milliseconds / 1000) == milliseconds * 10**6
    assert to_ns(0.001 * milliseconds) == milliseconds * 10**6


def test_infinity_is_forever_and_nan_no_time() -> None:
    assert to_ns(math.inf) == to_ns(1e12) == FOREVER
    assert to_ns(-math.inf) == -FOREVER
    assert to_s(FOREVER) == math.inf
    assert to_s(-FOREVER) == -math.inf
    with pytest.raises(UsageError, match="nan"):
        to_ns(math.nan)


words = st.integers(-(1 << 63), (1 << 63) - 1)
rows = st.lists(st.tuples(words, words, words, words, words), max_size=20)


@given(rows, st.data())
def test_a_trace_s_digest_depends_on_rows_alone(
    entries: list[tuple[int, int, int, int, int]], data: st.DataObject
) -> None:
    """Not on when it was flushed; and every number of every row counts."""
    plain, flushed = TraceDigest(), TraceDigest()
    for entry in entries:
        plain.add(*entry)
        flushed.extend(entry)
        if data.draw(st.booleans()):
            flushed.flush()
    digest = plain.hexdigest()
    assert flushed.hexdigest() == digest
    assert plain.rows == flushed.rows == len(entries)
    if entries:
        row, column = data.draw(st.integers(0, len(entries) - 1)), data.draw(st.integers(0, 4))
        other = TraceDigest()
        for number, entry in enumerate(entries):
            changed = list(entry)
            if number == row:
                changed[column] ^= 1
            other.add(*changed)
        assert other.hexdigest() != digest


def test_digests_are_fixed_values() -> None:
    """Reports keep digests, so they must not change with the version that reads them."""
    trace = TraceDigest()
    trace.add(1, 2, 3, -4, 5)
    assert trace.hexdigest() == bytes_digest(
        b"".join(n.to_bytes(8, "little", signed=True) for n in (1, 2, 3, -4, 5))
    )
    assert bytes_digest(b"ab", b"c") == bytes_digest(b"abc") == "cf4ab791c62b8d2b2109c90275287816"


texts = st.text(max_size=5)
keys = st.lists(st.integers(-(1 << 70), 1 << 70) | texts, max_size=5)


@given(st.integers(0, (1 << 64) - 1), keys, keys)
def test_folding_is_associative_and_stays_in_64_bits(state: int, left: list, right: list) -> None:
    folded = keyed.fold(state, *left, *right)
    assert folded == keyed.fold(keyed.fold(state, *left), *right)
    assert 0 <= folded < 1 << 64
    assert keyed.signed(folded) % (1 << 64) == folded
    assert -(1 << 63) <= keyed.signed(folded) < 1 << 63


@given(st.integers(0, (1 << 64) - 1), st.integers(-(1 << 63), (1 << 64) - 1))
def test_mix_is_fold_of_one_integer(state: int, bits: int) -> None:
    assert keyed.mix(state, bits) == keyed.fold(state, bits)


def test_draws_are_uniform_and_normal() -> None:
    count = 20_000
    draws = [keyed.uniform(3, "x", i) for i in range(count)]
    assert min(draws) >= 0.0
    assert max(draws) < 1.0
    # Five standard errors of the mean and of the variance.
    assert abs(sum(draws) / count - 0.5) < 5 * math.sqrt(1 / 12 / count)
    cells = [0] * 16
    for draw in draws:
        cells[int(draw * 16)] += 1
    # Chi-square with 15 degrees of freedom; 44.3 is its 0.9999 quantile.
    assert sum((c - count / 16) ** 2 / (count / 16) for c in cells) < 44.3
    normal = [keyed.normal(3, "x", i) for i in range(count)]
    assert abs(sum(normal) / count) < 5 / math.sqrt(count)
    assert abs(sum(x * x for x in normal) / count - 1.0) < 5 * math.sqrt(2 / count)


def test_neighbouring_keys_are_unrelated() -> None:
    count = 20_000
    pairs = [(keyed.uniform(0, i, 1), keyed.uniform(0, i + 1, 1)) for i in range(count)]
    product = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / count
    assert abs(product) < 5 / 12 / math.sqrt(count)


def test_strings_stand_for_the_same_numbers_in_every_process() -> None:
    script = "from shoal.base import keyed; print(keyed.fold(0, 'loss', 3, 'x'))"
    for salt in ("0", "77"):
        out = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": salt},
        ).stdout  # fmt: skip
        assert int(out) == keyed.fold(0, "loss", 3, "x")
