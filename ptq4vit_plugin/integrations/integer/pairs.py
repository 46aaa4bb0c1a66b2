"""Exact 8-bit products on CPUs that add neighbouring products in 16 bits.

x86 CPUs with AVX2 and no VNNI multiply unsigned by signed bytes and add the products of two
neighbours in 16 bits, where the sum saturates: 255 * 127 + 255 * 127 becomes 32767. oneDNN's linear
does so too, at half the time of float32. It is exact where no pair of products can get there, as
with weights of 7 bits, or with codes that span no more than 128.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_plugin.integrations.device import adds_int8_pairs

# oneDNN packs columns by fours; in a matrix of another width, others are neighbours.
PACK = 4


class PairedLinear:
    """oneDNN's linear of activation codes and one matrix of weight codes.

    Parameters
    ----------
    weight
        int8 codes ``[O, I]``.
    span
        Largest activation code less the smallest, at most 255.
    """

    def __init__(self, weight: Tensor, span: int) -> None:
        self.wide = span > 127
        self.padding = -weight.shape[1] % PACK
        matrix = F.pad(weight, (0, self.padding)).contiguous()
        self.packed = torch.ops.onednn.qlinear_prepack(matrix, None)
        self.ones = torch.ones(len(weight))
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)

    def bytes(self, codes: Tensor, lowest: int) -> Tensor:
        """uint8 codes less the lowest, padded, of integer-valued float32 codes ``[N, I]``."""
        # By way of int8: a conversion from float32 to uint8 takes several times as long.
        moved = lowest + (128 if self.wide else 0)
        signed = (codes - moved if moved else codes).to(torch.int8)
        unsigned = signed.view(torch.uint8)
        if self.wide:
            unsigned.bitwise_xor_(128)
        return F.pad(unsigned, (0, self.padding)) if self.padding else unsigned

    def __call__(
        self, codes: Tensor, lowest: int, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Accumulators times `scale` plus `bias`, float32 ``[N, O]``.

        Parameters
        ----------
        codes
            ``[N, I]``, integer-valued float32.
        lowest
            Smallest code that can occur.
        scale, bias
            ``[O]``; None: 1 and 0. Accumulators are exact, but leave
            the kernel as float32, which rounds those above 2^24.
        """
        scale = self.ones if scale is None else scale.contiguous()
        return torch.ops.onednn.qlinear_pointwise(
            self.bytes(codes, lowest),
            1.0,
            -lowest,
            self.packed,
            scale,
            self.zeros,
            bias,
            output_scale=1.0,
            output_zero_point=0,
            output_dtype=torch.float32,
            post_op_name="none",
            post_op_args=[],
            post_op_algorithm="",
        )


def pairs_fit(weight: Tensor, span: int) -> bool:
    """Whether no sum of two neighbours' products leaves 16 bits.

    Parameters
    ----------
    weight
        int8 ``[O, I]``.
    span
        Largest number that a weight is multiplied by, at least 0.
    """
    pairs = F.pad(weight.int(), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    most = int(pairs.clamp(min=0).sum(2).max()) * span
    return most < 2**15 and int(pairs.clamp(max=0).sum(2).min()) * span >= -(2**15)


@cache
def pairs_are_exact() -> bool:
    """Whether `PairedLinear` gives int64's results on this CPU with this release of torch.

    The kernel is oneDNN's and its signature torch's own, so both are asked, once, with the largest
    codes and weights that fit.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, inner, outer in ((3, 64, 16), (70, 386, 50), (40, 1536, 40)):
        codes = torch.randint(0, 2, (rows, inner), generator=generator) * 255
        weight = torch.randint(0, 2, (outer, inner), generator=generator) * 128 - 64
        try:
            found = PairedLinear(weight.to(torch.int8), 255)(codes.float(), 0)
        except (AttributeError, RuntimeError, TypeError):
            return False
        if not torch.equal(found, (codes @ weight.t()).float()):
            return False
    return True


def has_exact_pairs(device: torch.device) -> bool:
    """Whether `PairedLinear` is how a device multiplies 8-bit codes that fit."""
    return adds_int8_pairs(device) and pairs_are_exact()
