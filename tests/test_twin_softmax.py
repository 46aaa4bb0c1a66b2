"""Twin quantizer for softmax outputs against a brute-force search for the nearest level."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.torch.layer_utils import StatefulModuleInterface

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.quantizers.base import Grouping
from ptq4vit_plugin.quantizers.twin_softmax import TwinSoftmax, TwinSoftmaxQuantizer

BITS = range(2, 9)
EXPONENTS = range(20)
PROBABILITY = st.floats(0, 1, width=32)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def levels(bits, m):
    """All levels of both ranges in float64: range 1, then range 2."""
    magnitudes = torch.arange(2 ** (bits - 1), dtype=torch.float64) / (2 ** (bits - 1) - 1)
    return torch.cat([magnitudes * 2.0**-m, magnitudes])


def inputs(bits, m):
    """Values in [0, 1] of all magnitudes, every level, every midpoint, and their neighbours."""
    grid = levels(bits, m).unique()
    edges = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    return torch.cat(
        [
            edges,
            torch.nextafter(edges, torch.ones(1)),
            torch.nextafter(edges, torch.zeros(1)),
            torch.linspace(0, 1, 1001),
            torch.exp2(-24 * torch.rand(2000)),
        ]
    ).clamp(0, 1)


def bits_of(x):
    """Bit patterns: unlike ==, they tell 0.0 from -0.0."""
    return x.contiguous().view(torch.int32)


def module(bits, *exponents):
    return TwinSoftmaxQuantizer(bits, torch.tensor(exponents))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", EXPONENTS)
def test_every_value_takes_its_nearest_level(bits, m):
    x, grid = inputs(bits, m), levels(bits, m)
    out = module(bits, m)(x)
    distances = (x.double()[:, None] - grid).abs()
    best = distances.min(dim=1).values
    # Ties may go either way, and float32 levels are off by half a unit in the last place.
    rounding = 2.0**-22 * x.double()
    assert ((out.double() - x.double()).abs() <= best + rounding).all()
    on_grid = (out.double()[:, None] - grid).abs().min(dim=1).values
    assert (on_grid <= 2.0**-23 * out.double()).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", EXPONENTS)
def test_codes_name_the_level(bits, m):
    x, q = inputs(bits, m), 2 ** (bits - 1)
    quantizer = module(bits, m)
    codes, out = quantizer.to_codes(x), quantizer(x)
    assert codes.dtype == torch.uint8 and codes.max() <= 2**bits - 1
    assert torch.equal(bits_of(quantizer.from_codes(codes)), bits_of(out))
    named = levels(bits, m)[codes.long()]
    torch.testing.assert_close(out.double(), named, rtol=2.0**-22, atol=0)
    # Every code stands for the level of its number, whether or not any value is sent to it.
    every = quantizer.from_codes(torch.arange(2 * q, dtype=torch.uint8))
    torch.testing.assert_close(every.double(), levels(bits, m), rtol=2.0**-22, atol=0)
    # The flag: range 2 is for values above the top of range 1.
    assert (x[codes >= q] > 2.0**-m).all()
    if m:
        assert codes[x == 1].unique().tolist() == [2 * q - 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", EXPONENTS)
def test_monotone_idempotent_and_between_zero_and_one(bits, m):
    quantizer = module(bits, m)
    out = quantizer(inputs(bits, m).sort().values)
    assert (out.diff() >= 0).all()
    assert torch.equal(quantizer(out), out)
    assert out.min() == 0 and out.max() == 1


@given(st.integers(2, 8), st.integers(0, 19), st.lists(PROBABILITY, min_size=2, max_size=20))
@settings(max_examples=150, deadline=None)
def test_properties(bits, m, values):
    x = torch.tensor(values, dtype=torch.float32)
    quantizer = module(bits, m)
    out = quantizer(x)
    error = (out.double() - x.double()).abs()
    best = (x.double()[:, None] - levels(bits, m)).abs().min(dim=1).values
    assert (error <= best + 2.0**-22 * x.double()).all()
    assert torch.equal(quantizer(out), out)
    assert (out[x.argsort()].diff() >= 0).all()
    assert torch.equal(bits_of(quantizer.from_codes(quantizer.to_codes(x))), bits_of(out))
    assert torch.equal(sum(codes * scale for codes, scale in quantizer.terms(x)), out)


@pytest.mark.parametrize("bits", BITS)
def test_terms_split_the_ranges(bits):
    x = torch.softmax(3 * torch.randn(2, 3, 20, 20), -1)
    quantizer = TwinSoftmaxQuantizer(bits, torch.tensor([1, 6, 19]).view(3, 1, 1))
    (codes1, step1), (codes2, step2) = quantizer.terms(x)
    assert codes1.dtype == codes2.dtype == torch.int8
    for codes in (codes1, codes2):
        assert codes.min() >= 0 and codes.max() <= 2 ** (bits - 1) - 1
    assert not (codes1.bool() & codes2.bool()).any()
    assert torch.equal(codes1 * step1 + codes2 * step2, quantizer(x))
    torch.testing.assert_close(step1 * torch.tensor([2.0, 64, 2**19]).view(3, 1, 1), step2)


@pytest.mark.parametrize("bits", BITS)
def test_search_and_module_agree_bit_for_bit(bits):
    # More elements than one chunk of the search.
    x = torch.softmax(4 * torch.randn(4, 3, 90, 90), -1)
    operand = TwinSoftmax(bits, Grouping((1, 3, 1, 1)))
    operand.observe(x)
    assert operand.n == 20
    assert operand.table[:, 0, 2, 0, 0].tolist() == [*range(20), 0]
    for index in (0, 5, 20, torch.tensor([2, 19, 7]).view(1, 3, 1, 1)):
        hook = operand.module(index, lambda exponent: exponent[0])
        assert hook.exponent.shape == (3, 1, 1)
        assert torch.equal(operand.fake_quantize(x, index), hook(x))
        for ours, theirs in zip(operand.terms(x, index), hook.terms(x), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1][0], theirs[1])


def test_one_group_is_one_scalar():
    operand = TwinSoftmax(8, Grouping((1, 1, 1, 1)))
    operand.observe(torch.rand(1, 2, 3, 4))
    assert operand.module(4, lambda exponent: exponent).exponent.tolist() == [4]


def test_values_that_no_softmax_returns_are_refused():
    operand = TwinSoftmax(8, Grouping((1, 1, 1, 1)))
    with pytest.raises(DataError, match=r"outside \[0, 1\] \(-0.5 to 1\)"):
        operand.observe(torch.tensor([-0.5, 1.0]).view(1, 1, 1, 2))
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        operand.observe(torch.tensor([0.5, 1.5]).view(1, 1, 1, 2))


def test_gradient_is_straight_through():
    quantizer = module(8, 6)
    x = torch.tensor([-0.1, 0.0, 1e-6, 0.01, 0.5, 1.0, 1.1], requires_grad=True)
    out = quantizer(x)
    (out * torch.arange(1.0, 8)).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    assert torch.equal(bits_of(out.detach()), bits_of(quantizer(x.detach())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_compute_in_float32(dtype):
    x = torch.softmax(4 * torch.randn(50, 50), -1).to(dtype)
    quantizer = module(8, 12)
    expected = quantizer(x.float()).to(dtype)
    for candidate in (quantizer, module(8, 12).to(dtype)):
        out = candidate(x)
        assert out.dtype == dtype
        assert torch.equal(out, expected)
    assert torch.equal(quantizer.from_codes(quantizer.to_codes(x)).to(dtype), out)
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.dtype == dtype and (x.grad == 1).all()


def test_round_trip_through_json_and_state_dict():
    quantizer = TwinSoftmaxQuantizer(5, torch.tensor([[3.0], [17.0]]))
    assert isinstance(quantizer, StatefulModuleInterface)
    config = json.loads(json.dumps(quantizer.get_config()))
    copy = TwinSoftmaxQuantizer.from_config(config)
    copy.load_state_dict(quantizer.state_dict())
    x = torch.rand(2, 200)
    assert torch.equal(copy(x), quantizer(x))
    assert torch.equal(copy.exponent, torch.tensor([[3], [17]]))
    assert copy.get_config() == quantizer.get_config()
    assert not list(quantizer.parameters())
