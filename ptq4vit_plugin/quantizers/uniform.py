"""Uniform symmetric quantizer: NNCF's ``SymmetricQuantizer`` with a searched scale."""

from collections.abc import Callable

import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor

from ptq4vit_plugin.quantizers.base import NEGLIGIBLE, Grouping, OperandQuantizer, SearchRange


class Uniform(OperandQuantizer):
    """``code = clamp(round(x / scale), lowest, highest)``, half to even; ``x^ = scale * code``.

    The start scale is ``max|x| / (Q - 0.5)``, ``Q = 2^(bits-1)`` (``2^bits`` when unsigned): the
    largest value lies half a step above the top level. A group that is all zero, or never exceeds
    1e-12, gets scale 1.

    Parameters
    ----------
    bits, grouping, search
        See `OperandQuantizer`.
    signed
        Codes ``-Q ... Q-1`` when true, ``0 ... 2^bits - 1`` when false (values that are never
        negative).
    """

    def __init__(
        self,
        bits: int,
        grouping: Grouping,
        search: SearchRange | None = None,
        signed: bool = True,
    ) -> None:
        super().__init__(bits, grouping, search)
        self.signed = signed
        self.lowest = -self.q if signed else 0
        self.highest = self.q - 1 if signed else 2 * self.q - 1

    def candidates(self) -> Tensor:
        amax = torch.maximum(self.high, -self.low if self.signed else torch.zeros_like(self.low))
        table = self.search.candidates(amax / (self.highest + 0.5))
        return torch.where(amax > NEGLIGIBLE, table, torch.ones_like(table))

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        scale = self.at(index)
        return self._codes(x, scale).mul_(scale)

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        scale = self.at(index)
        dtype = torch.int8 if self.highest <= 127 else torch.uint8
        return [(self._codes(x, scale).to(dtype), scale)]

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> SymmetricQuantizer:
        """Return NNCF's quantizer with the same levels.

        NNCF's ``scale`` is the value of the top level, ``scale * highest`` in our terms. Its
        kernel rounds ``(x - input_low) / step`` and may therefore decide an exact tie, or a value
        within float32 rounding of one, the other way, and its output may differ in the last bits.
        """
        scale = self.at_hook(self.at(index), layout)
        spec = PTQuantizerSpec(
            num_bits=self.bits,
            mode=QuantizationScheme.SYMMETRIC,
            signedness_to_force=self.signed,
            narrow_range=False,
            half_range=False,
            scale_shape=tuple(scale.shape),
            logarithm_scale=False,
        )
        quantizer = SymmetricQuantizer(spec).to(scale.device)
        with torch.no_grad():
            quantizer.scale.copy_(scale * self.highest - quantizer.eps)
        return quantizer

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.div(x, scale).round_().clamp_(self.lowest, self.highest)
