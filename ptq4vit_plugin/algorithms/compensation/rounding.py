"""Rounding that compensates: the error of a weight is carried by the weights still to be rounded.

GPTQ (Frantar et al., 2210.17323): input by input, every output channel rounds one weight and the
remaining ones are moved to where the weighted output error is least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.compensation.normal import Normal
from ptq4vit_plugin.algorithms.compensation.steps import RowGrid

#: Inputs per block; a block's updates reach the other blocks as one matrix product.
BLOCK = 64
#: Candidates of the damping, relative to the mean of the Gram matrix's diagonal.
DAMPINGS = (0.01, 0.1)
#: Output channels on which they are compared.
ROWS = 32


def held_out_rounding(fit: Normal, check: Normal | None, weight: Tensor, grid: RowGrid) -> Tensor:
    """`compensated_rounding` on all tokens, with the damping that is best on held-out ones.

    Rounding to nearest is one of the choices. They are compared on `ROWS` output channels.

    Parameters
    ----------
    fit, check
        Sums over two disjoint sets of tokens; without `check` the largest damping is taken.
    """
    weight = weight.double()
    if check is None:
        return compensated_rounding(weight, fit.gram, DAMPINGS[-1], grid)
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long().to(weight.device)
    some, some_grid = weight[rows], grid.rows(rows)

    def error(rounded: Tensor) -> float:
        change = rounded - some
        return float(((change @ check.gram) * change).sum())

    best, least = None, error(some_grid.nearest(some))
    for damping in DAMPINGS:
        loss = error(compensated_rounding(some, fit.gram, damping, some_grid))
        if loss < least:
            best, least = damping, loss
    if best is None:
        return grid.nearest(weight)
    return compensated_rounding(weight, (fit + check).gram, best, grid)


def compensated_rounding(weight: Tensor, gram: Tensor, damping: float, grid: RowGrid) -> Tensor:
    """Round weights one input after the other, largest Gram diagonal first.

    Parameters
    ----------
    weight
        ``[O, I]``.
    gram
        ``[I, I]``: Σ t x xᵀ over the quantized inputs.
    damping
        Added to the diagonal, relative to its mean.
    grid
        Levels of every row.

    Returns
    -------
    Tensor
        ``[O, I]`` float64, every value on its row's grid.
    """
    weight, gram = weight.double(), gram.double()
    order = gram.diagonal().argsort(descending=True)
    # One row per input, so that what one step touches lies together in memory.
    rest, gram = weight.T[order].contiguous(), gram[order][:, order]
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean().clamp_min(1e-300))
    # Row i of the upper factor of the inverse holds what input i hands on to the inputs after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    upper = upper / upper.diagonal()[:, None]
    rounded = torch.empty_like(rest)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        block, hands_on = rest[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            level = grid.nearest(block[i][:, None])[:, 0]
            rounded[start + i] = level
            torch.sub(block[i], level, out=errors[i])
            block[i + 1 :].addr_(hands_on[i, i + 1 :], errors[i], alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T
