"""Which rows of an op stand for all of them.

Rows are drawn with probability proportional to size and weighted by the inverse (Horvitz-Thompson),
so that sums over a sample estimate sums over everything. Size is a row's share of the gradient's
energy and of the loss at a few scales: both are very uneven, and differ between output columns
(those of q, k, v; of each head).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Widest block of output columns that draws its own sample of rows.
BLOCK = 32


def block_width(columns: int) -> int:
    """The widest block up to `BLOCK` that divides the columns; all of them if none does."""
    return next((w for w in range(min(BLOCK, columns), 7, -1) if columns % w == 0), columns)


def shares(parts: Sequence[Tensor]) -> Tensor:
    """Sampling sizes ``[G, n]``: the sum of an item's shares of what its group has of each part."""
    return torch.stack([x / x.sum(1, keepdim=True).clamp_min(1e-300) for x in parts]).sum(0)


def draw(importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sample with probability proportional to size, without randomness.

    Parameters
    ----------
    importance
        ``[G, n]``, not negative.
    count
        Items to draw per group.

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
    certain = torch.zeros_like(size, dtype=torch.bool)
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
