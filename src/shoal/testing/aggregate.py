"""The contract of an aggregator, for Shoal's rules and for anybody's own.

>>> from shoal.parts.aggregate.median import Median
>>> check_aggregator(Median())
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.rounds.aggregator import Aggregator
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Mask, Stack, Vector

_NAN, _INF = float("nan"), float("inf")


def check_aggregator(
    aggregator: Aggregator, *, rows: int = 11, dim: int = 5, trials: int = 16, seed: int = 0
) -> None:
    """Raise AssertionError at the first broken promise of `shoal.rounds.aggregator.Aggregator`.

    Checked: shapes, dtypes and untouched inputs; stacked receivers equal single ones; masked rows
    are absent, whatever they hold; rows that are not finite never enter as numbers; nobody present
    gives the center or zeros; permutation and translation equivariance (the latter unless the rule
    says `translation = False`); where declared, the bound `kappa` under `tolerates` arbitrary rows
    at arbitrary places, and that `breaks_at` of them carry the result away (None: that from an
    honest center all rows but one do not);
    `everyone`, `among` and `mix` against plain calls, where offered; and a run on the meta device.
    A rule with `bind` is bound to a layout of two tensors. Of a rule with `keeps_length = False`
    (clipping, unit vectors) only the direction of equal rows is expected; one with
    `exchangeable = False` (buckets by place) may look at the order of rows.
    rows: choose enough for the rule's settings to leave a choice (ties have no order to keep).
    """
    if hasattr(aggregator, "bind"):
        bind: Any = aggregator.bind  # type: ignore[attr-defined]
        aggregator = bind(FlatSpec(("weight", "bias"), ((dim - 1,), ())))
    key = keyed.key_of(seed, "check_aggregator")
    x = keyed.normal(keyed.grid(keyed.grid(keyed.grid(key, 4), rows), dim), dtype=torch.float64)
    # Row 0 is the receiver's own; about a quarter of the others are absent.
    mask = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(key, "mask"), 4), rows)) < 0.75
    mask[..., 0] = True
    _check_form(aggregator, x, mask)
    _check_stacking(aggregator, x, mask)
    _check_absence(aggregator, x, mask)
    _check_not_finite(aggregator, x, mask)
    _check_nobody(aggregator, x)
    _check_equivariance(aggregator, x, mask, key)
    if hasattr(aggregator, "tolerates"):
        _check_breakdown(aggregator, rows, dim, trials, keyed.fold(key, "breakdown"))
    if hasattr(aggregator, "breaks_at"):
        _check_breaks(aggregator, rows, dim, trials, keyed.fold(key, "breaks"))
    if hasattr(aggregator, "everyone"):
        _check_everyone(aggregator, x, mask)
    if hasattr(aggregator, "among"):
        _check_among(aggregator, x, key)
    if getattr(aggregator, "mix", None) is not None:
        _check_mix(aggregator, x, key)
    _check_meta(aggregator, x)


def _close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda detail: f"aggregator: {what}\n{detail}",
    )


def _check_form(rule: Aggregator, x: Stack, mask: Mask) -> None:
    for dtype in (torch.float32, torch.float64):
        given = x.to(dtype)
        before, heard = given.clone(), mask.clone()
        out = rule(given, mask=heard, center=given[..., 0, :])
        assert out.dtype == dtype, f"aggregator: {dtype} became {out.dtype}"
        assert out.shape == (*x.shape[:-2], x.shape[-1]), f"aggregator: shape is {out.shape}"
        assert out.isfinite().all(), "aggregator: finite rows gave a result that is not"
        assert torch.equal(before, given), "aggregator: x was written to"
        assert torch.equal(mask, heard), "aggregator: mask was written to"
        _close(out.to(x.dtype), rule(x, mask=mask, center=x[..., 0, :]), "precision", 1e-4)
    strided = x.mT.contiguous().mT
    expected = rule(x, mask=mask, center=x[..., 0, :])
    _close(rule(strided, mask=mask, center=x[..., 0, :]), expected, "memory layout matters")
    if not hasattr(rule, "bind"):
        none: Any = x[..., :0]
        whole = mask.unsqueeze(-2).expand(*mask.shape, mask.shape[-1])
        made = [rule(none, mask=mask, center=none[..., 0, :]).unsqueeze(-2)]
        made += [getattr(rule, n)(none, m) for n, m in (("everyone", mask), ("among", whole))
                 if hasattr(rule, n)]  # fmt: skip
        for each in made:
            assert each.shape[-1] == 0, f"aggregator: no coordinates became {each.shape[-1]}"


def _check_stacking(rule: Aggregator, x: Stack, mask: Mask) -> None:
    weight = x[..., 0].abs() + 0.1
    whole = rule(x, mask=mask, weight=weight, center=x[..., 0, :])
    for i in range(len(x)):
        one = rule(x[i], mask=mask[i], weight=weight[i], center=x[i, 0])
        _close(whole[i], one, "f(x)[i] differs from f(x[i])")
    deep = rule(
        x.reshape(2, 2, *x.shape[1:]),
        mask=mask.reshape(2, 2, -1),
        weight=weight.reshape(2, 2, -1),
        center=x[..., 0, :].reshape(2, 2, -1),
    )
    _close(deep.reshape(whole.shape), whole, "two leading axes differ from one")
    shared = rule(x, mask=mask[0], center=x[..., 0, :])
    spread = rule(x, mask=mask[0].expand(mask.shape), center=x[..., 0, :])
    _close(shared, spread, "a mask without leading axes differs from an expanded one")


def _check_absence(rule: Aggregator, x: Stack, mask: Mask) -> None:
    center = x[..., 0, :]
    weight = x[..., 0].abs() + 0.1
    expected = rule(x, mask=mask, weight=weight, center=center)
    for garbage in (0.0, 1e30, -_INF, _NAN):
        dirty = torch.where(mask.unsqueeze(-1), x, garbage)
        heavy = torch.where(mask, weight, garbage)
        out = rule(dirty, mask=mask, weight=heavy, center=center)
        _close(out, expected, f"{garbage} in an absent row changes the result", 1e-12)
    for i in range(len(x)):
        here = mask[i]
        out = rule(
            x[i][here], mask=torch.ones_like(here[here]), weight=weight[i][here], center=center[i]
        )
        _close(out, expected[i], "a masked row differs from one that is not in the stack")


def _check_not_finite(rule: Aggregator, x: Stack, mask: Mask) -> None:
    center = x[..., 0, :]
    bad = x.clone()
    row = int(mask[0].nonzero()[-1])
    results = []
    for value, rest in ((_NAN, 0.0), (_NAN, 1e20), (_INF, 0.0), (-_INF, -7.0)):
        bad[0, row] = rest
        bad[0, row, -1] = value
        results.append(rule(bad, mask=mask, center=center))
        assert results[-1].isfinite().all(), f"aggregator: {value} in a row reached the result"
        _close(results[-1], results[0], "the numbers of a row that is not finite matter", 1e-12)
    _close(results[0][1:], rule(x, mask=mask, center=center)[1:], "a bad row changes other stacks")


def _check_nobody(rule: Aggregator, x: Stack) -> None:
    center = x[..., 1, :]
    nobody = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    everybody = ~nobody
    for stack, mask in (
        (x, nobody),
        (torch.full_like(x, _NAN), nobody),
        (torch.full_like(x, _NAN), everybody),
        (x[..., :0, :], nobody[..., :0]),
    ):
        _close(rule(stack, mask=mask, center=center), center, "nobody present, so the center", 0.0)
        zeros = torch.zeros_like(center)
        _close(rule(stack, mask=mask), zeros, "nobody present and no center, so zeros", 0.0)
    alone = rule(x[..., :1, :], mask=everybody[..., :1], center=x[..., 0, :])
    same = x[..., :1, :].expand(x.shape)
    out = rule(same, mask=everybody, center=x[..., 0, :])
    expected = x[..., 0, :]
    if not getattr(rule, "keeps_length", True):
        alone, out, expected = (
            vector / vector.norm(dim=-1, keepdim=True) for vector in (alone, out, expected)
        )
    _close(alone, expected, "a single row, the own one, is not the result")
    _close(out, expected, "equal rows have another result")


def _check_equivariance(rule: Aggregator, x: Stack, mask: Mask, key: Tensor) -> None:
    center = x[..., 0, :]
    weight = x[..., 0].abs() + 0.1
    expected = rule(x, mask=mask, weight=weight, center=center)
    order = keyed.uniform(keyed.grid(keyed.fold(key, "order"), x.shape[-2])).argsort()
    if getattr(rule, "exchangeable", True):
        out = rule(x[:, order], mask=mask[:, order], weight=weight[:, order], center=center)
        _close(out, expected, "the order of rows matters")
    if getattr(rule, "translation", True):
        shift = 10.0 * keyed.normal(keyed.grid(keyed.fold(key, "shift"), x.shape[-1])).to(x.dtype)
        out = rule(x + shift, mask=mask, weight=weight, center=center + shift)
        _close(out - shift, expected, "a shift of all rows is no shift of the result", 1e-8)


def _adversaries(honest: Stack, bad: int, key: Tensor) -> Stack:
    """Arbitrary rows [families, trials, bad, dim] against honest rows [trials, honest, dim]."""
    trials, _, dim = honest.shape
    noise = keyed.normal(keyed.grid(keyed.grid(keyed.grid(key, trials), bad), dim)).to(honest.dtype)
    mean = honest.mean(-2, keepdim=True)
    spread = honest.std(-2, correction=0, keepdim=True)
    direction = noise[:, :1].sign()
    together = torch.zeros_like(noise)
    families = [noise * size for size in (1.0, 30.0, 1e6, 1e18)]
    families += [mean + t * spread * direction + together for t in (0.5, 1.5, 3.0, 10.0, 1e4)]
    families += [-t * mean + together for t in (0.0, 1.0, 100.0)]
    # Copies of extreme honest rows, alone and beside a far one.
    extreme = honest.take_along_dim((honest - mean).norm(dim=-1).argmax(-1)[:, None, None], 1)
    families += [extreme + together, extreme + 0.1 * noise]
    # A ladder down to the honest rows: whoever measures from one rung cannot tell the lower ones.
    top = 38 if honest.dtype == torch.float32 else 150
    rung = torch.arange(bad, dtype=torch.float64, device=honest.device).unsqueeze(-1)
    families.append(direction * (10.0 ** (top - 8 * rung)).to(honest.dtype) + together)
    mixed = (mean + 1.5 * spread * direction + together).clone()
    for value in (_NAN, _INF, -_INF, 1e30):
        families.append(torch.full_like(noise, value))
        mixed[:, : (bad + 1) // 2] = value
        families.append(mixed.clone())
    return torch.stack(families)


def _check_breakdown(rule: Any, rows: int, dim: int, trials: int, key: Tensor) -> None:
    bad = rule.tolerates(rows)
    kappa = rule.kappa(rows)
    assert 0 <= bad < max(1, rows), f"aggregator: tolerates({rows}) = {bad}"
    if kappa == _INF:
        return
    keys = keyed.grid(keyed.grid(keyed.grid(keyed.fold(key, "honest"), trials), rows - bad), dim)
    plain = 3.0 + keyed.normal(keys, dtype=torch.float64)
    # Half of the trials have one honest peer far from the others, as unequal data make it.
    plain[trials // 2 :, 0] *= 20.0
    for dtype, slack in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        honest = plain.to(dtype)
        stack = _mixed(honest, _adversaries(honest, bad, keyed.fold(key, "attack")), key)
        mask = torch.ones(stack.shape[:-1], dtype=torch.bool, device=stack.device)
        for own in (0, 1) if getattr(rule, "centered", False) else (0,):
            out = rule(stack, mask=mask, center=honest[:, min(own, rows - bad - 1)])
            _check_bound(out, honest, kappa, slack, f"{bad} of {rows} rows ({dtype})")


def _mixed(honest: Stack, attack: Stack, key: Tensor) -> Stack:
    """Honest rows [trials, honest, dim] and others [families, trials, bad, dim], the places of
    which each trial draws anew."""
    stack = torch.cat((honest.expand(len(attack), *honest.shape), attack), -2)
    trials, rows = stack.shape[1:3]
    draws = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(key, "order"), trials), rows))
    order = draws.argsort(-1)[None, :, :, None].expand(stack.shape)
    return stack.gather(-2, order)


def _check_bound(out: Vector, honest: Stack, kappa: float, slack: float, what: str) -> None:
    mean = honest.mean(-2)
    variance = (honest - mean.unsqueeze(-2)).square().sum(-1).mean(-1)
    error = (out - mean).square().sum(-1)
    limit = (kappa * (1 + slack) + slack) * variance
    worst = (error / limit).nan_to_num(nan=_INF).max()
    assert (error <= limit).all(), (
        f"aggregator: {what} moved the result beyond kappa = {kappa:.3g} honest variances "
        f"(family, trial) {(~(error <= limit)).nonzero()[0].tolist()}: {float(worst):.3g} times"
    )


_FAR = 1e9


def _carriers(honest: Stack, bad: int, key: Tensor, far: float) -> Stack:
    """Rows that carry results away where anything does, [families, trials, bad, dim].

    All at one far point; there, but not quite equal; each far beyond the one before.
    """
    trials, _, dim = honest.shape
    noise = keyed.normal(keyed.grid(keyed.grid(keyed.grid(key, trials), bad), dim)).to(honest.dtype)
    point = far * noise[:, :1].sign()
    together = point.expand(noise.shape)
    step = torch.arange(bad, dtype=honest.dtype, device=honest.device).unsqueeze(-1)
    ladder = noise.sign() * far ** (1 + step.clamp(max=8))
    return torch.stack((together, together + noise, ladder))


def _check_breaks(rule: Any, rows: int, dim: int, trials: int, key: Tensor) -> None:
    bad = rule.breaks_at(rows)
    assert bad is None or bad > rule.tolerates(rows), f"aggregator: breaks_at({rows}) = {bad}"
    if bad is not None and bad >= rows:
        return
    keys = keyed.grid(keyed.grid(keyed.grid(keyed.fold(key, "honest"), trials), rows), dim)
    everybody = 3.0 + keyed.normal(keys, dtype=torch.float64)
    for far in (_FAR, 10 * _FAR):
        honest = everybody[:, : 1 if bad is None else rows - bad]
        attack = _carriers(honest, rows - honest.shape[1], keyed.fold(key, "attack"), far)
        stack = _mixed(honest, attack, key)
        mask = torch.ones(stack.shape[:-1], dtype=torch.bool, device=stack.device)
        out = rule(stack, mask=mask, center=honest[:, 0])
        moved = float((out - honest.mean(-2)).norm(dim=-1).max())
        if bad is None:
            assert moved < 1e3, f"aggregator: breaks_at is None, and it is {moved:.3g} away"
        else:
            assert moved > 1e-3 * far, (
                f"aggregator: breaks_at({rows}) = {bad}, and none of the known attacks carries it "
                f"away: {moved:.3g} from {far:.0e}"
            )


def _check_everyone(rule: Any, x: Stack, mask: Mask) -> None:
    dirty = torch.where(mask.unsqueeze(-1), x, _NAN)
    out = rule.everyone(dirty, mask)
    assert out.shape == x.shape, f"aggregator: everyone gave shape {out.shape}"
    for i in range(x.shape[-2]):
        one = rule(dirty, mask=mask, center=dirty[..., i, :])
        here = mask[:, i]
        _close(out[here, i], one[here], f"everyone differs from receiver {i}'s own call")


def _check_among(rule: Any, x: Stack, key: Tensor) -> None:
    rows = x.shape[-2]
    draws = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(key, "among"), rows), rows))
    heard = (draws < 0.8) | torch.eye(rows, dtype=torch.bool, device=x.device)
    dirty = x.clone()
    dirty[1, 2, 0] = _NAN
    for given in (x, dirty):
        out = rule.among(given, heard)
        assert out.shape == x.shape, f"aggregator: among gave shape {out.shape}"
        for i in range(rows):
            # As engines gather: the own row first.
            order = torch.tensor([i, *range(i), *range(i + 1, rows)], device=x.device)
            own = rule(given[..., order, :], mask=heard[i, order], center=given[..., i, :])
            same = torch.isfinite(given[..., i, :]).all(-1)
            _close(out[same, i], own[same], f"among differs from receiver {i}'s own call")


def _check_mix(rule: Any, x: Stack, key: Tensor) -> None:
    senders = x.shape[-2]
    weight = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(key, "mix"), senders + 2), senders))
    weight = torch.where(weight < 0.5, weight, torch.zeros_like(weight))
    weight[0] = 0.0
    dirty = x.clone()
    dirty[1, 2, 0] = _NAN
    out = rule.mix(weight, dirty)
    gathered = dirty.unsqueeze(-3).expand(*x.shape[:-2], senders + 2, *x.shape[-2:])
    expected = rule(gathered, mask=weight > 0, weight=weight)
    _close(out, expected, "mix differs from gathering")
    _close(out[..., 0, :], torch.zeros_like(out[..., 0, :]), "mix invents what nobody sent")
    _close(rule.mix(weight, dirty[0]), expected[0], "mix of one stack differs")


def _check_meta(rule: Any, x: Stack) -> None:
    far = x.to("meta")
    mask = torch.ones(x.shape[:-1], dtype=torch.bool, device="meta")
    out = rule(far, mask=mask, weight=far[..., 0], center=far[..., 0, :])
    assert out.device == far.device, f"aggregator: result is on {out.device}, x on {far.device}"
    assert out.shape == far[..., 0, :].shape, "aggregator: another shape on the meta device"
    if hasattr(rule, "everyone"):
        assert rule.everyone(far, mask).device == far.device, "aggregator: everyone left the device"
