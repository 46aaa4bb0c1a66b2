"""The steps of a weight, one per output channel or one for all, chosen for given weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.base import NEGLIGIBLE, SearchRange

#: Candidates of a step, relative to the largest weight's.
CANDIDATES = SearchRange(0.3, 1.1, 40)


@dataclass(frozen=True)
class RowGrid:
    """Uniform levels ``step * (lowest ... highest)``.

    Attributes
    ----------
    step
        ``[O, 1]`` or ``[1, 1]``, float32.
    """

    step: Tensor
    bits: int

    @classmethod
    def of(cls, quantizer: nn.Module | None) -> RowGrid | None:
        """The levels of a weight's hook; None if it is no symmetric NNCF quantizer."""
        if not isinstance(quantizer, SymmetricQuantizer) or not quantizer.signed:
            return None
        highest = 2 ** (quantizer.num_bits - 1) - 1
        scale = quantizer.scale.detach() + quantizer.eps
        return cls(scale.reshape(-1, 1) / highest, quantizer.num_bits)

    def rows(self, index: Tensor) -> RowGrid:
        """The levels of some rows."""
        return self if len(self.step) == 1 else replace(self, step=self.step[index])

    def nearest(self, weight: Tensor) -> Tensor:
        """Round ``weight [O, n]`` to the nearest levels of every row."""
        q, step = 2 ** (self.bits - 1), self.step.to(weight.dtype)
        return (weight / step).round().clamp(-q, q - 1) * step

    def module(self, like: SymmetricQuantizer) -> SymmetricQuantizer:
        """NNCF's quantizer with these levels, for the place of another one."""
        changed = copy.deepcopy(like)
        with torch.no_grad():
            top = self.step * (2 ** (self.bits - 1) - 1)
            changed.scale.copy_(top.reshape(like.scale.shape) - like.eps)
        return changed


def best_grid(grid: RowGrid, weight: Tensor, importance: Tensor) -> RowGrid:
    """Steps that make ``Σ_i importance_i (Ŵ_i - W_i)²`` least, row by row.

    Parameters
    ----------
    grid
        Gives bits, and whether rows share one step.
    weight
        ``[O, I]``.
    importance
        ``[I]``: the Gram matrix's diagonal.
    """
    weight = weight.float()
    peak = weight.abs().amax(1, keepdim=True)
    shared = len(grid.step) == 1 and len(weight) > 1
    peak = peak.amax(0, keepdim=True) if shared else peak
    starts = CANDIDATES.candidates(peak / (2 ** (grid.bits - 1) - 0.5))
    starts = torch.where(peak > NEGLIGIBLE, starts, torch.ones_like(starts))
    losses = []
    for step in starts:
        error = (replace(grid, step=step).nearest(weight) - weight).square() @ importance.float()
        losses.append(error.sum(0, keepdim=True) if shared else error)
    best = torch.stack(losses).argmin(0)
    return replace(grid, step=starts.gather(0, best.view(1, -1, 1))[0])
