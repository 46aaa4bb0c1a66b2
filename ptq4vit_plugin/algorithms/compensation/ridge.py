"""Weights that cancel the error of quantized inputs: ridge regression about the float weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.compensation.normal import Normal

#: Candidates of the damping, relative to the mean of the Gram matrix's diagonal.
DAMPINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def ridge(normal: Normal, weight: Tensor, damping: float) -> Tensor:
    """Minimise ``Σ t |X̂ Wᵀ + b - Y|² + λ |W - weight|²`` over W and b.

    Parameters
    ----------
    weight
        ``[O, I]``: the float weights, which W stays close to.
    damping
        λ relative to the mean of the Gram matrix's diagonal.

    Returns
    -------
    Tensor
        W, ``[O, I]`` float64. The bias that goes with it is ``normal.bias(W)``.
    """
    weight = weight.double()
    damped = normal.gram.clone()
    damped.diagonal().add_(damping * _mean_diagonal(normal))
    residual = normal.cross - normal.gram @ weight.T
    return weight + torch.cholesky_solve(residual, torch.linalg.cholesky(damped)).T


def held_out_ridge(fit: Normal, check: Normal, weight: Tensor) -> Tensor:
    """`ridge` on all tokens, with the damping that serves tokens best which it has not seen.

    Parameters
    ----------
    fit, check
        Sums over two disjoint sets of tokens.

    Returns
    -------
    Tensor
        ``[O, I]`` float64; `weight` itself if no damping beats it on `check`.
    """
    weight = weight.double()
    best, least = None, 0.0
    values, vectors = torch.linalg.eigh(fit.gram)
    turned = vectors.T @ (fit.cross - fit.gram @ weight.T)
    mean = _mean_diagonal(fit)
    # The error of W + D on the held-out tokens, up to a constant, in the basis of `vectors`.
    gram = vectors.T @ check.gram @ vectors
    residual = vectors.T @ (check.cross - check.gram @ weight.T)
    for damping in DAMPINGS:
        step = turned / (values.clamp_min(0) + damping * mean)[:, None]
        change = float(((gram @ step) * step).sum() - 2 * (step * residual).sum())
        if change < least:
            best, least = damping, change
    return weight if best is None else ridge(fit + check, weight, best)


def _mean_diagonal(normal: Normal) -> Tensor:
    return normal.gram.diagonal().mean().clamp_min(1e-300)
