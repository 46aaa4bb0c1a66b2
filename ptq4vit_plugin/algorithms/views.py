"""Every op as one canonical GEMM, so that a single search serves linears, convolutions and matrix
products.

Canonical shapes: left operand ``[B, H, N, I]``, right operand ``[B or 1, H, I, O]``, output ``[B,
H, N, O]``. A linear has B = H = 1 and N = all tokens of all images; a convolution is unfolded, H
are its groups; a matrix product of attention has B = images (times windows), H = heads; one of a
matrix and a constant is as a linear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4vit_plugin.plan import FoundOp, Granularity
from ptq4vit_plugin.quantizers.base import Grouping


class GemmView(ABC):
    """How the tensors of one op map to the canonical GEMM and back.

    Attributes
    ----------
    batch_dim
        Canonical dimension along which calibration batches are concatenated.
    """

    batch_dim: int

    @abstractmethod
    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical left and right operand."""

    @abstractmethod
    def output(self, y: Tensor) -> Tensor:
        """The op's output, or its gradient, in canonical shape."""

    @abstractmethod
    def grouping(self, port: int, granularity: Granularity) -> Grouping:
        """Canonical shape of an operand's scales."""

    @abstractmethod
    def layout(self, port: int, scale: Tensor) -> Tensor:
        """A tensor of group shape, so that it broadcasts against the operand in the model."""

    def bias(self, bias: Tensor) -> Tensor:
        """A bias per output channel, broadcastable against the canonical output."""
        return bias.reshape(1, 1, 1, -1)


class LinearView(GemmView):
    """``x [..., I]`` and ``weight [O, I]``."""

    batch_dim = 2

    def __init__(self, op: FoundOp) -> None:
        self.channels = op.shapes[1][0]

    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left.reshape(1, 1, -1, left.shape[-1]), right.t()[None, None]

    def output(self, y: Tensor) -> Tensor:
        return y.reshape(1, 1, -1, y.shape[-1])

    def grouping(self, port: int, granularity: Granularity) -> Grouping:
        if port == 1 and granularity == "channel":
            return Grouping((1, 1, 1, self.channels))
        if port == 1 and granularity == "row_blocks":
            return Grouping((1, 1, 1, self.channels), blocks=3)
        return Grouping((1, 1, 1, 1))

    def layout(self, port: int, scale: Tensor) -> Tensor:
        return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1)


class ConvView(GemmView):
    """``x [B, C, h, w]`` unfolded to patches, ``weight [O, C/groups, kh, kw]``."""

    batch_dim = 2

    def __init__(self, op: FoundOp) -> None:
        self.kernel = op.shapes[1][2:]
        self.channels = op.shapes[1][0]
        self.groups = op.convolution["groups"]
        self.call: dict[str, Any] = {k: op.convolution[k] for k in ("stride", "dilation")}
        self.padding = _padding(op.convolution["padding"], self.kernel, op.convolution["dilation"])

    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(F.pad(left, self.padding), self.kernel, **self.call)
        batch, _, positions = patches.shape
        grouped = patches.reshape(batch, self.groups, -1, positions).permute(1, 0, 3, 2)
        weight = right.reshape(self.groups, self.channels // self.groups, -1).transpose(1, 2)
        return grouped.reshape(1, self.groups, batch * positions, -1), weight[None]

    def output(self, y: Tensor) -> Tensor:
        batch, channels = y.shape[:2]
        grouped = y.reshape(batch, self.groups, channels // self.groups, -1).permute(1, 0, 3, 2)
        return grouped.reshape(1, self.groups, -1, channels // self.groups)

    def grouping(self, port: int, granularity: Granularity) -> Grouping:
        if port == 1 and granularity in ("channel", "row_blocks"):
            return Grouping((1, self.groups, 1, self.channels // self.groups))
        return Grouping((1, 1, 1, 1))

    def layout(self, port: int, scale: Tensor) -> Tensor:
        return scale.reshape(-1, 1, 1, 1) if scale.numel() > 1 else scale.reshape(1)

    def bias(self, bias: Tensor) -> Tensor:
        return bias.reshape(1, self.groups, 1, -1)


class MatmulView(GemmView):
    """Two activations ``[..., N, I]`` and ``[..., I, O]``, one of whose leading dimensions may
    count heads."""

    batch_dim = 0

    def __init__(self, op: FoundOp) -> None:
        self.rank = len(op.output_shape)
        self.dim = op.heads
        self.heads = 1 if op.heads is None else op.output_shape[op.heads]
        # A factor without the dimension, or with one entry for all heads, has one scale.
        self.per_head = {
            port: self.heads > 1
            and self.dim + len(shape) >= self.rank
            and shape[self.dim - self.rank] == self.heads
            for port, shape in op.shapes.items()
        }

    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        return (
            self.output(left.expand(*lead, *left.shape[-2:])),
            self.output(right.expand(*lead, *right.shape[-2:])),
        )

    def output(self, y: Tensor) -> Tensor:
        y = y if self.dim is None else y.movedim(self.dim, -3)
        return y.reshape(-1, self.heads, *y.shape[-2:])

    def grouping(self, port: int, granularity: Granularity) -> Grouping:
        per_head = granularity == "head" and self.per_head[port]
        return Grouping((1, self.heads if per_head else 1, 1, 1))

    def layout(self, port: int, scale: Tensor) -> Tensor:
        if scale.numel() == 1:
            return scale.reshape(1)
        shape = [1] * self.rank
        shape[self.dim] = self.heads
        return scale.reshape(shape)


class ConstantView(LinearView):
    """``x [N, I]`` and a constant ``[I, O]``, the same for all images as a linear's weight is."""

    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().operands(left, right.t())


def view_of(op: FoundOp) -> GemmView:
    """The canonical view of an op found on the graph."""
    if op.kind == "matmul" and len(op.output_shape) == 2 and op.sources[1].kind == "constant":
        return ConstantView(op)
    return {"linear": LinearView, "conv2d": ConvView, "matmul": MatmulView}[op.kind](op)


def _padding(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, int], dilation: Any
) -> list[int]:
    """Padding of conv2d as left, right, top, bottom."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        dilations = dilation if isinstance(dilation, (tuple, list)) else (dilation, dilation)
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        return [
            totals[1] // 2,
            totals[1] - totals[1] // 2,
            totals[0] // 2,
            totals[0] - totals[0] // 2,
        ]
    height, width = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    return [width, width, height, height]
