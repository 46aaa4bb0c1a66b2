"""What both twin uniform quantizers share: two uniform grids, side by side (PTQ4ViT)."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import Tensor, nn

from ptq4vit_plugin.quantizers.base import OperandQuantizer, checked_bits, straight_through
from ptq4vit_plugin.quantizers.branches import Branch

# Elements handled at once on CPU during the search: the few float32 temporaries then stay in cache.
CHUNK = 1 << 16


@dataclass(frozen=True)
class TwinGrid:
    """Two uniform grids: ``x <= split`` takes the first, anything above it the second.

    Parameters
    ----------
    step1, step2, split
        float32 tensors that broadcast against the quantized tensor.
    lowest, highest
        Limits of the magnitude code ``round(x / step)``, the same for both grids.
    """

    step1: Tensor
    step2: Tensor
    split: Tensor
    lowest: int
    highest: int

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (magnitude codes as float32, bool mask of grid 1, step of every element)."""
        first = x <= self.split
        step = torch.where(first, self.step1, self.step2)
        return (x / step).round_().clamp_(self.lowest, self.highest), first, step

    def codes_in_floats(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `codes`, bit for bit, with a float32 mask.

        Twice as fast on CPU, where neither comparing into bools nor ``torch.where`` vectorises, but
        clumsy to trace: for the search only.
        """
        first = torch.le(x, self.split, out=torch.empty_like(x))
        second = torch.gt(x, self.split, out=torch.empty_like(x))
        step = (first * self.step1).add_(second.mul_(self.step2))
        return torch.div(x, step).round_().clamp_(self.lowest, self.highest), first, step


class TwinOperand(OperandQuantizer):
    """A twin quantizer while its parameter is being searched."""

    @abstractmethod
    def grid(self, index: int | Tensor) -> TwinGrid:
        """Return the two grids of row `index` of the table."""

    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        grid = self.grid(index)
        out = torch.empty_like(x, dtype=torch.float32)
        for part, target in self._chunks(x, out):
            codes, _, step = grid.codes_in_floats(part.float())
            torch.mul(codes, step, out=target)
        return out

    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        grid = self.grid(index)
        out1, out2 = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x, dtype=torch.int8)
        for part, target1, target2 in self._chunks(x, out1, out2):
            codes, first, _ = grid.codes_in_floats(part.float())
            target1.copy_(first.mul_(codes))
            target2.copy_(codes.sub_(first))
        return [(out1, grid.step1), (out2, grid.step2)]

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors of one shape alike, along the longest dimension that shares parameters."""
        x = tensors[0]
        shared = [d for d, group in enumerate(self.grouping.shape[:-1]) if group == 1]
        if x.device.type != "cpu" or x.numel() <= CHUNK or not shared:
            return iter([tensors])
        dim = max(shared, key=x.size)
        rows = max(1, CHUNK * x.size(dim) // x.numel())
        return zip(*(t.split(rows, dim) for t in tensors), strict=True)


class TwinQuantizer(nn.Module, StatefulModuleInterface):
    """A twin quantizer as a module: NNCF hooks it into a model.

    Computes in float32 whatever the input, and returns the input's dtype. Gradients are
    straight-through: 1 where the input is representable, 0 where it is clamped, as in NNCF.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8: one range flag and ``bits - 1`` magnitude bits.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = checked_bits(bits)

    @property
    def q(self) -> int:
        """``Q = 2^(bits-1)``, the number of magnitudes of one range."""
        return 2 ** (self.bits - 1)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the scales; broadcasts against the input."""

    @abstractmethod
    def grid(self) -> TwinGrid:
        """Return both grids in float32."""

    @abstractmethod
    def to_codes(self, x: Tensor) -> Tensor:
        """Return the k-bit integer code of every element."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """Return the float32 value of every code: bit for bit what `forward` returns in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the levels (fake quantization), same shape and dtype."""
        grid, values = self.grid(), x.float()
        with torch.no_grad():
            codes, _, step = grid.codes(values)
            quantized = codes.mul_(step)
        low, high = grid.lowest * grid.step1, grid.highest * grid.step2
        gradient = straight_through(values, low, high)
        # Adding zero also turns -0.0 into the 0.0 that code 0 stands for.
        return (quantized + gradient).to(x.dtype)

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return ``(codes, scale)`` of both ranges, ``forward(x) == sum(codes * scale)``.

        Codes are int8 in the shape of `x`, and 0 where the element belongs to the other range;
        scales are float32 and broadcast against `x`.
        """
        grid = self.grid()
        codes, first, _ = grid.codes(x.detach().float())
        codes = codes.to(torch.int8)
        return [(codes * first, grid.step1), (codes * ~first, grid.step2)]

    @abstractmethod
    def branches(self) -> list[Branch]:
        """Return both ranges as uniform grids, ``forward(x) == sum(codes * scale)``."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as JSON; the scales travel in the state dict."""
        return {"bits": self.bits, "shape": list(self.shape)}

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={self.shape}"
