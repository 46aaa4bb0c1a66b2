"""A zero point that moves into the bias changes no number; one that cannot stays where it is."""

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino")

import ptq4vit_plugin as ptq  # noqa: E402
from ptq4vit_plugin.integrations.openvino.ir import IN_FLOAT, OpenVINOExporter, core  # noqa: E402
from ptq4vit_plugin.integrations.openvino.zero_points import fold_zero_points  # noqa: E402

SCALE, ZERO = 0.02, 90


class Quantized(torch.nn.Module):
    """One layer, its weight in int8 and its input in codes of 0 to 255 with a zero point."""

    def __init__(self, layer, zero=ZERO, codes=(0, 255), twice=False):
        super().__init__()
        self.layer, self.zero, self.codes, self.twice = layer, zero, codes, twice
        with torch.no_grad():
            step = layer.weight.abs().flatten(1).amax(1) / 127
            self.steps = step, torch.zeros(len(step), dtype=torch.int32)

    def forward(self, x):
        q = torch.fake_quantize_per_tensor_affine(x, SCALE, self.zero, *self.codes)
        layer = self.layer
        w = torch.fake_quantize_per_channel_affine(layer.weight, *self.steps, 0, -128, 127)
        if isinstance(layer, torch.nn.Linear):
            out = torch.nn.functional.linear(q, w, layer.bias)
        else:
            out = torch.nn.functional.conv2d(q, w, layer.bias, layer.stride, layer.padding)
        return (out, q.sum(1)) if self.twice else out


def linear(bias):
    torch.manual_seed(0)
    return torch.nn.Linear(12, 7, bias=bias), torch.randn(2, 5, 12)


def convolution(bias, padding=0):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 6, 4, stride=4, padding=padding, bias=bias)
    return layer, torch.randn(2, 3, 16, 16)


def converted(model, x):
    with torch.no_grad():
        return openvino.convert_model(model.eval(), example_input=x)


def lowest(model):
    """What the quantizer of the model's input gives for its lowest code."""
    (node,) = (n for n in model.get_ordered_ops() if n.get_type_name() == "FakeQuantize")
    return node.input_value(3).get_node().get_data().item()


@pytest.mark.parametrize("case", [linear(True), linear(False), convolution(True)])
def test_the_product_without_a_zero_point_gives_the_same(case):
    model, x = Quantized(case[0]), case[1]
    made = converted(model, x)
    assert lowest(made) == pytest.approx(-ZERO * SCALE)
    fold_zero_points(made)
    assert lowest(made) == 0
    got = core().compile_model(made, "CPU", IN_FLOAT)(x.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "model, x",
    [
        # Padding is zero, and not the code that stands for it.
        (Quantized(convolution(True, padding=1)[0]), convolution(True)[1]),
        # The sum takes the numbers themselves.
        (Quantized(linear(True)[0], twice=True), linear(True)[1]),
        # Signed codes have no zero point.
        (Quantized(linear(True)[0], 0, (-128, 127)), linear(True)[1]),
    ],
)
def test_what_has_to_stay_stays(model, x):
    made = converted(model, x)
    before = lowest(made)
    fold_zero_points(made)
    assert lowest(made) == before < 0


def test_a_weight_that_is_made_while_the_model_runs_keeps_its_zero_point():
    class Computed(Quantized):
        def forward(self, x):
            q = torch.fake_quantize_per_tensor_affine(x, SCALE, ZERO, 0, 255)
            return torch.nn.functional.linear(q, self.layer.weight * x.mean())

    made = converted(Computed(linear(True)[0]), linear(True)[1])
    before = lowest(made)
    fold_zero_points(made)
    assert lowest(made) == before < 0


def test_an_exported_model_has_no_zero_points(float_model, batch, tmp_path):
    """Linears and the patch embedding of `ptq4vit_plus`; OpenVINO fuses what is behind them."""
    x = batch("vit", 4)
    config = {"algorithm": "ptq4vit_plus", "search_range": {"n": 4}, "rounds": 1}
    model = ptq.quantize(float_model("vit"), [x], {**config, "target": "openvino"})
    OpenVINOExporter().write(model, tmp_path / "m.xml", x, (0,))
    made = core().read_model(tmp_path / "m.xml")
    quantizers = [n for n in made.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    # Image and head; per block both norms, queries with keys and values, softmax, heads, GELU.
    assert len(quantizers) == 2 + 2 * 6
    for node in quantizers:
        low, high = (node.input_value(port).get_node().get_data().ravel()[0] for port in (3, 4))
        assert low == 0 or low / high == pytest.approx(-128 / 127)
