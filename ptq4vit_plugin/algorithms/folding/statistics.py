"""What folds need to know of the activations: running statistics over calibration batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Channels:
    """Range and energy of every channel ``[C]`` of ``x [..., C]``, float64."""

    low: Tensor | None = None
    high: Tensor | None = None
    energy: Tensor | None = None  #: sum of squares about zero
    total: Tensor | None = None
    count: int = 0

    def __call__(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).double()
        low, high, energy, total = x.amin(0), x.amax(0), x.square().sum(0), x.sum(0)
        if self.low is None:
            self.low, self.high, self.energy, self.total = low, high, energy, total
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self.energy, self.total = self.energy + energy, self.total + total
        self.count += len(x)

    @property
    def centre(self) -> Tensor:
        """Middle of the range."""
        return (self.low + self.high) / 2

    @property
    def half_range(self) -> Tensor:
        """Largest distance from `centre`."""
        return (self.high - self.low) / 2

    @property
    def peak(self) -> Tensor:
        """Largest distance from zero."""
        return torch.maximum(self.high, -self.low)


@dataclass
class Heads:
    """Mean ``[H, D]`` and covariance ``[H, D, D]`` of ``x [B, H, N, D]``, float64."""

    transposed: bool = False  #: x comes as ``[B, H, D, N]``
    total: Tensor | None = None
    outer: Tensor | None = None
    count: int = 0

    def __call__(self, x: Tensor) -> None:
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
        """Second moment about the mean, or about zero."""
        second = self.outer / self.count
        if not centred:
            return second
        return second - self.mean[:, :, None] * self.mean[:, None, :]
