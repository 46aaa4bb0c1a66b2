"""Steps of a config around the search, end to end on a small model."""

import pytest
import timm
import torch

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.scale_search import ScaleSearch
from ptq4vit_plugin.errors import ConfigError, DataError, ModelError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.streams import Images, find_images, run_side_by_side
from ptq4vit_plugin.integrations.timm.attention import unfuse_attention
from ptq4vit_plugin.record import record_of

ARGS = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
SMALL = {"rounds": 1, "search_range": {"alpha": 0.01, "beta": 1.2, "n": 10}}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, **ARGS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.blocks[0].norm1.weight[3] *= 30  # an outlier channel
        model.blocks[0].attn.qkv.weight[:, 3] /= 30
    return model


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(40, 3, 32, 32)


def config(bits, **fields):
    widths = {"weights": {"bits": bits}, "activations": {"bits": bits}}
    return {"algorithm": "ptq4vit_plus", **widths, **SMALL, **fields}


@torch.no_grad()
def sqnr(model, net, images):
    expected = net(images)
    error = (model(images) - expected).square().mean()
    return float(10 * torch.log10(expected.var() / error))


def test_plus_beats_ptq4vit_and_survives_saving(net, images, tmp_path):
    calibration, unseen = list(images[:32].split(8)), images[32:]
    plain = ptq.quantize(net, calibration, {**config(4), "algorithm": "ptq4vit"})
    plus = ptq.quantize(net, calibration, config(4))
    assert sqnr(plus, net, unseen) > sqnr(plain, net, unseen)
    path = ptq.save(plus, tmp_path / "plus.safetensors")
    architecture = timm.create_model("deit_tiny_patch16_224", num_classes=10, **ARGS)
    with torch.no_grad():
        assert torch.equal(ptq.load(path, architecture)(unseen), plus(unseen))


def test_the_preset_is_its_three_steps(net, images):
    data = list(images[:16].split(8))
    fields = {k: v for k, v in config(4).items() if k != "algorithm"}
    twin = {"softmax": "numerator", "gelu": "piecewise"}
    fields["activations"] = {"bits": 4, "quantizer": "piecewise"}
    search = {"algorithm": "ptq4vit", **fields, "twin": twin, "gradient": {"kind": "output"}}
    steps = ["fold_norms", search, "compensate"]
    with torch.no_grad():
        expected = ptq.quantize(net, data, steps)(images[:2])
        assert torch.equal(ptq.quantize(net, data, config(4))(images[:2]), expected)


def test_compensation_needs_a_quantized_model_and_folds_a_float_one(net, images):
    with pytest.raises(ModelError, match="quantize it before"):
        ptq.quantize(net, [images[:4]], "compensate")
    with pytest.raises(ModelError, match="quantized already"):
        ptq.quantize(net, [images[:4]], [config(8, fold={"norms": False}), "fold_norms"])


def test_side_by_side_gives_float_targets_and_changed_inputs(net, images):
    """Each op's float half is the float model; what `visit` returns reaches the ops behind it."""
    model = hooks.wrap(timm.create_model("deit_tiny_patch16_224", num_classes=10, **ARGS).eval())
    model.load_state_dict(net.state_dict())
    data = batches(list(images[:4].split(2)))
    seen = {}
    unfuse_attention(model)
    ops, _ = find_ops(hooks.trace(model, images[:2]), 2)

    def visit(op, what):
        seen[op.name] = what
        first = len(seen) == 1
        return what.target * (2 if first else 1)

    run_side_by_side(model, data, ops, visit, find_images(model, data, ops), 2)
    assert list(seen) == [op.name for op in ops]
    with torch.no_grad():
        expected = net(images[:4])
    torch.testing.assert_close(seen["head/linear/0"].target, expected, rtol=1e-4, atol=1e-5)
    qkv = seen["blocks/0/attn/qkv/linear/0"]
    assert not torch.allclose(qkv.inputs[0], qkv.exact[0])
    proj = seen["blocks/0/attn/proj/linear/0"]
    torch.testing.assert_close(proj.inputs[0], proj.exact[0])


def test_mixed_precision_keeps_its_budget(net, images):
    fields = config(8, mixed_precision={"average_bits": 5.5, "choices": [4, 6, 8]})
    model = ptq.quantize(net, [images[:8]], fields)
    ops = [op for op in record_of(model).plan.ops if op.operands[0].source != "image"]
    widths = {op.name: op.operands[1].bits for op in ops}
    assert len(set(widths.values())) > 1
    macs = sum(op.macs for op in record_of(model).plan.ops)
    used = sum(op.macs * op.operands[1].bits for op in record_of(model).plan.ops)
    assert used <= 5.5 * macs


def test_a_promised_drop_is_held(net, images):
    max_drop = 5.0
    with torch.no_grad():
        labels = net(images).argmax(1)
    validation = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    fields = config(4, accuracy={"max_drop": max_drop}, compensate={"weights": False})
    model = ptq.quantize(net, [images[:8]], fields, validation)
    with torch.no_grad():
        drop = 100 * float((model(images).argmax(1) != labels).double().mean())
    assert drop <= max_drop
    record = record_of(model)
    if record is not None:
        assert any(trial.drop <= max_drop for trial in record.trials)


def test_a_promise_needs_validation_images(net, images):
    with pytest.raises(DataError, match="validation_dataset"):
        ptq.quantize(net, [images[:4]], config(8, accuracy={"max_drop": 1}))
    with pytest.raises(ConfigError, match="max_drop"):
        ptq.quantize(net, [images[:4]], config(8, accuracy={"max_drop": -1}))


@torch.no_grad()
def test_compensation_after_smooth_quant_aims_at_the_float_model(net, images):
    calibration, unseen = list(images[:32].split(8)), images[32:]
    steps = ["smooth_quant", {**config(4), "algorithm": "ptq4vit"}]
    plain = ptq.quantize(net, calibration, steps)
    repaired = ptq.quantize(net, calibration, [*steps, "compensate"])
    # With another target than the float model's it loses more than it gains.
    assert sqnr(repaired, net, unseen) > sqnr(plain, net, unseen)


@torch.no_grad()
def test_ranges_of_all_activations_are_looked_at(net, images, monkeypatch):
    seen = []

    def best_range(quantizer, rows, columns, weight, count):
        assert rows.shape[1] == weight.shape[1] and rows.shape[2] == columns.shape[1] and count == 8
        seen.append(type(quantizer).__name__)
        return quantizer

    monkeypatch.setattr("ptq4vit_plugin.algorithms.compensate.best_range", best_range)
    for softmax in ("numerator", False):
        seen.clear()
        ptq.quantize(net, [images[:8]], config(8, twin={"softmax": softmax}))
        # Queries, keys, values; four linears of the block and the head.
        assert sorted(seen) == ["AsymmetricQuantizer"] * 5 + ["SymmetricQuantizer"] * 3


class Grouped(torch.nn.Module):
    """Convolutions in groups, one without a bias and one with a computed one."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, 4, bias=False)
        self.groups = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.bias = torch.nn.Parameter(torch.randn(16))
        self.last = torch.nn.Parameter(torch.randn(16, 4, 3, 3) / 6)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x):
        x = self.groups(torch.relu(self.stem(x)))
        x = torch.nn.functional.conv2d(x, self.last, self.bias * 2, groups=4)
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def test_compensation_takes_grouped_convolutions_as_they_are(images):
    torch.manual_seed(3)
    net = Grouped().eval()
    quantized = ptq.quantize(net, list(images[:32].split(8)), config(8))
    assert sqnr(quantized, net, images[32:]) > 20
    for name in ("groups.weight", "last", "bias"):
        assert torch.equal(quantized.get_parameter(name), net.get_parameter(name))


@torch.no_grad()
def test_ridge_moves_weights_off_their_nearest_levels_and_stays_close(net, images):
    calibration, unseen = list(images[:32].split(8)), images[32:]
    only = {"ranges": False, "rounding": False, "bias": False}
    nearest = ptq.quantize(net, calibration, config(4, compensate={**only, "ranges": True}))
    moved = ptq.quantize(net, calibration, config(4, compensate={**only, "weights": True}))
    name = "blocks.0.mlp.fc2.weight"
    assert not torch.equal(moved.get_parameter(name), nearest.get_parameter(name))
    assert sqnr(moved, net, unseen) > sqnr(nearest, net, unseen) - 3


class Tokens(torch.nn.Module):
    """An MLP on tokens, which lie as in `nn.MultiheadAttention`: behind each other, or as rows."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.fc1, self.fc2 = torch.nn.Linear(12, 24), torch.nn.Linear(24, 12)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x):
        y = x if self.layout == "BLC" else x.transpose(0, 1)
        y = y.flatten(0, 1) if self.layout == "rows" else y
        y = self.fc2(torch.nn.functional.gelu(self.fc1(y)))
        y = y.unflatten(0, (-1, len(x))) if self.layout == "rows" else y
        return self.head((y if self.layout == "BLC" else y.transpose(0, 1)).mean(1))


@pytest.mark.parametrize(("layout", "place"), [("LBC", Images(1)), ("rows", Images(0, inner=True))])
def test_compensation_does_not_depend_on_where_the_images_lie(layout, place):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 9, 12, generator=generator) for _ in range(3)]
    model = hooks.wrap(Tokens(layout).eval())
    ops, _ = find_ops(hooks.trace(model, data[0]), 4)
    places = find_images(model, batches(data), ops)
    assert places == {
        "fc1/linear/0": place,
        "fc2/linear/0": place,
        "head/linear/0": Images(),
    }
    with torch.no_grad():
        expected = ptq.quantize(Tokens("BLC").eval(), data, config(4))(data[0])
        found = ptq.quantize(Tokens(layout).eval(), data, config(4))(data[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [Images(), Images(1), Images(0, inner=True)])
def test_images_in_front_and_back_again(place):
    x = torch.arange(6 * 4 * 3.0).view(6, 4, 3)
    count = 2
    front = place.first(x, count)
    assert front.shape[0] % count == 0
    assert torch.equal(place.back(front, count), x)


class Picky(torch.nn.Module):
    """What ordinary images pass and not a number does not; a mask and a factor for all images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.table = torch.nn.Linear(12, 12), torch.nn.Embedding(20, 12)
        self.register_buffer("left", torch.randn(12, 12) / 4)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x, mask, factor):
        assert torch.isfinite(x).all()
        x = x + self.table((x.mean(-1).sigmoid() * 19).long())
        x = (self.fc(x) * factor) + (mask @ torch.ones_like(x))
        return self.head((self.left @ x.mean(1).t()).t())  # the images are columns of this product


def test_compensation_of_a_model_with_other_inputs_and_assertions():
    generator = torch.Generator().manual_seed(1)
    mask = torch.eye(6)
    data = [(torch.randn(4, 6, 12, generator=generator), mask, torch.tensor(0.7)) for _ in range(2)]
    model = Picky().eval()
    for name in ("ptq4vit", "ptq4vit_plus"):
        quantized = ptq.quantize(model, data, config(8, algorithm=name))
        with torch.no_grad():
            assert logit_sqnr(model(*data[0]), quantized(*data[0])) > 25


@pytest.mark.parametrize("weights", [False, True])
def test_images_whose_squares_exceed_float32(net, images, weights):
    step = {"algorithm": "compensate", "weights": weights}
    data = images[:8] * 1e19
    message = r"compensate: patch_embed/proj/conv2d/0 takes numbers of up to .*e\+19 and gives .* "
    with pytest.raises(DataError, match=message + "algorithm: ptq4vit$"):
        ptq.quantize(net, [data], [config(8, algorithm="ptq4vit"), step])
    data[1] *= 1e38 / data[1].abs().max()  # not even the float model makes a number of it
    no_folds = {"norms": False, "attention": False, "smooth": False}
    with pytest.raises(ModelError, match="the model's output .* NaN or infinite values"):
        ptq.quantize(net, [data], config(8, fold=no_folds))


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(8, 12)
        self.a, self.b = torch.nn.Linear(12, 3), torch.nn.Linear(12, 5)

    def forward(self, x):
        y = torch.nn.functional.gelu(self.body(x))
        return self.a(y), self.b(y)


def test_a_head_that_the_loss_does_not_see_keeps_a_sensible_bias():
    model, x = TwoHeads().eval(), torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    quantized = ptq.quantize(model, [x], config(8))
    with torch.no_grad():
        for found, expected in zip(quantized(x), model(x), strict=True):
            assert logit_sqnr(expected, found) > 25
    assert (quantized.b.bias - model.b.bias).abs().max() < 0.05


class MixesImages(torch.nn.Module):
    """Attention without heads, as in timm's CSATv2: keys of all images, for every image."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_a_model_that_mixes_the_images_of_a_batch_is_refused_before_the_search(monkeypatch):
    def never(*_):
        raise AssertionError("searched in vain")

    monkeypatch.setattr(ScaleSearch, "apply", never)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="matmul.*images of a batch.*algorithm: ptq4vit"):
        ptq.quantize(MixesImages().eval(), [x], {"algorithm": "ptq4vit_plus", "fold": {}})
