"""What PyTorch's ONNX exporter cannot write, in terms of what it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.onnx import TensorProtoDataType, symbolic_helper
from torch.overrides import TorchFunctionMode

OPSET = 18  # the first whose Resize knows antialiasing


class Translatable(TorchFunctionMode):
    """While it is active, functions compute the same by way of others.

    ``repeat_interleave``, with which timm computes rotary embeddings of images of any size, and
    ``tile`` are written wrongly when sizes are no constants; ``rms_norm`` is not known in this
    opset; the rest needs sizes that a trace of a quantized model does not know.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        translation = TRANSLATIONS.get(func)
        found = translation and translation(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: Any = None
) -> Tensor:
    """`F.rms_norm`, written out."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return out if weight is None else out * weight


def repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None) -> Tensor | None:
    """`Tensor.repeat_interleave`, every element as often, as a stack of copies."""
    if not isinstance(repeats, int) or dim is None:
        return None
    dim %= x.dim()
    return torch.stack([x] * repeats, dim + 1).flatten(dim, dim + 1)


def tile(x: Tensor, *dims: Any) -> Tensor | None:
    """`Tensor.tile` as `Tensor.repeat`, where it adds no dimensions."""
    times = [*dims[0]] if isinstance(dims[0], (tuple, list)) else [*dims]
    missing = x.dim() - len(times)
    return x.repeat(*[1] * missing, *times) if missing >= 0 else None


def unfold(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """`Tensor.unfold`: windows along a dimension, their elements in a new last one."""
    dim = dimension % x.dim()
    firsts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = firsts[:, None] + torch.arange(size, device=x.device)
    return x.index_select(dim, places.flatten()).unflatten(dim, (-1, size)).movedim(dim + 1, -1)


def fold(
    x: Tensor,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Tensor:
    """`F.fold` as a transposed convolution in which every weight is 1 at one place."""
    size, kernel, dilation, padding, stride = (
        (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
        for value in (output_size, kernel_size, dilation, padding, stride)
    )
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    free = [n + 2 * p - s for n, p, s in zip(size, padding, spans, strict=True)]
    windows = [f // s + 1 for f, s in zip(free, stride, strict=True)]
    rest = [f % s for f, s in zip(free, stride, strict=True)]
    area = kernel[0] * kernel[1]
    channels = int(x.shape[-2]) // area
    weight = torch.eye(area, dtype=x.dtype, device=x.device).view(area, 1, *kernel)
    return F.conv_transpose2d(
        x.unflatten(-1, windows),
        weight.repeat(channels, 1, 1, 1),
        stride=stride,
        padding=padding,
        output_padding=rest,
        groups=channels,
        dilation=dilation,
    )


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor | None:
    """As products with matrices of averages; the average of all is no trouble."""
    have = [int(n) for n in input.shape[-2:]]
    wanted = [output_size] * 2 if isinstance(output_size, int) else output_size
    rows, columns = (n if want is None else want for n, want in zip(have, wanted, strict=True))
    if rows == columns == 1:
        return None
    left, right = _averages(have[0], rows).to(input), _averages(have[1], columns).to(input)
    return left @ input @ right.t()


def _averages(size: int, windows: int) -> Tensor:
    """``[windows, size]``; window i begins at floor(i size / windows) and ends before
    ceil((i + 1) size / windows)."""
    place, window = torch.arange(size), torch.arange(windows)[:, None]
    inside = (window * size // windows <= place) & (place * windows < (window + 1) * size)
    return inside / inside.sum(1, keepdim=True)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.rms_norm: rms_norm,
    F.rms_norm: rms_norm,
    Tensor.repeat_interleave: repeat_interleave,
    Tensor.tile: tile,
    Tensor.unfold: unfold,
    F.fold: fold,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
}


def _resize(g: Any, x: Any, size: Any, align_corners: Any, *scales: Any) -> Any:
    """PyTorch's antialiased bicubic resampling, for which its exporter has no translation.

    timm resamples position embeddings with it. Its kernel has the parameter -0.5.
    """
    empty = g.op("Constant", value_t=torch.tensor([]))
    if symbolic_helper._is_packed_list(size):
        ends = [
            g.op("Cast", end, to_i=TensorProtoDataType.INT64)
            for end in symbolic_helper._unpack_list(size)
        ]
        one = g.op("Constant", value_t=torch.tensor([1]))
        size = g.op("Concat", *(g.op("Reshape", end, one) for end in ends), axis_i=0)
    images = symbolic_helper._slice_helper(g, g.op("Shape", x), axes=[0], starts=[0], ends=[2])
    return g.op(
        "Resize",
        x,
        empty,
        empty,
        g.op("Concat", images, size, axis_i=0),
        mode_s="cubic",
        antialias_i=1,
        cubic_coeff_a_f=-0.5,
        coordinate_transformation_mode_s="half_pixel",
    )


torch.onnx.register_custom_op_symbolic("aten::_upsample_bicubic2d_aa", _resize, OPSET)
