"""The quantizer interface: grouping, candidates, observation, indices."""

import math

import pytest
import torch

from ptq4vit_plugin.errors import ConfigError, DataError
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.twin_gelu import TwinGELU, TwinGELUQuantizer
from ptq4vit_plugin.quantizers.twin_softmax import TwinSoftmax, TwinSoftmaxQuantizer
from ptq4vit_plugin.quantizers.uniform import Uniform

QUANTIZERS = [Uniform, TwinSoftmax, TwinGELU]
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 1), (1, 3, 1, 6), (1, 1, 1, 6)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_loop(x, shape, reduce):
    """Reduce every group of a canonical tensor, element by element."""
    groups = {}
    for at in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        group = tuple(0 if s == 1 else i for i, s in zip(at, shape, strict=True))
        groups.setdefault(group, []).append(x[tuple(at)].item())
    out = torch.empty(shape)
    for group, values in groups.items():
        out[group] = reduce(values)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_grouping_reduces_what_shares_a_scale(shape):
    x = torch.randn(2, 3, 5, 6)
    grouping = Grouping(shape)
    assert torch.equal(grouping.amax(x), by_loop(x, shape, lambda v: max(map(abs, v))))
    assert torch.equal(grouping.amin(x), by_loop(x, shape, min))
    assert torch.equal(grouping.max(x), by_loop(x, shape, max))
    torch.testing.assert_close(grouping.sum(x), by_loop(x, shape, math.fsum))


def test_grouping_of_one_element_per_group_keeps_the_tensor():
    x = torch.randn(1, 3, 1, 6)
    assert torch.equal(Grouping((1, 3, 1, 6)).sum(x), x)


def test_grouping_ties_equal_blocks():
    x = torch.randn(1, 1, 5, 6)
    grouping = Grouping((1, 1, 1, 6), blocks=3)
    for reduced, block in (
        (grouping.amax(x), lambda b: b.abs().max()),
        (grouping.amin(x), lambda b: b.min()),
        (grouping.max(x), lambda b: b.max()),
        (grouping.sum(x), lambda b: b.sum()),
    ):
        assert reduced.shape == (1, 1, 1, 6)
        for column in range(6):
            start = column // 2 * 2
            expected = block(x[..., start : start + 2])
            torch.testing.assert_close(reduced[0, 0, 0, column], expected)


def test_grouping_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="7 scales cannot be tied in 3"):
        Grouping((1, 1, 1, 7), blocks=3)
    with pytest.raises(ValueError, match="does not fit"):
        Grouping((1, 4, 1, 1)).amax(torch.zeros(2, 3, 5, 6))
    with pytest.raises(ValueError, match="does not fit"):
        Grouping((1, 1, 1)).amax(torch.zeros(2, 3, 5, 6))


def test_candidates_of_a_range():
    table = SearchRange(0.5, 1.2, 7).candidates(torch.tensor([1.0, 10.0]))
    expected = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.0]
    torch.testing.assert_close(table, torch.tensor([[f, 10 * f] for f in expected]))


@pytest.mark.parametrize("values", [(0.0, 1.2, 100), (0.5, 0.5, 10), (0.1, 1.2, 0)])
def test_range_refuses_nonsense(values):
    with pytest.raises(ConfigError, match="search"):
        SearchRange(*values)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [1, 9, "eight", True, 4.0])
def test_bits_are_checked(quantizer, bits):
    with pytest.raises(ConfigError, match="bits"):
        quantizer(bits, Grouping((1,)))


@pytest.mark.parametrize("bits", [1, 9, "8"])
def test_bits_of_a_module_are_checked(bits):
    with pytest.raises(ConfigError, match="bits"):
        TwinSoftmaxQuantizer(bits, torch.zeros(1))
    with pytest.raises(ConfigError, match="bits"):
        TwinGELUQuantizer(bits, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observed_data_must_be_finite(quantizer, bad):
    x = torch.rand(2, 3, 4, 5)
    x[1, 2, 3, 4] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        quantizer(8, Grouping((1, 3, 1, 1))).observe(x)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_observed_data_must_exist(quantizer):
    operand = quantizer(8, Grouping((1, 1, 1, 1)))
    with pytest.raises(DataError, match="empty"):
        operand.observe(torch.zeros(0, 3, 4, 5))
    with pytest.raises(DataError, match="no data"):
        _ = operand.table


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_chunks_are_observed_like_the_whole(quantizer):
    x = torch.rand(6, 3, 4, 5)
    whole, chunks = quantizer(6, Grouping((1, 3, 1, 1))), quantizer(6, Grouping((1, 3, 1, 1)))
    whole.observe(x)
    for chunk in x.split(2):
        chunks.observe(chunk)
        assert chunks.table.shape == (chunks.n + 1, 1, 3, 1, 1)  # never a stale table
    assert torch.equal(whole.table, chunks.table)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_index_tensor_picks_a_row_per_group(quantizer, bits):
    x = torch.rand(2, 3, 50, 20)
    operand = quantizer(bits, Grouping((1, 3, 1, 1)))
    operand.observe(x)
    rows = [3, 0, operand.n]
    index = torch.tensor(rows).view(1, 3, 1, 1)
    mixed = operand.fake_quantize(x, index)
    for head, row in enumerate(rows):
        assert torch.equal(mixed[:, head], operand.fake_quantize(x, row)[:, head])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_terms_sum_to_the_fake_quantized_operand(quantizer, shape, bits):
    # More elements than one chunk of the search, in a view that is not contiguous.
    x = torch.rand(2, 3, 150, 120).transpose(2, 3)
    kept = x.clone()
    operand = quantizer(bits, Grouping(shape))
    operand.observe(x)
    for row in (0, 7, operand.n):
        terms = operand.terms(x, row)
        total = sum(codes * scale for codes, scale in terms)
        assert torch.equal(total, operand.fake_quantize(x, row))
        for codes, scale in terms:
            assert codes.dtype == torch.int8 and codes.shape == x.shape
            assert scale.dtype == torch.float32 and scale.shape == shape
    assert torch.equal(x, kept)
