"""Exact products of integer codes, by the fastest way a device has."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import int_matmul
from ptq4vit_plugin.integrations.device import has_int8_dot

# Integers up to here, and all partial sums that stay below, are exact in float32 in any order.
EXACT = 2**24


class WeightProduct:
    """Products of activation codes with one fixed matrix of weight codes.

    With int8 dot products in hardware the product is `torch._int_mm` into int32; elsewhere a
    float32 GEMM over stretches of the inner dimension so short that every partial sum is exact.

    Parameters
    ----------
    weight
        int8 codes ``[O, I]``.
    lowest, highest
        Smallest and largest activation code.
    """

    def __init__(self, weight: Tensor, lowest: int, highest: int) -> None:
        largest = max(-lowest, highest)
        self.device = weight.device
        # Moves codes into int8's range.
        self.offset = 0 if lowest >= -128 and highest <= 127 else lowest + 128
        self.bound = int(weight.long().abs().sum(1).max()) * largest
        self.integer = has_int8_dot(weight.device)
        if self.integer:
            self.matrix = weight.t().contiguous()
            self.column_sums = weight.sum(1, dtype=torch.int32)
        else:
            stretches = -(-self.bound // EXACT)
            while True:
                parts = weight.tensor_split(stretches, dim=1)
                if all(int(p.long().abs().sum(1).max()) * largest < EXACT for p in parts):
                    break
                stretches += 1
            self.parts = [part.t().float() for part in parts]

    def __call__(self, codes: Tensor) -> Tensor:
        """Accumulators ``[N, O]`` of integer-valued float32 codes ``[N, I]``.

        int32, or float32 that holds integers exactly. (Sums of stretches may reach 2^24 and are
        int32 then.)
        """
        if self.integer:
            if not self.offset:
                return int_matmul(codes.to(torch.int8), self.matrix)
            # The weights' sums make up for what codes are moved by.
            moved = int_matmul((codes - self.offset).to(torch.int8), self.matrix)
            return moved.add_(self.column_sums * self.offset)
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
