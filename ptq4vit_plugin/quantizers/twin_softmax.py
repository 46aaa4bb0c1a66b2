"""Twin uniform quantizer for the output of softmax (PTQ4ViT)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.branches import Branch
from ptq4vit_plugin.quantizers.twin import TwinGrid, TwinOperand, TwinQuantizer

EXPONENTS = 20  # m = 0 ... 19


def softmax_grid(exponent: Tensor, bits: int) -> TwinGrid:
    """Return range 1, ``[0, 2^-m]``, and range 2, ``[0, 1]``, both with ``2^(bits-1)`` levels.

    The split is the midpoint between ``2^-m``, the top of range 1, and the smallest level of
    range 2 above it: every value then takes the nearest level of the union. (The paper splits at
    ``2^-m``, which leaves a hole from there to half a step of range 2 when m is large.)

    Parameters
    ----------
    exponent
        ``m``, an integer tensor.
    bits
        Width of a code.
    """
    top = 2 ** (bits - 1) - 1
    # A shift and float32 divisions by powers of two are exact on every device; exp2 need not be.
    power = torch.bitwise_left_shift(torch.ones_like(exponent), exponent).float()
    step2 = torch.full_like(power, 1 / top)
    above = torch.clamp(torch.floor(top / power) + 1, max=top)  # its code; m = 0 has none above
    split = (1 / power + above / top) / 2
    return TwinGrid(step1=step2 / power, step2=step2, split=split, lowest=0, highest=top)


class TwinSoftmaxQuantizer(TwinQuantizer):
    """Two ranges for values in [0, 1] of which most are tiny.

    Range 2 has step ``1/(Q-1)``, ``Q = 2^(bits-1)``, and covers [0, 1]; range 1 has ``2^-m`` of
    that step and covers ``[0, 2^-m]``. Every value takes the nearest level of both together.

    Codes are unsigned, their top bit is the range flag: ``0 ... Q-1`` are range 1, ``Q ... 2Q-1``
    range 2.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8.
    exponent
        ``m``, whole numbers 0 to 19, in a shape that broadcasts against the input. Kept as the
        int32 buffer `exponent`; everything else follows from it.
    """

    exponent: Tensor

    def __init__(self, bits: int, exponent: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("exponent", exponent.detach().to(torch.int32))

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "TwinSoftmaxQuantizer":
        """Rebuild from `get_config`; load the state dict to get the exponents."""
        return cls(state["bits"], torch.zeros(state["shape"]))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.exponent.shape)

    def grid(self) -> TwinGrid:
        return softmax_grid(self.exponent, self.bits)

    def to_codes(self, x: Tensor) -> Tensor:
        """Return uint8 codes, ``0 ... 2^bits - 1``."""
        codes, first, _ = self.grid().codes(x.detach().float())
        return (codes + self.q * ~first).to(torch.uint8)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Return the float32 values of uint8 codes."""
        grid = self.grid()
        second = codes >= self.q
        return (codes - self.q * second) * torch.where(second, grid.step2, grid.step1)

    def branches(self) -> list[Branch]:
        """Both ranges. Probabilities end at 1, where range 2 ends, so it never clamps."""
        grid = self.grid()
        low = Branch(grid.step1, 0, grid.highest, grid.split, "low")
        return [
            low,
            replace(low, scale=grid.step2, side="high", flag=self.q, bounded=True),
        ]


class TwinSoftmax(TwinOperand):
    """`TwinSoftmaxQuantizer` while its exponents are being searched: candidates ``m = 0 ... 19``.

    The start row is ``m = 0``: both ranges alike, a uniform quantizer of ``bits - 1`` bits. The
    search range is not used; candidates do not depend on the data.

    Parameters
    ----------
    bits, grouping, search
        See `OperandQuantizer`.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        super().__init__(bits, grouping, search)

    @property
    def n(self) -> int:
        """Number of searched candidates, 20."""
        return EXPONENTS

    def observe(self, x: Tensor) -> None:
        """See `OperandQuantizer.observe`.

        Raises
        ------
        DataError
            Also if a value lies outside [0, 1] by more than half-precision rounding.
        """
        super().observe(x)
        if self.low.min() < -0.01 or self.high.max() > 1.01:
            raise DataError(
                "calibration: the softmax twin quantizer got values outside [0, 1] "
                f"({self.low.min():.4g} to {self.high.max():.4g})"
            )

    def candidates(self) -> Tensor:
        exponents = [*range(EXPONENTS), 0]
        column = torch.tensor(exponents, dtype=torch.float32, device=self.high.device)
        return column.view(-1, *[1] * self.high.dim()).repeat(1, *self.high.shape)

    def grid(self, index: int | Tensor) -> TwinGrid:
        return softmax_grid(self.at(index).int(), self.bits)

    def module(
        self, index: int | Tensor, layout: Callable[[Tensor], Tensor]
    ) -> TwinSoftmaxQuantizer:
        return TwinSoftmaxQuantizer(self.bits, self.at_hook(self.at(index), layout))
