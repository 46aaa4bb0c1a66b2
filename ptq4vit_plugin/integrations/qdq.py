"""A quantized model in the words of other runtimes: plain fake-quantize ops of 256 levels.

Runtimes take a product of two operands to be one of int8 only when each is quantized to exactly
256 levels, and when nothing is summed between quantizer and product. So every
grid becomes one such fake-quantize, grids with fewer levels are clamped first, and a twin operand
is distributed: two products are added, each with its own range.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.integrations.lowering import QuantizedOp, check_rows, factors, take_apart
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps
from ptq4vit_plugin.quantizers.branches import Branch, row_peak

SIGNED, UNSIGNED = (-128, 127), (0, 255)
# Where a layer's output has what is a weight's first dimension.
OUTPUT_CHANNELS = {"linear": (-1,), "conv2d": (-1, 1, 1)}


def qdq_model(
    model: nn.Module,
    per_tensor: bool = False,
    unsigned_right: bool = False,
    selected: bool = False,
) -> tuple[ReplacedOps, list[QuantizedOp]]:
    """A copy, on the CPU, of a quantized model made of torch's own fake-quantize functions.

    Its ops are returned with it.

    Parameters
    ----------
    per_tensor
        The runtime multiplies activations in integers only if they have one scale. Scales per head
        are then divided out before the quantizer and multiplied in after the product.
    unsigned_right
        Move the signed codes of weights and right factors by 128, into unsigned ones.
    selected
        Cut operands at a split by selection; else by a product with a mask. The same numbers: which
        is faster is the runtime's.

    Raises
    ------
    ModelError
        See `take_apart` and `check_rows`.
    """
    taken, found = take_apart(copy.deepcopy(model).cpu())
    taken = taken.float()  # the type of what runtimes are given, whatever the model's is
    check_rows(found)
    ops = {op.name: QDQOp(op, per_tensor, unsigned_right, selected) for op in found}
    return ReplacedOps(taken, ops).eval(), found


class QDQGrid(nn.Module):
    """One branch of an operand, as a fake-quantize of 256 levels.

    Parameters
    ----------
    branch
        Scales vary along one dimension at most.
    signed
        Whether the runtime's kernel wants signed codes here even for numbers that are never
        negative. Codes above 127 stay unsigned all the same.
    constant
        The operand is a weight, whose values are levels already: nothing to clamp.
    per_tensor
        Divide by scales that vary and quantize to whole numbers; `factor` are the scales then,
        else None.
    moved
        Move signed codes by 128.
    selected
        See `qdq_model`.
    """

    def __init__(
        self,
        branch: Branch,
        signed: bool,
        constant: bool,
        per_tensor: bool,
        moved: bool,
        selected: bool,
    ) -> None:
        super().__init__()
        self.side, self.selected = branch.side, selected
        fits = branch.highest <= SIGNED[1]
        self.range = SIGNED if branch.lowest < 0 or (signed and fits) else UNSIGNED
        self.per_row = branch.per_row
        # Codes less their zero point that fit no int8: the runtime gets the zero point itself.
        shifted = branch.lowest < 0 and (branch.lowest < SIGNED[0] or branch.highest > SIGNED[1])
        zero = -branch.lowest if shifted else 0
        if moved and self.range == SIGNED and not shifted:
            zero = -SIGNED[0]
        if zero:
            self.range = UNSIGNED
        scale = branch.scale.detach()
        outside = per_tensor and not constant and scale.numel() > 1
        self.factor = scale if outside else None
        self.inverse = 1 / scale if outside else None
        if outside:
            scale = torch.ones(1)
        self.axis = max(range(scale.dim()), key=lambda d: scale.shape[d])
        self.zero = torch.full((scale.numel(),), zero, dtype=torch.int32)
        self.zero_point = zero
        self.scale = _number(scale)
        self.coarse, self.knee = branch.coarse, _number(branch.knee * scale)
        self.below = _number(-branch.knee * scale) if branch.lowest < 0 else None
        self.split = None if branch.split is None else _number(branch.split)
        lowest, highest = (end - zero for end in self.range)
        clamps_low = not constant and branch.lowest > lowest
        clamps_high = not constant and branch.highest < highest and not branch.bounded
        self.low = _number(branch.lowest * scale) if clamps_low else None
        self.high = _number(branch.highest * scale) if clamps_high else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers rounded to the branch's levels, 0 on the split's other side, over a factor that
        is returned with them."""
        factor = self.factor
        if self.per_row:
            peak = row_peak(x)
            x = x / peak
            factor = peak if factor is None else peak * factor
        if self.split is not None:
            x = self._cut(x)
        if self.inverse is not None:
            x = x * self.inverse
        x = _clamp(x, self.low, self.high)
        if self.coarse > 1:
            x = self._coarser(x)
        if isinstance(self.scale, float):
            x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.range)
            return x, factor
        scale = self.scale.flatten()
        x = torch.fake_quantize_per_channel_affine(x, scale, self.zero, self.axis, *self.range)
        return x, factor

    def _coarser(self, x: Tensor) -> Tensor:
        """Numbers beyond the knee on their levels; the others are left to what rounds them all."""
        inner = _clamp(x, self.below, self.knee)
        step = self.coarse * self.scale
        return inner + torch.round((x - inner) * (1 / step)) * step

    def _cut(self, x: Tensor) -> Tensor:
        above = x > self.split
        if self.selected:
            return torch.where(above, x, 0.0) if self.side == "high" else torch.where(above, 0.0, x)
        high = x * above.to(x.dtype)
        return high if self.side == "high" else x - high


class QDQOp(nn.Module):
    """An op on fake-quantized operands, a product per pair of branches.

    Parameters
    ----------
    op
        Which of the operands are quantized, and how.
    """

    def __init__(
        self, op: QuantizedOp, per_tensor: bool, unsigned_right: bool, selected: bool
    ) -> None:
        super().__init__()
        self.kind = op.kind
        weight = op.parameter is not None
        self.left = _grids(op.grids.get(0), False, False, per_tensor, False, selected)
        self.right = _grids(op.grids.get(1), True, weight, per_tensor, unsigned_right, selected)

    def forward(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the function that is replaced on every pair; the bias is added once."""
        left, right, rest, named = factors(function, args, kwargs)
        # Two dimensions would become ONNX's Gemm, which ONNX Runtime leaves in float.
        flat = self.kind == "linear" and left.dim() == 2
        left = left[None] if flat else left
        lefts, rights = _parts(self.left, left), _parts(self.right, right)
        call = torch.matmul if self.kind == "matmul" else function
        out = bias = None
        if any(factor is not None for _, factor in (*lefts, *rights)):
            # Factors are the product's alone.
            bias = _bias(self.kind, rest, named)
            rest, named = _without_bias(self.kind, rest, named)
        for a, a_factor in lefts:
            for b, b_factor in rights:
                part = call(a, b, *rest, **named)
                if b_factor is not None and self.kind in OUTPUT_CHANNELS:
                    b_factor = b_factor.reshape(OUTPUT_CHANNELS[self.kind])
                if a_factor is not None or b_factor is not None:
                    part = part * _product(a_factor, b_factor)
                out = part if out is None else out + part
                rest, named = _without_bias(self.kind, rest, named)
        if bias is not None:
            out = out + bias.reshape(OUTPUT_CHANNELS[self.kind])
        # Squeeze, not an index: OpenVINO gives the result of an index behind an integer product the
        # wrong shape.
        return out.squeeze(0) if flat else out


def _grids(branches: list[Branch] | None, *how: bool) -> nn.ModuleList | None:
    return None if branches is None else nn.ModuleList(QDQGrid(b, *how) for b in branches)


def _parts(grids: nn.ModuleList | None, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    return [(x, None)] if grids is None else [grid(x) for grid in grids]


def _product(first: Tensor | None, second: Tensor | None) -> Tensor:
    return second if first is None else first if second is None else first * second


def _number(value: Tensor) -> Tensor | float:
    """One number as a Python number, so that a trace has it as a constant."""
    return float(value) if value.numel() == 1 else value


def _clamp(x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    """Clamped by numbers in one pass: no runtime is sure to make one of two."""
    if low is None and high is None:
        return x
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return torch.clamp(x, low, high)
    x = x if low is None else torch.maximum(x, torch.as_tensor(low))
    return x if high is None else torch.minimum(x, torch.as_tensor(high))


def _bias(kind: str, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    if kind == "matmul":
        return None
    return named.get("bias", rest[0] if rest else None)


def _without_bias(
    kind: str, rest: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kind == "matmul":
        return rest, named
    return (None, *rest[1:]), {name: value for name, value in named.items() if name != "bias"}
