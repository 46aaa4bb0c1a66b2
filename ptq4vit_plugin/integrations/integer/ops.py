"""Ops that compute with integers: activations to codes, integer accumulators, one rescale."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4vit_plugin.integrations.integer.product import (
    WeightProduct,
    accumulator_bound,
    batched_product,
    weight_product,
)
from ptq4vit_plugin.integrations.lowering import factors
from ptq4vit_plugin.quantizers.branches import Branch, packed_codes, row_peak

INT32 = 2**31


class Grids(nn.Module):
    """The branches of one operand; their scales are buffers.

    Parameters
    ----------
    branches
        See `branches_of`.
    """

    FIELDS = ("lowest", "highest", "side", "flag", "bounded", "per_row", "knee", "coarse")

    def __init__(self, branches: list[Branch]) -> None:
        super().__init__()
        self.fields = [{name: getattr(b, name) for name in self.FIELDS} for b in branches]
        for number, branch in enumerate(branches):
            self.register_buffer(f"scale_{number}", branch.scale.detach().clone())
            split = None if branch.split is None else branch.split.detach().clone()
            self.register_buffer(f"split_{number}", split)

    @property
    def branches(self) -> list[Branch]:
        """The branches, with scales on the module's device."""
        return [
            Branch(getattr(self, f"scale_{n}"), split=getattr(self, f"split_{n}"), **fields)
            for n, fields in enumerate(self.fields)
        ]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Smallest and largest code of every branch."""
        return [(f["lowest"], f["highest"]) for f in self.fields]

    @property
    def largest(self) -> int:
        """Largest magnitude of a code."""
        return max(max(-lowest, highest) for lowest, highest in self.ranges)

    @property
    def per_row(self) -> bool:
        """Whether codes are of rows over their peaks."""
        return any(f["per_row"] for f in self.fields)

    def values(self, x: Tensor) -> Tensor:
        """Numbers rounded to the grids' levels."""
        total = sum(branch.codes(x) * branch.scale for branch in self.branches)
        return total * row_peak(x) if self.per_row else total

    def shift(self) -> int | None:
        """m when the second of two scales is ``2^m`` of the first everywhere, m >= 0, else None."""
        if len(self.fields) != 2:
            return None
        ratio = (self.scale_1 / self.scale_0).flatten()
        m = round(math.log2(float(ratio[0])))
        return m if m >= 0 and bool((ratio == 2.0**m).all()) else None


class IntegerOp(nn.Module):
    """One op of a model; runs where the model calls the function that it replaces.

    Parameters
    ----------
    left
        Grids of the operand at port 0; None when it stays float.
    """

    def __init__(self, left: Grids | None) -> None:
        super().__init__()
        self.left = left

    def forward(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The op's float output; dtype of its left argument."""
        left, right, rest, named = factors(function, args, kwargs)
        rest = tuple(map(_float32, rest))
        named = {name: _float32(value) for name, value in named.items()}
        out = self.compute(function, left.float(), right, rest, named)
        return out.to(left.dtype)

    @abstractmethod
    def compute(
        self,
        function: Callable[..., Tensor],
        left: Tensor,
        right: Tensor,
        rest: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Tensor:
        """As `forward`, from the call's operands and its other arguments, of which all tensors but
        the right operand are float32."""

    @abstractmethod
    def input_codes(self, left: Tensor, right: Tensor) -> dict[int, Tensor]:
        """k-bit codes of the quantized operands that are activations, by port."""


class WeightedOp(IntegerOp):
    """A linear or convolution whose weight is kept as codes.

    Parameters
    ----------
    left
        Grids of the activations; None when they stay float, and the weight is scaled back.
    codes
        int8, in the parameter's shape, output channels first.
    scale
        Of the weight: one, or one per output channel.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, left: Grids | None, codes: Tensor, scale: Tensor) -> None:
        super().__init__(left)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.detach().reshape(-1).clone())
        self._products: dict[torch.device, list[WeightProduct]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's prepared weights can be neither copied nor saved; a copy prepares its own.
        return {**self.__dict__, "_products": {}}

    def weight(self) -> Tensor:
        """The quantized weight as numbers."""
        return self.codes * self.scale.reshape(-1, *[1] * (self.codes.dim() - 1))

    def input_codes(self, left: Tensor, right: Tensor) -> dict[int, Tensor]:
        return {0: packed_codes(self.left.branches, left.float())} if self.left else {}

    groups = 1

    def products(self) -> list[WeightProduct]:
        """The prepared weight, one matrix per group of a convolution."""
        device = self.codes.device
        if device not in self._products:
            matrices = self.codes.flatten(1).tensor_split(self.groups)
            self._products = {device: [weight_product(m, self.left.ranges) for m in matrices]}
        return self._products[device]

    @cached_property
    def bound(self) -> int:
        """Largest magnitude that an accumulator of one grid can have."""
        return accumulator_bound(self.codes.flatten(1), self.left.ranges)

    def accumulators(self, codes: Tensor, lowest: int) -> Tensor:
        """Integer accumulators ``[N, O]`` of one grid's codes ``[N, groups * I]``."""
        parts = zip(self.products(), codes.tensor_split(self.groups, dim=1), strict=True)
        return torch.cat([product.accumulators(part, lowest) for product, part in parts], 1)

    def rescaled(
        self, rows: Callable[[Tensor], Tensor], left: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The product of ``left`` and the weight plus `bias`, ``[N, O]``.

        Parameters
        ----------
        rows
            Makes the matrix ``[N, groups * I]`` of what has the shape of ``left``.
        """
        branches = self.left.branches
        scales = [(b.scale.reshape(-1) * self.scale).expand(len(self.codes)) for b in branches]
        shift = self.left.shift()
        if shift is not None and self.bound * (1 + 2**shift) < INT32:
            # The paper's accumulation: one range's sums are shifted to the step of the other.
            sums = [self.accumulators(rows(b.codes(left)), b.lowest) for b in branches]
            total = (sums[0].to(torch.int32) + (sums[1].to(torch.int32) << shift)) * scales[0]
            return total if bias is None else total.add_(bias)
        total, inputs = None, rows(left).tensor_split(self.groups, dim=1)
        for branch, scale in zip(branches, scales, strict=True):
            added = [None] * self.groups if bias is None else bias.tensor_split(self.groups)
            calls = zip(
                self.products(), inputs, scale.tensor_split(self.groups), added, strict=True
            )
            parts = [product.rescaled(branch, x, s, b) for product, x, s, b in calls]
            part = parts[0] if self.groups == 1 else torch.cat(parts, 1)
            total, bias = part if total is None else total.add_(part), None
        return total


class IntegerLinear(WeightedOp):
    """``x [..., I]`` times a weight of codes ``[O, I]``."""

    def compute(self, function, left, right, rest, named):
        if self.left is None:
            return function(left, self.weight(), *rest, **named)
        bias = rest[0] if rest else named.get("bias")
        out = self.rescaled(lambda codes: codes.reshape(-1, codes.shape[-1]), left, bias)
        return out.reshape(*left.shape[:-1], -1)


class IntegerConv2d(WeightedOp):
    """A convolution as the product of unfolded patches and a weight of codes ``[O, I, kh, kw]``."""

    def compute(self, function, left, right, rest, named):
        if self.left is None:
            return function(left, self.weight(), *rest, **named)
        names = ("bias", "stride", "padding", "dilation", "groups")
        call = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        call |= dict(zip(names, rest, strict=False)) | named
        if call["groups"] != self.groups:
            self.groups, self._products = call["groups"], {}
        kernel = self.codes.shape[2:]
        dilation, stride = _pair(call["dilation"]), _pair(call["stride"])
        left = F.pad(left, _padding(call["padding"], kernel, dilation))
        size = [
            (left.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
        ]

        def rows(codes: Tensor) -> Tensor:
            patches = F.unfold(codes, kernel, dilation=dilation, stride=stride)
            return patches.transpose(1, 2).flatten(0, 1)

        out = self.rescaled(rows, left, call.get("bias"))
        return out.reshape(len(left), -1, out.shape[-1]).transpose(1, 2).unflatten(2, size)


class IntegerMatmul(IntegerOp):
    """The product of two activations.

    Parameters
    ----------
    left, right
        Grids of the operands; None when one stays float.
    """

    def __init__(self, left: Grids | None, right: Grids | None) -> None:
        super().__init__(left)
        self.right = right

    def compute(self, function, left, right, rest, named):
        right = right.float()
        if self.left is None or self.right is None:
            left = left if self.left is None else self.left.values(left)
            right = right if self.right is None else self.right.values(right)
            return torch.matmul(left, right)
        largest = self.left.largest * self.right.largest
        left, right = _dense(left), _dense(right)
        peak = row_peak(left) if self.left.per_row else None
        left = left if peak is None else left / peak
        rights = [(branch.codes(right), branch.scale) for branch in self.right.branches]
        out = None
        for branch in self.left.branches:
            codes = branch.rounded(left)
            for right_codes, right_scale in rights:
                part = batched_product(codes, right_codes, largest).float()
                part = part.mul_(branch.scale * right_scale)
                out = part if out is None else out.add_(part)
        return out if peak is None else out.mul_(peak)

    def input_codes(self, left: Tensor, right: Tensor) -> dict[int, Tensor]:
        sides = ((0, self.left, left), (1, self.right, right))
        return {n: packed_codes(g.branches, x.float()) for n, g, x in sides if g is not None}


class FloatWeightOp(IntegerOp):
    """A linear or convolution of which only the activations are quantized."""

    def compute(self, function, left, right, rest, named):
        return function(self.left.values(left), right.float(), *rest, **named)

    def input_codes(self, left: Tensor, right: Tensor) -> dict[int, Tensor]:
        return {0: packed_codes(self.left.branches, left.float())}


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _dense(x: Tensor) -> Tensor:
    """`x` in memory that a product takes without a copy, in the order in which its matrices are.

    Codes inherit it; to copy all of them, transposed at that, takes several times as long.
    """
    return x.mT.contiguous().mT if x.dim() > 1 and x.stride(-2) == 1 else x.contiguous()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, int]) -> list[int]:
    """Padding of conv2d as left, right, top, bottom."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return [width // 2, width - width // 2, height // 2, height - height // 2]
    height, width = _pair(padding)
    return [width, width, height, height]
