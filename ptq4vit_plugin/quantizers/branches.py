"""Quantizers as sums of integer grids: the form in which integer arithmetic runs them.

A matrix product distributes over the sum, so every branch is one integer operand, and a twin
quantizer costs two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from ptq4vit_plugin.errors import ModelError

# Softmax's largest value in a row of N is at least 1/N; this only guards rows that are masked out.
SMALLEST = 1e-30


def row_peak(x: Tensor) -> Tensor:
    """Largest value of every row, ``[..., 1]``; 1/Σexp(s - max s) of a softmax."""
    return x.amax(-1, keepdim=True).clamp_min(SMALLEST)


@dataclass(frozen=True)
class Levels:
    """Whole numbers that codes stand for: single steps up to a knee, and coarser ones beyond it.

    Piecewise linear quantization (Fang et al., 2002.00104), with steps whose ratio is a whole
    number: all levels are on one integer grid, and the product stays a single integer one.

    Parameters
    ----------
    lowest, highest
        Smallest and largest level.
    knee, coarse
        Levels beyond `knee`, by magnitude, are `coarse` apart.
    """

    lowest: int
    highest: int
    knee: int = 0
    coarse: int = 1

    def nearest(self, x: Tensor) -> Tensor:
        """The levels nearest to `x`, which is overwritten; ties to even numbers of steps."""
        return self.rounded(x).clamp_(self.lowest, self.highest)

    def rounded(self, x: Tensor) -> Tensor:
        """As `nearest`, as if the levels had no ends."""
        if self.coarse == 1:
            return x.round_()
        inner = x.clamp(-self.knee, self.knee)
        outer = x.sub_(inner).div_(self.coarse).round_().mul_(self.coarse)
        return outer.add_(inner.round_())

    def counted(self, levels: Tensor) -> Tensor:
        """Places of levels in their order, counted from zero: what a k-bit code has room for."""
        if self.coarse == 1:
            return levels
        inner = levels.clamp(-self.knee, self.knee)
        return inner + (levels - inner) / self.coarse

    @property
    def places(self) -> tuple[int, int]:
        """`counted` of the lowest and the highest."""
        low, high = self.counted(torch.tensor([self.lowest, self.highest])).int().tolist()
        return low, high


@dataclass(frozen=True)
class Branch:
    """One grid of a quantizer.

    ``quantizer(x) == sum(branch.codes(x) * branch.scale)`` over the quantizer's branches.

    Parameters
    ----------
    scale
        Step, float32; broadcasts against the quantized tensor.
    lowest, highest
        Smallest and largest code.
    split
        None, or the border of two ranges: the branch then sees numbers of the other `side` as 0.
    side
        ``low``: numbers up to `split`; ``high``: those above it.
    flag
        What the k-bit code of a number on this side has on top of the grid's own code.
    bounded
        Whether no number on this side ever exceeds the top level, so that nothing need clamp it.
    per_row
        Codes are of ``x / peak``, `peak` the largest number of every row of x; the product has to
        be multiplied by it.
    knee, coarse
        See `Levels`.
    """

    scale: Tensor
    lowest: int
    highest: int
    split: Tensor | None = None
    side: Literal["low", "high"] = "low"
    flag: int = 0
    bounded: bool = False
    per_row: bool = False
    knee: int = 0
    coarse: int = 1

    def codes(self, x: Tensor) -> Tensor:
        """Integer-valued float32 codes of float32 `x`, in its shape."""
        return self.rounded(x / row_peak(x) if self.per_row else x)

    def rounded(self, x: Tensor) -> Tensor:
        """`codes` of rows that are over their peaks already, where the grid is of such."""
        # The reciprocal, as in torch's own conversion to bytes and in NNCF's quantizers.
        codes = self.levels.nearest(x * self.scale.reciprocal())
        # Ones and zeros in float32 at once: multiplying by bools takes twice as long.
        return codes if self.split is None else codes.mul_(self.mine(x, torch.empty_like(x)))

    @property
    def levels(self) -> Levels:
        """The codes that there are."""
        return Levels(self.lowest, self.highest, self.knee, self.coarse)

    def mine(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Which elements lie on this branch's side of the split, as bools or in `out`."""
        return (torch.le if self.side == "low" else torch.gt)(x, self.split, out=out)


def branches_of(quantizer: nn.Module) -> list[Branch]:
    """The grids that a quantizer's hook module adds up.

    Any module takes part that has a method ``branches()`` returning them; so do NNCF's symmetric
    quantizers, and its asymmetric ones with one zero point: codes less the zero point.

    Raises
    ------
    ModelError
        The quantizer is of neither kind.
    """
    if hasattr(quantizer, "branches"):
        return quantizer.branches()
    if isinstance(quantizer, SymmetricQuantizer):
        highest = quantizer.level_high
        step = (quantizer.scale.detach().abs() + quantizer.eps) / highest
        return [Branch(step.float(), quantizer.level_low, highest)]
    if isinstance(quantizer, AsymmetricQuantizer):
        step = (quantizer.input_range.detach().abs() + quantizer.eps) / quantizer.level_high
        zero = (-quantizer.input_low.detach() / step).round()
        if bool((zero == zero.flatten()[0]).all()):
            lowest = -int(zero.flatten()[0])
            return [Branch(step.float(), lowest, quantizer.level_high + lowest)]
    raise ModelError(
        f"{type(quantizer).__name__} has no integer form; allowed: NNCF's SymmetricQuantizer, its "
        "AsymmetricQuantizer with one zero point, and quantizers with a method branches()"
    )


def packed_codes(branches: list[Branch], x: Tensor) -> Tensor:
    """The k-bit code of every element: uint8 where codes are never negative, else int8.

    For a softmax twin the top bit is the range flag; for a GELU twin the sign selects the step.
    8-bit codes less a zero point may fit neither and are int16.
    """
    codes = sum(
        branch.levels.counted(branch.codes(x)) + branch.flag * _flagged(branch, x)
        for branch in branches
    )
    if all(branch.lowest >= 0 for branch in branches):
        return codes.to(torch.uint8)
    fits = all(-128 <= low and high <= 127 for low, high in (b.levels.places for b in branches))
    return codes.to(torch.int8 if fits else torch.int16)


def _flagged(branch: Branch, x: Tensor) -> Tensor | int:
    return branch.mine(x) if branch.flag else 0
