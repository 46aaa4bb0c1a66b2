"""The extension interface: what a quantizer offers to the scale search.

Operands come in the canonical matrix-product view: ``A [B, H, N, I] x B [B or 1, H, I, O]``. A
*group shape* broadcasts against such an operand and has one entry per scale, e.g. ``(1, 1, 1, 1)``
per tensor, ``(1, H, 1, 1)`` per head, ``(1, H, 1, O)`` per output channel.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq4vit_plugin.errors import ConfigError, DataError

MIN_BITS, MAX_BITS = 2, 8

# A group that never exceeds this is as good as zero and gets scale 1: smaller scales would drown in
# the 1e-16 that NNCF adds to each of them.
NEGLIGIBLE = 1e-12


def checked_bits(bits: int) -> int:
    """Return `bits`, or raise ConfigError unless it is an integer from 2 to 8."""
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits: {bits!r} is not an integer from {MIN_BITS} to {MAX_BITS}")
    return bits


def straight_through(x: Tensor, low: Tensor, high: Tensor) -> Tensor | float:
    """Zero, but with the gradient of a quantizer: 1 where `x` lies in its range, else 0.

    A plain 0.0 where no gradient is asked for.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.jit.is_tracing():
        return 0.0
    # Not clamp(): at a limit, such as the many zeros of a softmax, it gives half a gradient.
    inside = torch.where((x >= low) & (x <= high), x, 0.0)
    return inside - inside.detach()


@dataclass(frozen=True)
class Grouping:
    """Which elements of an operand share a scale.

    Parameters
    ----------
    shape
        Group shape: as many dimensions as the operand; a dimension of size 1 is shared.
    blocks
        When positive, the last dimension is tied in that many equal blocks, e.g. 3 for the q, k
        and v rows of one weight. Tensors of the group shape then repeat one value within a block.

    Raises
    ------
    ValueError
        If the last dimension cannot be cut into `blocks` equal parts.
    """

    shape: tuple[int, ...]
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0 or (self.blocks and self.shape[-1] % self.blocks):
            raise ValueError(
                f"{self.shape[-1]} scales cannot be tied in {self.blocks} equal blocks"
            )

    def amax(self, x: Tensor) -> Tensor:
        """Return ``max |x|`` of every group, shape `shape`."""
        return torch.maximum(self.max(x), -self.amin(x))

    def amin(self, x: Tensor) -> Tensor:
        """Return ``min x`` of every group, shape `shape`."""
        return self._reduce(x, torch.amin)

    def max(self, x: Tensor) -> Tensor:
        """Return ``max x`` of every group, shape `shape`."""
        return self._reduce(x, torch.amax)

    def sum(self, err: Tensor) -> Tensor:
        """Return the sum of `err` over every group, shape `shape`."""
        return self._reduce(err, torch.sum)

    def _reduce(self, x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        if x.dim() != len(self.shape) or any(
            group not in (1, size) for group, size in zip(self.shape, x.shape, strict=True)
        ):
            raise ValueError(f"group shape {self.shape} does not fit an operand {tuple(x.shape)}")
        shared = [d for d, group in enumerate(self.shape) if group == 1 and x.shape[d] != 1]
        if shared:  # an empty list would mean "all dimensions"
            x = reduce(x, dim=shared, keepdim=True)
        if self.blocks:
            block = x.unflatten(-1, (self.blocks, -1))
            x = reduce(block, dim=-1, keepdim=True).expand_as(block).flatten(-2)
        return x


@dataclass(frozen=True)
class SearchRange:
    """Candidates ``(alpha + i (beta - alpha) / n) * start``, ``i = 0 ... n-1`` (PTQ4ViT).

    Raises
    ------
    ConfigError
        Unless ``0 < alpha < beta`` and ``n >= 1``.
    """

    alpha: Annotated[float, Field(gt=0)] = 0.01
    beta: Annotated[float, Field(gt=0)] = 1.2
    n: Annotated[int, Field(ge=1)] = 100

    def __post_init__(self) -> None:
        if not 0 < self.alpha < self.beta < math.inf or self.n < 1:
            raise ConfigError(
                f"search: needs 0 < alpha < beta and n >= 1, "
                f"not alpha={self.alpha}, beta={self.beta}, n={self.n}"
            )

    def candidates(self, start: Tensor) -> Tensor:
        """Return the candidates around `start`, then `start` itself, ``[n + 1, *start.shape]``."""
        width = (self.beta - self.alpha) / self.n
        factors = [self.alpha + i * width for i in range(self.n)] + [1.0]
        column = torch.tensor(factors, dtype=start.dtype, device=start.device)
        return column.view(-1, *[1] * start.dim()) * start


class OperandQuantizer(ABC):
    """The quantizer of one operand of one op, while its parameter is being searched.

    Life: construct, `observe` the calibration operand (once, or chunk by chunk), read `table`,
    try rows of it with `fake_quantize` or `terms`, then turn the chosen row into a hook with
    `module`.

    A row is named by an `index`: an int for all groups, or a long tensor of the group shape. Row
    `n`, the last, is where the search starts; it is not a candidate.

    Parameters
    ----------
    bits
        Width of a code, 2 to 8.
    grouping
        Which elements share a parameter.
    search
        Range and number of the candidates.

    Raises
    ------
    ConfigError
        If `bits` is not an integer from 2 to 8.
    """

    def __init__(self, bits: int, grouping: Grouping, search: SearchRange | None = None) -> None:
        self.bits = checked_bits(bits)
        self.grouping = grouping
        self.search = search or SearchRange()
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._table: Tensor | None = None

    @property
    def q(self) -> int:
        """``Q = 2^(bits-1)`` of the paper."""
        return 2 ** (self.bits - 1)

    @property
    def n(self) -> int:
        """Number of searched candidates."""
        return self.search.n

    @property
    def low(self) -> Tensor:
        """Smallest observed value of every group, float32, group shape."""
        return self._observed(self._low)

    @property
    def high(self) -> Tensor:
        """Largest observed value of every group, float32, group shape."""
        return self._observed(self._high)

    @property
    def table(self) -> Tensor:
        """Values of the searched parameter, float32 ``[n + 1, *grouping.shape]``."""
        if self._table is None:
            self._table = self.candidates()
        return self._table

    def observe(self, x: Tensor) -> None:
        """Take note of the range of a calibration operand; several calls widen the range.

        Parameters
        ----------
        x
            Canonical operand that the group shape fits.

        Raises
        ------
        DataError
            If `x` is empty or contains NaN or infinite values.
        """
        if not x.numel():
            raise DataError("calibration: nothing to observe, an operand is empty")
        # amin and amax hand NaN and infinities on, so the full tensor need not be scanned again.
        low, high = self.grouping.amin(x).float(), self.grouping.max(x).float()
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            raise DataError("calibration: an operand contains NaN or infinite values")
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._table = None

    def at(self, index: int | Tensor) -> Tensor:
        """Return the parameter that `index` names, float32, group shape."""
        if isinstance(index, int):
            return self.table[index]
        return self.table.gather(0, index.unsqueeze(0)).squeeze(0)

    def of_columns(self, columns: Tensor) -> "OperandQuantizer":
        """The same quantizer for some columns of an operand with a scale per column.

        Parameters
        ----------
        columns
            Their places, ``[count]``. Rows of `table` keep their numbers.
        """
        part = copy(self)
        part.grouping = Grouping((*self.grouping.shape[:-1], len(columns)))
        part._low, part._high = self.low[..., columns], self.high[..., columns]
        part._table = self.table[..., columns]
        return part

    @abstractmethod
    def candidates(self) -> Tensor:
        """Compute `table` from `low` and `high`."""

    @abstractmethod
    def fake_quantize(self, x: Tensor, index: int | Tensor) -> Tensor:
        """Return canonical operand `x` rounded to the levels of row `index`; no gradient, `x` is
        kept."""

    @abstractmethod
    def terms(self, x: Tensor, index: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return ``(codes, scale)`` pairs such that ``fake_quantize(x) == sum(codes * scale)``.

        Codes are int8, uint8 (unsigned ones above 127) or int16 (256 consecutive numbers that no
        byte holds, as of codes less a zero point), in the shape of `x`; scales are float32 in the
        group shape. Each pair is one operand of an integer matrix product.
        """

    @abstractmethod
    def module(self, index: int | Tensor, layout: Callable[[Tensor], Tensor]) -> nn.Module:
        """Return the hook module that quantizes with row `index`.

        Parameters
        ----------
        index
            Chosen row(s) of `table`.
        layout
            Maps a tensor of the group shape to one that broadcasts against the tensor at the hook.

        Returns
        -------
        nn.Module
            Implements ``nncf.torch.layer_utils.StatefulModuleInterface``.
        """

    @staticmethod
    def at_hook(value: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `value` as a hook module keeps it: ``[1]`` for one group, else by `layout`."""
        return (value.reshape(1) if value.numel() == 1 else layout(value)).clone()

    @staticmethod
    def _observed(extreme: Tensor | None) -> Tensor:
        if extreme is None:
            raise DataError("calibration: no data was observed; is the calibration set empty?")
        return extreme
