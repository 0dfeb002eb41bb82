"""Supervised contrast: features of one class are pulled together, those of others pushed away."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.tensor.types import Mask, Scalar


def contrastive_loss(
    features: Tensor, labels: Tensor, valid: Mask, temperature: float = 0.07
) -> Scalar:
    """Mean over anchors a and positives p of -log(e^(a.p/t) / sum over others o of e^(a.o/t)).

    features [n, width] (brought to length 1 first), labels [n], valid bool [n]: rows that take
    part. Positives are the other rows with the anchor's label; an anchor without any is skipped,
    and with no anchor left the loss is 0. With equal features it is log(rows - 1).
    Source: Khosla et al. 2020, equation 2 (arXiv 2004.11362).

    >>> loss = contrastive_loss(
    ...     torch.ones(8, 3), torch.tensor([0, 1] * 4), torch.ones(8, dtype=torch.bool)
    ... )
    >>> round(float(loss), 5)
    1.94591
    """
    size = features.square().sum(-1, keepdim=True)
    # Units may all be dead: a row of zeros has no direction, and stays.
    unit = features / torch.where(size > 0, size, 1.0).sqrt()
    alike = unit @ unit.T / temperature
    place = torch.arange(len(labels), device=labels.device)
    others = (place != place.unsqueeze(-1)) & valid
    score = torch.where(others, alike, -1e30)
    logs = alike - torch.logsumexp(score, -1, keepdim=True)
    positive = (others & (labels == labels.unsqueeze(-1))).to(features.dtype)
    count = positive.sum(-1)
    anchor = (valid & (count > 0)).to(features.dtype)
    each = -(logs * positive).sum(-1) / count.clamp_min(1.0)
    return (each * anchor).sum() / anchor.sum().clamp_min(1.0)
