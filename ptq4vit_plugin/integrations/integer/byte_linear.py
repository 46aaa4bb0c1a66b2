"""oneDNN's linear of bytes on x86 CPUs: product, rescaling and bias in one pass.

With VNNI it is exact. CPUs with AVX2 and no VNNI multiply unsigned by signed bytes and add the
products of two neighbours in 16 bits, where the sum saturates: 255 * 127 + 255 * 127 becomes 32767.
There it is exact where no pair of products can get there, as with weights of 7 bits, or with codes
that span no more than 128.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_plugin.integrations.device import adds_int8_pairs, multiplies_bytes
from ptq4vit_plugin.quantizers.branches import Branch

# oneDNN packs columns by fours; in a matrix of another width, others are neighbours.
PACK = 4


class ByteLinear:
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
        """uint8 codes less the lowest of integer-valued float32 codes ``[N, I]``."""
        # By way of int8: a conversion from float32 to uint8 takes several times as long.
        moved = lowest + (128 if self.wide else 0)
        signed = (codes - moved if moved else codes).to(torch.int8)
        unsigned = signed.view(torch.uint8)
        return unsigned.bitwise_xor_(128) if self.wide else unsigned

    def quantized(self, branch: Branch, x: Tensor) -> Tensor:
        """uint8 codes less the lowest of float32 numbers ``[N, I]``.

        One pass where torch has one for all of dividing, rounding, clamping and converting.
        """
        even = not branch.per_row and branch.coarse == 1
        simple = branch.scale.numel() == 1 and branch.split is None and even
        if not (simple and -255 <= branch.lowest <= 0 and _quantizes()):
            return self.bytes(branch.codes(x), branch.lowest)
        scale = float(branch.scale)
        found = torch.quantize_per_tensor(x.contiguous(), scale, -branch.lowest, torch.quint8)
        # Its numbers without a copy of them; a view would still take itself for a quantized tensor.
        codes = torch.empty(0, dtype=torch.uint8).set_(found.untyped_storage(), 0, x.shape)
        highest = branch.highest - branch.lowest
        return codes.clamp_(max=highest) if highest < 255 else codes

    def __call__(self, codes: Tensor, lowest: int) -> Tensor:
        """Accumulators ``[N, O]`` of integer-valued float32 codes ``[N, I]``, the lowest of which
        is given, in float32, which rounds those above 2^24."""
        return self.of_bytes(self.bytes(codes, lowest), lowest, self.ones, None)

    def of_bytes(self, unsigned: Tensor, lowest: int, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Accumulators times `scale` plus `bias`, float32 ``[N, O]``.

        Parameters
        ----------
        unsigned, lowest
            Codes less the lowest, uint8 ``[N, I]``, and the lowest.
        scale, bias
            ``[O]``.
        """
        if self.padding:
            unsigned = F.pad(unsigned, (0, self.padding))
        return torch.ops.onednn.qlinear_pointwise(
            unsigned,
            1.0,
            -lowest,
            self.packed,
            scale.contiguous(),
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
def _quantizes() -> bool:
    """Whether this release of torch still makes bytes of numbers in one pass.

    It says once that it will not do so for ever; no user can do anything about that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        except (AttributeError, RuntimeError):
            return False
    return True


@cache
def _is_exact(most: int) -> bool:
    """Whether `ByteLinear` gives int64's results on this CPU with this release of torch.

    The kernel is oneDNN's and its signature torch's own, so both are asked, once, with codes up to
    255 and weights from ``-most`` to ``most - 1``.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, inner, outer in ((3, 64, 16), (70, 386, 50), (40, 400, 40)):
        codes = torch.randint(0, 2, (rows, inner), generator=generator) * 255
        weight = torch.randint(0, 2, (outer, inner), generator=generator) * (2 * most - 1) - most
        try:
            found = ByteLinear(weight.to(torch.int8), 255)(codes.float(), 0)
        except (AttributeError, RuntimeError, TypeError):
            return False
        if not torch.equal(found, (codes @ weight.t()).float()):
            return False
    return True


def is_exact(weight: Tensor, span: int) -> bool:
    """Whether a device multiplies codes by these weights exactly with `ByteLinear`.

    Parameters
    ----------
    weight, span
        As `ByteLinear` takes them.
    """
    if not multiplies_bytes(weight.device):
        return False
    if adds_int8_pairs(weight.device):
        return pairs_fit(weight, span) and _is_exact(64)
    return _is_exact(128)
