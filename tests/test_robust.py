"""Models as people use them: other batches and sizes, features, half precision, wrappers."""

import copy

import nncf
import pytest
import timm
import torch
from calls import PRODUCTS, Calls
from timm.layers.halo_attn import HaloAttn
from torch import nn

import ptq4vit_plugin
from ptq4vit_plugin.algorithms.gradient import output_loss
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf.batch import Batch, batches
from ptq4vit_plugin.integrations.nncf.passes import tensors_of
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.pipeline import plan
from ptq4vit_plugin.record import record_of

SHORT = {"algorithm": "ptq4vit", "search_range": {"alpha": 0.5, "n": 3}, "rounds": 1}
PLUS = SHORT | {"algorithm": "ptq4vit_plus"}
RECON = SHORT | {"algorithm": "ptq4vit_recon", "reconstruct": {"iterations": 3, "finish": 3}}
TINY = dict(img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=3, num_classes=10)


def vit(**args):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(TINY | args)).eval()


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(model, result, x):
    """Mean squared difference over the variance, the largest over all outputs."""
    with torch.no_grad():
        pairs = list(zip(*map(listed, (model(x), result(x))), strict=True))
    return max(float((b.float() - a.float()).square().mean() / a.float().var()) for a, b in pairs)


def listed(output):
    return output if isinstance(output, (list, tuple)) else [output]


def test_another_batch_and_image_size():
    model = vit(dynamic_img_size=True)
    result = ptq4vit_plugin.quantize(model, [images()], SHORT)
    assert noise(model, result, images(5)) < 0.01
    assert noise(model, result, images(1, size=48)) < 0.01


def test_features_and_feature_maps(tmp_path):
    maps = timm.create_model("pvt_v2_b0", features_only=True, depths=(1, 1, 1, 1)).eval()
    # timm's list of feature maps is a container: it calls all its children in a row.
    assert isinstance(maps, nn.ModuleDict)
    for model in (vit(num_classes=0), maps):
        result = ptq4vit_plugin.quantize(model, [images()], SHORT)
        assert noise(model, result, images()) < 0.01
        path = ptq4vit_plugin.save(result, tmp_path / "model.safetensors")
        again = ptq4vit_plugin.load(path, copy.deepcopy(model))
        assert noise(result, again, images()) == 0


def test_a_bias_that_is_a_buffer():
    model = vit()
    bias = torch.randn(10)
    del model.head.bias
    model.head.register_buffer("bias", bias)
    result = ptq4vit_plugin.quantize(model, [images()], SHORT | {"algorithm": "ptq4vit_plus"})
    assert torch.equal(result.head.bias, bias)
    assert noise(model, result, images()) < 0.01


def test_labels_need_class_scores():
    compression = SHORT | {"gradient": {"kind": "labels"}}
    data = [(images(), torch.tensor([0, 1, 2]))]
    with pytest.raises(DataError, match="no class scores"):
        ptq4vit_plugin.quantize(vit(num_classes=0), data, compression)


def test_output_probe_is_the_gauss_newton_diagonal():
    """Against the Jacobian of a small map, averaged over many probes."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 3, generator=generator), torch.randn(3, generator=generator)
    jacobian = torch.autograd.functional.jacobian(lambda x: (weight @ x).tanh(), x)
    squares = torch.zeros(3)
    probes = 4000
    for _ in range(probes):
        leaf = x.clone().requires_grad_()
        y = (weight @ leaf).tanh()
        output_loss([y[:2], y[2:]], [generator]).backward()
        squares += leaf.grad.square() / probes
    torch.testing.assert_close(squares, jacobian.square().sum(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["uniform", "asymmetric"])
def test_half_precision(dtype, quantizer, tmp_path):
    compression = SHORT | {"activations": {"quantizer": quantizer}}
    full = vit()
    x = images()
    expected = noise(full, ptq4vit_plugin.quantize(full, [x], compression), x)
    model = copy.deepcopy(full).to(dtype)
    x = x.to(dtype)
    result = ptq4vit_plugin.quantize(model, [x], compression)
    assert result(x).dtype == dtype
    # Quantizers that rounded x / scale to bfloat16 would quadruple the noise.
    assert noise(model, result, x) < 2 * expected
    again = ptq4vit_plugin.load(
        ptq4vit_plugin.save(result, tmp_path / "model.safetensors"), copy.deepcopy(model)
    )
    assert noise(result, again, x) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folds_in_half_precision(dtype, tmp_path):
    compression = SHORT | {"algorithm": "ptq4vit_plus"}
    full, x = vit(), images()
    with torch.no_grad():
        for parameter in full.parameters():  # norms and biases that are not 1 and 0
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = noise(full, ptq4vit_plugin.quantize(full, [x], compression), x)
    model, x = copy.deepcopy(full).to(dtype), x.to(dtype)
    result = ptq4vit_plugin.quantize(model, [x], compression)
    assert result(x).dtype == dtype
    assert noise(model, result, x) < 2 * expected
    path = ptq4vit_plugin.save(result, tmp_path / "model.safetensors")
    assert noise(result, ptq4vit_plugin.load(path, copy.deepcopy(model)), x) == 0


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_the_model_inside_a_wrapper_is_quantized(wrap):
    model = vit()
    result = ptq4vit_plugin.quantize(wrap(model), [images()], SHORT)
    assert type(result) is type(model)
    assert noise(model, result, images()) < 0.01


def test_sequential_with_multihead_attention(tmp_path):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(24, 3, 48, activation="gelu", batch_first=True)
    model = nn.Sequential(nn.Conv2d(3, 24, 8, 8), Tokens(), encoder, nn.Linear(24, 4)).eval()
    compression = SHORT | {"gradient": {"kind": "output"}}
    result = ptq4vit_plugin.quantize(model, [images()], compression)
    roles = [record.role for record in ptq4vit_plugin.describe(result)]
    assert roles.count("qk") == roles.count("attention_v") == 1
    assert noise(model, result, images()) < 0.01
    path = ptq4vit_plugin.save(result, tmp_path / "model.safetensors")
    assert noise(result, ptq4vit_plugin.load(path, copy.deepcopy(model)), images()) == 0


@pytest.mark.parametrize(
    "attention",
    [
        lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=1),
        lambda: timm.layers.MultiQueryAttention2d(16, num_heads=2),
        lambda: timm.layers.Attention2d(16, num_heads=2),
        lambda: timm.layers.NonLocalAttn(16),
        lambda: timm.layers.GlobalContext(16),
    ],
)
def test_a_model_of_timm_layers_at_another_image_size(attention):
    """Scales fit any number of windows, blocks and tokens."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), attention(), *head).eval()
    assert_all_products_are_quantized(model, images())
    result = ptq4vit_plugin.quantize(model, [images()], SHORT)
    assert noise(model, result, images()) < 0.01
    assert noise(model, result, images(2, size=48)) < 0.02


def assert_all_products_are_quantized(model, x):
    chosen = plan(model, x)
    prepared = copy.deepcopy(model)
    prepare(prepared, Batch((x,), {}))
    with Calls() as calls, torch.no_grad():
        prepared(x)
    kinds = [op.kind for op in chosen.ops]
    assert chosen.left_out == () and kinds.count("linear") == calls.count["linear"]
    assert kinds.count("matmul") == sum(calls.count[name] for name in PRODUCTS) > 0


def test_a_wrapper_for_data_parallel_training(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = vit()
        wrapped = nn.parallel.DistributedDataParallel(model)
        result = ptq4vit_plugin.quantize(wrapped, [images()], SHORT)
    finally:
        torch.distributed.destroy_process_group()
    assert type(result) is type(model)
    assert noise(model, result, images()) < 0.01


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Function(nn.Module):
    """A small MLP on tokens, and any function of the scores and the arguments around it."""

    def __init__(self, result, *, before=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.result = nn.Linear(12, 24), nn.Linear(24, 6), result
        self.before = before

    def forward(self, x, *rest, **named):
        x = x if self.before is None else self.before(x)
        return self.result(self.head(nn.functional.gelu(self.body(x))), *rest, **named)


def tokens(count=8, seed=1):
    return torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compression", [SHORT, PLUS])
@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (lambda y: {"logits": y}, "output"),
        (lambda y: {"logits": y.transpose(1, 2).unflatten(2, (5, 1))}, "output"),
        (lambda y: {"logits": y[:, 0, 0]}, "output"),
        (lambda y: {"loss": y.square().mean(), "scores": y.mean(1)}, "fisher"),
        (lambda y: (y.square().mean(), y), "output"),
    ],
)
def test_results_of_any_rank_are_weighed_by_what_they_are(result, kind, compression):
    """As the same numbers are when the model returns nothing else, and by the gradient given."""
    net = Function(result).eval()
    plain = Function(lambda y: [x for x in tensors_of(result(y)) if x.ndim][0]).eval()
    found = ptq4vit_plugin.quantize(net, [tokens()], compression)
    kind = kind if compression is SHORT else "output"  # which the other weighs everything by
    explicit = compression | {"gradient": {"kind": kind}}
    expected = ptq4vit_plugin.quantize(plain, [tokens()], explicit)
    with torch.no_grad():
        (*_, found), expected = tensors_of(found(tokens())), expected(tokens())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_single_number_is_no_output_of_an_image():
    with pytest.raises(ModelError, match="single numbers only"):
        ptq4vit_plugin.quantize(Function(lambda y: y.mean()).eval(), [tokens()], SHORT)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Function(lambda y: y.mean(1))

    def forward(self, scale, x):
        return self.inner(x * scale)


@pytest.mark.parametrize("compression", [SHORT, PLUS])
def test_a_number_in_front_of_the_images(compression):
    factor = torch.tensor(0.5)
    found = ptq4vit_plugin.quantize(Scaled().eval(), [(factor, tokens())], compression)
    named = {"x": tokens(), "scale": factor}
    expected = ptq4vit_plugin.quantize(Scaled().eval(), [named], compression)
    with torch.no_grad():
        assert torch.equal(found(factor, tokens()), expected(**named))
    assert record_of(found).images == 8


def stepped(y, t):
    return y.mean(1) * (1 + t.float()[:, None])


def test_an_integer_vector_that_is_an_argument():
    model, t = Function(stepped).eval(), torch.arange(8)
    named = [{"x": tokens(), "t": t}]
    expected = ptq4vit_plugin.quantize(model, named, SHORT)
    items = [{"pixels": tokens(), "step": t}]
    dataset = nncf.Dataset(items, lambda item: (item["pixels"], item["step"]))
    found = ptq4vit_plugin.quantize(model, dataset, SHORT)
    with torch.no_grad():
        assert torch.equal(found(tokens(), t), expected(tokens(), t))
    assert noise(lambda x: model(x, t), lambda x: found(x, t), tokens()) < 0.01
    for pair in ([(tokens(), t)], nncf.Dataset([(tokens(), t)])):
        with pytest.raises(DataError, match=r"argument: 't'; .* taken as labels: give a dict"):
            ptq4vit_plugin.quantize(model, pair, SHORT)


def test_labels_of_a_shuffled_dataset_are_those_of_its_images():
    x = tokens(12)
    pairs = torch.utils.data.TensorDataset(x, x[:, 0, 0].gt(0).long())
    loader = torch.utils.data.DataLoader(pairs, 4, shuffle=True)
    for batch in batches(nncf.Dataset(loader, lambda item: item[0])):
        assert torch.equal(batch.args[0][:, 0, 0].gt(0).long(), batch.labels)


@pytest.mark.parametrize("data", [{"pixel_values": tokens()}, {"x": tokens(), "y": tokens()}])
def test_arguments_that_the_model_does_not_have(data):
    model = nn.Sequential(nn.Linear(12, 6)) if "y" in data else vit()
    with pytest.raises(DataError, match="cannot take calibration images.*argument"):
        ptq4vit_plugin.quantize(model, [data], SHORT)


def in_place(x):
    x -= 0.5
    x /= 0.25
    return x


@pytest.mark.parametrize("compression", [SHORT, PLUS, RECON])
def test_a_model_that_writes_into_its_images(compression):
    data, kept = [tokens(), tokens(seed=2)], [tokens(), tokens(seed=2)]
    writing = Function(lambda y: y.mean(1), before=in_place).eval()
    other = Function(lambda y: y.mean(1), before=lambda x: (x - 0.5) / 0.25).eval()
    found = ptq4vit_plugin.quantize(writing, data, compression)
    assert all(map(torch.equal, data, kept))
    expected = ptq4vit_plugin.quantize(other, kept, compression)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens()), expected(tokens()), rtol=1e-6, atol=1e-6)


def test_inference_mode():
    model = vit()
    with torch.no_grad():
        expected = ptq4vit_plugin.quantize(model, [images()], SHORT)(images())
    with torch.inference_mode():
        made = images(), torch.tensor([0, 1, 2])
        inside = ptq4vit_plugin.quantize(model, [made], SHORT)
    for result in (inside, ptq4vit_plugin.quantize(model, [made], SHORT)):
        with torch.no_grad():
            assert torch.equal(result(images()), expected)
        assert not any(value.is_inference() for value in result.state_dict().values())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 6)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("compression", [SHORT, PLUS, RECON])
def test_a_mask_of_minus_infinity(compression):
    hidden = torch.arange(5).expand(5, 5) > 2
    hidden[0] = True  # this token attends to nothing
    mask = torch.zeros(8, 1, 5, 5).masked_fill(hidden, -torch.inf)
    model = Masked().eval()
    result = ptq4vit_plugin.quantize(model, [{"x": tokens(), "mask": mask}], compression)
    assert noise(lambda x: model(x, mask), lambda x: result(x, mask), tokens()) < 0.01
    for value in (torch.nan, torch.inf):
        mask[0, 0, 0, 0] = value
        with pytest.raises(DataError, match="NaN or infinite"):
            ptq4vit_plugin.quantize(model, [(tokens(), mask)], compression)
    with pytest.raises(DataError, match="NaN or infinite"):
        ptq4vit_plugin.quantize(model, [tokens() - torch.inf], compression)


class Weighted(nn.Module):
    """One matrix for all images, which einsum repeats."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 24), nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(1, 24, 8) / 5)

    def forward(self, x):
        return self.head(torch.einsum("bnc,bcd->bnd", self.body(x), self.weight))


def test_an_einsum_with_one_matrix_for_all_images():
    model = Weighted().eval()
    result = ptq4vit_plugin.quantize(model, [tokens()], SHORT)
    assert len(ptq4vit_plugin.describe(result)) == 3
    assert noise(model, result, tokens(5, seed=4)) < 0.01


def test_models_that_cannot_be_quantized():
    with pytest.raises(ModelError, match="TorchScript"):
        ptq4vit_plugin.quantize(torch.jit.script(nn.Linear(3, 3)), [torch.randn(2, 3)])
    with pytest.raises(ModelError, match="no transformer op"):
        ptq4vit_plugin.quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [images()])
    with pytest.raises(ModelError, match="no transformer op"):
        ptq4vit_plugin.quantize(nn.Identity(), [images()])


def test_hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    result = ptq4vit_plugin.quantize(model, [images()], SHORT)
    roles = [record.role for record in ptq4vit_plugin.describe(result)]
    assert roles.count("qk") == roles.count("attention_v") == 1
