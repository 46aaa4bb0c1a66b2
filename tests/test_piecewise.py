"""Levels that lie closer around zero, against lists of all levels and brute force."""

import math

import pytest
import torch

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.quantizers.asymmetric import Asymmetric
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.branches import Branch, Levels, branches_of, packed_codes
from ptq4vit_plugin.quantizers.piecewise import (
    FORMS,
    Piecewise,
    PiecewiseQuantizer,
    piecewise,
)

TENSOR = Grouping((1, 1, 1, 1))
#: By hand: 4 bits with a knee at 6 and double steps beyond it, to -8 and 10.
DOUBLE = Levels(-8, 10, knee=6, coarse=2)
BY_HAND = [-8, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10]


def every_level(levels):
    """All levels in a list, counted up and down from zero."""
    found = []
    for sign, end in ((-1, -levels.lowest), (1, levels.highest)):
        number = 0
        while number < end:
            number += levels.coarse if levels.coarse > 1 and number >= levels.knee else 1
            found.append(sign * number)
    return sorted([0, *found])


def nearest(x, levels):
    """The nearest of all levels, by trying all, and how much nearer it is than the next."""
    table = torch.tensor(every_level(levels), dtype=torch.float64)
    distance, order = (x.double()[..., None] - table).abs().sort(-1)
    return table[order[..., 0]].float(), distance[..., 1] - distance[..., 0]


def skewed(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.gelu(torch.randn(*shape, generator=generator) * 2)


def test_levels_by_hand():
    assert every_level(DOUBLE) == BY_HAND
    found, margin = nearest(torch.linspace(-12, 14, 4001), DOUBLE)
    safe = margin > 1e-3
    x = torch.linspace(-12, 14, 4001)
    assert torch.equal(DOUBLE.nearest(x.clone())[safe], found[safe])
    places = DOUBLE.counted(torch.tensor(BY_HAND, dtype=torch.float32))
    assert places.tolist() == list(range(-7, 9))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("coarse", "share"), FORMS)
@pytest.mark.parametrize(("low", "high"), [(-1.3, 1.0), (-0.17, 4.0), (0.0, 2.0), (-3.0, 0.0)])
def test_levels_cover_a_range_and_fit_their_bits(bits, coarse, share, low, high):
    scale, levels = piecewise(low, high, 2**bits - 1, coarse, share)
    table = every_level(levels)
    assert len(table) == 2**bits and table[0] == levels.lowest and table[-1] == levels.highest
    ends = torch.tensor([low, high])
    gaps = torch.tensor([table[1] - table[0], table[-1] - table[-2]])
    beyond = (ends - scale * torch.tensor([table[0], table[-1]])) * torch.tensor([-1, 1])
    half = scale * gaps / 2
    assert (beyond <= half * (1 + 1e-5)).all()
    assert (beyond / half).max() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_candidates_against_trying_every_level(bits):
    x = skewed(1, 1, 50, 12)
    operand = Piecewise(bits, TENSOR, SearchRange(n=20))
    operand.observe(x)
    forms = {operand.levels_at(row).coarse for row in range(operand.n + 1)}
    assert forms == {1, *(coarse for coarse, _ in FORMS)}
    for row in range(0, operand.n + 1, 7):
        scale, levels = operand.at(row), operand.levels_at(row)
        assert int(operand.zero_at(row)) == -levels.lowest
        assert len(every_level(levels)) <= 2**bits and levels.highest - levels.lowest <= 255
        expected, margin = nearest(x / scale, levels)
        quantized = operand.fake_quantize(x, row)
        safe = margin > 1e-4
        torch.testing.assert_close(quantized[safe], (expected * scale)[safe], rtol=1e-6, atol=1e-7)
        ((codes, step),) = operand.terms(x, row)
        assert torch.equal(codes * step, quantized)
        module = operand.module(row, lambda value: value)
        assert isinstance(module, PiecewiseQuantizer) == (levels.coarse > 1)
        torch.testing.assert_close(module(x)[safe], quantized[safe], rtol=1e-5, atol=1e-6)


def test_eight_bits_leave_a_byte_no_room_and_stay_uniform():
    x = skewed(1, 1, 50, 12)
    operand, uniform = Piecewise(8, TENSOR), Asymmetric(8, TENSOR)
    for quantizer in (operand, uniform):
        quantizer.observe(x)
    assert torch.equal(operand.table, uniform.table)
    for row in (0, 100, operand.n):
        assert torch.equal(operand.fake_quantize(x, row), uniform.fake_quantize(x, row))


@pytest.mark.parametrize("name", ["normal", "skewed"])
def test_the_search_finds_more_than_uniform_levels_have(name):
    """16 uniform levels on a normal distribution give 19.4 dB at best, uneven ones 20.2."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(1, 1, 4000, 8, generator=generator)
    x = skewed(1, 1, 4000, 8) if name == "skewed" else normal
    gemm, found = Gemm(x, torch.eye(8)[None, None]), {}
    for family in (Piecewise, Asymmetric):
        operand = family(4, TENSOR)
        operand.observe(x)
        result = search(gemm, operand, None, metric="mse", strategy="exhaustive")
        error = (operand.fake_quantize(x, result.a_index) - x).square().mean()
        found[family] = 10 * math.log10(x.square().mean() / error)
    assert found[Piecewise] > found[Asymmetric] + 0.4
    if name == "normal":
        assert 19.0 < found[Asymmetric] < 19.5 and found[Piecewise] < 20.3


def test_module_state_gradient_and_type():
    module = PiecewiseQuantizer(4, torch.tensor([0.5]), DOUBLE)
    copy = PiecewiseQuantizer.from_config(module.get_config())
    copy.load_state_dict(module.state_dict())
    x = torch.tensor([-4.2, -3.6, 0.3, 2.9, 3.4, 4.9, 6.0], requires_grad=True)
    assert torch.equal(copy(x), module(x))
    assert module(x).tolist() == [-4.0, -4.0, 0.5, 3.0, 3.0, 5.0, 5.0]
    module(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()).bfloat16())


def test_codes_have_as_many_bits_as_they_say():
    x = torch.linspace(-6, 8, 500)
    module = PiecewiseQuantizer(4, torch.tensor([0.5]), DOUBLE)
    (branch,) = branches_of(module)
    assert torch.equal(branch.codes(x) * branch.scale, module(x))
    assert packed_codes([branch], x).unique().tolist() == list(range(-7, 9))
    long = Branch(torch.ones(1), -7, 152, knee=24, coarse=4)
    assert packed_codes([long], torch.arange(-9.0, 160)).dtype == torch.int8
    unsigned = Branch(torch.ones(1), 0, 45, knee=5, coarse=4)
    assert packed_codes([unsigned], torch.arange(50.0)).unique().tolist() == list(range(16))


def test_more_than_one_scale_is_refused():
    with pytest.raises(ConfigError, match="piecewise: has one scale per tensor"):
        Piecewise(4, Grouping((1, 3, 1, 1)))
    with pytest.raises(ConfigError, match="'piecewise' is for activations"):
        ptq.quantize(
            torch.nn.Linear(4, 4),
            [torch.ones(2, 4)],
            {"algorithm": "ptq4vit", "weights": {"quantizer": "piecewise"}},
        )
