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
BLOCK = 128
#: Candidates of the damping, relative to the mean of the Gram matrix's diagonal.
DAMPINGS = (0.01, 0.1, 1.0)
#: Output channels on which they are compared.
ROWS = 64


def held_out_rounding(fit: Normal, check: Normal | None, weight: Tensor, grid: RowGrid) -> Tensor:
    """`compensated_rounding` on all tokens, with the damping that is best on held-out ones.

    Rounding to nearest is one of the choices. They are compared on `ROWS` output channels.

    Parameters
    ----------
    fit, check
        Sums over two disjoint sets of tokens; without `check` the middle damping is taken.
    """
    weight = weight.double()
    if check is None:
        return compensated_rounding(weight, fit.gram, DAMPINGS[1], grid)
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
    weight, gram = weight.double().clone(), gram.double()
    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order], gram[order][:, order]
    size = len(order)
    mean = gram.diagonal().mean().clamp_min(1e-300)
    damped = gram + damping * mean * torch.eye(size).to(gram)
    # Row i of the upper factor of the inverse holds what input i hands on to the inputs after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.empty_like(weight)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        block, factor = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i, hands_on in enumerate(factor):
            column = grid.nearest(block[:, i : i + 1])
            rounded[:, start + i : start + i + 1] = column
            error = (block[:, i : i + 1] - column) / hands_on[i]
            block[:, i + 1 :].addmm_(error, hands_on[None, i + 1 :], alpha=-1)
            errors[:, i : i + 1] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result
