"""Exact folds: the float logits stay, and rescaled copies of a model fold to the same model."""

import copy

import pytest
import timm
import torch

from ptq4vit_plugin.algorithms.fold_norms import FoldNorms
from ptq4vit_plugin.algorithms.folding.factors import balance, channel_scale, spread
from ptq4vit_plugin.algorithms.folding.statistics import Channels, Heads
from ptq4vit_plugin.algorithms.planning import make_plan
from ptq4vit_plugin.algorithms.ptq4vit import PTQ4ViT
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import channels, hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.passes import tensors_of

SWIN = {"patch_size": 2, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}),
    "vit_no_bias": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 1, "qkv_bias": False},
    ),
    "deit": ("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 28, **SWIN}),
    "beit": (
        "beit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3},
    ),
    "eva02": (
        "eva02_base_patch14_224",
        {"img_size": 28, "patch_size": 7, "depth": 1, "embed_dim": 48, "num_heads": 3},
    ),
    "swin_padded": ("swin_tiny_patch4_window7_224", {"img_size": 40, **SWIN}),
}


def model(name, seed=0):
    architecture, args = MODELS[name]
    torch.manual_seed(seed)
    net = timm.create_model(architecture, num_classes=10, **args).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # norms and biases that are not 1 and 0
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net, torch.randn(2, 3, args["img_size"], args["img_size"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_stay(name):
    net, images = model(name)
    expected = net(images)
    before = {key: value.clone() for key, value in net.named_parameters()}
    FoldNorms().fold(net, batches([images]))
    change = (net(images) - expected).abs().max() / expected.abs().max()
    assert change <= 1e-5
    changed = {key for key in before if not torch.equal(net.get_parameter(key), before[key])}
    # Swin averages over positions between its last norm and the head.
    norms = {key for key in before if "norm" in key and "patch_embed" not in key}
    norms -= {"norm.weight", "norm.bias"} if "swin" in name else set()
    assert norms <= changed
    # BEiT adds the bias of queries, keys and values up in forward, so its values stay.
    parts = ("qkv.weight",) if name == "beit" else ("qkv.weight", "attn.proj.weight")
    assert {key for key in before if key.endswith(parts)} <= changed
    # A norm lies in front of EVA's second MLP layer; everywhere else GELU does.
    smoothed = [hook.op for hook in hooks.hooks(net) if "fc2" in hook.op]
    assert len(smoothed) == (0 if name == "eva02" else sum("fc2.weight" in key for key in before))
    with hooks.unquantized(net):  # the factors are part of the float model
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_norm_that_gives_the_same_for_all_images_is_folded(gamma, bias, dtype):
    net, images = model("vit")
    norm, qkv = net.blocks[0].norm1, net.blocks[0].attn.qkv
    norm.weight.fill_(gamma)
    norm.bias.mul_(bias)
    net, images = net.to(dtype), images.to(dtype)
    largest, weight = qkv.weight.abs().max(), net.blocks[0].norm2.weight.clone()
    expected = net(images)
    FoldNorms().fold(net, batches([images]))
    change = (net(images) - expected).abs().max() / expected.abs().max()
    assert change <= max(1e-5, 4 * torch.finfo(dtype).eps)
    assert qkv.weight.abs().max() < 100 * largest  # rounding is not taken for what channels say
    assert not torch.equal(net.blocks[0].norm2.weight, weight)  # the other norm is folded


@torch.no_grad()
def test_images_of_which_a_model_makes_no_numbers():
    net, images = model("vit")
    before = {key: value.clone() for key, value in net.named_parameters()}
    images[1] *= 1e38 / images[1].abs().max()
    message = (
        "fold_norms: the input of blocks/0/attn/qkv/linear/0 has NaN or infinite values; the "
        "largest number of the calibration images is 1.0e+38; allowed: images and weights of "
        "which the model makes finite numbers"
    )
    for data in (images, images[[1, 0]]):
        with pytest.raises(DataError) as error:
            FoldNorms().fold(net, batches([data]))
        assert str(error.value) == message
    assert all(torch.equal(value, before[key]) for key, value in net.named_parameters())
    assert not list(hooks.hooks(net))


class FrozenNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.rand(192) + 0.5)
        self.register_buffer("bias", torch.randn(192))

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, (192,), self.weight, self.bias)


@torch.no_grad()
def test_norms_and_biases_that_are_buffers_stay():
    net, images = model("vit")
    block = net.blocks[0]
    block.norm1 = FrozenNorm()
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
        bias = linear.bias.detach().clone()
        del linear.bias
        linear.register_buffer("bias", bias)
    before = {key: value.clone() for key, value in net.named_buffers()}
    weight, expected = block.norm2.weight.clone(), net(images)
    FoldNorms().fold(net, batches([images]))
    assert (net(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(net.get_buffer(key), value) for key, value in before.items())
    assert not torch.equal(block.norm2.weight, weight)  # a scale needs no bias to change


@torch.no_grad()
def test_a_fold_that_is_not_exact_is_refused_and_undone(monkeypatch):
    def wrong(module, path, scale, shift):
        module.get_parameter(path.weight).mul_(1.3)

    monkeypatch.setattr("ptq4vit_plugin.algorithms.fold_norms.fold_norm", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        net, images = model("vit")
        net, images = net.to(dtype), images.to(dtype)
        expected = net(images)
        with pytest.raises(ModelError, match="change by .* leave the step out"):
            FoldNorms().fold(net, batches([images]))
        assert torch.equal(net(images), expected)


class Returns(torch.nn.Module):
    """A norm and an attention whose own numbers are part of the result, in some container."""

    def __init__(self, container):
        super().__init__()
        torch.manual_seed(0)
        self.container = container
        self.embed, self.norm = torch.nn.Linear(12, 16), torch.nn.LayerNorm(16)
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.norm2, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)
        with torch.no_grad():
            for norm in (self.norm, self.norm2):
                norm.weight.uniform_(0.1, 5)
                norm.bias.normal_()

    def forward(self, x):
        y = self.norm(self.embed(x))
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        weighted = scores.softmax(-1) @ v
        z = self.proj(weighted.transpose(1, 2).flatten(2))
        logits = self.head(self.norm2(z)).mean(1)
        return self.container(logits, {"norm": y, "q": q, "scores": scores, "weighted": weighted})


@pytest.mark.parametrize("inside", ["norm", "q", "scores", "weighted"])
@pytest.mark.parametrize(
    "container",
    [
        lambda logits, inner: {"logits": logits, "inner": inner},
        lambda logits, inner: (logits, [inner]),
    ],
)
@torch.no_grad()
def test_what_the_model_returns_itself_stays(inside, container):
    net = Returns(lambda logits, inner: container(logits, inner[inside])).eval()
    x = torch.randn(4, 6, 12)
    expected = tensors_of(net(x))
    weight = net.norm2.weight.clone()
    FoldNorms().fold(net, batches([x]))
    for found, wanted in zip(tensors_of(net(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(net.norm2.weight, weight)  # the other norm is folded


class Masked(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        torch.nn.init.normal_(self.qkv.bias)
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("alone", [0, 2])
@torch.no_grad()
def test_tokens_that_may_attend_to_nothing(dtype, alone):
    seen = torch.arange(6)[:, None] >= alone
    mask = seen.expand(6, 6) if dtype == torch.bool else torch.zeros(6, 6).where(seen, -torch.inf)
    net, x = Masked(mask).eval(), torch.randn(4, 6, 16)
    expected, proj = net(x), copy.deepcopy(net.proj)
    FoldNorms().fold(net, batches([x]))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(net.proj.weight, proj.weight)
    assert torch.equal(net.proj.bias, proj.bias) == (alone > 0)  # it takes up a shift of values


@torch.no_grad()
def test_a_fold_that_changes_another_output_is_refused(monkeypatch):
    monkeypatch.setattr(channels, "used_elsewhere", lambda *_: set())
    net, x = (
        Returns(lambda y, inner: {"logits": y, "y": inner["norm"]}).eval(),
        torch.randn(4, 6, 12),
    )
    with pytest.raises(ModelError, match="change by .* leave the step out"):
        FoldNorms().fold(net, batches([x]))


class Computed(torch.nn.Module):
    """Linears behind a norm: one weight is computed, one is a slice, one is a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(3))
        self.first = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
        self.rows = torch.nn.Parameter(torch.randn(48, 16) / 4)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = x + self.first(self.norms[0](x))
        x = x + torch.nn.functional.linear(self.norms[1](x), self.rows[:16])
        return self.head(self.norms[2](x))


@torch.no_grad()
def test_norms_in_front_of_computed_weights_stay():
    net, x = Computed().eval(), torch.randn(4, 6, 16)
    expected = net(x)
    FoldNorms().fold(net, batches([x]))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(norm.weight, torch.ones(16)) for norm in net.norms]
    assert changed == [False, False, True]


@torch.no_grad()
def test_attention_whose_weights_are_computed_stays():
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    net = torch.nn.TransformerDecoder(layer, 1).eval()
    x, memory = torch.randn(4, 5, 16), torch.randn(4, 6, 16)
    expected = net(x, memory)
    FoldNorms().fold(net, batches([(x, memory)]))
    torch.testing.assert_close(net(x, memory), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_rescaled_hidden_layer_folds_to_the_same_model():
    nets = []
    factor = torch.rand(768) * 20 + 0.05
    for rescaled in (False, True):
        torch.manual_seed(1)
        args = {"img_size": 32, "patch_size": 8, "depth": 1, "act_layer": torch.nn.ReLU}
        net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **args).eval()
        mlp = net.blocks[0].mlp
        if rescaled:  # ReLU lets a positive factor through
            mlp.fc1.weight.mul_(factor[:, None])
            mlp.fc1.bias.mul_(factor)
            mlp.fc2.weight.div_(factor)
        nets.append(net)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nets[1](images), nets[0](images), rtol=1e-3, atol=1e-4)
    for net in nets:
        FoldNorms(attention=False, norms=False).fold(net, batches([images]))
        assert [hook.op for hook in hooks.hooks(net)] == ["blocks/0/mlp/fc2/linear/0"]
    one, other = (net.blocks[0].mlp.fc2.weight for net in nets)
    used = one.abs().amax(0) > 0  # a channel that is always zero keeps its weights
    ratio = (other / one)[:, used]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_rescaled_gelu_stays_a_gelu_for_the_plan():
    net, images = model("deit")
    FoldNorms().fold(net, batches([images]))
    found, _ = find_ops(hooks.trace(net, images), len(images))
    source = next(op for op in found if "fc2" in op.name).sources[0]
    assert (source.kind, source.rescaled) == ("gelu", True)
    plan = make_plan(found, (), PTQ4ViT())
    operand = next(op for op in plan.ops if "fc2" in op.name).operands[0]
    assert operand.quantizer == "twin_gelu" and operand.options["minimum"] is None


@torch.no_grad()
def test_a_rescaled_copy_folds_to_the_same_model():
    net, images = model("deit")
    other, _ = model("deit")
    factor = torch.rand(192) * 20 + 0.05
    block = other.blocks[0]
    for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        linear.weight.div_(factor)
    torch.testing.assert_close(other(images), net(images), rtol=1e-3, atol=1e-4)
    for each in (net, other):
        FoldNorms(attention=False).fold(each, batches([images]))
    for norm in ("norm1", "norm2"):
        # One common factor is left free: the quantizer's own scale takes it up.
        ratio = getattr(other.blocks[0], norm).weight / getattr(net.blocks[0], norm).weight
        torch.testing.assert_close(ratio, ratio[:1].expand(192), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_norm_outputs_get_one_range():
    net, _ = model("vit")
    images = torch.randn(40, 3, 32, 32)  # 680 rows: enough to shift
    block = net.blocks[0]
    seen = []
    block.norm1.weight[5] *= 50  # an outlier channel
    block.attn.qkv.weight[:, 5] /= 50
    FoldNorms(attention=False).fold(net, batches([images]))
    handle = block.norm1.register_forward_hook(lambda *args: seen.append(args[2]))
    net(images)
    handle.remove()
    peak = seen[0].flatten(0, 1).abs().amax(0)
    assert peak.max() / peak.median() < 5
    # The shift centres every channel: to either side there is as much of the fifth power.
    fifth = seen[0].flatten(0, 1).double() ** 5
    assert (fifth.sum(0).abs() < 1e-3 * fifth.abs().sum(0)).all()


@pytest.mark.parametrize("rows", [40, 3000])
def test_moments_against_trying_every_centre(rows):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 3, generator=generator).double().exp() * 4 + 20  # skewed, far from zero
    channels = Channels()
    for part in x.split(17):
        channels(part.float())
    x, power = x.float().double(), 6 if rows > 512 else 2
    about = torch.tensor([1.0, 22.0, -3.0]).double()
    for order in (1, 2, 5):
        expected = ((x - about) ** order).mean(0)
        torch.testing.assert_close(channels.moment(order, about), expected)
    tried = torch.linspace(float(x.min()), float(x.max()), 20001).double()
    squares = ((x - centres[:, None, None]).square() for centres in tried.split(20))
    losses = torch.cat([(s * s * s if power == 6 else s).mean(1) for s in squares])
    step = float(tried[1] - tried[0])
    assert (channels.centre() - tried[losses.argmin(0)]).abs().max() <= step
    normal = torch.randn(200000, 1, generator=generator).double()
    normal = (normal**power).mean() ** (1 / power)
    expected = losses.amin(0) ** (1 / power) / normal
    torch.testing.assert_close(channels.reach(channels.centre()), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("unused", ["activation", "weight"])
def test_channel_scale_of_what_is_all_zero_is_one(unused):
    reach = torch.rand(5, dtype=torch.float64) + 1
    weight = torch.randn(3, 5)
    if unused == "activation":
        reach = torch.zeros_like(reach)
    else:
        weight = torch.zeros_like(weight)
    scale = channel_scale(reach, reach.square(), weight)
    assert torch.equal(scale, torch.ones(5, dtype=torch.float64))


def test_channel_scale_undoes_a_rescaling():
    weight, peak = torch.randn(8, 6).double(), torch.rand(6).double() + 0.5
    factor = torch.tensor([1, 10, 0.1, 3, 1, 100]).double()
    plain = channel_scale(peak, peak.square() / 9, weight)
    rescaled = channel_scale(peak * factor, (peak * factor).square() / 9, weight / factor)
    ratio = rescaled / plain / factor
    torch.testing.assert_close(ratio, ratio[:1].expand(6))


def test_balance_against_its_definition():
    a, b = torch.randn(2, 40, 8).double(), torch.randn(2, 40, 8).double() * 5
    left, right = a.transpose(1, 2) @ a, b.transpose(1, 2) @ b
    forward, backward = balance(left, right)
    identity = torch.eye(8).double().expand(2, 8, 8)
    torch.testing.assert_close(forward @ backward.transpose(1, 2), identity)
    new_left = forward.transpose(1, 2) @ left @ forward
    new_right = backward.transpose(1, 2) @ right @ backward
    torch.testing.assert_close(new_left, new_right, rtol=1e-2, atol=1e-1)
    trace = torch.einsum("hii->h", new_left) * torch.einsum("hii->h", new_right)
    for _ in range(20):  # no other transform does better
        other = torch.linalg.qr(torch.randn(2, 8, 8).double())[0] * (torch.rand(2, 1, 8) + 0.3)
        inverse = torch.linalg.inv(other)
        product = torch.einsum("hii->h", other.transpose(1, 2) @ left @ other) * torch.einsum(
            "hii->h", inverse @ right @ inverse.transpose(1, 2)
        )
        assert (trace <= product * 1.001).all()


def test_balance_leaves_heads_that_do_not_vary():
    varying = torch.randn(200, 8)
    x = torch.stack([varying, torch.randn(8).expand(200, 8), torch.zeros(200, 8)])[None]
    heads = Heads()
    heads(x)
    left, right = heads.covariance(False), heads.covariance(True)
    mean = varying.double().mean(0)
    torch.testing.assert_close(left[0], varying.double().T @ varying.double() / 200)
    torch.testing.assert_close(right[0], left[0] - torch.outer(mean, mean))
    assert not right[1:].any()
    forward, backward = balance(left, right)
    assert torch.equal(forward[1:], torch.eye(8).double().expand(2, 8, 8))
    assert torch.equal(backward[1:], forward[1:])
    alone = balance(left[:1], right[:1])
    torch.testing.assert_close((forward[:1], backward[:1]), alone)


@pytest.mark.parametrize("size", [1, 3, 8, 24, 64])
def test_spread_is_orthogonal_and_even(size):
    matrix = spread(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double())
    assert matrix.abs().max() <= 2**0.5 * size**-0.5 + 1e-9
