"""ONNX and OpenVINO files mean what the simulation computes, and run as integers."""

from collections import Counter

import numpy as np
import pytest
import torch

import ptq4vit_plugin as ptq
from ptq4vit_plugin.errors import ExportError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.exporting import exporter_of
from ptq4vit_plugin.integrations.device import adds_int8_pairs
from ptq4vit_plugin.integrations.lowering import take_apart
from ptq4vit_plugin.integrations.qdq import qdq_model
from ptq4vit_plugin.record import record_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

from ptq4vit_plugin.integrations.openvino.ir import core  # noqa: E402

FORMATS = {"onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture(scope="module")
def exported(quantized, batch, tmp_path_factory):
    """`exported(format, family, bits)`: path and report; written once."""
    made = {}

    def get(format, family="vit", bits=8):
        key = (format, family, bits)
        if key not in made:
            path = tmp_path_factory.mktemp(format) / f"model{FORMATS[format]}"
            images = batch(family, 8, seed=1)
            made[key] = path, ptq.export(quantized(family, bits), path, format, images)
        return made[key]

    return get


@pytest.mark.parametrize(("family", "bits"), [("vit", 8), ("vit", 3), ("swin", 6)])
@pytest.mark.parametrize(("per_tensor", "unsigned"), [(False, False), (True, False), (True, True)])
def test_plain_fake_quantize_is_the_simulation(
    family, bits, per_tensor, unsigned, quantized, batch
):
    model, x = quantized(family, bits), batch(family, 8, seed=1)
    lowered, _ = qdq_model(model, per_tensor, unsigned)
    selected, _ = qdq_model(model, per_tensor, unsigned, selected=True)
    with torch.no_grad():
        assert logit_sqnr(model(x), lowered(x)) > 30
        assert torch.equal(selected(x), lowered(x))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("per_tensor", "unsigned"), [(False, False), (True, False), (True, True)])
def test_weights_that_are_computed_keep_a_scale_per_output_channel(per_tensor, unsigned, biased):
    class Computed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("basis", torch.randn(9, 8) * torch.logspace(-2, 2, 9)[:, None])
            self.conv = torch.nn.Conv2d(3, 8, 1)
            self.head = torch.nn.Linear(9, 5)
            # As large as the products, whose scales must not be multiplied by them.
            self.inner = torch.randn(8) * torch.logspace(-2, 2, 8) if biased else None
            self.outer = torch.randn(9) * torch.logspace(0, 4, 9) if biased else None

        def forward(self, x):
            kernel = self.conv.weight * torch.logspace(-2, 2, 8)[:, None, None, None]
            x = torch.nn.functional.conv2d(x, kernel, self.inner).mean(3).transpose(1, 2)
            return self.head(torch.nn.functional.linear(x, self.basis, bias=self.outer)).mean(1)

    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    config = {"algorithm": "base_ptq", "metric": "mse", "search_range": {"n": 10}, "rounds": 1}
    model = ptq.quantize(Computed().eval(), [x], config)
    assert sum(op.operands[1].parameter is None for op in record_of(model).plan.ops) == 2
    lowered, _ = qdq_model(model, per_tensor, unsigned)
    with torch.no_grad():
        assert logit_sqnr(model(x), lowered(x)) > 30


def test_float_arithmetic_is_right_behind_a_sum_with_a_convolution(tmp_path):
    """OpenVINO's own is not where the batch is dynamic, as it is in the file."""

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
            self.first, self.second = torch.nn.Conv2d(16, 16, 1), torch.nn.Conv2d(16, 16, 1)
            self.norm = torch.nn.BatchNorm2d(16)
            torch.nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
            torch.nn.init.normal_(self.norm.running_mean)
            self.head = torch.nn.Linear(16, 10)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.first(x)
            return self.head((x + self.second(self.norm(x))).mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    config = {"algorithm": "base_ptq", "metric": "mse", "search_range": {"n": 4}, "rounds": 1}
    model = ptq.quantize(Residual().eval(), [x], config)
    path = tmp_path / "model.xml"
    assert ptq.export(model, path, "openvino", x).exact_sqnr_db > 60
    run, more = exporter_of(path).read_in_float(path), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        assert logit_sqnr(model(more), run(more)) > 60


@pytest.mark.parametrize(
    ("format", "family", "bits"),
    [("onnx", "vit", 8), ("onnx", "vit", 4), ("onnx", "swin", 8), ("openvino", "vit", 4)],
)
def test_file_means_what_the_simulation_computes(format, family, bits, exported, quantized, batch):
    path, report = exported(format, family, bits)
    assert report.exact_sqnr_db > 30
    model, x = quantized(family, bits), batch(family, 3, seed=5)  # another batch size
    run = exporter_of(path).read_in_float(path)
    with torch.no_grad():
        assert logit_sqnr(model(x), run(x)) > 30


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [4, 6, 7])
def test_levels_with_a_knee_are_one_integer_product(format, bits, quantized, batch, tmp_path):
    """Those of linears and of softmax; the same levels in the file and in its integer products."""
    model, x = quantized("vit", bits, algorithm="ptq4vit_plus"), batch("vit", 16, seed=5)
    grids = [grid for op in take_apart(model)[1] for grid in op.grids[0]]
    kinds = {(grid.coarse > 1, grid.per_row) for grid in grids}
    assert kinds >= {(True, False), (True, True)}
    assert len(grids) == 1 + 2 * 6 + 1  # the embedding, six products per block, the head
    path = tmp_path / f"model{FORMATS[format]}"
    report = ptq.export(model, path, format, x)
    products = report.facts["integer_products"]
    assert products == report.facts["planned_products"] - (format == "onnx")  # the embedding's
    with torch.no_grad():
        assert logit_sqnr(model(x), exporter_of(path).read_in_float(path)(x)) > 30
        assert logit_sqnr(model(x), exporter_of(path).read(path)(x)) > 20


def test_onnx_is_standard_and_keeps_8_bit_weights(exported, quantized):
    path, report = exported("onnx", "vit", 8)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.version for entry in model.opset_import] == [report.facts["opset"]] == [18]
    large = [t for t in model.graph.initializer if np.prod(t.dims) >= 64 * 64]
    assert len(large) == 9 and {t.data_type for t in large} == {onnx.TensorProto.UINT8}
    products = Counter(node.op_type for node in model.graph.node if node.op_type in ("MatMul",))
    # Per block: q·k, two for attention·V, qkv, proj, fc1, two for fc2; and the head.
    assert products["MatMul"] == 2 * 8 + 1
    assert report.facts["planned_products"] == 18 and report.facts["integer_products"] == 17
    assert report.facts["float_products"] == ["patch_embed/proj/conv2d/0"]
    assert "target: onnx" in report.facts["note"]


def test_onnx_runtime_computes_what_the_file_means_on_every_cpu(exported, quantized, batch):
    """Unsigned codes do not saturate where there are no int8 dot products."""
    path, report = exported("onnx", "vit", 8)
    model, x = quantized("vit", 8), batch("vit", 32, seed=6)
    with torch.no_grad():
        assert logit_sqnr(model(x), exporter_of(path).read(path)(x)) > 30
    signed = path.with_name("signed.onnx")
    ptq.export(model, signed, "onnx", x, unsigned=False)
    codes = {
        onnx.numpy_helper.to_array(t).dtype.name
        for t in onnx.load(signed).graph.initializer
        if np.prod(t.dims) >= 64 * 64
    }
    assert codes == {"int8"}


def test_openvino_runs_every_planned_product_in_integers(exported):
    path, report = exported("openvino", "vit", 4)
    # The embedding, per block 8 products, the head.
    assert report.facts["integer_products"] == report.facts["planned_products"] == 18
    model = core().read_model(path)
    levels = {
        op.get_attributes()["levels"]
        for op in model.get_ops()
        if op.get_type_name() == "FakeQuantize"
    }
    assert levels == {256}
    assert model.inputs[0].partial_shape[0].is_dynamic
    types = Counter(
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and np.prod(op.shape) >= 4096
    )
    assert types == {"i8": 9}


def float_activations(monkeypatch, where):
    """One op's activations float and its weights int8, which OpenVINO still reports as i8."""
    from ptq4vit_plugin.integrations.openvino import ir as exporter

    class Float(torch.nn.Module):
        def forward(self, x):
            return x, None

    def with_float_activations(model, per_tensor, **named):
        lowered, found = qdq_model(model, per_tensor, **named)
        if per_tensor in where:
            grids = lowered.named_ops()["blocks/1/mlp/fc1/linear/0"].left
            grids[0] = Float()
        return lowered, found

    monkeypatch.setattr(exporter, "qdq_model", with_float_activations)


def test_openvino_refuses_and_names_a_product_in_float(quantized, batch, tmp_path, monkeypatch):
    float_activations(monkeypatch, where=(False, True))
    arguments = (quantized("vit", 4), tmp_path / "m.xml", "openvino", batch("vit", 2))
    with pytest.raises(ExportError, match="blocks/1/mlp/fc1/linear/0 in float.*allow_float"):
        ptq.export(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_float", [False, True])
def test_scales_per_head_go_outside_only_where_products_would_run_in_float(
    in_float, quantized, batch, tmp_path, monkeypatch
):
    """As LeViT's products of softmax's output and values do."""
    float_activations(monkeypatch, where=(not in_float,))
    report = ptq.export(quantized("vit", 4), tmp_path / "m.xml", "openvino", batch("vit", 2))
    assert report.facts["integer_products"] == report.facts["planned_products"] == 18
    assert ("multiplied outside" in report.facts.get("note", "")) == in_float


@pytest.mark.parametrize("format", FORMATS)
def test_preprocessing_travels(format, exported, quantized):
    path, _ = exported(format, "vit", 4)
    preprocessing = exporter_of(path).preprocessing(path)
    assert preprocessing.input_size == (3, 32, 32)
    assert preprocessing.mean == tuple(quantized("vit", 4).pretrained_cfg["mean"])


def test_scales_per_head_export_where_openvinos_quantizer_has_none(quantized, batch, tmp_path):
    """ConViT transposes heads in front of the quantizer; OpenVINO moves the quantizer there."""
    model, x = quantized("convit", 8), batch("convit", 4, seed=1)
    report = ptq.export(model, tmp_path / "m.xml", "openvino", x)
    # Random weights: a code that rounds the other way moves the logits (24 dB when written).
    assert report.exact_sqnr_db > 20
    assert report.facts["integer_products"] == report.facts["planned_products"]
    assert "target: openvino" in report.facts["note"]


def test_target_openvino_converts_by_openvinos_own_way(quantized, batch):
    model, x = quantized("convit", 8, target="openvino"), batch("convit", 4, seed=1)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
    with torch.no_grad():
        made = openvino.convert_model(model, example_input=x)
        out = torch.from_numpy(core().compile_model(made, "CPU", settings)(x.numpy())[0])
        assert logit_sqnr(model(x), out) > 30


@pytest.mark.parametrize("format", ["integer", *FORMATS])
def test_differences_op_by_op_on_request(format, quantized, batch, tmp_path):
    model, x = quantized("swin", 6), batch("swin", 2, seed=1)
    path = tmp_path / f"m{FORMATS.get(format, '.safetensors')}"
    found = ptq.export(model, path, format, x, per_op=True).op_differences
    assert list(found) == [op.name for op in ptq.describe(model)]
    exporter = exporter_of(path)
    run = exporter.read_in_float(path) or ptq.load(path)
    with torch.no_grad():
        expected, logits = model(x), run(x)
    worst = float((logits - expected).abs().max() / expected.abs().max())
    assert found["head/fc/linear/0"] == pytest.approx(worst, abs=1e-6)
    assert found["patch_embed/proj/conv2d/0"] < 1e-5 and max(found.values()) < 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_the_runtime_gives_logits_of_the_models_shape(format, exported, batch):
    """OpenVINO's integer path, which saturates on this CPU or not, has shapes of its own."""
    path, report = exported(format, "vit", 8)
    assert exporter_of(path).read(path)(batch("vit", 3)).shape == (3, 10)
    assert report.sqnr_db > 10
    # Codes of ONNX files do not saturate anywhere.
    saturates = format == "openvino" and adds_int8_pairs(torch.device("cpu"))
    assert ("saturation" in report.facts) == saturates


@pytest.mark.parametrize("family", ["any size", "rotary"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_image_size_is_free_where_the_model_takes_others(
    format, family, quantized, batch, tmp_path
):
    model, path = quantized(family, 8, target="openvino"), tmp_path / f"m{FORMATS[format]}"
    report = ptq.export(model, path, format, batch(family, 4, seed=1))
    assert report.image_size == "free"
    run = exporter_of(path).read_in_float(path)
    for size in ((32, 32), (40, 56), (72, 32)):
        images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            assert logit_sqnr(model(images), run(images)) > 30


def test_a_file_that_fails_at_another_size_gets_a_fixed_one(
    quantized, batch, tmp_path, monkeypatch
):
    from ptq4vit_plugin.integrations import onnx as exporter

    write = exporter.ONNXExporter.write

    def traced_at_its_own_size(self, model, path, example, dynamic):
        return write(self, model, path, example[..., :32, :32], dynamic)

    monkeypatch.setattr(exporter.ONNXExporter, "write", traced_at_its_own_size)
    images = batch("any size", 4)
    report = ptq.export(quantized("any size", 4), tmp_path / "m.onnx", "onnx", images)
    assert report.image_size.startswith("fixed: [ONNXRuntimeError]")
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 32, 32]


@pytest.mark.parametrize("format", FORMATS)
def test_the_batch_is_dynamic_where_the_image_size_is_fixed(format, exported, batch):
    path, report = exported(format, "vit", 4)
    assert report.image_size == "fixed: Input height (64) doesn't match model (32)."
    if format == "onnx":
        shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
        sizes = [d.dim_param or d.dim_value for d in shape]
        assert sizes == ["batch", 3, 32, 32]
    else:
        shape = core().read_model(path).inputs[0].partial_shape
        assert shape[0].is_dynamic and [shape[d].get_length() for d in (1, 2, 3)] == [3, 32, 32]
    run = exporter_of(path).read_in_float(path)
    x = batch("vit", 5, seed=3)
    one = torch.cat([run(image[None]) for image in x])
    torch.testing.assert_close(run(x), one, rtol=0, atol=1e-4)


def test_openvinos_own_conversion_takes_our_models(quantized, batch):
    model, x = quantized("vit", 8), batch("vit", 4, seed=1)
    with torch.no_grad():
        made = openvino.convert_model(model, example_input=x)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
        out = torch.from_numpy(core().compile_model(made, "CPU", settings)(x.numpy())[0])
        assert logit_sqnr(model(x), out) > 30


def test_nncfs_strip_takes_our_models(quantized, batch):
    """Eight-bit uniform quantizers become PyTorch's own; a twin stays what it is."""
    pytest.importorskip("torchao", reason="nncf.strip imports torchao")
    import nncf

    model, x = quantized("vit", 8), batch("vit", 4, seed=1)
    with torch.no_grad():
        stripped = nncf.strip(model, do_copy=True, example_input=x)
        assert logit_sqnr(model(x), stripped(x)) > 30
    names = [type(module).__name__ for module in stripped.modules()]
    assert "FakeQuantize" in names and "SymmetricQuantizer" not in names
    assert any(name.startswith("Twin") for name in names)


def test_torch_export_takes_the_lowered_model(quantized, batch):
    model, x = quantized("vit", 8), batch("vit", 4, seed=1)
    lowered, _ = qdq_model(model)
    with torch.no_grad():
        program = torch.export.export(lowered, (x,), strict=False)
        assert torch.equal(program.module()(x), lowered(x))


@pytest.mark.parametrize("reason", ["it cannot compile it", "it computes something else"])
def test_one_image_at_a_time_where_openvino_takes_no_batch_of_any_size(
    reason, quantized, batch, tmp_path, monkeypatch
):
    """As LeViT's and MViTv2's `ptq4vit_plus` in OpenVINO 2026.4."""
    from ptq4vit_plugin.integrations.openvino import ir as exporter

    if reason == "it cannot compile it":
        precisions = exporter._precisions

        def fails(model, ops):
            if model.inputs[0].partial_shape[0].is_dynamic:
                raise RuntimeError("ReshapeTransformation")
            return precisions(model, ops)

        monkeypatch.setattr(exporter, "_precisions", fails)
    else:
        monkeypatch.setattr(exporter, "_right_for_any_size", lambda *given: False)
    model, x, path = quantized("vit", 6), batch("vit", 3, seed=2), tmp_path / "m.xml"
    report = ptq.export(model, path, "openvino", x, per_op=True)
    assert "one image at a time" in report.facts["note"]
    assert report.facts["integer_products"] == report.facts["planned_products"]
    assert max(report.op_differences.values()) < 0.5
    with torch.no_grad():
        assert logit_sqnr(model(x), exporter_of(path).read(path)(x)) > 20


@pytest.mark.parametrize(
    ("free", "fixed", "right"),
    [(40, 100, True), (21, 100, True), (18, 23, True), (18, 36, False), (-3, 36, False)],
)
def test_what_counts_as_wrong_for_a_batch_of_any_size(
    free, fixed, right, quantized, batch, monkeypatch
):
    from ptq4vit_plugin.integrations.openvino import ir as exporter

    model, x = quantized("vit", 6), batch("vit", 2, seed=2)
    with torch.no_grad():
        logits = model(x)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    noise *= (logits - logits.mean()).square().mean().sqrt() / noise.square().mean().sqrt()

    def runner(made, settings):
        sqnr = free if made.inputs[0].partial_shape[0].is_dynamic else fixed
        return lambda images: logits + noise * 10 ** (-sqnr / 20)

    monkeypatch.setattr(exporter, "_runner", runner)
    images = openvino.opset13.parameter([-1, 3, 32, 32], np.float32)
    made = openvino.Model([openvino.opset13.result(images)], [images])
    assert exporter._right_for_any_size(made, x, logits) == right


def test_products_of_one_kernel_are_counted_one_by_one(float_model, batch, tmp_path):
    """As OpenVINO computes attention where it has uniform quantizers."""
    x = batch("vit", 2)
    config = {"algorithm": "base_ptq", "metric": "mse", "search_range": {"n": 4}, "rounds": 1}
    model = ptq.quantize(float_model("vit"), [x], config)
    facts = ptq.export(model, tmp_path / "m.xml", "openvino", x).facts
    # The embedding, per block qkv, q·k, attention·V, proj, fc1 and fc2; and the head.
    assert facts["planned_products"] == facts["integer_products"] == 2 * 6 + 2
    assert facts["float_products"] == []


@pytest.mark.parametrize(("kernel", "integer"), [("jit_avx512_i8", 2), ("jit_avx512_f32", 0)])
def test_products_of_a_kernel_in_float_are_named(kernel, integer, quantized, monkeypatch):
    from ptq4vit_plugin.integrations.openvino import ir as exporter

    first, second, norm = "blocks:0:attn:matmul:0", "blocks:0:attn:matmul:1", "__module.model.norm"
    nodes = [
        f"__module.ops.{first}/aten::matmul/MatMul",
        f"__module.ops.{first}/aten::matmul/MatMul/DequantizationMultiply",
        "__module.model.blocks.0.attn/aten::softmax/Softmax",
        f"__module.ops.{second}.left.0/aten::fake_quantize_per_tensor_affine/FakeQuantize",
        f"__module.ops.{second}/aten::matmul/MatMul",
        "",
    ]

    class Text(str):
        def astype(self, kind):
            return str(self)

    class Node:
        def __init__(self, names, kernel):
            said = {
                "layerType": "Subgraph",
                "originalLayersNames": names,
                "primitiveType": kernel,
                "runtimePrecision": kernel.rpartition("_")[2],
            }
            self.info = {key: Text(value) for key, value in said.items()}

        def get_rt_info(self):
            return self.info

    class Core:
        def compile_model(self, *given):
            return self

        def get_runtime_model(self):
            return self

        def get_ops(self):
            return [Node(",".join(nodes), kernel), Node(f"{norm}/Add,", "jit_avx512_f32")]

    monkeypatch.setattr(exporter, "core", Core)
    _, ops = qdq_model(quantized("vit", 8))
    facts = exporter._precisions(None, ops)
    assert facts["integer_products"] == integer
    named = ["blocks/0/attn/matmul/0", "blocks/0/attn/matmul/1"]
    assert facts["float_products"] == ([] if integer else named)
