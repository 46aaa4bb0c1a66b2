"""Uniform quantizer with a zero point: NNCF's ``AsymmetricQuantizer`` with a searched range."""

from collections.abc import Callable

import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.base import NEGLIGIBLE, Grouping, OperandQuantizer, SearchRange

#: Share of the lowest value that a candidate's range reaches down to, widest first.
LOWS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
#: Candidates of the highest value for each of them, as a share of the search range's own number.
HIGHS = 2 / 5


class Asymmetric(OperandQuantizer):
    """``code = clamp(round(x / scale) + zero, 0, 2^bits - 1)``; ``x^ = scale * (code - zero)``.

    Scale and zero point are searched jointly: a candidate is a pair of the lowest and the highest
    value, ``low * LOWS[j]`` and ``high * (alpha + i (beta - alpha) / m)``. The zero point is
    rounded to a code, so zero stays exact. An operand that is never negative has zero point 0
    throughout, and all candidates go to the highest value. Integer kernels take a zero point on
    the left operand of a matrix product only, where it can be moved into the bias; so use it for
    activations.

    Parameters
    ----------
    bits, grouping, search
        See `OperandQuantizer`.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        super().__init__(bits, grouping, search)
        self._zero_points: Tensor | None = None

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 * self.q - 1

    @property
    def n(self) -> int:
        return len(self.table) - 1

    @property
    def zero_points(self) -> Tensor:
        """Zero points of all rows of `table`, whole float32 numbers in the same shape."""
        if self._zero_points is None or self._table is None:
            self._table = self.candidates()
        return self._zero_points

    def candidates(self) -> Tensor:
        low, high = self.ends()
        width = high - low
        # Half a step beyond the last level still rounds to it.
        scale = torch.where(
            width > NEGLIGIBLE, width / (self.highest + 0.5), torch.ones_like(width)
        )
        self._zero_points = (-low / scale).round().clamp(0, self.highest)
        return scale

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value of all candidates, then the observed ones."""
        low, high = self.low.clamp_max(0), self.high.clamp_min(0)
        if not bool((low < 0).any()):
            high = self.search.candidates(high)
            return torch.zeros_like(high), high
        steps = max(1, round(self.search.n * HIGHS))
        search = SearchRange(self.search.alpha, self.search.beta, steps)
        highs = search.candidates(high)
        lows = torch.tensor(LOWS, dtype=low.dtype, device=low.device)
        lows = lows.view(-1, 1, *[1] * low.dim()) * low
        # Highest value runs faster: neighbours in the table differ a little.
        high = torch.cat([highs[:-1].repeat(len(LOWS), *[1] * low.dim()), highs[-1:]])
        low = torch.cat([lows.expand(-1, steps, *low.shape).flatten(0, 1), low[None]])
        return low, high

    def of_columns(self, columns: Tensor) -> OperandQuantizer:
        zero_points = self.zero_points  # makes the table, too
        part = super().of_columns(columns)
        assert isinstance(part, Asymmetric)
        part._zero_points = zero_points[..., columns]
        return part

    def zero_at(self, index: int | Tensor) -> Tensor:
        """Return the zero point that `index` names, float32, group shape."""
        if isinstance(index, int):
            return self.zero_points[index]
        return self.zero_points.gather(0, index.unsqueeze(0)).squeeze(0)

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        scale = self.at(index)
        return self._codes(x, scale, self.zero_at(index)).mul_(scale)

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        # Less its zero point a code needs one bit more than int8 has when bits is 8.
        scale = self.at(index)
        return [(self._codes(x, scale, self.zero_at(index)).to(torch.int16), scale)]

    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> nn.Module:
        """Return NNCF's quantizer with the same levels (to float32 rounding)."""
        scale = self.at_hook(self.at(index), layout)
        return self.nncf_quantizer(scale, self.at_hook(self.zero_at(index), layout))

    def nncf_quantizer(self, scale: Tensor, zero_point: Tensor) -> AsymmetricQuantizer:
        """Return NNCF's quantizer of these steps and zero points, in the shape at the hook."""
        spec = PTQuantizerSpec(
            num_bits=self.bits,
            mode=QuantizationScheme.ASYMMETRIC,
            signedness_to_force=None,
            narrow_range=False,
            half_range=False,
            scale_shape=tuple(scale.shape),
            logarithm_scale=False,
        )
        quantizer = AsymmetricQuantizer(spec).to(scale.device)
        with torch.no_grad():
            quantizer.input_low.copy_(-zero_point * scale)
            quantizer.input_range.copy_(scale * self.highest - quantizer.eps)
        return quantizer

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes less their zero point, float32."""
        return torch.clamp(torch.div(x, scale).round_(), -zero, self.highest - zero)
