"""Block reconstruction: gradients, levels, blocks, held-out images, and the whole from a config."""

import logging
import math

import pytest
import timm
import torch
from models import images, small_vit
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import (
    AsymmetricQuantizer,
    PTQuantizerSpec,
    SymmetricQuantizer,
)
from torch import nn
from torch.nn import functional as F

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms import reconstruct
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.reconstruct import split, without_quantizers
from ptq4vit_plugin.algorithms.reconstruction.learned import LearnedActivation, LearnedWeight
from ptq4vit_plugin.algorithms.reconstruction.optimise import Group, learn, weighted_error
from ptq4vit_plugin.algorithms.reconstruction.variations import varied
from ptq4vit_plugin.errors import ConfigError, DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.blocks import WHOLE, find_blocks, run_block, watch_block
from ptq4vit_plugin.integrations.nncf.passes import frozen
from ptq4vit_plugin.quantizers.branches import Levels
from ptq4vit_plugin.quantizers.numerator import NumeratorQuantizer
from ptq4vit_plugin.quantizers.piecewise import PiecewiseQuantizer
from ptq4vit_plugin.record import record_of

SEARCH = {
    "algorithm": "ptq4vit",
    "weights": {"bits": 3},
    "activations": {"bits": 3},
    "rounds": 1,
    "search_range": {"n": 10},
    "metric": "mse",
}
LEARN = {"algorithm": "reconstruct", "iterations": 12, "finish": 12, "batch_size": 6}
RATES = {"iterations": 12, "finish": 12, "batch_size": 6}


def symmetric(scale, bits=3, signed=True):
    shape = tuple(scale.shape)
    spec = PTQuantizerSpec(bits, QuantizationScheme.SYMMETRIC, signed, False, False, shape, False)
    quantizer = SymmetricQuantizer(spec)
    quantizer.signed = signed
    quantizer.scale.data.copy_(scale)
    return quantizer


def asymmetric(step, zero, bits=3):
    spec = PTQuantizerSpec(bits, QuantizationScheme.ASYMMETRIC, None, False, False, (1,), False)
    quantizer = AsymmetricQuantizer(spec)
    quantizer.input_low.data.fill_(-zero * step)
    quantizer.input_range.data.fill_(step * (2**bits - 1))
    return quantizer


QUANTIZERS = {
    "symmetric": lambda: symmetric(torch.tensor([0.9])),
    "per channel": lambda: symmetric(torch.linspace(0.5, 1.1, 6)),
    "unsigned": lambda: symmetric(torch.tensor([1.4]), signed=False),
    "asymmetric": lambda: asymmetric(0.4, 2),
    "numerator": lambda: NumeratorQuantizer(3, torch.tensor([0.04])),
    "even numerator": lambda: NumeratorQuantizer(8, torch.tensor([0.003])),
    "piecewise": lambda: PiecewiseQuantizer(3, torch.tensor([0.3]), Levels(-5, 5, 2, 3)),
}


#: Of those that are not even, by hand.
EVERY_LEVEL = {"numerator": [0, 1, 2, 6, 10, 14, 18, 22], "piecewise": [-5, -2, -1, 0, 1, 2, 5]}


def operand(name):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    return x.softmax(-1) if "numerator" in name else x


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_learned_quantizer_starts_and_ends_as_the_ordinary_one(name):
    quantizer, x = QUANTIZERS[name](), operand(name)
    learned = LearnedActivation(quantizer, torch.Generator())
    torch.testing.assert_close(learned(x), quantizer(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        learned.growth.add_(torch.linspace(-0.2, 0.3, learned.growth.numel()))
        if learned.zero is not None:
            learned.zero.add_(1.3)
    assert not torch.allclose(learned(x), quantizer(x), rtol=0, atol=1e-3)
    expected = learned(x)
    assert learned.finish() is quantizer
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_against_finite_differences_with_the_rounding_held(name):
    x = operand(name).double()
    learned = LearnedActivation(QUANTIZERS[name](), torch.Generator())
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
    unit = x.amax(-1, keepdim=True) if "numerator" in name else torch.ones(1, 1)
    step = learned.step().detach().double()
    zero = 0.0 if learned.zero is None else learned.zero.detach().double()
    low, high = learned.levels.lowest - zero, learned.levels.highest - zero
    code = (x / unit / step).round()
    if learned.levels.coarse > 1:
        all_levels = torch.tensor(EVERY_LEVEL[name]).double()
        code = all_levels[(x[..., None] / unit.unsqueeze(-1) / step - all_levels).abs().argmin(-1)]
    inside = (code >= low) & (code <= high) & (x / unit / step >= low) & (x / unit / step <= high)
    offset = code - x / unit / step

    def value(growth, shift=0.0):
        """What the output would be if rounding errors and clamping stayed as they are."""
        at = step * math.exp(growth)
        limit = torch.where(x / unit / step < low, low - shift, high - shift)
        return (slope * torch.where(inside, x / unit + offset * at, limit * at) * unit).sum()

    eps = 1e-5
    (slope.float() * learned(x.float())).sum().backward()
    numeric = (value(eps) - value(-eps)) / (2 * eps)
    torch.testing.assert_close(learned.growth.grad.sum().double(), numeric, rtol=1e-4, atol=1e-4)
    if learned.zero is not None:
        numeric = (value(0, eps) - value(0, -eps)) / (2 * eps)
        assert float(learned.zero.grad) == pytest.approx(float(numeric), rel=1e-4)


def test_dropped_rows_stay_in_float():
    quantizer = QUANTIZERS["symmetric"]()
    learned = LearnedActivation(quantizer, torch.Generator().manual_seed(0))
    x = torch.randn(2000, 6)
    learned.drop = 0.25
    with torch.no_grad():
        y = learned(x)
    kept = (y == x).all(1)
    assert 0.2 < kept.float().mean() < 0.3
    torch.testing.assert_close(y[~kept], quantizer(x)[~kept], rtol=0, atol=1e-6)


def test_a_learned_weight_ends_on_the_levels_of_its_quantizer():
    parameter = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(5)))
    quantizer = symmetric(torch.linspace(1, 2, 5)[:, None])
    start = quantizer(parameter).detach()
    learned = LearnedWeight(quantizer, parameter)
    torch.testing.assert_close(learned(parameter), start, rtol=0, atol=1e-6)
    with torch.no_grad():
        learned.codes.add_(torch.randn(5, 7, generator=torch.Generator().manual_seed(6)))
        learned.growth.sub_(0.1)
    expected = learned(parameter).detach()
    assert learned.finish() is quantizer
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
    assert torch.equal(quantizer(parameter), parameter)
    codes = parameter.detach() / (quantizer.scale.detach() / 3)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert codes.min() >= -4.00001 and codes.max() <= 3.00001


def test_learning_finds_a_minimum_and_never_leaves_a_worse_state():
    target = torch.tensor([3.0, -2.0])

    def run(rate, held_out):
        p = nn.Parameter(torch.zeros(2))
        outcome = learn(
            lambda images: (p - target).square().sum() * len(images),
            lambda: float((p.detach() - held_out).square().sum()),
            [Group([p], rate)],
            8,
            200,
            4,
            torch.Generator().manual_seed(0),
        )
        return p.detach(), outcome

    p, outcome = run(0.1, target)
    torch.testing.assert_close(p, target, atol=0.01, rtol=0)
    assert outcome.before == 13 and outcome.after < 1e-3
    p, outcome = run(0.1, -target)  # the held-out images want the opposite
    assert torch.equal(p, torch.zeros(2)) and outcome.after == outcome.before == 13
    p, outcome = run(math.inf, target)  # diverges
    assert torch.equal(p, torch.zeros(2)) and outcome.after == 13


def test_weighted_error():
    output, target, weight = torch.randn(3, 2, 4, 5)
    by_hand = sum(
        float(weight[i, j, k] * (output[i, j, k] - target[i, j, k]) ** 2)
        for i in range(2)
        for j in range(4)
        for k in range(5)
    )
    assert float(weighted_error(output, target, weight)) == pytest.approx(by_hand / 40, rel=1e-4)


def test_variations_are_crops_with_a_rectangle_of_another():
    # Every pixel says which image it is of, and where in it: what is made of it can be read off.
    count, size = 64, 32
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    number = torch.arange(float(count)).view(-1, 1, 1).expand(count, size, size)
    plain = torch.stack([number, x.expand_as(number), y.expand_as(number)], 1)
    made = varied(plain, torch.Generator().manual_seed(0))
    assert made.shape == plain.shape
    mirrored = torch.zeros(count, dtype=torch.bool)
    for place, (of, left, top) in enumerate(made):
        own = of == place
        rows, columns = (~own).any(1), (~own).any(0)
        assert torch.equal(~own, rows[:, None] & columns)  # one rectangle, perhaps empty
        assert of[~own].unique().numel() <= 1
        if own.double().mean() < 0.5:
            continue
        # Inside a crop places are affine in places; at its edges interpolation has no neighbours.
        inner = own[2:-2, 2:-2]
        across = left[2:-2, 2:-2].diff(dim=1)[inner[:, 1:] & inner[:, :-1]]
        down = top[2:-2, 2:-2].diff(dim=0)[inner[1:] & inner[:-1]]
        torch.testing.assert_close(across, across[:1].expand_as(across), atol=1e-4, rtol=0)
        torch.testing.assert_close(down, down[:1].expand_as(down), atol=1e-4, rtol=0)
        width, height = float(across[0].abs()), float(down[0])
        assert 0 < width <= 1 and 0 < height <= 1
        # A side is a whole number of pixels, so area and ratio are those drawn up to one each.
        pixel = 1 / size
        assert (width + pixel) * (height + pixel) >= 0.5
        assert (width - pixel) / (height + pixel) <= 1.25 and (width + pixel) / height >= 0.8
        mirrored[place] = across[0] < 0
    assert 0 < mirrored.sum() < count
    assert 0 < (made[:, 0] != number).double().mean() < 1


def test_variations_follow_their_generator_and_leave_the_global_one():
    x = images(1, 3)[0]
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    first, second = varied(x, generator), varied(x, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(varied(x, torch.Generator().manual_seed(0)), first)


def test_the_whole_model_learns_from_new_variations_in_every_step(monkeypatch):
    drawn = []

    def recorded(x, generator):
        drawn.append(varied(x, generator))
        return drawn[-1]

    monkeypatch.setattr(reconstruct, "varied", recorded)
    config = [SEARCH, {**LEARN, "iterations": 0, "finish": 5}]
    ptq.quantize(small_vit(1), images(4, 4), config)
    # First those by which it is judged, with the 4 images that are held out: 64 in all.
    assert [len(x) for x in drawn] == [4] * 15 + [6] * 5
    assert len({float(x.double().sum()) for x in drawn}) == 20


def test_what_is_no_image_is_learned_from_as_it_is(monkeypatch):
    def refuse(*_):
        raise AssertionError("tokens have no crops")

    monkeypatch.setattr(reconstruct, "varied", refuse)
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)).eval()
    data = [torch.randn(4, 9, 12) for _ in range(4)]
    start = ptq.quantize(tokens, data, SEARCH)
    result = ptq.quantize(tokens, data, [SEARCH, {**LEARN, "iterations": 0}])
    assert held_out_error(result, tokens, data) < held_out_error(start, tokens, data)


def swin():
    args = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", **args, depths=(2, 2), num_heads=(2, 2)
    )
    return model.eval()


def beit():
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    return timm.create_model("beit_base_patch16_224", **args, depth=2).eval()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: small_vit(2), ["patch_embed.proj", "blocks.0", "blocks.1", "head"]),
        (
            swin,
            [
                "patch_embed.proj",
                "layers.0.blocks.0",
                "layers.0.blocks.1",
                "layers.1.downsample.reduction",
                "layers.1.blocks.0",
                "layers.1.blocks.1",
                "head.fc",
            ],
        ),
        # It calls its blocks in a loop, so NNCF's names do not say which one an op is in.
        (beit, ["patch_embed.proj", "blocks.0", "blocks.1", "head"]),
    ],
)
def test_blocks_are_found_and_run_by_themselves(make, expected):
    data = images(2, 3)
    model = ptq.quantize(make(), data, SEARCH)
    data = batches(data)
    blocks = find_blocks(model, data[0])
    assert [block.name for block in blocks] == expected
    with torch.no_grad():
        for block in [*blocks, WHOLE]:
            call = watch_block(model, block.name, data)
            assert len(call.output) == 6
            some = torch.tensor([4, 1])
            output = run_block(model, block, *call.of(some))
            torch.testing.assert_close(output, call.output[some], rtol=0, atol=1e-5)


def test_importance_is_the_squared_gradient_at_the_blocks_output():
    model = hooks.wrap(small_vit(2))
    data = batches([(x, torch.tensor([0, 3, 6, 1])) for x in images(2)])
    call = watch_block(model, "blocks.0", data, Gradient(kind="labels"))
    for place, batch in enumerate(data):
        x = call.output[4 * place : 4 * place + 4].clone().requires_grad_()
        logits = model.forward_head(model.norm(model.blocks[1](x)))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, batch.labels, reduction="sum"), x)
        found = call.importance[4 * place : 4 * place + 4]
        torch.testing.assert_close(found, grad.square(), rtol=1e-4, atol=1e-9)


def test_a_block_that_runs_twice_is_not_learned():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            return self.block(self.block(x))

    assert watch_block(Twice().eval(), "block", batches([torch.randn(2, 4)])) is None


@pytest.fixture(scope="module")
def learned():
    """A model, its images, quantized, and quantized and learned, with the events of that."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.getMessage(), record.fields))
    log = logging.getLogger("ptq4vit_plugin.events")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    model, data = small_vit(2), images(4, 4)
    try:
        result = ptq.quantize(model, data, [SEARCH, LEARN])
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return model, data, ptq.quantize(model, data, SEARCH), result, dict(seen_blocks(seen))


def seen_blocks(events):
    return [(fields["name"], fields) for message, fields in events if message == "block"]


@torch.no_grad()
def held_out_error(model, reference, data, views=()):
    """Squared error of the logits of every fourth image, and of variations."""
    x = torch.cat([torch.cat(data)[3::4], *views])
    return float((model(x) - reference(x)).square().mean())


def test_no_block_gets_worse_on_held_out_images(learned):
    model, data, start, result, events = learned
    generator = torch.Generator().manual_seed(4)  # blocks before the whole model
    views = [varied(torch.cat(data)[3::4], generator) for _ in range(15)]
    assert list(events) == ["patch_embed.proj", "blocks.0", "blocks.1", "head", ""]
    assert all(block["after"] <= block["before"] for block in events.values())
    assert any(block["after"] < block["before"] for block in events.values())
    after = held_out_error(result, model, data, views)
    assert after == pytest.approx(events[""]["after"], rel=1e-3)
    assert after < held_out_error(start, model, data, views)


def test_the_result_is_an_ordinary_model_with_weights_on_their_levels(learned, tmp_path):
    model, data, start, result, _ = learned
    parameters = dict(result.named_parameters())
    found = list(hooks.hooks(result))
    before = [(h.when, h.op, h.port, type(h.module)) for h in hooks.hooks(start)]
    assert [(h.when, h.op, h.port, type(h.module)) for h in found] == before
    weights = [h for h in found if h.when == "post"]
    assert len(weights) == 10
    for hook in weights:
        assert torch.equal(hook.module(parameters[hook.op]), parameters[hook.op])
    assert {p.requires_grad for p in small_vit().parameters()} == {True}
    again = ptq.load(ptq.save(result, tmp_path / "model.safetensors"), small_vit(2, seed=9))
    assert torch.equal(again(data[0]), result(data[0]))


def test_the_same_seed_gives_the_same_result():
    model, data = small_vit(1), images(4, 4)
    few = LEARN | {"iterations": 5, "finish": 5}  # more than one pass over 12 images
    result, again = (ptq.quantize(model, data, [SEARCH, few]) for _ in range(2))
    assert torch.equal(again(data[0]), result(data[0]))
    other = ptq.quantize(model, data, [SEARCH, few | {"seed": 1}])
    assert not torch.equal(other(data[0]), result(data[0]))


def test_preset_from_a_config():
    model, data = small_vit(1), images(4, 4)
    config = {**SEARCH, "algorithm": "ptq4vit_recon"}
    plus = ptq.quantize(model, split(batches(data))[0], {**SEARCH, "algorithm": "ptq4vit_plus"})
    same = ptq.quantize(model, data, config | {"reconstruct": {"iterations": 0, "finish": 0}})
    assert torch.equal(same(data[0]), plus(data[0]))
    result = ptq.quantize(model, data, config | {"reconstruct": RATES})
    assert record_of(result).images == 16 and record_of(result).algorithm == "PTQ4ViTRecon"
    generator = torch.Generator().manual_seed(4)  # four images by themselves cannot tell
    views = [varied(torch.cat(data)[3::4], generator) for _ in range(15)]
    assert held_out_error(result, model, data, views) < held_out_error(plus, model, data, views)


def test_learning_inside_a_frozen_model_leaves_it_as_it_was(learned):
    model, data, _, result, _ = learned
    with frozen(result):
        assert not any(p.requires_grad for p in result.parameters())
    assert all(p.grad is None for p in result.parameters())
    assert not result.training


def test_the_target_keeps_the_factors_of_smooth_quant():
    model, data = small_vit(1), images(1, 4)
    quantized = ptq.quantize(model, data, [{"algorithm": "smooth_quant"}, SEARCH])
    target = without_quantizers(quantized)
    assert not torch.allclose(quantized(data[0]), model(data[0]), atol=1e-2)
    torch.testing.assert_close(target(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)


def test_split_holds_out_every_fourth_image_across_batches():
    x = torch.arange(10.0).view(10, 1, 1, 1)
    fit, check = split(batches([x[:3], x[3:8], x[8:]]))
    assert torch.cat([b.args[0] for b in fit]).flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert torch.cat([b.args[0] for b in check]).flatten().tolist() == [3, 7]


def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch():
    model, x = small_vit(1), torch.cat(images(4, 4))
    one, *others = (
        [watch_block(model, "blocks.0", part, Gradient(probes=2)) for part in split(data)]
        for data in (batches(x.split(size)) for size in (16, 3, 8))
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a.importance, b.importance, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_learn_too(dtype):
    model, data = small_vit(1).to(dtype), [x.to(dtype) for x in images(4, 4)]
    start, result = ptq.quantize(model, data, SEARCH), ptq.quantize(model, data, [SEARCH, LEARN])
    types = {name: p.dtype for name, p in start.state_dict().items()}
    assert {name: p.dtype for name, p in result.state_dict().items()} == types
    # In float32: what rounding activations to half precision adds is none of learning's.
    reference, wide = small_vit(1), [x.float() for x in data]
    before, after = (held_out_error(m.float(), reference, wide) for m in (start, result))
    assert after < 0.8 * before


def test_images_of_several_sizes_are_refused():
    model = small_vit(1, dynamic_img_size=True)
    data = [*images(1, 4), *images(1, 4, size=40)]
    for algorithm in ("ptq4vit_plus", "ptq4vit_recon"):
        with pytest.raises(DataError, match=r"\(3, 32, 32\), \(3, 40, 40\); .* take one size"):
            ptq.quantize(model, data, SEARCH | {"algorithm": algorithm})


def test_errors():
    model, data = small_vit(1), images(1, 4)
    with pytest.raises(ModelError, match="reconstruct: the model has no quantizers"):
        ptq.quantize(model, data, "reconstruct")
    with pytest.raises(ModelError, match="in place of 'compensate', or .* 'ptq4vit_recon'"):
        ptq.quantize(model, data, [SEARCH, {"algorithm": "compensate", "gradient": None}, LEARN])
    with pytest.raises(DataError, match="reconstruct: 3 calibration images; allowed: at least 4"):
        ptq.quantize(model, images(1, 3), [SEARCH, LEARN])
    with pytest.raises(ConfigError, match="iteration: unknown key.*did you mean 'iterations'"):
        ptq.quantize(model, data, [SEARCH, {"algorithm": "reconstruct", "iteration": 3}])
    with pytest.raises(ConfigError, match="drop: 1 is not allowed"):
        ptq.quantize(model, data, [SEARCH, {"algorithm": "reconstruct", "drop": 1}])
