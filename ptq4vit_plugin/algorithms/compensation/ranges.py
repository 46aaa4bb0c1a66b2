"""Ranges of activations that few rows decide: widened for the rows that come later."""

from __future__ import annotations

import copy

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.branches import branches_of
from ptq4vit_plugin.quantizers.piecewise import PiecewiseQuantizer

#: Candidates, relative to the range that was there.
FACTORS = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 2.0, 2.5, 3.2, 4.0)
#: Effective number of rows from which the calibration set's own range is good enough.
FEW = 128
#: Numbers that all candidates round before the next ones are read: so few that they stay in the
#: cache.
CHUNK = 2**18


@torch.no_grad()
def best_range(
    quantizer: nn.Module, rows: Tensor, columns: Tensor, weight: Tensor, images: int
) -> nn.Module:
    """The quantizer, with another range if few rows have decided it and another one is better.

    Rows that were not seen reach further than those that were, and the fewer there are the more:
    every row counts a second time, moved away from the mean by `reach` of its distance. So a layer
    that sees one row per image, such as a head, does not clip what other images bring.

    Parameters
    ----------
    quantizer
        Of one scale for all rows or one per group; any but NNCF's and `PiecewiseQuantizer` is
        returned as it is.
    rows
        ``[G, N, I]``: what it quantizes, group by group, image after image.
    columns
        ``[G, I]``: the energy with which the op multiplies every number of a row.
    weight
        ``[G or 1, N]``, not negative: how much a row counts.
    images
        Images that the N rows belong to. Nothing changes in groups whose rows are worth more than
        `FEW` independent ones (`effective_rows`).
    """
    values = _range(quantizer)
    groups = len(rows)
    if not values or values[0].numel() not in (1, groups) or not weight.any():
        return quantizer
    share = (weight / weight.sum(1, keepdim=True).clamp_min(1e-30))[..., None]
    effective = effective_rows(rows, share, images)
    if not (effective <= FEW).any():
        return quantizer
    errors = _errors(quantizer, rows, columns, share, 1 + reach(effective))
    if values[0].numel() == 1:
        errors, effective = errors.sum(1, keepdim=True), effective.amin(0, keepdim=True)
    factors = torch.tensor(FACTORS).to(errors)[errors.argmin(0)]
    factors = torch.where(effective.flatten() <= FEW, factors, 1.0)
    changed = copy.deepcopy(quantizer)
    for value in _range(changed):
        value.mul_(factors.view(value.shape))
    return changed if (factors != 1).any() else quantizer


def _errors(
    quantizer: nn.Module, rows: Tensor, columns: Tensor, share: Tensor, further: Tensor
) -> Tensor:
    """What the ranges ``FACTORS`` of the quantizer's lose, ``[factors, G]``, float64.

    The variance over the rows, and over those `further` times as far from their mean, of what
    rounding adds to a number, times the energy of its column.

    Parameters
    ----------
    rows, columns
        As in `best_range`.
    share
        ``[G or 1, N, 1]``: weights of the rows, which sum to 1.
    further
        ``[G, 1, 1]``.
    """
    (grid,) = branches_of(quantizer)
    scale = grid.scale.reshape(-1, 1, 1)
    share = share.mT.expand(len(rows), -1, -1)
    mean = share @ rows
    # Of every candidate, for both kinds of rows: the mean error of a column, and its square's.
    sums = rows.new_zeros(len(FACTORS), 2, 2, *columns.shape, dtype=torch.float64)
    length = max(1, CHUNK // rows[:, 0].numel())
    for some, weights in zip(rows.split(length, 1), share.split(length, 2), strict=True):
        for kind, x in enumerate((some, torch.lerp(mean, some, further))):
            for factor, (first, second) in zip(FACTORS, sums[:, kind], strict=True):
                step = factor * scale
                error = grid.levels.nearest(x * step.reciprocal()).mul_(step).sub_(x)
                first += (weights @ error)[:, 0]
                second += (weights @ error.square_())[:, 0]
    variance = sums[:, :, 1] - sums[:, :, 0].square()
    return (variance.sum(1) * columns).sum(2)


def reach(rows: Tensor) -> Tensor:
    """How much further than n independent rows, relatively, unseen ones are assumed to go.

    The second term is for a handful of rows: folds have scaled every channel by them, and a channel
    of n numbers never exceeds ``sqrt(n - 1)`` of its own standard deviations. Chosen by trial.
    """
    return 2 / rows.sqrt() + 128 / rows**3


def effective_rows(rows: Tensor, share: Tensor, images: int) -> Tensor:
    """How many independent rows say as much as the rows of all images do, per group.

    Two of Kish's corrections: ``1 / Σ share²`` for uneven weights, and a design effect of
    ``1 + (m - 1) ρ`` for the m rows of an image, which resemble each other; ρ is the share of the
    variance that lies between images, by analysis of variance over all columns together.

    Parameters
    ----------
    rows
        ``[G, N, I]``, image after image.
    share
        ``[G or 1, N, 1]``: weights that sum to 1.

    Returns
    -------
    Tensor
        ``[G, 1, 1]``.
    """
    count = (1 / share.square().sum(1, keepdim=True)).expand(len(rows), 1, 1)
    per_image = count / images
    if images < 2 or rows.shape[1] % images or not (per_image > 1).any():
        return count
    x, w = rows.unflatten(1, (images, -1)), share.unflatten(1, (images, -1))
    of_image = w.sum(2, keepdim=True)
    means = (w * x).sum(2, keepdim=True) / of_image.clamp_min(1e-30)
    mean = (of_image * means).sum(1, keepdim=True)
    # The mean of m rows varies by 1/m of what they do, without their resembling each other.
    inside = (w * (x - means).square()).sum((1, 2, 3)) / (1 - 1 / per_image.flatten()).clamp_min(
        0.1
    )
    between = (of_image * (means - mean).square()).sum((1, 2, 3)) - inside / per_image.flatten()
    alike = between.clamp_min(0) / (between.clamp_min(0) + inside).clamp_min(1e-30)
    return count / (1 + (per_image - 1).clamp_min(0) * alike[:, None, None])


def _range(quantizer: nn.Module) -> list[Tensor]:
    """The parameters that grow with the range; none of a quantizer that is not known."""
    if isinstance(quantizer, AsymmetricQuantizer):
        return [quantizer.input_low, quantizer.input_range]
    known = isinstance(quantizer, (SymmetricQuantizer, PiecewiseQuantizer))
    return [quantizer.scale] if known else []
