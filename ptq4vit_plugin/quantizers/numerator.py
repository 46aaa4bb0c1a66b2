"""Uniform quantizer for the numerator of softmax: `exp(s - max s)`, divided after the product."""

from collections.abc import Callable
from typing import Any

import torch
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.base import Grouping, OperandQuantizer, SearchRange, checked_bits
from ptq4vit_plugin.quantizers.branches import Branch, row_peak


class NumeratorQuantizer(nn.Module, StatefulModuleInterface):
    """``p^ = peak * step * clamp(round(p / peak / step), 0, 2^bits - 1)``, peak the row's largest.

    ``p / peak`` is ``exp(s - max s)``, a number in [0, 1] before it is divided by its sum: the
    integer product takes ``exp(s - max s)`` in unsigned codes of one fixed step, and the division
    by the sum, which softmax makes anyway, comes after the product instead of before it.

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
        self.register_buffer("step", step.detach().float())

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "NumeratorQuantizer":
        """Rebuild from `get_config`; load the state dict to get the step."""
        return cls(state["bits"], torch.ones(state["shape"]))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as JSON; the step travels in the state dict."""
        return {"bits": self.bits, "shape": list(self.step.shape)}

    def to_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 codes and the peak of every row ``[..., 1]`` (float32)."""
        values = x.detach().float()
        peak = row_peak(values)
        codes = (values / peak / self.step.float()).round().clamp(0, 2**self.bits - 1)
        return codes.to(torch.uint8), peak

    def from_codes(self, codes: Tensor, peak: Tensor) -> Tensor:
        """Return the float32 values of codes: what `forward` returns in float32."""
        return codes * self.step.float() * peak

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the levels; straight-through gradient, same shape and dtype."""
        values = x.float()
        peak, step = row_peak(values.detach()), self.step.float()
        codes = (values.detach() / peak / step).round().clamp(0, 2**self.bits - 1)
        quantized = codes * step * peak
        if torch.is_grad_enabled() and values.requires_grad and not torch.jit.is_tracing():
            quantized = quantized + (values - values.detach())
        return quantized.to(x.dtype)

    def branches(self) -> list[Branch]:
        """Its one grid, on rows over their peaks."""
        return [Branch(self.step.float(), 0, 2**self.bits - 1, per_row=True)]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={list(self.step.shape)}"


class Numerator(OperandQuantizer):
    """`NumeratorQuantizer` while its step is being searched.

    Candidates are ``(alpha + i (beta - alpha) / n) / (2^bits - 0.5)``: 1 at the start.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        super().__init__(bits, grouping, search)
        self.highest = 2 * self.q - 1

    def candidates(self) -> Tensor:
        return self.search.candidates(torch.ones_like(self.high) / (self.highest + 0.5))

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        step, peak = self.at(index), row_peak(x)
        return self._codes(x, step, peak).mul_(step).mul_(peak)

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        step, peak = self.at(index), row_peak(x)
        dtype = torch.int8 if self.highest <= 127 else torch.uint8
        return [(self._codes(x, step, peak).to(dtype), step * peak)]

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> NumeratorQuantizer:
        return NumeratorQuantizer(self.bits, self.at_hook(self.at(index), layout))

    def _codes(self, x: Tensor, step: Tensor, peak: Tensor) -> Tensor:
        return torch.div(x, peak).div_(step).round_().clamp_(0, self.highest)
