"""The canonical GEMM that every op is, and its product from quantized operands.

Linear layers, convolutions (im2col) and attention matmuls are all ``A [B,H,N,I] x B [B|1,H,I,O]``.
A quantized operand is a list of *terms*: ``(codes, scale)`` pairs whose sum of products is the
operand. Integer codes are multiplied exactly; a floating point operand is one term without scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vit_plugin.integrations.device import needs_padded_int8

Terms = list[tuple[Tensor, Tensor | None]]


@dataclass
class Gemm:
    """One op on the calibration set.

    Attributes
    ----------
    a
        First operand ``[B, H, N, I]``, float32: the activations.
    b
        Second operand ``[B or 1, H, I, O]``, float32: the transposed weight, or activations.
    bias
        Broadcastable to ``[1, H, 1, O]``, or None. Never quantized.
    fisher
        Mean squared gradient of the loss at the output, ``[B, H, N, O]``, not negative. None if
        the metric does not use it.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    fisher: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.dim() != 4 or self.b.dim() != 4 or self.b.shape[0] not in (1, self.a.shape[0]):
            raise ValueError(
                f"operands must be [B,H,N,I] and [B or 1,H,I,O]; "
                f"got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        expected = (*self.a.shape[:3], self.b.shape[3])
        if self.fisher is not None and tuple(self.fisher.shape) != expected:
            raise ValueError(f"fisher must be {expected}; got {tuple(self.fisher.shape)}")


def int_matmul(a: Tensor, b: Tensor, *, padded: bool | None = None) -> Tensor:
    """Exact product ``[M,K] x [K,N]`` of int8 matrices as int32.

    Parameters
    ----------
    padded
        Pad with zeros to the shapes that CUDA accepts. Default: when the device asks for it.
    """
    if padded is None:
        padded = needs_padded_int8(a.device)
    if not padded:
        return torch._int_mm(a.contiguous(), b.contiguous())
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    a = F.pad(a, (0, -inner % 8, 0, max(0, 17 - rows)))
    b = F.pad(b, (0, -columns % 8, 0, -inner % 8))
    return torch._int_mm(a, b)[:rows, :columns]


def _moved_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of int16 codes, of which a row has 256 at most, and int8 codes, as int32.

    Codes less a zero point fit no byte. Moved by another whole number they do, and what that takes
    from the product is that number times the sums of the columns.
    """
    offset = a.amin(1, keepdim=True) + 128
    sums = int_matmul(b.new_ones(1, len(b)), b)
    return int_matmul((a - offset).to(torch.int8), b).addcmul_(offset.to(sums.dtype), sums)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of two canonical code tensors, float32."""
    if a.dtype not in (torch.int8, torch.int16) or b.dtype != torch.int8:
        return torch.matmul(a.float(), b.float())
    multiply = int_matmul if a.dtype == torch.int8 else _moved_matmul
    heads = [multiply(a[0, h], b[0, h]).float() for h in range(a.shape[1])]
    return torch.stack(heads)[None] if len(heads) > 1 else heads[0][None, None]


def product(a: Terms, b: Terms) -> Tensor:
    """Product of two operands given as terms, ``[B,H,N,O]`` float32.

    int8 codes, and int16 ones on the left of which a row has 256 at most, are multiplied in
    integers (batch 1 only: `torch._int_mm` is two-dimensional); everything else in float32. Scales
    never vary along the inner dimension, so they multiply the result.
    """
    total: Tensor | None = None
    for a_codes, a_scale in a:
        for b_codes, b_scale in b:
            part = _matmul(a_codes, b_codes)
            for scale in _merged(a_scale, b_scale):
                part = part.mul_(scale)
            total = part if total is None else total.add_(part)
    assert total is not None, "an operand has at least one term"
    return total


def _merged(a: Tensor | None, b: Tensor | None) -> list[Tensor]:
    """The scales, as one if that is no larger: each takes a pass over the product."""
    scales = [scale for scale in (a, b) if scale is not None]
    if len(scales) == 2 and (a.shape[2] == 1 or b.shape[3] == 1):
        return [a * b]
    return scales


def difference(a: Terms, b: Terms, output: Tensor) -> Tensor:
    """``a x b - output`` for a contiguous `output [B,H,N,O]`; one fused pass if both are float."""
    if len(a) == len(b) == 1 and a[0][1] is None and b[0][1] is None:
        left, right = a[0][0], b[0][0]
        if output.shape[0] == output.shape[1] == 1:
            return torch.addmm(output[0, 0], left[0, 0], right[0, 0], beta=-1)[None, None]
        flat = torch.baddbmm(output.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1), beta=-1)
        return flat.view(output.shape)
    return product(a, b).sub_(output)
