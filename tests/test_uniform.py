"""Uniform quantizer, and NNCF's module that carries its scale, against NumPy in float64."""

import json

import numpy as np
import pytest
import torch
from nncf.torch.quantization.layers import SymmetricQuantizer

from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.uniform import Uniform

TENSOR, HEAD, CHANNEL = (1, 1, 1, 1), (1, 3, 1, 1), (1, 1, 1, 12)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def numpy_codes(x, scale, lowest, highest):
    """Codes in float64, and the distance of every element to the nearest rounding tie, in steps."""
    ratio = x.double().numpy() / scale.double().numpy()
    distance = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
    return np.clip(np.rint(ratio), lowest, highest), distance


def observed(bits, shape, x, **options):
    operand = Uniform(bits, Grouping(shape), **options)
    operand.observe(x)
    return operand


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [TENSOR, HEAD])
def test_codes_against_numpy(bits, signed, shape):
    x = torch.randn(2, 3, 40, 12)
    x = x if signed else x.relu()
    operand = observed(bits, shape, x, signed=signed)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    for row in (0, 40, 99, 100):
        ((codes, scale),) = operand.terms(x, row)
        expected, distance = numpy_codes(x, scale, lowest, highest)
        differs = codes.numpy() != expected
        assert distance[differs].max(initial=0) < 2.0 ** (bits - 23)  # ties within float32 rounding
        assert torch.equal(operand.fake_quantize(x, row), codes * scale)
        assert codes.dtype == (torch.uint8 if highest > 127 else torch.int8)


def test_rounding_is_half_to_even():
    operand = observed(8, (1,), torch.tensor([127.5]))
    assert operand.table[-1] == 1.0
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 127.5, 1000.0, -128.5, -1000.0])
    expected = torch.tensor([-2.0, 0, 0, 2, 2, 127, 127, -128, -128])
    assert torch.equal(operand.fake_quantize(x, operand.n), expected)


def test_table_follows_the_range():
    x = torch.tensor([[-3.0, 1.0], [2.0, 0.5]])
    operand = Uniform(4, Grouping((1, 2)), SearchRange(0.5, 1.2, 7))
    operand.observe(x)
    factors = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.0]).view(-1, 1, 1)
    torch.testing.assert_close(operand.table, factors * torch.tensor([[3.0, 1.0]]) / 7.5)


def test_row_blocks_share_a_scale():
    w = torch.randn(1, 1, 5, 12)
    operand = Uniform(8, Grouping(CHANNEL, blocks=3))
    operand.observe(w)
    start = operand.table[-1].flatten()
    for block in range(3):
        columns = slice(4 * block, 4 * block + 4)
        torch.testing.assert_close(
            start[columns], (w[..., columns].abs().max() / 127.5).expand(4), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("dead", [0.0, 1e-13, 1e-42])
def test_dead_group_gets_scale_one(dead):
    x = torch.ones(1, 3, 4, 5)
    x[:, 1] = dead
    operand = observed(8, HEAD, x)
    assert (operand.table[:, 0, 1] == 1).all()
    out = operand.fake_quantize(x, 0)
    assert torch.isfinite(out).all() and (out[:, 1] == 0).all() and (out[:, 0] != 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [TENSOR, HEAD, CHANNEL])
@pytest.mark.parametrize("magnitude", [1e-11, 1e-2, 1e4])
def test_nncf_module_has_our_levels(bits, signed, shape, magnitude):
    x = torch.randn(2, 3, 100, 12) * magnitude
    x = x if signed else x.relu()
    operand = observed(bits, shape, x, signed=signed)
    index = torch.randint(20, 101, shape)
    module = operand.module(index, lambda scale: scale)
    scale = operand.at(index)
    with torch.no_grad():
        out = module(x)

    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected, distance = numpy_codes(x, scale, lowest, highest)
    actual = out.double().numpy() / scale.double().numpy()
    assert np.abs(actual - np.rint(actual)).max() < 1e-3  # on the grid
    differs = np.rint(actual) != expected
    assert differs.mean() < 1e-3
    assert distance[differs].max(initial=0) < 2.0 ** (bits - 21)  # ties within float32 rounding
    assert np.abs(np.rint(actual) - expected).max() <= 1
    exact = scale.double().numpy() * np.rint(actual)
    np.testing.assert_allclose(out.double().numpy(), exact, rtol=1e-6, atol=0)
    # Also when the module is restored elsewhere, from JSON and tensors.
    copy = SymmetricQuantizer.from_config(json.loads(json.dumps(module.get_config())))
    copy.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(copy(x), out)


def test_scale_of_nncf_is_the_top_level():
    x = torch.randn(1, 1, 50, 12)
    operand = observed(8, TENSOR, x)
    module = operand.module(50, lambda scale: scale)
    assert module.scale.shape == (1,) and not module.per_channel
    torch.testing.assert_close(module.scale.detach(), operand.table[50].view(1) * 127)
    with torch.no_grad():
        top, bottom = module(torch.tensor([1e6, -1e6])).tolist()
    assert top == pytest.approx(127 * operand.table[50].item(), rel=1e-6)
    assert bottom == pytest.approx(-128 * operand.table[50].item(), rel=1e-6)


def test_weight_layout():
    weight = torch.randn(12, 5)
    operand = observed(6, CHANNEL, weight.t()[None, None])
    module = operand.module(30, lambda scale: scale.view(12, 1))
    assert module.scale.shape == (12, 1) and module.per_channel
    with torch.no_grad():
        out = module(weight)
    torch.testing.assert_close(
        out, operand.fake_quantize(weight.t()[None, None], 30)[0, 0].t(), rtol=1e-6, atol=0
    )


def test_gradient_is_straight_through():
    operand = observed(4, (1,), torch.tensor([7.5]))
    module = operand.module(operand.n, lambda scale: scale)
    x = torch.tensor([-9.0, -7.9, -0.3, 0.4, 6.9, 7.5], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
