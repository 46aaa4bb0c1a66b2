"""What folds need to know of the activations: running statistics over calibration batches."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

# A channel's reach is a moment of high order: as its largest value does, it sees the tails, but a
# few thousand rows estimate it well enough for rows that were not seen. Few rows allow the second.
POWER, POWER_OF_FEW = 6, 2
FEW = 512
# The same moment of a normal distribution, by which a reach is expressed in standard deviations.
NORMAL = {2: 1.0, 6: 15.0 ** (1 / 6)}
NEWTON_STEPS = 20
# Relative to the largest number, a reach that only float64's rounding makes; far below float32's.
CONSTANT = 1e-12
# Likewise a variance, relative to the mean square: what is left when that of the mean is taken off.
CANCELLED = 1e-10
# Numbers whose powers are summed at a time: so few that they stay in the cache.
CHUNK = 2**16


@dataclass
class Channels:
    """Moments of every channel ``[C]`` of ``x [..., C]``, float64."""

    origin: Tensor | None = None  #: the first batch's mean, about which powers are summed
    sums: Tensor | None = None  #: ``[POWER + 1, C]``: sums of powers 0 ... POWER
    peak: Tensor | None = None  #: largest distance from zero
    count: int = 0

    def __call__(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        peak = torch.maximum(x.amax(0), -x.amin(0)).double()
        if self.origin is None:
            self.origin, self.peak = x.mean(0, dtype=torch.float64), peak
            self.sums = x.new_zeros(POWER + 1, x.shape[1], dtype=torch.float64)
        self.peak = torch.maximum(self.peak, peak)
        for part in x.split(max(1, CHUNK // x.shape[1])):
            distance = part.double().sub_(self.origin)
            power = torch.ones_like(distance)
            for sums in self.sums:
                sums += power.sum(0)
                power.mul_(distance)
        self.count += len(x)

    @property
    def power(self) -> int:
        """The order of moment that the rows allow."""
        return POWER if self.count >= FEW else POWER_OF_FEW

    def moment(self, order: int, about: Tensor) -> Tensor:
        """Mean of ``(x - about) ** order``."""
        gap = self.origin - about
        terms = (comb(order, i) * self.sums[i] * gap ** (order - i) for i in range(order + 1))
        return sum(terms) / self.count

    def centre(self) -> Tensor:
        """The point about which the moment is least: a soft middle, of few rows the mean."""
        centre, power = self.moment(1, torch.zeros_like(self.origin)), self.power
        for _ in range(NEWTON_STEPS):
            slope, curvature = (self.moment(power - i, centre) for i in (1, 2))
            centre = centre + slope / ((power - 1) * curvature).clamp_min(1e-300)
        return centre

    def reach(self, about: Tensor) -> Tensor:
        """How far the channel reaches from a point, as a standard deviation would be if normal.

        Zero if it is always there.
        """
        root = self.moment(self.power, about).clamp_min(0) ** (1 / self.power)
        return root.masked_fill(root <= CONSTANT * self.peak, 0) / NORMAL[self.power]

    @property
    def finite(self) -> bool:
        """Whether no number was NaN or infinite."""
        return bool(self.sums.isfinite().all())


@dataclass
class Heads:
    """Mean ``[H, D]`` and covariance ``[H, D, D]`` of ``x [B, H, N, D]``, float64."""

    transposed: bool = False  #: x comes as ``[B, H, D, N]``
    total: Tensor | None = None
    outer: Tensor | None = None
    count: int = 0
    step: float = 0.0  #: between the numbers of x's type, relative

    def __call__(self, x: Tensor) -> None:
        self.step = torch.finfo(x.dtype).eps
        x = (x.transpose(-1, -2) if self.transposed else x).detach().double()
        x = x.transpose(0, 1).flatten(1, 2)
        total, outer = x.sum(1), x.transpose(1, 2) @ x
        if self.total is None:
            self.total, self.outer = total, outer
        else:
            self.total, self.outer = self.total + total, self.outer + outer
        self.count += x.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self, centred: bool) -> Tensor:
        """Second moment about the mean, or about zero.

        Zero for heads that are at their mean always, up to the rounding of the type.
        """
        second = self.outer / self.count
        if not centred:
            return second
        variance = second - self.mean[:, :, None] * self.mean[:, None, :]
        least = max(self.step**2, CANCELLED) * trace(second)
        return variance.masked_fill((trace(variance) <= least)[:, None, None], 0)

    @property
    def finite(self) -> bool:
        """Whether no number was NaN or infinite."""
        return bool(self.outer.isfinite().all())


def trace(matrices: Tensor) -> Tensor:
    """Sums ``[H]`` of the diagonals of ``[H, D, D]``."""
    return matrices.diagonal(dim1=1, dim2=2).sum(1)
