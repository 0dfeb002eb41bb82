"""The contract of an attack, for Shoal's and for anybody's own.

>>> from shoal.parts.attack.sign_flip import SignFlip
>>> check_attack(SignFlip())
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.rounds.attack import Attack, Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack

_SEARCHES = 8


def check_attack(attack: Attack, *, task: Task | None = None, dim: int = 6, seed: int = 0) -> None:
    """Raise AssertionError at the first broken promise of `shoal.rounds.attack.Attack`.

    Checked: shapes, dtypes, devices and untouched inputs; worlds stacked along leading axes equal
    single ones; the same key gives the same numbers; the rule in force is asked at most 8 times;
    one honest peer and one Byzantine peer are enough; and with a task, that `poison` keeps the
    shard's samples (unless the attack says `own_data`), is batched over peers, and leaves the given
    shard alone.
    """
    key = keyed.grid(keyed.key_of(seed, "check_attack"), 3)
    for honest, byzantine in ((7, 2), (1, 1)):
        if attack.knowledge is Knowledge.OWN and (honest, byzantine) != (1, 1):
            continue
        x = _normal(key, "honest", honest, dim)
        own = x if attack.knowledge is Knowledge.OWN else _normal(key, "own", byzantine, dim)
        for dtype in (torch.float32, torch.float64):
            _check_form(attack, x.to(dtype), own.to(dtype), key)
        _check_stacking(attack, x, own, key)
        _check_meta(attack, x, own, key)
    if task is not None:
        _check_poison(attack, task, keyed.key_of(seed, "poison"))


def _normal(key: Key, word: str, rows: int, dim: int) -> Stack:
    keys = keyed.grid(keyed.grid(keyed.fold(key, word), rows), dim)
    return 1.0 + keyed.normal(keys, dtype=torch.float64)


class _Asked:
    """A rule in force, the mean, that counts its calls."""

    def __init__(self, honest: Stack) -> None:
        self.honest = honest
        self.times = 0

    def __call__(self, candidate: Stack) -> Stack:
        self.times += 1
        total = self.honest.sum(-2, keepdim=True) + candidate.sum(-2, keepdim=True)
        return (total / (self.honest.shape[-2] + candidate.shape[-2])).expand(self.honest.shape)


def _send(attack: Attack, honest: Stack, own: Stack, key: Key) -> Stack:
    asked = _Asked(honest)
    rule = asked if attack.knowledge is Knowledge.ALL and not attack.per_receiver else None
    out = attack(View(honest=honest, own=own, round=3, rule=rule), key)
    assert asked.times <= _SEARCHES, f"attack: asked the rule {asked.times} times, not 8"
    return out


def _check_form(attack: Attack, honest: Stack, own: Stack, key: Key) -> None:
    before = honest.clone(), own.clone()
    out = _send(attack, honest, own, key)
    shape = own.shape
    if attack.per_receiver:
        shape = (*honest.shape[:-1], *own.shape[-2:])
    assert out.shape == shape, f"attack: shape {tuple(out.shape)}, not {tuple(shape)}"
    assert out.dtype == own.dtype, f"attack: {own.dtype} became {out.dtype}"
    assert torch.equal(before[0], honest), "attack: honest rows were written to"
    assert torch.equal(before[1], own), "attack: own rows were written to"
    _same(_send(attack, honest, own, key), out, "the same key gave other numbers")


def _check_stacking(attack: Attack, honest: Stack, own: Stack, key: Key) -> None:
    whole = _send(attack, honest, own, key)
    for i in range(len(key)):
        one = _send(attack, honest[i], own[i], key[i])
        _same(whole[i], one, "a world among others differs from the same one alone")


def _check_meta(attack: Attack, honest: Stack, own: Stack, key: Key) -> None:
    out = _send(attack, honest.to("meta"), own.to("meta"), key.to("meta"))
    assert out.device.type == "meta", f"attack: result is on {out.device}, its input on meta"


def _check_poison(attack: Attack, task: Task, key: Key) -> None:
    peers = torch.arange(min(3, task.peers), device=key.device)
    shard = task.shard(peers)
    labels = None if shard.labels is None else shard.labels.clone()
    out = attack.poison(task, shard, key.expand(peers.shape))
    if not getattr(attack, "own_data", False):
        assert torch.equal(out.index, shard.index), "attack: poison chose other samples"
        assert torch.equal(out.size, shard.size), "attack: poison changed the number of samples"
    if labels is not None and shard.labels is not None:
        assert torch.equal(shard.labels, labels), "attack: poison wrote to the given shard"
    for i in range(len(peers)):
        alone = Shard(
            shard.index[i], shard.size[i], None if shard.labels is None else shard.labels[i]
        )
        one = attack.poison(task, alone, key)
        _same(out.index[i], one.index, "samples chosen among others differ from those alone")
        for name in ("labels", "inputs"):
            mine, whole = getattr(one, name), getattr(out, name)
            assert (mine is None) == (whole is None), "attack: poison depends on stacking"
            if mine is not None:
                _same(whole[i], mine, "a poisoned shard among others differs from one alone")


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual,
        expected,
        rtol=1e-9,
        atol=1e-9,
        equal_nan=True,
        msg=lambda detail: f"attack: {what}\n{detail}",
    )
