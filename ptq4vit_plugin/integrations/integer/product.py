"""Exact products of integer codes, by the fastest way a device has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import int_matmul
from ptq4vit_plugin.integrations.device import has_int8_dot
from ptq4vit_plugin.integrations.integer.byte_linear import ByteLinear, is_exact
from ptq4vit_plugin.quantizers.branches import Branch

# Integers up to here, and all partial sums that stay below, are exact in float32 in any order.
EXACT = 2**24
# Base of the digits of codes whose accumulators would not be.
DIGIT = 16


def weight_product(weight: Tensor, ranges: Sequence[tuple[int, int]]) -> WeightProduct:
    """The fastest exact product of activation codes with one fixed matrix of weight codes.

    Parameters
    ----------
    weight
        int8 codes ``[O, I]``.
    ranges
        Smallest and largest activation code, of every grid that is multiplied with the weight.
    """
    bound = accumulator_bound(weight, ranges)
    span = max(high - low for low, high in ranges)
    if bound < DIGIT * EXACT and is_exact(weight, span):
        return BytesProduct(weight, span, bound < EXACT)
    if has_int8_dot(weight.device):
        return DotProduct(weight, ranges)
    return FloatProduct(weight, ranges)


def accumulator_bound(weight: Tensor, ranges: Sequence[tuple[int, int]]) -> int:
    """Largest magnitude of an accumulator of weight codes ``[O, I]`` and one grid's codes."""
    return int(weight.long().abs().sum(1).max()) * max(max(-low, high) for low, high in ranges)


class WeightProduct(ABC):
    """Products of activation codes with one matrix of weight codes ``[O, I]``."""

    @abstractmethod
    def accumulators(self, codes: Tensor, lowest: int) -> Tensor:
        """Exact sums ``[N, O]``: int32, or float32 that holds integers exactly.

        Parameters
        ----------
        codes
            ``[N, I]``, integer-valued float32.
        lowest
            Smallest code that the grid has.
        """

    def rescaled(self, branch: Branch, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Accumulators of the codes of ``x [N, I]``, scaled and shifted to float32 ``[N, O]``.

        Parameters
        ----------
        branch
            The grid of the codes.
        scale, bias
            Multiplied by and added, ``[O]``.
        """
        out = self.accumulators(branch.codes(x), branch.lowest) * scale
        return out if bias is None else out.add_(bias)


class DotProduct(WeightProduct):
    """`torch._int_mm` into int32, where int8 dot products are in hardware and oneDNN is not."""

    def __init__(self, weight: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        self.fits = all(low >= -128 and high <= 127 for low, high in ranges)
        self.matrix = weight.t().contiguous()
        self.sums = weight.sum(1, dtype=torch.int32)

    def accumulators(self, codes: Tensor, lowest: int) -> Tensor:
        if self.fits:
            return int_matmul(codes.to(torch.int8), self.matrix)
        # Codes move into int8's range, and the weights' sums make up for it.
        offset = lowest + 128
        moved = int_matmul((codes - offset).to(torch.int8), self.matrix)
        return moved.add_(self.sums * offset)


class BytesProduct(WeightProduct):
    """oneDNN's linear on bytes, rescaling included, where it is exact."""

    def __init__(self, weight: Tensor, span: int, exact: bool) -> None:
        self.linear = ByteLinear(weight, span)
        self.exact = exact

    def accumulators(self, codes: Tensor, lowest: int) -> Tensor:
        if self.exact:
            return self.linear(codes, lowest)
        # The kernel's int32 leave it as float32, so that large ones are added up from digits.
        high = (codes / DIGIT).trunc_()
        low = codes - DIGIT * high
        high, low = (self.linear(digit, lowest).to(torch.int32) for digit in (high, low))
        return low.add_(high, alpha=DIGIT)

    def rescaled(self, branch: Branch, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return self.linear.of_bytes(self.linear.quantized(branch, x), branch.lowest, scale, bias)


class FloatProduct(WeightProduct):
    """float32 products over stretches of the inner dimension in which every sum is exact."""

    def __init__(self, weight: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        stretches = max(1, -(-accumulator_bound(weight, ranges) // EXACT))
        while True:
            parts = weight.tensor_split(stretches, dim=1)
            if all(accumulator_bound(part, ranges) < EXACT for part in parts):
                break
            stretches += 1
        self.parts = [part.t().float() for part in parts]

    def accumulators(self, codes: Tensor, lowest: int) -> Tensor:
        if len(self.parts) == 1:
            return codes @ self.parts[0]
        widths = [part.shape[0] for part in self.parts]
        products = [c @ p for c, p in zip(codes.split(widths, 1), self.parts, strict=True)]
        total = products[0].to(torch.int32)
        for product in products[1:]:
            total += product.to(torch.int32)
        return total


def batched_product(left: Tensor, right: Tensor, largest: int) -> Tensor:
    """Accumulators of two stacks of integer-valued float32 codes, ``[..., N, I] x [..., I, O]``.

    Always a float32 product, in stretches that keep it exact: `torch._int_mm` multiplies two
    matrices only, and a call per image and head costs more than it saves.

    Parameters
    ----------
    largest
        Largest magnitude of a product of two codes.
    """
    stretch = max(1, (EXACT - 1) // largest)
    if left.shape[-1] <= stretch:
        return left @ right
    parts = zip(left.split(stretch, -1), right.split(stretch, -2), strict=True)
    return sum((a @ b).to(torch.int32) for a, b in parts)
