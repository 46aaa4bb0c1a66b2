"""Which scale every channel gets, in closed form.

With b bits and step s a rounded operand has an error of variance s²/12 per element, and s is
proportional to the largest value. The expected squared error of a GEMM ``X Wᵀ`` of which both
operands are quantized, one step for X and one per row of W, is therefore proportional to

    max|X|² · Σ W²  +  Σ_rows max|W_row|² · Σ_columns E X²,

and the factors below make it small. They do not depend on scales that were folded before: two
models that compute the same function get the same quantized model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.folding.statistics import trace

# How much of a channel's range moves from the activation into the weight (SmoothQuant's alpha).
MIGRATIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Standard deviations to which a searched range goes, about.
CLIPPED_AT = 4.0
# Of the mean variance; keeps transforms of near-degenerate heads well conditioned.
RIDGE = 1e-4


def channel_scale(reach: Tensor, energy: Tensor, weight: Tensor) -> Tensor:
    """Scale of every channel of an activation that linears take: x / scale and weight · scale.

    Parameters
    ----------
    reach
        ``[C]``: how far every channel reaches from zero, in standard deviations of a normal one.
    energy
        ``[C]``: mean square.
    weight
        ``[O, C]``: the weights of all linears that take it.

    Returns
    -------
    Tensor
        ``[C]``, positive, float64; 1 for a channel that is always zero or that nothing uses.
    """
    weight = weight.double()
    largest = weight.abs().amax(0)
    dead = (reach <= 0) | (largest <= 0)
    if dead.all():  # as of a head whose weights start at zero
        return torch.ones_like(reach)
    peak = CLIPPED_AT * reach.masked_fill(dead, 1)
    largest = largest.masked_fill(dead, 1)

    def scale_at(migration: float) -> Tensor:
        return peak**migration / largest ** (1 - migration)

    def error(scale: Tensor) -> Tensor:
        alive = ~dead
        x, w = (peak / scale)[alive], (weight * scale)[:, alive]
        of_x = x.max().square() * w.square().sum()
        of_w = w.abs().amax(1).square().sum() * (energy / scale.square())[alive].sum()
        return of_x + of_w

    best = min((scale_at(m) for m in MIGRATIONS), key=lambda scale: float(error(scale)))
    best = best / best[~dead].log().mean().exp()  # a common factor changes nothing: keep it near 1
    return torch.where(dead, torch.ones_like(best), best)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Transform the inner dimension of a product so that both factors get the same covariance.

    For ``x yᵀ = (x A)(y A^-T)ᵀ`` with one step per factor the error is proportional to
    ``tr(Aᵀ left A) · tr(A⁻¹ right A⁻ᵀ)``, which is smallest when both matrices are equal; this is
    the balancing of control theory. A Hadamard-like rotation then spreads both over all dimensions
    evenly, so that no dimension sets the range alone.

    Parameters
    ----------
    left, right
        ``[H, D, D]`` second moments, float64.

    Returns
    -------
    tuple
        ``A`` and ``A⁻ᵀ``, ``[H, D, D]``; the identity where a matrix is zero.
    """
    size = left.shape[-1]
    constant = ((trace(left) <= 0) | (trace(right) <= 0))[:, None, None]
    left, right = _regular(left), _regular(right)
    root = torch.linalg.cholesky(left)
    values, vectors = torch.linalg.eigh(root.transpose(1, 2) @ right @ root)
    quarter = values.clamp_min(1e-300) ** 0.25
    rotation = spread(size).to(left)
    inverse_root = torch.linalg.inv(root)
    forward = inverse_root.transpose(1, 2) @ (vectors * quarter[:, None, :]) @ rotation
    backward = root @ (vectors / quarter[:, None, :]) @ rotation
    same = torch.eye(size).to(left)
    return same.where(constant, forward), same.where(constant, backward)


def spread(size: int) -> Tensor:
    """Orthogonal matrix whose entries are all of about the same size, float64.

    Hadamard where `size` is a power of two times a small rest; the rest is a cosine transform.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while size % 2 == 0 and size > 1:
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
        matrix, size = torch.kron(matrix, pair), size // 2
    if size > 1:
        place = torch.arange(size, dtype=torch.float64)
        cosine = torch.cos(torch.pi / size * (place[:, None] + 0.5) * place) * (2 / size) ** 0.5
        cosine[:, 0] = size**-0.5
        matrix = torch.kron(matrix, cosine)
    return matrix


def _regular(matrix: Tensor) -> Tensor:
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    return matrix + RIDGE * mean * torch.eye(size).to(matrix)
