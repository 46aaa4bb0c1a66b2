"""Levels that lie closer around zero than far from it, on one integer grid.

Piecewise linear quantization (Fang et al., 2002.00104) with steps whose ratio is a whole number:
what is multiplied are whole numbers of the smaller step, which below 8 bits leave a byte room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import Tensor, nn

from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.quantizers.asymmetric import Asymmetric
from ptq4vit_plugin.quantizers.base import (
    NEGLIGIBLE,
    Grouping,
    SearchRange,
    checked_bits,
    straight_through,
)
from ptq4vit_plugin.quantizers.branches import Branch, Levels

#: How many times as far apart the outer levels are, and the share of the largest magnitude below
#: which they are not: about what suits a normal distribution, and one with a long tail.
FORMS = ((2, 0.6), (4, 0.15))
#: The lowest value of a candidate of these forms reaches down to this share of the observed one at
#: least.
LEAST = 0.6
#: Whole numbers that a byte holds.
BYTE = 256


class PiecewiseQuantizer(nn.Module, StatefulModuleInterface):
    """``x^ = scale * level``, `level` the nearest of `levels` to ``x / scale``.

    Computes in float32 whatever the input, and returns the input's dtype. Gradients are
    straight-through: 1 where the input is representable, 0 where it is clamped.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8: there are at most ``2^bits`` levels.
    scale
        Step around zero, ``[1]``. Kept as a float32 buffer.
    levels
        The whole numbers of steps that are levels.
    """

    scale: Tensor

    def __init__(self, bits: int, scale: Tensor, levels: Levels) -> None:
        super().__init__()
        self.bits = checked_bits(bits)
        self.levels = levels
        self.register_buffer("scale", scale.detach().float())

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> PiecewiseQuantizer:
        """Rebuild from `get_config`; load the state dict to get the scale."""
        return cls(state["bits"], torch.ones(1), Levels(**state["levels"]))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as JSON; the scale travels in the state dict."""
        return {"bits": self.bits, "levels": asdict(self.levels)}

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the levels (fake quantization), same shape and dtype."""
        values, scale = x.float(), self.scale.float()
        quantized = self.levels.nearest(values.detach() / scale).mul_(scale)
        low, high = self.levels.lowest * scale, self.levels.highest * scale
        return (quantized + straight_through(values, low, high)).to(x.dtype)

    def branches(self) -> list[Branch]:
        """Its one grid."""
        return [Branch(self.scale.float(), **asdict(self.levels))]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {self.levels}"


class Piecewise(Asymmetric):
    """`PiecewiseQuantizer`, or a uniform quantizer, while step and levels are being searched.

    Candidates are those of `Asymmetric`, and each of `FORMS` at their ranges, as far as all levels
    fit a byte: with 8 bits none does. For the left operand of linears and convolutions, which has
    one scale and may have a zero point.

    Parameters
    ----------
    bits, grouping, search
        See `OperandQuantizer`.

    Raises
    ------
    ConfigError
        `grouping` has more than one group.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        super().__init__(bits, grouping, search)
        if any(size != 1 for size in grouping.shape):
            raise ConfigError(
                f"piecewise: has one scale per tensor, not a group shape of {grouping.shape}"
            )
        self._levels: list[Levels] = []

    def candidates(self) -> Tensor:
        even = super().candidates()
        zero_points = self._zero_points.flatten().int().tolist()
        uniform = [Levels(-zero, self.highest - zero) for zero in zero_points]
        scales, found = even.flatten().tolist(), uniform[:-1]
        start = scales.pop()
        lows, highs = (ends.flatten().tolist() for ends in self.ends())
        for coarse, share in FORMS:
            for low, high in zip(lows[:-1], highs[:-1], strict=True):
                if low <= LEAST * lows[-1] and high - low > NEGLIGIBLE:
                    scale, levels = piecewise(low, high, self.highest, coarse, share)
                    if levels.highest - levels.lowest < BYTE:
                        scales.append(scale)
                        found.append(levels)
        self._levels = [*found, uniform[-1]]
        table, self._zero_points = (
            torch.tensor(column, device=even.device).to(even.dtype).view(-1, *even.shape[1:])
            for column in ([*scales, start], [-levels.lowest for levels in self._levels])
        )
        return table

    def levels_at(self, index: int | Tensor) -> Levels:
        """Return the levels that `index` names."""
        assert len(self.table) == len(self._levels)
        return self._levels[int(index)]

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        scale = self.at(index)
        return self.levels_at(index).nearest(torch.div(x, scale)).mul_(scale)

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        scale = self.at(index)
        return [(self.levels_at(index).nearest(torch.div(x, scale)).to(torch.int16), scale)]

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> nn.Module:
        """Return NNCF's quantizer where the levels are uniform, else a `PiecewiseQuantizer`."""
        scale, levels = self.at_hook(self.at(index), layout), self.levels_at(index)
        if levels.coarse == 1:
            return self.nncf_quantizer(scale, torch.full_like(scale, -levels.lowest))
        return PiecewiseQuantizer(self.bits, scale, levels)


def piecewise(
    low: float, high: float, intervals: int, coarse: int, share: float
) -> tuple[float, Levels]:
    """Return the step and the levels that cover a range: no end is more than half a step beyond.

    Parameters
    ----------
    low, high
        Ends of the range, ``low <= 0 <= high``.
    intervals
        Between levels; one less than there are levels.
    coarse, share
        Beyond `share` of the largest magnitude levels are `coarse` steps apart.
    """
    knee = share * max(-low, high)

    def counted(magnitude: float) -> float:
        """Intervals up to a magnitude, times the step."""
        return min(magnitude, knee) + max(magnitude - knee, 0) / coarse

    scale = (counted(-low) + counted(high)) / (intervals + 0.5)
    inner = max(1, round(knee / scale))
    down = min(intervals, round(counted(-low) / scale))

    def level(number: int) -> int:
        return number if number <= inner else inner + coarse * (number - inner)

    def reach(number: int) -> float:
        """Steps from zero up to which numbers are rounded to that level."""
        return level(number) + (0.5 if number < inner + 1 else coarse / 2)

    up = intervals - down
    scale = max(-low / reach(down), high / reach(up))
    return scale, Levels(-level(down), level(up), inner, coarse)
