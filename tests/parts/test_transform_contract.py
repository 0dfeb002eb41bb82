"""Every transform that the folder holds, with every example of its own, meets the contract."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import parts
from shoal.parts.transform.base import Codec
from shoal.tensor.flat import FlatSpec
from shoal.tensor.keyed import grid, key_of
from shoal.testing.transform import check_malformed, check_rows, check_transform, vectors

CASES = [
    pytest.param(name, example, id=f"{name}-{place}")
    for name in parts.names("transform")
    for place, example in enumerate(parts.find("transform", name).examples)
]
SPEC = FlatSpec(("conv", "bias", "empty", "head"), ((5, 3, 2), (5,), (0, 4), (4, 3)))


def test_all_parts_are_found() -> None:
    assert {"identity", "top_k", "quantise", "fedzip", "chain"} <= set(parts.names("transform"))


@pytest.mark.parametrize(("name", "example"), CASES)
def test_contract(name: str, example: dict) -> None:
    check_transform(parts.find("transform", name)(**example), SPEC, seed=1)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_single_entry_and_odd_sizes(name: str, example: dict) -> None:
    transform = parts.find("transform", name)(**example)
    for spec in (FlatSpec(("one",), ((1,),)), FlatSpec(("a", "b"), ((1, 1), (9, 1)))):
        bound = transform.bind(spec)
        keys = grid(key_of(3), 2)
        kinds = vectors(spec.dim, 2, 3, torch.float32)
        for kind in ("gaussian", "zeros", "ties"):
            check_rows(bound, kinds[kind], keys, kind)
        check_malformed(bound, kinds["gaussian"][0], keys[0], most=60)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_settings_are_plain_and_survive_json(name: str, example: dict) -> None:
    kind = parts.find("transform", name)
    transform = kind(**example)
    assert isinstance(transform, Codec)
    assert hash(transform) == hash(kind(**example))
    assert transform == kind(**json.loads(json.dumps(example)))
    assert transform.bind(SPEC) == kind(**example).bind(SPEC) != transform


@given(
    case=st.sampled_from([(case.values[0], case.values[1]) for case in CASES]),
    shapes=st.lists(
        st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_bytes_are_exact_for_any_layout(case, shapes, seed: int, rows: int) -> None:
    name, example = case
    spec = FlatSpec(tuple(f"t{i}" for i in range(len(shapes))), tuple(shapes))
    bound = parts.find("transform", name)(**example).bind(spec)
    kinds = vectors(spec.dim, rows, seed, torch.float32)
    kind = sorted(kinds)[seed % len(kinds)]
    check_rows(bound, kinds[kind], grid(key_of(seed), rows), kind)
