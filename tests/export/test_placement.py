"""Quantizers that move in an OpenVINO graph round the same numbers, nearer to a product."""

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino")

import ptq4vit_plugin as ptq  # noqa: E402
from ptq4vit_plugin.integrations.openvino import ir as exporter  # noqa: E402
from ptq4vit_plugin.integrations.openvino.ir import IN_FLOAT, OpenVINOExporter, core  # noqa: E402
from ptq4vit_plugin.integrations.openvino.placement import place_quantizers  # noqa: E402

TOKENS, HEADS, WIDTH = 5, 2, 4
SIGNED = (-128, 127)


def quantize(x, scale):
    """torch's fake quantization with one scale, or one per head, dimension 1."""
    if isinstance(scale, float):
        return torch.fake_quantize_per_tensor_affine(x, scale, 0, *SIGNED)
    scale = torch.tensor(scale)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, 1, *SIGNED)


class Attention(torch.nn.Module):
    """Attention as timm writes it, its operands quantized; steps of q, k, v and of the output."""

    def __init__(self, q, k, v, out, cut="unbind"):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(6, 3 * HEADS * WIDTH)
        self.steps, self.out, self.cut = (q, k, v), out, cut

    def forward(self, x):
        x = self.qkv(x)
        if self.cut == "unbind":
            parts = x.reshape(len(x), TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = x.chunk(3, 2) if self.cut == "chunk" else x.split([8, 8, 8], 2)
            parts = [p.reshape(len(x), TOKENS, HEADS, WIDTH).transpose(1, 2) for p in parts]
        q, k, v = (quantize(p, step) for p, step in zip(parts, self.steps, strict=True))
        p = (q @ k.transpose(2, 3)).softmax(-1)
        x = torch.fake_quantize_per_tensor_affine(p, 1 / 255, 0, 0, 255) @ v
        return quantize(x.transpose(1, 2).reshape(len(x), TOKENS, HEADS * WIDTH), self.out)


def converted(model):
    example = torch.randn(3, TOKENS, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = openvino.convert_model(model, example_input=example)
    made.reshape([-1, TOKENS, 6])
    return made, example


def run(model, x):
    return core().compile_model(model, "CPU", IN_FLOAT)(x.numpy())[0].copy()


def above(node):
    """The kind of node that gives a node's first operand."""
    return node.input_value(0).get_node().get_type_name()


def quantizers(model):
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]


@pytest.mark.parametrize("cut", ["unbind", "chunk", "split"])
@pytest.mark.parametrize(
    "steps",
    [(0.02, 0.013, 0.017), ([0.02, 0.03], [0.013, 0.01], [0.017, 0.02]), (0.02, 0.013, [0.1, 0.2])],
)
def test_queries_keys_and_values_are_quantized_where_they_are_made(cut, steps):
    model = Attention(*steps, out=0.004, cut=cut).eval()
    made, x = converted(model)
    placed = made.clone()
    place_quantizers(placed)
    first, _, last = quantizers(placed)
    assert above(first) == "Add"  # the linear's bias
    assert above(last) == "MatMul"  # attention times values
    assert len(quantizers(made)) == 5
    # Steps are 0.004: everything else would be off by a step somewhere.
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(run(placed, x), expected, atol=1e-6)
    np.testing.assert_allclose(run(made, x), expected, atol=1e-6)


def test_a_quantizer_stays_where_its_operand_goes_elsewhere_too():
    class Shared(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, 2)
            return quantize(q, 0.02) @ quantize(k, 0.01).transpose(1, 2), v

    made, x = converted(Shared(0.02, 0.01, 0.1, 0.1).eval())
    before = [above(node) for node in quantizers(made)]
    place_quantizers(made)
    assert [above(node) for node in quantizers(made)] == before


def test_unsigned_codes_stay_behind_a_split_and_move_past_a_reordering():
    class Unsigned(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, 2)
            v = torch.fake_quantize_per_tensor_affine(v.transpose(1, 2), 0.01, 0, 0, 255)
            return v @ quantize(q, 0.02) @ quantize(k, 0.02).transpose(1, 2)

    model = Unsigned(0.02, 0.01, 0.1, 0.1).eval()
    made, x = converted(model)
    place_quantizers(made)
    assert [above(node) for node in quantizers(made)] == ["VariadicSplit"] * 3
    with torch.no_grad():
        np.testing.assert_allclose(run(made, x), model(x).numpy(), atol=1e-5)


def test_a_quantizer_behind_a_mean_and_factors_is_computed_right():
    """Moved up to them, OpenVINO would compute something else."""

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.factor, self.head = torch.rand(32) + 0.5, torch.nn.Linear(32, 4)

        def forward(self, x):
            return self.head(quantize((x.mean((1, 2)) * self.factor)[None], 0.01)).squeeze(0)

    model, x = Pooled().eval(), torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        made, expected = openvino.convert_model(model, example_input=x), model(x).numpy()
    made.reshape(list(x.shape))
    place_quantizers(made)
    np.testing.assert_allclose(run(made, x), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_an_exported_model_reorders_codes(family, float_model, batch, tmp_path):
    """What OpenVINO cuts into queries, keys and values are bytes."""
    x = batch(family, 2)
    config = {"algorithm": "base_ptq", "metric": "mse", "search_range": {"n": 4}, "rounds": 1}
    model = ptq.quantize(float_model(family), [x], {**config, "target": "openvino"})
    OpenVINOExporter().write(model, tmp_path / "m.xml", x, (0,))
    compiled = core().compile_model(tmp_path / "m.xml", "CPU")
    splits = [
        node.rt_info["outputPrecisions"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.rt_info["layerType"].astype(str) == "Split"
    ]
    assert splits and set(splits) == {"i8"}


def taken_away(model):
    """Without the quantizers of activations: products run in float."""
    for node in quantizers(model):
        for consumer in node.output(0).get_target_inputs():
            consumer.replace_source_output(node.input_value(0))


def test_quantizers_stay_where_products_would_run_in_float(quantized, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "place_quantizers", taken_away)
    model, x = quantized("vit", 4), batch("vit", 2)
    facts = OpenVINOExporter().write(model, tmp_path / "m.xml", x, (0,))
    assert facts["float_products"] == []
    assert facts["integer_products"] == facts["planned_products"]
