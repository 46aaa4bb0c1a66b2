"""Zero points and row-wise softmax against NumPy, and NNCF's module against the search's levels."""

import numpy as np
import pytest
import torch

from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.quantizers.asymmetric import Asymmetric
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.numerator import Numerator, NumeratorQuantizer
from ptq4vit_plugin.quantizers.uniform import Uniform

TENSOR = (1, 1, 1, 1)


def skewed(*shape):
    return torch.nn.functional.gelu(torch.randn(*shape) * 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_against_numpy(bits):
    x = skewed(1, 1, 50, 12)
    operand = Asymmetric(bits, Grouping(TENSOR), SearchRange(n=20))
    operand.observe(x)
    assert operand.n == 48
    for row in (0, 7, 30, operand.n):
        scale, zero = float(operand.at(row)), float(operand.zero_at(row))
        assert zero == round(zero) and 0 <= zero <= 2**bits - 1
        codes = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, 0, 2**bits - 1)
        expected = torch.from_numpy((codes - zero) * scale).float()
        torch.testing.assert_close(operand.fake_quantize(x, row), expected)
        ((less_zero, step),) = operand.terms(x, row)
        torch.testing.assert_close(less_zero * step, expected)


def test_the_start_covers_the_range():
    x = skewed(1, 1, 200, 12)
    operand = Asymmetric(8, Grouping(TENSOR))
    operand.observe(x)
    error = (operand.fake_quantize(x, operand.n) - x).abs().max()
    assert error <= 1.01 * float(operand.at(operand.n))


def test_never_negative_means_no_zero_point():
    operand = Asymmetric(8, Grouping((1, 2, 1, 1)))
    operand.observe(torch.rand(3, 2, 5, 5))
    assert operand.n == 100
    assert not operand.zero_points.any()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("row", [3, 33, 48])
def test_module_has_the_same_levels(bits, row):
    x = skewed(1, 1, 40, 12)
    operand = Asymmetric(bits, Grouping(TENSOR), SearchRange(n=20))
    operand.observe(x)
    expected = operand.fake_quantize(x, row)
    found = operand.module(row, lambda s: s)(x)
    ratio = (x / operand.at(row)).abs()
    safe = ((ratio - ratio.floor()) - 0.5).abs() > 1e-3  # NNCF may decide ties the other way
    torch.testing.assert_close(found[safe], expected[safe], rtol=1e-4, atol=1e-6)


def test_search_beats_symmetric_on_skewed_numbers():
    a, b = skewed(1, 1, 300, 16), torch.randn(1, 1, 16, 8)
    losses = []
    for family in (Asymmetric, Uniform):
        operand = family(4, Grouping(TENSOR))
        operand.observe(a)
        result = search(Gemm(a, b), operand, None, metric="mse")
        quantized = operand.fake_quantize(a, result.a_index)
        assert result.after == pytest.approx(float(((quantized - a) @ b).square().sum()), rel=1e-3)
        losses.append(result.after)
    assert losses[0] < 0.6 * losses[1]


#: What 3, 7 and 8 bits have room for, in steps, written down by hand.
NUMERATOR = {
    3: [0, 1, 2, 6, 10, 14, 18, 22],
    7: [*range(43), *range(44, 213, 2)],
    8: [*range(256)],
}


@pytest.mark.parametrize("bits", NUMERATOR)
def test_numerator_against_numpy(bits):
    generator = torch.Generator().manual_seed(0)
    p = (torch.randn(2, 3, 7, 9, generator=generator) * 3).softmax(-1)
    operand = Numerator(bits, Grouping((1, 3, 1, 1)), SearchRange(n=10))
    operand.observe(p)
    levels = np.array(NUMERATOR[bits], dtype=np.float32)
    assert len(levels) == 2**bits
    for row in (4, operand.n):
        step = operand.at(row).numpy()
        peak = p.numpy().max(-1, keepdims=True)
        distance = np.abs((p.numpy() / peak / step)[..., None] - levels)
        expected = levels[distance.argmin(-1)] * step * peak
        quantized = operand.fake_quantize(p, row)
        torch.testing.assert_close(quantized, torch.from_numpy(expected))
        ((codes, scale),) = operand.terms(p, row)
        torch.testing.assert_close(codes * scale, quantized)
        module = operand.module(row, lambda s: s)
        torch.testing.assert_close(module(p), quantized)
        stored, peaks = module.to_codes(p)
        assert torch.equal(module.from_codes(stored, peaks), module(p))


def test_numerator_is_the_division_after_the_product():
    """exp(s - max) in codes, times V, divided by the sum of the exact exponentials."""
    s, v = torch.randn(4, 9).double() * 2, torch.randn(9, 5).double()
    module = NumeratorQuantizer(8, torch.tensor([1 / 255]))
    exponentials = (s - s.amax(1, keepdim=True)).exp()
    codes = (exponentials * 255).round()
    expected = codes @ v / 255 / exponentials.sum(1, keepdim=True)
    found = module(s.softmax(1).float()).double() @ v
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_numerator_state_and_gradient():
    module = NumeratorQuantizer(8, torch.full((1, 3, 1, 1), 1 / 255))
    copy = NumeratorQuantizer.from_config(module.get_config())
    copy.load_state_dict(module.state_dict())
    p = torch.rand(2, 3, 4, 4).softmax(-1).requires_grad_()
    assert torch.equal(copy(p), module(p))
    module(p).sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))
    assert module(torch.zeros(1, 3, 2, 2)).abs().max() == 0


def test_some_columns_are_quantized_as_in_the_whole():
    x = torch.randn(1, 1, 9, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6)
    quantizer = Asymmetric(4, Grouping((1, 1, 1, 6)))
    quantizer.observe(x)
    columns, index = torch.tensor([0, 3, 5]), torch.tensor([3, 50, 7, 90, 2, 11]).view(1, 1, 1, 6)
    part = quantizer.of_columns(columns)
    found = part.fake_quantize(x[..., columns], index[..., columns])
    assert torch.equal(found, quantizer.fake_quantize(x, index)[..., columns])
