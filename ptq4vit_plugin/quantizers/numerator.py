"""Uniform quantizer for the numerator of softmax: `exp(s - max s)`, divided after the product."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.base import Grouping, OperandQuantizer, SearchRange, checked_bits
from ptq4vit_plugin.quantizers.branches import Branch, Levels, row_peak

#: How many times as far apart the upper levels are, by bits: the most that a byte has room for, up
#: to 4.
COARSE = {8: 1, 7: 2}


def numerator_levels(bits: int) -> Levels:
    """Return the levels of ``p / peak`` in steps around zero.

    Most of softmax's numbers are far below their row's largest. Below 8 bits a third of the levels
    lies under an eighth of it, for 7 bits a fifth, and the others are `COARSE` times as far apart.
    """
    highest, coarse = 2**bits - 1, COARSE.get(bits, 4)
    if coarse == 1:
        return Levels(0, highest)
    knee = highest // 3
    return Levels(0, knee + coarse * (highest - knee), knee, coarse)


class NumeratorQuantizer(nn.Module, StatefulModuleInterface):
    """``p^ = peak * step * level``, `peak` the row's largest, `level` the nearest to `p / peak`.

    ``p / peak`` is ``exp(s - max s)``, a number in [0, 1] before it is divided by its sum: the
    integer product takes ``exp(s - max s)`` in unsigned codes of one fixed step, and the division
    by the sum, which softmax makes anyway, comes after the product instead of before it. With 8
    bits levels are 0 ... 255; with fewer, see `numerator_levels`.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8.
    step
        Of ``p / peak``; broadcasts against the input. Kept as a float32 buffer.
    """

    step: Tensor

    def __init__(self, bits: int, step: Tensor) -> None:
        super().__init__()
        self.bits = checked_bits(bits)
        self.levels = numerator_levels(bits)
        self.register_buffer("step", step.detach().float())

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "NumeratorQuantizer":
        """Rebuild from `get_config`; load the state dict to get the step."""
        return cls(state["bits"], torch.ones(state["shape"]))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as JSON; the step travels in the state dict."""
        return {"bits": self.bits, "shape": list(self.step.shape)}

    def to_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 levels and the peak of every row ``[..., 1]`` (float32)."""
        values = x.detach().float()
        peak = row_peak(values)
        return self._nearest(values / peak).to(torch.uint8), peak

    def from_codes(self, codes: Tensor, peak: Tensor) -> Tensor:
        """Return the float32 values of levels: what `forward` returns in float32."""
        return codes * self.step.float() * peak

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the levels; straight-through gradient, same shape and dtype."""
        values = x.float()
        peak, step = row_peak(values.detach()), self.step.float()
        quantized = self._nearest(values.detach() / peak) * step * peak
        if torch.is_grad_enabled() and values.requires_grad and not torch.jit.is_tracing():
            quantized = quantized + (values - values.detach())
        return quantized.to(x.dtype)

    def branches(self) -> list[Branch]:
        """Its one grid, on rows over their peaks."""
        return [Branch(self.step.float(), **asdict(self.levels), per_row=True)]

    def _nearest(self, of_peak: Tensor) -> Tensor:
        return self.levels.nearest(of_peak / self.step.float())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={list(self.step.shape)}"


class Numerator(OperandQuantizer):
    """`NumeratorQuantizer` while its step is being searched.

    Candidates are ``alpha + i (beta - alpha) / n`` over half a coarse step more than the highest
    level: 1 at the start is the last that rounds to it.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        super().__init__(bits, grouping, search)
        self.levels = numerator_levels(bits)

    def candidates(self) -> Tensor:
        reach = self.levels.highest + self.levels.coarse / 2
        return self.search.candidates(torch.ones_like(self.high) / reach)

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        step, peak = self.at(index), row_peak(x)
        return self._codes(x, step, peak).mul_(step).mul_(peak)

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        step, peak = self.at(index), row_peak(x)
        dtype = torch.int8 if self.levels.highest <= 127 else torch.uint8
        return [(self._codes(x, step, peak).to(dtype), step * peak)]

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> NumeratorQuantizer:
        return NumeratorQuantizer(self.bits, self.at_hook(self.at(index), layout))

    def _codes(self, x: Tensor, step: Tensor, peak: Tensor) -> Tensor:
        return self.levels.nearest(torch.div(x, peak).div_(step))
