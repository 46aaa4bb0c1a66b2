"""What a report shows of an op beside its objective: noise, distributions, search curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.engine import SearchResult
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.quantizers.base import OperandQuantizer
from ptq4vit_plugin.quantizers.twin_gelu import MINIMA
from ptq4vit_plugin.record import Histogram

#: Values that a histogram looks at, spread evenly over the calibration set.
SAMPLE = 1 << 18
#: Exponents of softmax's bins, in steps of a half: below 2^-24 nothing is told apart.
LOWEST_EXPONENT = -24
#: Bins below and above zero of an activation function's histogram.
NEGATIVE_BINS, POSITIVE_BINS = 16, 48
#: About as many rows as an output's noise is measured on.
SQNR_ROWS = 1024
CURVE_POINTS = 33


def output_sqnr(
    gemm: Gemm,
    a: OperandQuantizer | None,
    b: OperandQuantizer | None,
    result: SearchResult,
) -> float:
    """Return the signal-to-quantization-noise ratio in dB of an op's output at the chosen scales.

    The signal is the output's mean square, the bias left out. Rows are a sample, spread evenly
    over the calibration set: a figure for a drawing is not worth an evaluation on everything.
    """
    batch, heads, rows = gemm.a.shape[:3]
    images = max(1, batch * heads * rows // SQNR_ROWS) if batch > 1 else 1
    step = max(1, batch * heads * rows // images // SQNR_ROWS)
    x, y = gemm.a[::images, :, ::step], gemm.b[::images] if len(gemm.b) > 1 else gemm.b
    left = x if a is None else a.fake_quantize(x, result.a_index)
    right = y if b is None else b.fake_quantize(y, result.b_index)
    output = torch.matmul(x, y)
    noise = torch.matmul(left, right).sub_(output).square_().sum(dtype=torch.float64).item()
    signal = output.square_().sum(dtype=torch.float64).item()
    if signal == 0 or noise == 0:
        return math.inf if noise == 0 else -math.inf
    return round(10 * math.log10(signal / noise), 3)


def histogram(x: Tensor, source: str) -> Histogram | None:
    """Return the histogram of an operand that a twin quantizer is made for, else None.

    Softmax has bins of half an octave, an activation function two ranges of equal bins, below and
    above zero.
    """
    if source not in ("softmax", *MINIMA):
        return None
    x = x.flatten()
    x = x[:: max(1, len(x) // SAMPLE)].float()
    if source == "softmax":
        steps = torch.arange(2 * LOWEST_EXPONENT, 1, device=x.device) / 2
        edges = torch.cat([steps.new_zeros(1), torch.exp2(steps)])
    else:
        low, high = x.min().clamp(max=-1e-6), x.max().clamp(min=1e-6)
        edges = torch.cat(
            [
                torch.linspace(low, 0, NEGATIVE_BINS + 1, device=x.device)[:-1],
                torch.linspace(0, high, POSITIVE_BINS + 1, device=x.device),
            ]
        )
    bins = len(edges) - 1
    place = torch.bucketize(x.contiguous(), edges, right=True).sub_(1).clamp_(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    return Histogram(edges=_significant(edges.tolist()), counts=counts.tolist())


def thinned(curve: Sequence[float]) -> tuple[float, ...]:
    """Return at most `CURVE_POINTS` values of a curve, its ends among them."""
    if len(curve) <= CURVE_POINTS:
        return _significant(curve)
    step = (len(curve) - 1) / (CURVE_POINTS - 1)
    return _significant([curve[round(i * step)] for i in range(CURVE_POINTS)])


def _significant(values: Sequence[float]) -> tuple[float, ...]:
    """Four digits: enough for a drawing, and a third of the record's size."""
    return tuple(float(f"{value:.4g}") for value in values)
