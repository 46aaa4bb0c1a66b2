"""Twin quantizer for GELU outputs against a brute-force search for the nearest level."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.torch.layer_utils import StatefulModuleInterface

from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.twin_gelu import MINIMA, TwinGELU, TwinGELUQuantizer

BITS = range(2, 9)
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def module(bits, negative, positive):
    return TwinGELUQuantizer(bits, torch.tensor([negative]), torch.tensor([positive]))


def levels(bits, negative, positive):
    """All levels in float64, in the order of the codes -Q ... Q-1."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    return codes * torch.where(codes < 0, float(negative), float(positive))


def inputs(grid):
    """Values in and beyond the range, every level, every midpoint, and their neighbours."""
    edges = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    return torch.cat(
        [
            edges,
            torch.nextafter(edges, torch.tensor(math.inf)),
            torch.nextafter(edges, torch.tensor(-math.inf)),
            torch.linspace(2 * grid[0].item(), 1.2 * grid[-1].item(), 2001),
        ]
    )


def bits_of(x):
    """Bit patterns: unlike ==, they tell 0.0 from -0.0."""
    return x.contiguous().view(torch.int32)


def steps(bits, ratio):
    """float32 steps: range 1 covers the minimum of GELU; range 2 is `ratio` times as coarse."""
    negative = torch.tensor(-MINIMA["gelu"] / 2 ** (bits - 1)).item()
    return negative, torch.tensor(negative * ratio).item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ratio", [0.3, 1.0, 7.7, 64.0])
def test_every_value_takes_its_nearest_level(bits, ratio):
    grid = levels(bits, *steps(bits, ratio))
    x = inputs(grid)
    quantizer = module(bits, *steps(bits, ratio))
    codes, out = quantizer.to_codes(x), quantizer(x)
    best = (x.double()[:, None] - grid).abs().min(dim=1).values
    assert ((out.double() - x.double()).abs() <= best + 2.0**-22 * x.double().abs()).all()
    assert codes.dtype == torch.int8
    assert torch.equal(bits_of(quantizer.from_codes(codes)), bits_of(out))
    named = grid[codes.long() + 2 ** (bits - 1)]
    torch.testing.assert_close(out.double(), named, rtol=2.0**-23, atol=0)
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    assert set(codes.tolist()) == set(every.tolist())
    torch.testing.assert_close(quantizer.from_codes(every).double(), grid, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ratio", [0.3, 1.0, 7.7, 64.0])
def test_monotone_and_idempotent(bits, ratio):
    quantizer = module(bits, *steps(bits, ratio))
    out = quantizer(inputs(levels(bits, *steps(bits, ratio))).sort().values)
    assert (out.diff() >= 0).all()
    assert torch.equal(quantizer(out), out)


@given(
    st.integers(2, 8),
    st.floats(2**-10, 8, width=32),
    st.floats(2**-10, 8, width=32),
    st.lists(st.floats(-100, 1000, width=32), min_size=2, max_size=20),
)
@settings(max_examples=150, deadline=None)
def test_properties(bits, negative, positive, values):
    x = torch.tensor(values, dtype=torch.float32)
    quantizer = module(bits, negative, positive)
    out = quantizer(x)
    grid = levels(bits, negative, positive)
    best = (x.double()[:, None] - grid).abs().min(dim=1).values
    assert ((out.double() - x.double()).abs() <= best + 2.0**-22 * x.double().abs()).all()
    assert torch.equal(quantizer(out), out)
    assert (out[x.argsort()].diff() >= 0).all()
    assert torch.equal(bits_of(quantizer.from_codes(quantizer.to_codes(x))), bits_of(out))
    assert torch.equal(sum(codes * scale for codes, scale in quantizer.terms(x)), out)


@pytest.mark.parametrize("bits", BITS)
def test_terms_split_the_ranges(bits):
    x = F.gelu(2 * torch.randn(1000))
    quantizer = module(bits, *steps(bits, 20))
    (codes1, step1), (codes2, step2) = quantizer.terms(x)
    assert codes1.dtype == codes2.dtype == torch.int8
    assert codes1.max() == 0 and codes1.min() >= -(2 ** (bits - 1))
    assert codes2.min() == 0 and codes2.max() <= 2 ** (bits - 1) - 1
    assert (codes1[x > 0] == 0).all() and (codes2[x < 0] == 0).all()
    assert torch.equal(codes1 * step1 + codes2 * step2, quantizer(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1)])
def test_search_and_module_agree_bit_for_bit(bits, shape):
    x = F.gelu(2 * torch.randn(2, 3, 150, 120))  # more elements than one chunk of the search
    operand = TwinGELU(bits, Grouping(shape), minimum=MINIMA["gelu"])
    operand.observe(x)
    for index in (0, 40, 100, torch.randint(0, 101, shape)):
        hook = operand.module(index, lambda scale: scale[0])
        assert torch.equal(operand.fake_quantize(x, index), hook(x))
        for ours, theirs in zip(operand.terms(x, index), hook.terms(x), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1].flatten(), theirs[1].flatten())


@pytest.mark.parametrize("name", MINIMA)
def test_minima(name):
    x = torch.linspace(-3, 1, 400001, dtype=torch.float64)
    assert FUNCTIONS[name](x).min().item() == pytest.approx(MINIMA[name], abs=1e-10)


def test_table():
    x = torch.tensor([[-0.1, 3.0], [0.5, 1.0], [0.0, 0.25], [-0.17, -0.01]]).view(1, 4, 1, 2)
    operand = TwinGELU(4, Grouping((1, 4, 1, 1)), SearchRange(0.5, 1.2, 7), minimum=-0.2)
    operand.observe(x)
    factors = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.0]).view(-1, 1)
    start = torch.tensor([3.0, 1.0, 0.25]) / 7.5
    torch.testing.assert_close(operand.table[:, 0, :3, 0, 0], factors * start)
    assert (operand.table[:, 0, 3] == 1).all()  # nothing positive there
    torch.testing.assert_close(operand.scale_negative, torch.full((1, 4, 1, 1), 0.2 / 8))


def test_unknown_minimum_is_measured_per_group():
    x = torch.tensor([[-0.4, 3.0], [0.5, 1.0]]).view(1, 2, 1, 2)
    operand = TwinGELU(4, Grouping((1, 2, 1, 1)))
    operand.observe(x)
    operand.observe(2 * x)
    torch.testing.assert_close(operand.scale_negative.flatten(), torch.tensor([0.1, 1.0]))
    assert operand.fake_quantize(2 * x, operand.n)[0, 0, 0, 0] == pytest.approx(-0.8)


@pytest.mark.parametrize("minimum", [-0.17, None])
def test_power_of_two_ratio(minimum):
    x = F.gelu(2 * torch.randn(1, 3, 40, 30))
    search = SearchRange(0.01, 1.2, 50)
    grouping = Grouping((1, 3, 1, 1))
    free = TwinGELU(6, grouping, search, minimum=minimum)
    shift = TwinGELU(6, grouping, search, minimum=minimum, scale_ratio="power_of_two")
    for operand in (free, shift):
        operand.observe(x)
    mantissa, _ = torch.frexp(shift.table / shift.scale_negative)
    assert (mantissa == 0.5).all()
    distance = torch.log2(shift.table / free.table).abs()
    assert distance.max() <= 0.5 + 1e-5
    assert shift.table.shape == free.table.shape
    # The product of a power of two is exact, so both accumulators differ by a shift only.
    hook = shift.module(30, lambda scale: scale)
    mantissa, _ = torch.frexp(hook.scale_positive / hook.scale_negative)
    assert (mantissa == 0.5).all()


def test_options_are_checked():
    grouping = Grouping((1,))
    with pytest.raises(ConfigError, match="scale_ratio.*did you mean 'power_of_two'"):
        TwinGELU(8, grouping, scale_ratio="powers_of_two")
    for minimum in (0.0, 0.17, math.nan, -math.inf):
        with pytest.raises(ConfigError, match="minimum"):
            TwinGELU(8, grouping, minimum=minimum)


def test_gradient_is_straight_through():
    quantizer = module(4, 0.25, 1.0)  # -2 ... 7
    x = torch.tensor([-2.1, -2.0, -0.3, 0.0, 0.4, 7.0, 7.1], requires_grad=True)
    out = quantizer(x)
    (out * torch.arange(1.0, 8)).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    assert torch.equal(bits_of(out.detach()), bits_of(quantizer(x.detach())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_compute_in_float32(dtype):
    x = F.gelu(torch.randn(500)).to(dtype)
    quantizer = module(8, *steps(8, 20))
    out = quantizer(x)
    assert out.dtype == dtype
    assert torch.equal(out, quantizer(x.float()).to(dtype))
    assert torch.equal(quantizer.from_codes(quantizer.to_codes(x)).to(dtype), out)


def test_round_trip_through_json_and_state_dict():
    quantizer = TwinGELUQuantizer(5, torch.tensor([[0.01], [0.02]]), torch.tensor([[0.1], [0.3]]))
    assert isinstance(quantizer, StatefulModuleInterface)
    config = json.loads(json.dumps(quantizer.get_config()))
    copy = TwinGELUQuantizer.from_config(config)
    copy.load_state_dict(quantizer.state_dict())
    x = torch.randn(2, 200)
    assert torch.equal(copy(x), quantizer(x))
    assert copy.get_config() == quantizer.get_config()
    assert set(copy.state_dict()) == {"scale_negative", "scale_positive"}
    assert not list(quantizer.parameters())
