"""Closed-form compensation against least squares, brute force and the textbook algorithm."""

import itertools

import pytest
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec

from ptq4vit_plugin.algorithms.compensation.normal import Normal
from ptq4vit_plugin.algorithms.compensation.ranges import (
    FACTORS,
    best_range,
    effective_rows,
)
from ptq4vit_plugin.algorithms.compensation.ridge import held_out_ridge, ridge
from ptq4vit_plugin.algorithms.compensation.rounding import (
    compensated_rounding,
    held_out_rounding,
)
from ptq4vit_plugin.algorithms.compensation.steps import RowGrid, best_grid
from ptq4vit_plugin.quantizers.base import Grouping
from ptq4vit_plugin.quantizers.uniform import Uniform


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    y = torch.randn(200, 3, generator=generator) + x[:, :3] * 2
    weight = torch.rand(200, generator=generator)
    return x, y, weight


def test_sums_give_the_weighted_error_of_the_best_bias(task):
    x, y, t = task
    candidate = torch.randn(3, 6)
    normal = Normal.of(x, y, t)
    residual = (y - x @ candidate.T).double()
    bias = (t.double() @ residual) / t.double().sum()
    torch.testing.assert_close(normal.bias(candidate), bias, atol=1e-5, rtol=1e-5)
    error = (t.double()[:, None] * (residual - bias).square()).sum()
    assert normal.error(candidate) == pytest.approx(float(error), rel=1e-4)


def test_sums_of_parts_add_up(task):
    x, y, t = task
    whole = Normal.of(x, y, t)
    parts = Normal.of(x[:80], y[:80], t[:80]) + Normal.of(x[80:], y[80:], t[80:])
    for name in ("gram", "cross", "energy", "x_mean", "y_mean", "total"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 3.0])
def test_ridge_against_lstsq(task, damping):
    x, y, t = (v.double() for v in task)
    prior = torch.randn(3, 6, dtype=torch.float64)
    # Ridge about a prior, with a free bias, as one ordinary least squares problem.
    mean = (t @ x) / t.sum()
    gram = ((x - mean) * t[:, None]).T @ (x - mean)
    strength = (damping * gram.diagonal().mean()).sqrt()
    root = t.sqrt()[:, None]
    top = torch.cat([x * root, root], 1)
    bottom = torch.cat([strength * torch.eye(6), torch.zeros(6, 1)], 1)
    target = torch.cat([(y - x @ prior.T) * root, torch.zeros(6, 3)])
    solution = torch.linalg.lstsq(torch.cat([top, bottom.double()]), target.double()).solution
    normal = Normal.of(*task)
    updated = ridge(normal, prior, damping)
    torch.testing.assert_close(updated, prior + solution[:6].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(normal.bias(updated), solution[6], rtol=1e-3, atol=1e-3)


def test_ridge_keeps_the_weight_when_nothing_helps_held_out_tokens():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=generator)
    weight = torch.randn(2, 5, generator=generator)
    y, ones = x @ weight.T, torch.ones(200)
    fit = Normal.of(x[:200], y[:200] + torch.randn(200, 2, generator=generator), ones)
    check = Normal.of(x[200:], y[200:], ones)
    assert torch.equal(held_out_ridge(fit, check, weight), weight.double())


def textbook_gptq(weight, gram, grid):
    """GPTQ with the inverse of the remaining Gram matrix computed afresh for every input."""
    weight, out = weight.clone(), torch.empty_like(weight)
    for i in range(len(gram)):
        out[:, i : i + 1] = grid.nearest(weight[:, i : i + 1])
        inverse = torch.linalg.inv(gram[i:, i:])
        error = (weight[:, i] - out[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("size", [5, 150])  # 150: more than one block
def test_rounding_against_the_textbook(size):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, size, generator=generator, dtype=torch.float64)
    gram, grid = x.T @ x, RowGrid(torch.full((4, 1), 0.3), bits=4)
    order = gram.diagonal().argsort(descending=True)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(size)
    expected = textbook_gptq(weight[:, order], damped[order][:, order], grid)
    rounded = compensated_rounding(weight, gram, 0.01, grid)
    torch.testing.assert_close(rounded[:, order], expected, rtol=0, atol=1e-6)
    change, nearest = rounded - weight, grid.nearest(weight) - weight
    assert ((change @ gram) * change).sum() < ((nearest @ gram) * nearest).sum()


def test_rounding_lies_between_the_best_of_all_and_nearest():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    x = x + 2 * x.mean(1, keepdim=True)
    weight = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    gram, step = x.T @ x, 0.5
    choices = torch.tensor(list(itertools.product((0, 1), repeat=6)), dtype=torch.float64)

    def losses(rounded):
        return (((rounded - weight) @ gram) * (rounded - weight)).sum(-1)

    floor = (weight / step).floor() * step
    best = torch.stack([losses(floor + step * up) for up in choices]).amin(0)
    grid = RowGrid(torch.full((1, 1), step), bits=8)
    nearest = losses(grid.nearest(weight))
    found = losses(compensated_rounding(weight, gram, 1e-6, grid))
    assert (found >= best - 1e-9).all()
    assert found.mean() < nearest.mean()


def test_held_out_rounding_never_loses_to_nearest_on_the_held_out_tokens():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    weight, ones = torch.randn(8, 20, generator=generator), torch.ones(150)
    y, grid = x @ weight.T, RowGrid(torch.full((8, 1), 0.4), bits=4)
    fit, check = Normal.of(x[:150], y[:150], ones), Normal.of(x[150:], y[150:], ones)
    rounded = held_out_rounding(fit, check, weight, grid)
    assert check.error(rounded) <= check.error(grid.nearest(weight.double())) * 1.001
    assert torch.equal(rounded, grid.nearest(rounded))


@pytest.mark.parametrize("held_out", [True, False])
def test_rounding_never_loses_to_nearest_on_all_tokens(held_out):
    """All output channels together: a single one may, so that it does not on other tokens."""
    better = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        few, many = torch.randint(1, 40, (2,), generator=generator).tolist()
        x = torch.randn(5 * many, few, generator=generator)
        if seed % 3:  # channels that resemble each other, then also ones that do not centre
            x = x @ torch.randn(few, few, generator=generator) + 5 * (seed % 3 - 1)
        weight = torch.randn(9, few, generator=generator)
        tokens = torch.rand(5 * many, generator=generator)
        y, bits = x @ weight.T, 2 + seed % 5
        clipped = (1.1, 0.5, 0.2)[seed // 3 % 3]
        step = weight.abs().amax(1, keepdim=True) * clipped / (2 ** (bits - 1) - 0.5)
        grid, cut = RowGrid(step, bits), 4 * many if held_out else 5 * many
        fit = Normal.of(x[:cut], y[:cut], tokens[:cut])
        check = Normal.of(x[cut:], y[cut:], tokens[cut:]) if held_out else None
        rounded = held_out_rounding(fit, check, weight, grid)
        lowest, highest = -(2 ** (bits - 1)) * step, (2 ** (bits - 1) - 1) * step
        nearest = torch.clamp((weight / step).round() * step, lowest, highest)

        def error(w, x=x, y=y, tokens=tokens):  # with the best bias
            error = x.double() @ w.double().T - y.double()
            share = (tokens / tokens.sum()).double()
            return share @ (error - share @ error).square()

        assert error(rounded).sum() <= (1 + 1e-5) * error(nearest).sum()
        better += int((error(rounded) < 0.9 * error(nearest)).sum())
    assert better > 100  # it is not nearest


@pytest.mark.parametrize("shared", [False, True])
def test_steps_against_trying_all(shared):
    weight = torch.randn(5, 30)
    importance = torch.rand(30)
    grid = RowGrid(torch.ones(1 if shared else 5, 1), bits=3)
    found = best_grid(grid, weight, importance).step

    def loss(step):
        error = ((weight / step).round().clamp(-4, 3) * step - weight).square() * importance
        return error.sum() if shared else error.sum(1)

    losses = [
        loss(weight.abs().amax(1, keepdim=True).max() / 3.5 * f)
        if shared
        else loss(weight.abs().amax(1, keepdim=True) / 3.5 * f)
        for f in torch.arange(0.3, 1.1, 0.02)
    ]
    torch.testing.assert_close(loss(found), torch.stack(losses).amin(0), rtol=1e-4, atol=1e-5)


def asymmetric(low, high, bits=8):
    spec = PTQuantizerSpec(bits, QuantizationScheme.ASYMMETRIC, None, False, False, (1,), False)
    quantizer = AsymmetricQuantizer(spec)
    with torch.no_grad():
        quantizer.input_low.fill_(low)
        quantizer.input_range.fill_(high - low)
    return quantizer


def energy_of(matrix):
    return matrix.square().sum(0)[None]


@torch.no_grad()
def test_ranges_of_few_rows_fit_rows_that_come_later():
    generator = torch.Generator().manual_seed(6)
    x, later = torch.randn(2, 4000, 24, generator=generator)
    matrix = torch.randn(5, 24, generator=generator)
    few = torch.zeros(1, 4000)
    few[0, :20] = 1
    quantizer = asymmetric(float(x[:20].min()), float(x[:20].max()))
    found = best_range(quantizer, x[None], energy_of(matrix), few, 1)

    def error(q):
        return float(((q(later) - later) @ matrix.T).square().mean())

    assert error(found) < error(quantizer)
    # Zero stays exact: the same zero point.
    assert found.input_low / found.input_range == pytest.approx(
        float(quantizer.input_low / quantizer.input_range), rel=1e-5
    )


@torch.no_grad()
def test_ranges_against_trying_all():
    generator = torch.Generator().manual_seed(7)
    x, weight = torch.randn(30, 8, generator=generator), torch.rand(30, generator=generator)
    matrix = torch.randn(3, 8, generator=generator)
    n = float(weight.sum() ** 2 / (weight**2).sum())
    share = weight[:, None] / weight.sum()
    mean = (share * x).sum(0)
    losses = []
    for factor in FACTORS:
        quantizer, loss = asymmetric(-1.4 * factor, 2.1 * factor, bits=4), 0
        for rows in (x, mean + (1 + 2 / n**0.5 + 128 / n**3) * (x - mean)):
            rest = quantizer(rows) - rows
            rest = rest - (share * rest).sum(0)
            for output in matrix:  # errors of a row's numbers are taken as unrelated
                loss += float((share * (rest * output).square()).sum())
        losses.append(loss)
    found = best_range(asymmetric(-1.4, 2.1, bits=4), x[None], energy_of(matrix), weight[None], 30)
    best = FACTORS[losses.index(min(losses))]
    assert float(found.input_range) == pytest.approx(3.5 * best, rel=1e-5)


@torch.no_grad()
def test_ranges_per_head_are_those_of_each_head_alone():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, 40, 6, generator=generator) * torch.tensor([1.0, 3.0])[:, None, None]
    energy = torch.rand(2, 6, generator=generator)
    weight = torch.rand(2, 40, generator=generator)

    def quantizer(heads):  # 3 bits: the levels of both heads end far inside and far outside
        operand = Uniform(3, Grouping((1, heads, 1, 1)))
        operand.observe(torch.ones(1, heads, 1, 1) * torch.tensor([1.0, 20.0])[:heads, None, None])
        return operand.module(operand.n, lambda value: value)

    both = quantizer(2)
    found = best_range(both, x, energy, weight, 40)
    for head in range(2):
        one = slice(head, head + 1)
        alone = quantizer(1)
        alone.scale.copy_(both.scale[0, head].flatten())
        expected = best_range(alone, x[one], energy[one], weight[one], 40)
        assert float(found.scale[0, head]) == pytest.approx(float(expected.scale), rel=1e-5)
    assert (found.scale / both.scale).flatten().unique().numel() == 2


def test_ranges_that_many_rows_decided_stay():
    x, energy = torch.randn(1, 2000, 8), torch.ones(1, 8)
    quantizer = asymmetric(-1, 1)
    assert best_range(quantizer, x, energy, torch.ones(1, 2000), 10) is quantizer
    other = torch.nn.Identity()
    assert best_range(other, x[:, :9], energy, torch.ones(1, 9), 9) is other


@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
def test_effective_rows_are_what_the_variance_of_a_mean_says(alike):
    """Rows of one image share a part of their variance: how far do means of all rows scatter?"""
    generator = torch.Generator().manual_seed(9)
    trials, images, m, columns = 400, 16, 10, 12
    shared = torch.randn(trials, images, 1, columns, generator=generator)
    own = torch.randn(trials, images, m, columns, generator=generator)
    x = (alike**0.5 * shared + (1 - alike) ** 0.5 * own).flatten(1, 2)
    weight = torch.rand(images * m, generator=generator) + 0.1
    share = (weight / weight.sum())[None, :, None]
    scatter = float((share * x).sum(1).var(0).mean())  # of a variance of 1 per row
    found = effective_rows(x, share, images)
    assert found.shape == (trials, 1, 1)
    # Kish's correction for uneven weights counts twice where rows are the same: 10 % or so.
    assert float(found.mean()) == pytest.approx(1 / scatter, rel=0.2)
