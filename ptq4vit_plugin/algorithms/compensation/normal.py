"""Weighted sums over tokens from which the best weights of a linear follow.

The task, with X̂ the quantized inputs ``[N, I]``, Y the float model's outputs ``[N, O]`` and t the
weight of every token ``[N]``: make ``Σ_n t_n |X̂_n Wᵀ + b - Y_n|²`` small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens per float32 product.
CHUNK = 4096


@dataclass(frozen=True)
class Normal:
    """Second moments, float64. Sums of disjoint tokens add up with ``+``.

    Attributes
    ----------
    gram
        ``[I, I]``: Σ t x xᵀ; about the mean if `centred`.
    cross
        ``[I, O]``: Σ t x yᵀ, likewise.
    energy
        ``[O]``: Σ t y².
    x_mean, y_mean
        ``[I]``, ``[O]``: weighted means; zero unless `centred`.
    total
        Σ t.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    x_mean: Tensor
    y_mean: Tensor
    total: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weight: Tensor, centred: bool = True) -> Normal:
        """Sums over tokens ``x [N, I]``, ``y [N, O]``, ``weight [N]`` (not negative), float32.

        Not `centred`: about zero, for a layer whose bias cannot change.
        """
        total = weight.double().sum().clamp_min(1e-300)
        x_mean = (weight @ x).double() / total
        y_mean = (weight @ y).double() / total
        if not centred:
            x_mean, y_mean = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
        gram, cross, energy = (torch.zeros(1).to(x_mean) for _ in range(3))
        parts = (z.split(CHUNK) for z in (x, y, weight.sqrt()[:, None]))
        # Products of centred numbers in float32, their sums in float64.
        for a, b, root in zip(*parts, strict=True):
            a, b = (a - x_mean.float()).mul_(root), (b - y_mean.float()).mul_(root)
            gram, cross = gram + (a.T @ a).double(), cross + (a.T @ b).double()
            energy = energy + b.square().sum(0, dtype=torch.float64)
        return cls(gram, cross, energy, x_mean, y_mean, total)

    def __add__(self, other: Normal) -> Normal:
        total = self.total + other.total
        share = self.total * other.total / total
        dx, dy = other.x_mean - self.x_mean, other.y_mean - self.y_mean
        return Normal(
            self.gram + other.gram + share * torch.outer(dx, dx),
            self.cross + other.cross + share * torch.outer(dx, dy),
            self.energy + other.energy + share * dy.square(),
            (self.total * self.x_mean + other.total * other.x_mean) / total,
            (self.total * self.y_mean + other.total * other.y_mean) / total,
            total,
        )

    @property
    def finite(self) -> bool:
        """Whether no sum was too large for float32, or of NaN or infinite numbers."""
        return all(bool(z.isfinite().all()) for z in vars(self).values())

    def error(self, weight: Tensor) -> float:
        """Σ t |X̂ Wᵀ + b - Y|² for ``weight [O, I]`` and the best bias for it."""
        weight = weight.double()
        quadratic = ((weight @ self.gram) * weight).sum()
        return float(quadratic - 2 * (weight * self.cross.T).sum() + self.energy.sum())

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias ``[O]`` for ``weight [O, I]``."""
        return self.y_mean - weight.double() @ self.x_mean
