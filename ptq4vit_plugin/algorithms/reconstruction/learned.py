"""Quantizers while their steps, zero points and roundings are being learned.

Rounding has no gradient; the straight-through estimator takes it to be 1. Then the gradient of a
level with respect to its step is the rounding's offset inside the range and the limit's code
outside (LSQ, Esser et al., 1902.08153). A step is learned by its logarithm, so that one rate serves
steps of all sizes and none becomes negative.
"""

from __future__ import annotations

from typing import Any

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.branches import Levels, row_peak
from ptq4vit_plugin.quantizers.numerator import NumeratorQuantizer
from ptq4vit_plugin.quantizers.piecewise import PiecewiseQuantizer


def rounded(x: Tensor) -> Tensor:
    """``round(x)`` with gradient 1."""
    return x + (x.round() - x).detach()


class _Levels(torch.autograd.Function):
    """``step * clamp(levels.rounded(x / step), lowest - zero, highest - zero)``.

    `zero` is a whole number. Written out, because autograd would keep and mask a dozen tensors of
    the size of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        zero: Tensor,
        levels: Levels,
    ) -> Tensor:
        ratio = x / step
        clamped = ratio.clamp(levels.lowest - zero, levels.highest - zero)
        inside, codes = ratio == clamped, levels.rounded(clamped.clone())
        ctx.save_for_backward(step, zero, clamped, codes, inside)
        return codes * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, zero, clamped, codes, inside = ctx.saved_tensors
        through = grad * inside
        limited = grad - through
        # Inside the range the offset of the rounding stays, outside the limit's code does.
        of_step = torch.addcmul(limited * codes, through, codes - clamped)
        of_zero = -(limited * step)
        return through, of_step.sum_to_size(step.shape), of_zero.sum_to_size(zero.shape), None


class LearnedActivation(nn.Module):
    """A quantizer of activations with one grid; with `drop`, some tokens pass in float (QDrop).

    Attributes
    ----------
    growth
        Logarithm of the step over the quantizer's own step.
    zero
        Zero point in codes; None for a symmetric quantizer.
    drop
        Probability with which a token (a row of the tensor) is not quantized; 0 at first.
    """

    def __init__(self, quantizer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.per_row = isinstance(quantizer, NumeratorQuantizer)
        zero = None
        if isinstance(quantizer, NumeratorQuantizer):
            step, self.levels = quantizer.step, quantizer.levels
        elif isinstance(quantizer, PiecewiseQuantizer):
            step, self.levels = quantizer.scale, quantizer.levels
        elif isinstance(quantizer, AsymmetricQuantizer):
            self.levels = Levels(0, quantizer.levels - 1)
            step = (quantizer.input_range + quantizer.eps) / self.levels.highest
            zero = nn.Parameter((-quantizer.input_low / step).round().detach().float())
        else:
            self.levels = Levels(quantizer.level_low, quantizer.level_high)
            step = (quantizer.scale + quantizer.eps) / self.levels.highest
        self.start = step.detach().float().clone()
        self.growth = nn.Parameter(torch.zeros_like(self.start))
        self.zero = zero
        self.drop = 0.0
        self.generator = generator
        # Not a child: the quantizer's parameters are not learned directly.
        self.quantizer = (quantizer,)

    @classmethod
    def can_learn(cls, quantizer: nn.Module) -> bool:
        """Whether a hook is one of the quantizers that this class knows."""
        known = (SymmetricQuantizer, AsymmetricQuantizer, NumeratorQuantizer, PiecewiseQuantizer)
        return isinstance(quantizer, known)

    def step(self) -> Tensor:
        """Distance between two levels."""
        return self.start * self.growth.exp()

    def _zero(self) -> Tensor:
        """The zero point as a code; zero if there is none."""
        if self.zero is None:
            return torch.zeros_like(self.start)
        return rounded(self.zero.clamp(self.levels.lowest, self.levels.highest))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the levels, each row in float with probability `drop`."""
        if not torch.is_grad_enabled() and not self.drop:
            # What is judged is what is kept: no number at a border falls to another level then.
            return self.finish()(x)
        values, step = x.float(), self.step()
        if self.per_row:
            step = step * row_peak(values.detach())
        quantized = _Levels.apply(values, step, self._zero(), self.levels)
        quantized = quantized.to(x.dtype)
        if not self.drop:
            return quantized
        shape = (*x.shape[:-1], 1)
        chance = torch.rand(shape, generator=self.generator, device=x.device)
        return torch.where(chance < self.drop, x, quantized)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Write what was learned into the quantizer it came from, and return that."""
        (quantizer,) = self.quantizer
        step = self.step()
        if isinstance(quantizer, NumeratorQuantizer):
            quantizer.step.copy_(step)
        elif isinstance(quantizer, PiecewiseQuantizer):
            quantizer.scale.copy_(step)
        elif self.zero is not None:
            quantizer.input_low.copy_(-self._zero() * step)
            quantizer.input_range.copy_(step * self.levels.highest - quantizer.eps)
        else:
            quantizer.scale.copy_(step * self.levels.highest - quantizer.eps)
        return quantizer


class LearnedWeight(nn.Module):
    """A weight in units of its steps, which moves until it rounds to another level.

    Attributes
    ----------
    codes
        In the shape of the parameter, not rounded.
    growth
        Logarithm of the step over the quantizer's own step.
    """

    def __init__(self, quantizer: SymmetricQuantizer, parameter: nn.Parameter) -> None:
        super().__init__()
        self.lowest, self.highest = quantizer.level_low, quantizer.level_high
        step = (quantizer.scale + quantizer.eps) / self.highest
        self.start = step.detach().float().clone()
        self.growth = nn.Parameter(torch.zeros_like(self.start))
        self.codes = nn.Parameter(parameter.detach().float() / self.start)
        self.quantizer, self.parameter = (quantizer,), (parameter,)

    @classmethod
    def can_learn(cls, quantizer: nn.Module) -> bool:
        """Whether a weight's hook is a signed symmetric quantizer of NNCF's."""
        return isinstance(quantizer, SymmetricQuantizer) and quantizer.signed

    def forward(self, _: Tensor) -> Tensor:
        """Return the weight on its levels, whatever the parameter is."""
        codes = rounded(self.codes.clamp(self.lowest, self.highest))
        return (codes * (self.start * self.growth.exp())).to(self.parameter[0].dtype)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Write steps into the quantizer and the weight, on its levels, into the parameter."""
        (quantizer,), (parameter,) = self.quantizer, self.parameter
        step = self.start * self.growth.exp()
        quantizer.scale.copy_(step * self.highest - quantizer.eps)
        codes = self.codes.clamp(self.lowest, self.highest).round()
        # Through the quantizer: its own arithmetic gives the levels to the last bit.
        parameter.copy_(quantizer((codes * step).to(parameter.dtype)))
        return quantizer
