"""Ops are found by pattern: every product of the model, each with its sources."""

import pytest
import timm
import torch
from models import sqnr
from torch import nn
from torch.overrides import TorchFunctionMode

import ptq4vit_plugin as ptq
from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.timm.attention import unfuse_attention
from ptq4vit_plugin.pipeline import plan
from ptq4vit_plugin.plan import Source
from ptq4vit_plugin.record import record_of

SMALL = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, depth=2)),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=32, patch_size=8, depth=2)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=56, depths=(1, 2), num_heads=(2, 4), embed_dim=16),
    ),
}


class Chain(nn.Module):
    """Layers in a row. Not nn.Sequential, which would call the module that NNCF adds to it."""

    def __init__(self, *layers):
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class _CountCalls(TorchFunctionMode):
    """An independent count: what the model calls, whatever a graph says."""

    PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, *names):
        return sum(name in names for name in self.calls)


def _model(family):
    name, args = SMALL[family]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **args).eval()


def _example(family):
    size = SMALL[family][1]["img_size"]
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("family", SMALL)
def test_everything_the_model_calls_is_found(family):
    model, images = _model(family), _example(family)
    unfuse_attention(model)
    with _CountCalls() as counted, torch.no_grad():
        model(images)
    found, left_out = find_ops(hooks.trace(model, images), len(images))
    assert left_out == []
    kinds = [op.kind for op in found]
    assert kinds.count("linear") == counted.count("linear")
    assert kinds.count("conv2d") == counted.count("conv2d")
    assert kinds.count("matmul") == counted.count(*_CountCalls.PRODUCTS)
    sources = [source.kind for op in found for source in op.sources.values()]
    assert sources.count("softmax") == counted.count("softmax")
    assert sources.count("gelu") == counted.count("gelu")


@pytest.mark.parametrize("family", SMALL)
def test_roles(family):
    model, images = _model(family), _example(family)
    unfuse_attention(model)
    found, _ = find_ops(hooks.trace(model, images), len(images))
    roles = [op.role for op in found]
    blocks = sum(name.endswith("attn") for name, _ in model.named_modules())
    assert roles[0] == "patch_embedding"
    assert roles.count("qkv") == roles.count("qk") == roles.count("attention_v") == blocks
    for op in found:
        assert (op.role == "attention_v") == (op.sources[0].kind == "softmax")


def test_macs_are_for_one_image():
    model = Chain(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(4, 5))
    found, _ = find_ops(hooks.trace(model, torch.zeros(7, 3, 8, 8)), 7)
    assert [op.macs for op in found] == [8 * 4 * 3 * 16, 8 * 4 * 5]


def test_activations_written_out_are_recognised():
    class Quick(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            x = self.second(x * torch.sigmoid(1.702 * x))
            return self.third(torch.nn.functional.gelu(x, approximate="tanh"))

    found, _ = find_ops(hooks.trace(Quick(), torch.randn(2, 4)), 2)
    assert [op.sources[0].kind for op in found] == ["image", "silu", "gelu_tanh"]
    assert found[1].sources[0].minimum_scale == 1.702


@pytest.mark.parametrize(
    ("function", "lowest"),
    [
        (nn.GELU(), -0.16997),
        (nn.GELU("tanh"), -0.17004),
        (timm.layers.QuickGELU(), -0.27846 / 1.702),
        (nn.SiLU(), -0.27846),
        (nn.Hardswish(), -0.375),
        (nn.Mish(), -0.30884),
    ],
)
def test_twins_cover_the_minimum_of_the_function(function, lowest):
    chosen = plan(Chain(nn.Linear(4, 4), function, nn.Linear(4, 4)), torch.randn(2, 4))
    operand = chosen.ops[-1].operands[0]
    assert operand.quantizer == "twin_gelu"
    assert operand.options["minimum"] == pytest.approx(lowest, abs=1e-5)
    x = torch.linspace(-10, 0, 100_001, dtype=torch.float64)
    assert operand.options["minimum"] == pytest.approx(function(x).min().item(), abs=1e-6)


@pytest.mark.parametrize("function", [nn.ReLU(), nn.ReLU6(), nn.Sigmoid()])
def test_what_is_never_negative_is_unsigned(function):
    chosen = plan(Chain(nn.Linear(4, 4), function, nn.Linear(4, 4)), torch.randn(2, 4))
    operand = chosen.ops[-1].operands[0]
    assert (operand.quantizer, operand.options) == ("uniform", {"signed": False})


class Weighted(nn.Module):
    """A product with softmax's output on one side, or a linear of it."""

    def __init__(self, side):
        super().__init__()
        self.side, self.mix = side, nn.Linear(4, 4)

    def forward(self, x):
        p = self.mix(x).softmax(-1)
        return {"left": lambda: p @ x.mT, "right": lambda: x @ p.mT, "linear": lambda: self.mix(p)}[
            self.side
        ]()


UNSIGNED = {"signed": False}


@pytest.mark.parametrize(
    ("algorithm", "softmax", "side", "expected"),
    [
        ("ptq4vit", False, "left", ("uniform", UNSIGNED)),
        ("ptq4vit", False, "linear", ("uniform", UNSIGNED)),
        ("ptq4vit", False, "right", ("uniform", {})),
        ("ptq4vit", "uniform", "left", ("uniform", {})),
        ("ptq4vit", True, "left", ("twin_softmax", {})),
        ("ptq4vit", "numerator", "left", ("numerator", {})),
        # A row's factor can be taken out of the left side of a product of activations only.
        ("ptq4vit", "numerator", "right", ("uniform", {})),
        ("ptq4vit", "numerator", "linear", ("uniform", UNSIGNED)),
        # One scale per tensor and a zero point: for what a bias follows.
        ("ptq4vit", "piecewise", "left", ("uniform", UNSIGNED)),
        ("ptq4vit", "piecewise", "right", ("uniform", {})),
        ("ptq4vit", "piecewise", "linear", ("piecewise", {})),
        # The paper's baseline is signed.
        ("base_ptq", None, "left", ("uniform", {})),
    ],
)
def test_what_softmax_gives_is_unsigned_without_a_twin(algorithm, softmax, side, expected):
    twin = {} if softmax is None else {"twin": {"softmax": softmax}}
    chosen = plan(Weighted(side), torch.randn(2, 3, 4), {"algorithm": algorithm, **twin})
    operands = [o for op in chosen.ops for o in op.operands if o.source == "softmax"]
    assert [(o.quantizer, o.options) for o in operands] == [expected]


def test_a_shared_weight_is_quantized_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    chosen = plan(Twice(), torch.randn(2, 4))
    weights = [op.operands[1] for op in chosen.ops]
    assert [w.parameter for w in weights] == ["layer.weight"] * 2
    assert weights[0].quantizer == "uniform" and weights[1].quantizer is None
    assert "layer/linear/0" in weights[1].reason and chosen.macs_quantized == 1


def test_what_shares_its_weight_with_an_ignored_op_stays_in_float():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()))

    for ignored, kept in (("a/linear/0", "b/linear/0"), ("b/linear/0", "a/linear/0")):
        compression = {"algorithm": "ptq4vit", "ignored_scopes": [ignored]}
        chosen = plan(Tied(), torch.randn(2, 4), compression)
        assert [op.name for op in chosen.ops] == ["c/linear/0"]
        reasons = {op.name: op.reason for op in chosen.left_out}
        assert reasons.keys() == {ignored, kept} and ignored in reasons[kept]
        assert chosen.macs_quantized == pytest.approx(1 / 3)


def test_computed_weight_is_quantized_where_the_op_takes_it():
    class Normalised(nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    found, left_out = find_ops(hooks.trace(Chain(Normalised(4, 3)), torch.randn(2, 4)), 2)
    assert left_out == []
    assert [(op.kind, op.macs, op.sources[1]) for op in found] == [("linear", 12, Source("weight"))]


def test_weight_that_is_a_buffer_has_no_parameter_to_hook():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 4))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.kernel)

    found, _ = find_ops(hooks.trace(Fixed(), torch.randn(2, 4)), 2, {"kernel"})
    assert [op.sources[1] for op in found] == [Source("weight")]


def test_weight_made_of_the_image_is_left_out():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.mix(x))

    found, left_out = find_ops(hooks.trace(Dynamic(), torch.randn(2, 4)), 2)
    assert [op.name for op in found] == ["mix/linear/0"]
    assert [op.reason for op in left_out] == ["its weight depends on the image"]


def test_what_no_image_reaches_is_left_out():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 2))
            self.bias = nn.Linear(2, 4)

        def forward(self, x):
            return (x @ torch.ones(4, 4)) + self.bias(self.table).sum(0)

    found, left_out = find_ops(hooks.trace(Biased(), torch.randn(3, 4)), 3)
    assert [(op.name, op.sources[1].kind, op.macs) for op in found] == [
        ("/matmul/0", "constant", 16)
    ]
    assert [op.name for op in left_out] == ["bias/linear/0"]
    assert "no image" in left_out[0].reason


@pytest.mark.parametrize("dtype", [torch.complex64, torch.long])
def test_products_of_numbers_that_have_no_quantizer_stay_as_they_are(dtype):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            self.register_buffer("matrix", torch.ones(16, 16).triu().to(dtype))

        def forward(self, x):
            x = self.first(x)
            product = (10 * x).to(dtype) @ self.matrix
            return self.last(x + product.real / 10 if dtype.is_complex else x + product / 10)

    torch.manual_seed(0)
    model, x = Product().eval(), torch.randn(4, 5, 8)
    quantized = ptq.quantize(model, [x], {"algorithm": "ptq4vit", "rounds": 1})
    chosen = record_of(quantized).plan
    assert [op.name for op in chosen.ops] == ["first/linear/0", "last/linear/0"]
    assert [(op.name, op.macs) for op in chosen.left_out] == [("/matmul/0", 5 * 16 * 16)]
    assert str(dtype).removeprefix("torch.") in chosen.left_out[0].reason
    assert sqnr(model(x), quantized(x)) > 25


def test_a_gated_product_is_no_activation_output():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.c(torch.nn.functional.silu(self.a(x)) * self.b(x))

    found, _ = find_ops(hooks.trace(Gated(), torch.randn(2, 4)), 2)
    assert found[-1].sources[0].kind == "activation"


def test_softmax_is_followed_through_masking_and_joining_only():
    class Mixed(nn.Module):
        def forward(self, x):
            p = x.softmax(-1)
            halves = torch.cat([p[:, :1], p[:, 1:]], 1).masked_fill(x < 0, 0)
            return p @ x, halves @ x, (p * x) @ x, p.masked_fill(x < 0, 2.0) @ x

    found, _ = find_ops(hooks.trace(Mixed(), torch.randn(2, 3, 3)), 2)
    kinds = [op.sources[0].kind for op in found]
    assert kinds == ["softmax", "softmax", "activation", "activation"]


def test_left_out_convolutions_have_macs():
    model = Chain(nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Conv2d(5, 2, 1))
    found, left_out = find_ops(hooks.trace(model, torch.randn(2, 3, 4, 4)), 2)
    assert [op.macs for op in found] == [64 * 5 * 2]
    assert [(op.kind, op.macs) for op in left_out] == [("conv_transpose2d", 16 * 3 * 5 * 4)]


@pytest.mark.parametrize(
    ("kind", "macs", "function"),
    [
        ("linalg_multi_dot", 0, lambda a, w: torch.linalg.multi_dot([a, w, w])),
        ("chain_matmul", 0, lambda a, w: torch.chain_matmul(a, w)),
        ("addmm_", 64, lambda a, w: torch.zeros(2, 8).addmm_(a, w)),
        ("addmv", 8, lambda a, w: a + torch.addmv(a[:, 0], a, w[0])[:, None]),
        ("_sparse_mm", 64, lambda a, w: torch.sparse.mm(a, w)),
        ("inner", 64, lambda a, w: torch.inner(a, w)),
        ("linear", 64, lambda a, w: torch.ops.aten.linear.default(a, w)),
        ("matmul", 64, lambda a, w: torch.ops.aten.matmul.default(a, w)),
        ("matmul", 64, lambda a, w: torch.ops.aten.mm.default(a, w)),
        ("gru_cell", 0, lambda a, w: nn.GRUCell(8, 8)(a)),
        ("rnn_tanh_cell", 0, lambda a, w: nn.RNNCell(8, 8)(a)),
        ("rnn_relu_cell", 0, lambda a, w: nn.RNNCell(8, 8, nonlinearity="relu")(a)),
        ("lstm_cell", 0, lambda a, w: nn.LSTMCell(8, 8)(a)[0]),
    ],
)
def test_products_that_are_not_quantized_are_listed(kind, macs, function):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return function(self.linear(x), self.weight) + 0

    found, left_out = find_ops(hooks.trace(Product(), torch.randn(2, 8)), 2)
    assert [op.name for op in found] == ["linear/linear/0"]
    assert [(op.kind, op.macs) for op in left_out] == [(kind, macs)]


@pytest.mark.parametrize("named", [True, False])
def test_images_are_an_argument_that_forward_names(named):
    class Star(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, *args, scale=None):
            return self.linear(args[0])

    class Named(Star):
        def forward(self, x):
            return super().forward(x)

    x = torch.randn(2, 8)
    if named:
        assert [op.name for op in plan(Named(), x).ops] == ["linear/linear/0"]
        return
    with pytest.raises(ModelError, match=r"^model: none of .* names is a tensor.*forward\(self, x"):
        plan(Star(), x)


def test_every_spelling_of_a_matrix_product_is_found():
    class Spelled(nn.Module):
        def forward(self, x):
            x = torch.matmul(x, x.mT) + torch.linalg.matmul(x, other=x.mT)
            return x @ torch.bmm(x, x)

    found, left_out = find_ops(hooks.trace(Spelled(), torch.randn(2, 3, 3)), 2)
    assert [op.kind for op in found] == ["matmul"] * 4 and left_out == []


def test_fused_attention_without_a_switch_is_left_out_with_its_reason():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            x = self.proj(x)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    found, left_out = find_ops(hooks.trace(Fused(), torch.randn(2, 1, 5, 4)), 2)
    assert [op.kind for op in found] == ["linear"]
    assert [op.kind for op in left_out] == ["scaled_dot_product_attention"]


class Cut(nn.Module):
    """Products whose first factor is made by a linear and a function, the second by the same."""

    def __init__(self, cut):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.cut = cut

    def forward(self, x):
        q = self.cut(self.linear(x))
        return q @ q.mT


@pytest.mark.parametrize(
    ("cut", "heads"),
    [
        # [images, tokens, channels] -> [images, heads, tokens, channels of a head]
        (lambda y: y.reshape(2, 4, 3, 4).transpose(1, 2), 1),
        (lambda y: y.view(2, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)[0], 1),
        # channel attention: tokens are the inner dimension
        (lambda y: y.unflatten(-1, (3, 4)).permute(0, 2, 3, 1), 1),
        # windows beside the heads, before and behind them
        (lambda y: y.reshape(2, 2, 2, 3, 4).permute(0, 1, 3, 2, 4), 2),
        (lambda y: y.reshape(2, 2, 2, 3, 4).permute(0, 3, 1, 2, 4), 1),
        # heads spend some time in the batch
        (
            lambda y: torch.tanh(y.view(2, 4, 3, 4).transpose(1, 2).reshape(6, 4, 4)).view(
                2, 3, 4, 4
            ),
            1,
        ),
        # blocks of tokens are no heads, nor is what is joined with the batch or moved out of it
        (lambda y: y.reshape(2, 2, 2, 12), None),
        (lambda y: y.view(2, 4, 3, 4).transpose(1, 2).reshape(6, 4, 4), None),
        (lambda y: y.view(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 2, 2, 4), None),
        (lambda y: y[:, None], None),
    ],
)
def test_heads_are_cut_from_channels(cut, heads):
    model = Cut(cut)
    found, _ = find_ops(hooks.trace(model, torch.randn(2, 4, 12)), 2)
    assert found[-1].kind == "matmul" and found[-1].heads == heads
