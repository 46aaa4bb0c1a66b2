"""Ranges of a layer's input that few rows decide: widened for the rows that come later."""

from __future__ import annotations

import copy

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

#: Candidates, relative to the range that was there.
FACTORS = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6)
#: Effective number of rows from which the calibration set's own range is good enough.
FEW = 128


@torch.no_grad()
def best_range(
    quantizer: nn.Module, x: Tensor, y: Tensor, matrix: Tensor, weight: Tensor
) -> nn.Module:
    """The quantizer, with another range if few rows have decided it and another one is better.

    Rows that were not seen reach further than those that were, and the fewer there are the more:
    every row counts a second time, moved away from the mean by ``2 / sqrt(n)`` of its distance.
    So a layer that sees one row per image, such as a head, does not clip what other images bring.

    Parameters
    ----------
    quantizer
        Of one scale for all of `x`; any but NNCF's is returned as it is.
    x
        ``[N, I]``: the layer's input in the quantized model.
    y
        ``[N, O]``: its output in the float model.
    matrix
        ``[O, I]``: its weight.
    weight
        ``[N]``, not negative: how much a row counts. ``(Σ weight)² / Σ weight²`` is their
        effective number n; nothing changes if it exceeds `FEW`.
    """
    values = _range(quantizer)
    alive = weight.nonzero()[:, 0]
    if not values or any(value.numel() > 1 for value in values) or not len(alive):
        return quantizer
    effective = weight.sum().square() / weight.square().sum()
    if effective > FEW:
        return quantizer
    x, y, t = x[alive], y[alive], weight[alive] / weight.sum()
    x, y = (torch.cat([v, torch.lerp(t @ v, v, 1 + 2 / effective.sqrt())]) for v in (x, y))
    t = torch.cat([t, t]) / 2

    def error(candidate: nn.Module) -> float:
        rest = candidate(x) @ matrix.T - y
        return float(t @ (rest - t @ rest).square().sum(1))

    return min((_widened(quantizer, factor) for factor in FACTORS), key=error)


def _range(quantizer: nn.Module) -> list[Tensor]:
    """The parameters that grow with the range; none if the quantizer is not NNCF's."""
    if isinstance(quantizer, AsymmetricQuantizer):
        return [quantizer.input_low, quantizer.input_range]
    return [quantizer.scale] if isinstance(quantizer, SymmetricQuantizer) else []


def _widened(quantizer: nn.Module, factor: float) -> nn.Module:
    """The same zero point, another step."""
    changed = copy.deepcopy(quantizer)
    for value in _range(changed):
        value.mul_(factor)
    return changed
