"""Graphs written so that OpenVINO's int8 kernels compute them rightly mean what they meant."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

openvino = pytest.importorskip("openvino")

from ptq4vit_plugin.integrations.device import adds_int8_pairs  # noqa: E402
from ptq4vit_plugin.integrations.openvino.convolutions import (  # noqa: E402
    rewrite_convolutions,
    wrong_convolutions,
)
from ptq4vit_plugin.integrations.openvino.heads import keep_apart  # noqa: E402
from ptq4vit_plugin.integrations.openvino.ir import EXACT, IN_FLOAT, _both_ways, core  # noqa: E402

STEP = 0.02


class Convolution(torch.nn.Module):
    """One convolution of codes with a zero point, as the exporter writes it."""

    def __init__(self, channels, kernel, stride=1, padding=0, groups=1, zero=100):
        super().__init__()
        torch.manual_seed(0)
        shape = (48, channels // groups, kernel, kernel)
        self.register_buffer("codes", torch.randint(-127, 128, shape, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(48, 1, 1, 1) / 100)
        self.how = {"stride": stride, "padding": padding, "groups": groups}
        self.zero = zero

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, STEP, self.zero, 0, 255)
        return F.conv2d(x, self.codes.float() * self.scale, torch.ones(48), **self.how)


def converted(model, example, size):
    with torch.no_grad():
        made = openvino.convert_model(model, example_input=example)
    made.reshape(size)
    return made


def run(model, x, how):
    return torch.from_numpy(core().compile_model(model, "CPU", how)(x.numpy())[0].copy())


def sqnr(expected, found):
    return 10 * torch.log10(expected.var() / (expected - found).square().mean())


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


CASES = {
    "few channels": (Convolution(32, 8, 8), True),
    "few channels, overlapping": (Convolution(48, 4, 2, 1), True),
    "enough channels": (Convolution(64, 4, 4), False),
    "an odd kernel": (Convolution(32, 7, 4), False),
    "an image's channels": (Convolution(3, 16, 16), False),
    "padded groups": (Convolution(48, 3, 1, 1, groups=2), True),
    "padded groups without a zero point": (Convolution(48, 3, 1, 1, groups=2, zero=0), False),
    "groups": (Convolution(48, 3, 1, 0, groups=2), False),
    "one channel per group": (Convolution(48, 3, 1, 1, groups=48), False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [2, -1])
def test_convolutions_are_rewritten_where_kernels_are_wrong_and_mean_the_same(case, batch):
    model, changes = CASES[case]
    channels = model.codes.shape[1] * model.how["groups"]
    x = torch.rand(2, channels, 28, 28, generator=torch.Generator().manual_seed(1)) * 5 - 2
    made = converted(model, x, [batch, *x.shape[1:]])
    before = kinds(made)
    rewrite_convolutions(made)
    assert (kinds(made) != before) == changes
    assert ("Pad" in kinds(made)) == changes
    expected = model(x)
    assert torch.allclose(run(made, x, IN_FLOAT), expected, atol=1e-4 * expected.std())
    if not adds_int8_pairs(x.device):
        assert sqnr(expected, run(made, x, EXACT)) > 60


def test_names_survive_for_the_report():
    made = converted(CASES["padded groups"][0], torch.rand(1, 48, 8, 8), [1, 48, 8, 8])
    names = [n.get_friendly_name() for n in made.get_ordered_ops() if "Conv" in n.get_type_name()]
    rewrite_convolutions(made)
    assert names == [
        n.get_friendly_name() for n in made.get_ordered_ops() if "Conv" in n.get_type_name()
    ]


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Convolution(3, 4, 4), Convolution(48, 3, 1, 1)

    def forward(self, x):
        return self.second(self.second(self.first(x)))


def test_a_wrong_kernel_is_found_and_named():
    made = converted(Two(), torch.rand(1, 3, 32, 32), [-1, 3, 32, 32])
    nodes = [n for n in made.get_ordered_ops() if n.get_type_name() == "Convolution"]
    names = [n.get_friendly_name() for n in nodes]
    seen = []

    def compute(model, x):
        _, floating = _both_ways(model, x)
        assert x.shape[0] == 1
        assert (x >= -STEP * 100 - 1e-6).all()
        seen.append(x.shape[1])
        spoilt = floating + (floating.std() * 0.01 if x.shape[1] == 48 else 0)
        return spoilt, floating

    # The last two are alike but for their input; one of them is run.
    assert wrong_convolutions(made, compute) == [names[1]]
    assert seen == [3, 48]
    assert len([n for n in made.get_ordered_ops() if n.get_type_name() == "Parameter"]) == 1
    assert wrong_convolutions(made, lambda model, x: (np.ones(1), np.ones(1))) == []


@pytest.mark.skipif(adds_int8_pairs(torch.device("cpu")), reason="pairs saturate on this CPU")
def test_integers_are_right_on_this_cpu():
    made = converted(Two(), torch.rand(1, 3, 32, 32), [-1, 3, 32, 32])
    assert wrong_convolutions(made, _both_ways) == []


class LinearAttention(torch.nn.Module):
    """EfficientViT's: the product of keys and values is the second product's operand."""

    def forward(self, x):
        q, k, v = x[:, :, :, :6].relu(), x[:, :, :, 6:12].relu(), x[:, :, :, 12:]
        q, k, v = (self.quantize(part, 0.03) for part in (q, k, v))
        return q @ self.quantize(k.transpose(-1, -2) @ v, 0.5)

    def quantize(self, x, step):
        scale = step * torch.tensor([1.0, 0.5, 0.8, 1.3])
        zero = torch.zeros(4, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, 1, -128, 127)


@pytest.mark.parametrize("batch", [2, -1])
def test_a_quantizer_per_head_is_kept_out_of_the_product(batch):
    x = torch.randn(2, 4, 9, 19, generator=torch.Generator().manual_seed(0))
    model = LinearAttention()
    made = converted(model, x, [batch, *x.shape[1:]])
    keep_apart(made)
    after = [n for n in made.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    above = {n.input_value(0).get_node().get_type_name() for n in after}
    assert "MatMul" not in above
    expected = model(x)
    # Only ties may round the other way.
    assert sqnr(expected, run(made, x, IN_FLOAT)) > 60
    compiled = core().compile_model(made, "CPU", EXACT)
    products = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "MatMul"
    ]
    assert len(products) == 2 and set(products) <= {"i8", "u8"}
    assert sqnr(expected, torch.from_numpy(compiled(x.numpy())[0].copy())) > 60
