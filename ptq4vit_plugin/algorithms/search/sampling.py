"""Which rows of an op stand for all of them.

Rows are drawn with probability proportional to size and weighted by the inverse (Horvitz-Thompson),
so that sums over a sample estimate sums over everything. Size is a row's share of the gradient's
energy and of the loss at a few scales: both are very uneven, and differ between output columns
(those of q, k, v; of each head).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Widest block of output columns that draws its own sample of rows; widths are multiples of `UNIT`.
BLOCK, UNIT = 64, 8


def block_width(columns: int) -> int:
    """Columns of the blocks whose losses are told apart: as many as allowed, else all."""
    widths = range(BLOCK, 0, -UNIT)
    return next((width for width in widths if columns % width == 0), columns)


def shares(parts: Sequence[Tensor]) -> Tensor:
    """Sampling sizes ``[G, n]``: an item's mean share of what its group has of each part."""
    return torch.stack([x / x.sum(1, keepdim=True).clamp_min(1e-300) for x in parts]).mean(0)


def draw(importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sample with probability proportional to size, without randomness.

    Parameters
    ----------
    importance
        ``[G, n]``, not negative.
    count
        Items to draw per group; may be none.

    Returns
    -------
    tuple
        Indices ``[G, count]`` in ascending order and inverse inclusion probabilities.
    """
    groups, n = importance.shape
    if count >= n:
        index = torch.arange(n, device=importance.device).expand(groups, n)
        return index, torch.ones_like(index, dtype=torch.float64)
    size = importance.double()
    total = size.sum(1, keepdim=True)
    # A tenth of the draws is uniform: no item is impossible and no weight exceeds 10 n / count.
    size = 0.9 * size / total.clamp_min(1e-300) + 0.1 / n
    certain, probability = torch.zeros_like(size, dtype=torch.bool), torch.ones_like(size)
    for _ in range(count):  # items whose probability would exceed 1 are taken for certain
        rest = count - certain.sum(1, keepdim=True)
        free = size.masked_fill(certain, 0)
        probability = (free * rest / free.sum(1, keepdim=True)).masked_fill(certain, 1)
        over = probability > 1
        if not over.any():
            break
        certain |= over
    probability = probability.clamp_max(1)
    ends = probability.cumsum(1)
    points = (torch.arange(count, device=size.device, dtype=torch.float64) + 0.5).expand(
        groups, count
    )
    index = torch.searchsorted(ends, points.contiguous()).clamp_max(n - 1)
    return index, 1 / probability.gather(1, index)


def enough(size: Tensor, error: float) -> tuple[int, int]:
    """How many items to take for certain, the largest first, and how many to draw of the rest.

    With the rest drawn in proportion to their mean size in all groups, the variance of a group's
    sum is at most ``sum size^2 / mean`` times ``sum mean``, over the number drawn.

    Parameters
    ----------
    size
        ``[H, G, P, n]``: of H sets of G groups that sum to 1 each, P independent samples of n
        items, which the groups of a set share.
    error
        Relative standard error that every group's sum may have.
    """
    drawn, order = size.mean(1, keepdim=True, dtype=torch.float64).sort(-1)
    squares = size.double().gather(-1, order.expand(size.shape)).square_()
    squares /= drawn.clamp_min(1e-300)
    # After 0, 1, .. n - 1 certain items.
    rest = [x.cumsum(-1).flip(-1) for x in (squares, drawn)]
    variance = (rest[0] * rest[1]).sum(2).amax((0, 1))
    total = torch.arange(len(variance), device=variance.device) + variance / error**2
    certain = int(total.argmin())
    return certain, math.ceil(float(total[certain])) - certain


def largest_and(size: Tensor, certain: int, more: int) -> tuple[Tensor, Tensor]:
    """The `certain` largest items, and behind them a sample of `more` of the rest, as of `draw`."""
    order = size.argsort(1, descending=True)
    largest, rest = order[:, :certain], order[:, certain:].sort(1).values
    chosen, factor = draw(size.gather(1, rest), more)
    index = torch.cat([largest, rest.gather(1, chosen)], 1)
    return index, torch.cat([torch.ones_like(largest, dtype=factor.dtype), factor], 1)
