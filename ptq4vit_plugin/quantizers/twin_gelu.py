"""Twin uniform quantizer for the output of GELU and its relatives (PTQ4ViT)."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ptq4vit_plugin.errors import ConfigError, nearest
from ptq4vit_plugin.quantizers.base import NEGLIGIBLE, Grouping, SearchRange
from ptq4vit_plugin.quantizers.branches import Branch
from ptq4vit_plugin.quantizers.twin import TwinGrid, TwinOperand, TwinQuantizer

# Global minima, by 40-digit root finding of the derivative. Evaluated in float32, an activation
# may fall some 5e-8 below.
MINIMA: dict[str, float] = {
    "gelu": -0.16997120747990366,  # x Phi(x), at x = -0.7517915
    "gelu_tanh": -0.17004075057125406,  # the tanh approximation, at x = -0.7524614
    "quick_gelu": -0.16361018963635357,  # x sigmoid(1.702 x), at x = -0.7511543
    "silu": -0.2784645427610738,  # x sigmoid(x), at x = -1.2784645
    "mish": -0.30884341301725043,  # x tanh(softplus(x)), at x = -1.1924312
    "hardswish": -0.375,  # x relu6(x + 3) / 6, at x = -1.5
}

SCALE_RATIOS = ("free", "power_of_two")


class TwinGELUQuantizer(TwinQuantizer):
    """Two ranges for values that are bounded below close to zero and unbounded above.

    Negative values have step `scale_negative` and codes ``-Q ... 0``, the others `scale_positive`
    and ``0 ... Q-1``, ``Q = 2^(bits-1)``. Codes are signed integers whose sign selects the step.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8.
    scale_negative, scale_positive
        Steps of both ranges, in one shape that broadcasts against the input. Kept as float32
        buffers.
    """

    scale_negative: Tensor
    scale_positive: Tensor

    def __init__(self, bits: int, scale_negative: Tensor, scale_positive: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale_negative", scale_negative.detach().float())
        self.register_buffer("scale_positive", scale_positive.detach().float())

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "TwinGELUQuantizer":
        """Rebuild from `get_config`; load the state dict to get the scales."""
        return cls(state["bits"], torch.ones(state["shape"]), torch.ones(state["shape"]))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.scale_positive.shape)

    def grid(self) -> TwinGrid:
        return gelu_grid(self.scale_negative.float(), self.scale_positive.float(), self.bits)

    def to_codes(self, x: Tensor) -> Tensor:
        """Return int8 codes, ``-2^(bits-1) ... 2^(bits-1) - 1``."""
        return self.grid().codes(x.detach().float())[0].to(torch.int8)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Return the float32 values of int8 codes."""
        grid = self.grid()
        return codes * torch.where(codes < 0, grid.step1, grid.step2)

    def branches(self) -> list[Branch]:
        """Both ranges; clamping at code 0 already keeps each from the other's numbers."""
        grid = self.grid()
        return [
            Branch(grid.step1, grid.lowest, 0),
            Branch(grid.step2, 0, grid.highest),
        ]


def gelu_grid(scale_negative: Tensor, scale_positive: Tensor, bits: int) -> TwinGrid:
    """Return the grids of ``[-Q scale_negative, 0]`` and ``[0, (Q-1) scale_positive]``."""
    q = 2 ** (bits - 1)
    zero = torch.zeros_like(scale_positive)
    return TwinGrid(scale_negative, scale_positive, split=zero, lowest=-q, highest=q - 1)


class TwinGELU(TwinOperand):
    """`TwinGELUQuantizer` while the step of its positive range is being searched.

    The negative step is fixed, ``|minimum| / Q``. The positive step starts at
    ``max x / (Q - 0.5)``; a group without positive values gets step 1.

    Parameters
    ----------
    bits, grouping, search
        See `OperandQuantizer`.
    minimum
        The activation's true minimum, see `MINIMA`. None: the smallest observed value of every
        group.
    scale_ratio
        "free", or "power_of_two": every candidate is rounded (by its logarithm) to ``2^m`` times
        the negative step, m an integer, so that an accumulator only shifts (as in the paper).
        Equal candidates stay in the table.

    Raises
    ------
    ConfigError
        If `minimum` is not a negative number or `scale_ratio` is unknown.
    """

    def __init__(
        self,
        bits: int,
        grouping: Grouping,
        search: SearchRange | None = None,
        minimum: float | None = None,
        scale_ratio: Literal["free", "power_of_two"] = "free",
    ) -> None:
        super().__init__(bits, grouping, search)
        if minimum is not None and not -math.inf < minimum < 0:
            raise ConfigError(f"minimum: {minimum!r} is not a negative number")
        if scale_ratio not in SCALE_RATIOS:
            raise ConfigError(
                f"scale_ratio: {scale_ratio!r} is not one of {', '.join(SCALE_RATIOS)}"
                f"{nearest(scale_ratio, SCALE_RATIOS)}"
            )
        self.minimum = minimum
        self.scale_ratio = scale_ratio

    @property
    def scale_negative(self) -> Tensor:
        """Step of the negative range, float32, group shape; 1 where there are no such values."""
        if self.minimum is not None:
            return torch.full_like(self.low, -self.minimum / self.q)
        return torch.where(self.low < -NEGLIGIBLE, -self.low / self.q, torch.ones_like(self.low))

    def candidates(self) -> Tensor:
        table = self.search.candidates(self.high / (self.q - 0.5))
        table = torch.where(self.high > NEGLIGIBLE, table, torch.ones_like(table))
        if self.scale_ratio == "power_of_two":
            negative = self.scale_negative.double()
            table = (negative * torch.exp2(torch.log2(table / negative).round())).float()
        return table

    def grid(self, index: int | Tensor) -> TwinGrid:
        return gelu_grid(self.scale_negative, self.at(index), self.bits)

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> TwinGELUQuantizer:
        negative = self.at_hook(self.scale_negative, layout)
        return TwinGELUQuantizer(self.bits, negative, self.at_hook(self.at(index), layout))
