"""The integer model computes what the simulation computes, in integers, and its file is whole."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import in_a_new_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ptq4vit_plugin as ptq
from ptq4vit_plugin.errors import CheckpointError, ExportError, ModelError, PTQ4ViTError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.device import adds_int8_pairs
from ptq4vit_plugin.integrations.integer import byte_linear, product
from ptq4vit_plugin.integrations.integer.byte_linear import ByteLinear, is_exact, pairs_fit
from ptq4vit_plugin.integrations.integer.checkpoint import (
    GridEntry,
    Metadata,
    OpEntry,
    pack,
    read_metadata,
    unpack,
)
from ptq4vit_plugin.integrations.integer.model import codes, integer_model
from ptq4vit_plugin.integrations.integer.ops import (
    FloatWeightOp,
    Grids,
    IntegerConv2d,
    IntegerLinear,
)
from ptq4vit_plugin.integrations.lowering import QuantizedOp, check_rows
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.quantizers.branches import Branch, branches_of, packed_codes
from ptq4vit_plugin.quantizers.twin_gelu import TwinGELUQuantizer
from ptq4vit_plugin.quantizers.twin_softmax import TwinSoftmaxQuantizer

CASES = [("vit", 8), ("vit", 6), ("vit", 4), ("swin", 8), ("swin", 4)]


def simulated_calls(model, x):
    """What every quantizer of a simulated model got and gave: {(op or parameter, port): ...}."""
    seen, handles = {}, []
    for hook in hooks.hooks(model):
        key = (hook.op, hook.port if hook.when == "pre" else None)
        handles.append(
            hook.module.register_forward_hook(
                lambda module, args, out, key=key: seen.update({key: (module, args[0], out)})
            )
        )
    outputs = {}
    names = [op.name for op in ptq.describe(model)]
    watched = {name: lambda y, name=name: outputs.setdefault(name, y) for name in names}
    with torch.no_grad(), hooks.watching(model, {}, watched):
        model(x)
    for handle in handles:
        handle.remove()
    return seen, outputs


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["softmax", "gelu"])
def test_branches_add_up_to_the_twin(family, bits):
    generator = torch.Generator().manual_seed(bits)
    if family == "softmax":
        quantizer = TwinSoftmaxQuantizer(bits, torch.tensor([0, 3, 7, 12]).view(1, 4, 1, 1))
        x = torch.randn(2, 4, 9, 9, generator=generator).mul_(4).softmax(-1)
    else:
        quantizer = TwinGELUQuantizer(bits, torch.tensor([0.17 / 2 ** (bits - 1)]), torch.rand(1))
        x = F.gelu(torch.randn(50, 30, generator=generator) * 3)
    branches = branches_of(quantizer)
    assert torch.equal(sum(b.codes(x) * b.scale for b in branches), quantizer(x))
    assert torch.equal(packed_codes(branches, x), quantizer.to_codes(x))


@pytest.mark.parametrize(("family", "bits"), CASES)
def test_every_op_on_the_simulations_inputs(family, bits, quantized, batch):
    model, x = quantized(family, bits), batch(family, 4, seed=1)
    seen, outputs = simulated_calls(model, x)
    made, found = integer_model(model)
    assert {op.name for op in found} == set(outputs)
    total = different = 0
    for op in found:
        module = made.named_ops()[op.name]
        left = seen[op.name, 0][1]
        right = seen[op.name, 1][1] if op.kind == "matmul" else torch.empty(0)
        for port, ours in module.input_codes(left, right).items():
            quantizer, value, out = seen[op.name, port]
            if hasattr(quantizer, "to_codes"):
                theirs = quantizer.to_codes(value)
            else:
                theirs = (out / (quantizer.scale / quantizer.level_high)).round()
            unequal = ours != theirs
            total, different = total + ours.numel(), different + int(unequal.sum())
            if unequal.any():  # only where the number lies half way between two levels
                step = quantizer.scale / quantizer.level_high
                position = (value.double() / step)[unequal]
                assert ((position - position.floor() - 0.5).abs() < 1e-4).all()
    assert different <= 1e-4 * total


@pytest.mark.parametrize(("family", "bits"), CASES)
def test_whole_model_is_close_to_the_simulation(family, bits, quantized, batch, tmp_path):
    model, x = quantized(family, bits), batch(family, 16, seed=2)
    report = ptq.export(model, tmp_path / "model.safetensors", example_input=x)
    loaded = ptq.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        sqnr = logit_sqnr(model(x), loaded(x))
        assert torch.equal(loaded(x), integer_model(model)[0](x))
    assert report.sqnr_db == pytest.approx(sqnr, abs=0.2) and sqnr > 25
    assert report.facts["float_ops"] == []
    assert report.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}


@pytest.mark.parametrize("way", ["dot", "bytes", "float"])
@pytest.mark.parametrize(
    ("inner", "lowest", "highest"),
    [
        (64, -128, 127),
        (1040, -128, 127),
        (3072, 0, 255),
        (5000, -128, 127),
        (701, -100, 155),
        (386, -128, 0),
        (386, 0, 127),
        (30, 0, 15),
    ],
)
def test_products_are_those_of_int64(inner, lowest, highest, way, monkeypatch):
    paired = way == "bytes" and adds_int8_pairs(torch.device("cpu"))
    generator = torch.Generator().manual_seed(inner)
    most = 64 if paired and highest - lowest > 128 else 128
    weight = torch.randint(-most, most, (12, inner), generator=generator, dtype=torch.int8)
    weight[0], weight[1] = -most, most - 1
    x = torch.randint(lowest, highest + 1, (7, inner), generator=generator).float()
    x[0], x[1] = lowest, highest
    if way == "bytes" and not is_exact(weight, highest - lowest):
        pytest.skip("this CPU does not multiply bytes")
    monkeypatch.setattr(product, "has_int8_dot", lambda device: way == "dot")
    monkeypatch.setattr(product, "is_exact", lambda *what: way == "bytes")
    made = product.weight_product(weight, [(lowest, highest), (0, 1)])
    kind = {"dot": "DotProduct", "bytes": "BytesProduct", "float": "FloatProduct"}[way]
    assert type(made).__name__ == kind
    exact = x.long() @ weight.long().t()
    assert torch.equal(made.accumulators(x, lowest).long(), exact)
    scale, bias = torch.rand(2, 12, generator=generator)
    # Three roundings of float32: the accumulator's, the product's and the sum's.
    expected = exact * scale.double() + bias.double()
    branch = Branch(torch.tensor([0.37]), lowest, highest)
    rescaled = made.rescaled(branch, x * 0.37, scale, bias).double()
    torch.testing.assert_close(rescaled, expected, rtol=3 * 2**-24, atol=1e-6)


def test_a_model_that_has_run_can_be_copied(quantized, batch):
    made, x = integer_model(quantized("vit", 6))[0], batch("vit", 4, seed=1)
    with torch.no_grad():
        expected = made(x)
        assert torch.equal(copy.deepcopy(made)(x), expected)


@pytest.mark.parametrize(
    ("lowest", "highest"), [(-128, 127), (-8, 7), (0, 255), (-128, 0), (-100, 155)]
)
@pytest.mark.parametrize("removed", [False, True])
def test_bytes_made_in_one_pass_are_the_codes(lowest, highest, removed, monkeypatch):
    if not is_exact(torch.zeros(1, 4, dtype=torch.int8), 255):
        pytest.skip("this CPU does not multiply bytes")
    monkeypatch.setattr(byte_linear, "_quantizes", byte_linear._quantizes.__wrapped__)
    if removed:  # torch announces it
        monkeypatch.delattr(torch, "quantize_per_tensor")
    generator = torch.Generator().manual_seed(0)
    linear = ByteLinear(torch.zeros(1, 64, dtype=torch.int8), 255)
    for scale in torch.rand(8, generator=generator):
        branch = Branch(scale[None], lowest, highest)
        x = torch.randn(20000, 64, generator=generator) * 50 * scale
        x[0] = scale * (torch.arange(64) - 32.5)  # ties, as float32 has them
        found = linear.quantized(branch, x).float() + lowest
        assert torch.equal(found, branch.codes(x))


@pytest.mark.parametrize(
    ("weight", "span", "fits"),
    [
        ([127, 1], 255, True),
        ([127, 2], 255, False),
        ([127, -128], 255, True),
        ([-128, -1], 255, False),
        ([1, 127, 127, 1], 255, True),
        ([1, 127, 127], 255, True),
        ([-128, -128], 128, True),
        ([127, 127], 129, True),
        ([127, 127], 130, False),
    ],
)
def test_which_pairs_fit_into_16_bits(weight, span, fits):
    assert pairs_fit(torch.tensor([[0] * len(weight), weight], dtype=torch.int8), span) is fits


@pytest.mark.parametrize("inner", [197, 2000])
def test_batched_products_are_those_of_int64(inner):
    left = torch.full((2, 3, 5, inner), 255.0)
    right = torch.full((2, 3, inner, 4), -128.0)
    out = product.batched_product(left, right, 255 * 128)
    assert torch.equal(out.long(), left.long() @ right.long())


def test_power_of_two_scales_accumulate_by_shifting():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (6, 40), generator=generator, dtype=torch.int8)
    grids = Grids([Branch(torch.tensor([0.01]), -128, 0), Branch(torch.tensor([0.01]) * 8, 0, 127)])
    assert grids.shift() == 3
    op = IntegerLinear(grids, weight, torch.rand(6, 1, generator=generator))
    x = F.gelu(torch.randn(9, 40, generator=generator) * 3)
    negative, positive = (branch.codes(x).long() for branch in grids.branches)
    accumulated = (negative + 8 * positive) @ weight.long().t()
    expected = accumulated.float() * (torch.tensor([0.01]) * op.scale)
    assert torch.equal(op(F.linear, (x, torch.empty(0)), {}), expected)


@pytest.mark.parametrize(
    "call",
    [
        dict(stride=4),
        dict(stride=2, padding=1),
        dict(padding="same", dilation=2),
        dict(stride=(2, 1), padding=(1, 0), groups=2),
    ],
)
def test_convolution_is_torchs(call):
    generator = torch.Generator().manual_seed(0)
    channels = 4 // call.get("groups", 1)
    codes = torch.randint(-128, 128, (6, channels, 3, 3), generator=generator, dtype=torch.int8)
    x = torch.randint(-128, 128, (2, 4, 9, 8), generator=generator).float()
    bias = torch.randn(6, generator=generator)
    op = IntegerConv2d(Grids([Branch(torch.ones(1), -128, 127)]), codes, torch.full((6,), 0.5))
    out = op(F.conv2d, (x, torch.empty(0), bias), call)
    expected = F.conv2d(x.double(), codes.double() / 2, bias.double(), **call).float()
    assert torch.equal(out, expected)


def test_codes_of_a_simulated_model_and_of_a_loaded_one(quantized, batch, tmp_path):
    model, x = quantized("vit", 8), batch("vit", 2)
    ptq.export(model, tmp_path / "m.safetensors", example_input=x)
    loaded = codes(ptq.load(tmp_path / "m.safetensors"), x)
    simulated = codes(model, x)
    assert loaded.keys() == simulated.keys() == {op.name for op in ptq.describe(model)}
    for name, ports in loaded.items():
        assert all(torch.equal(value, simulated[name][port]) for port, value in ports.items())
    twin = loaded["blocks/0/attn/matmul/1"][0]
    assert twin.dtype == torch.uint8 and twin.max() >= 128  # the range bit
    assert loaded["blocks/0/mlp/fc2/linear/0"][0].dtype == torch.int8


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=30))
def test_packing_keeps_codes(values):
    codes = torch.tensor(values, dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == (len(values) + 1) // 2
    assert torch.equal(unpack(packed, (len(values),)), codes)


def test_sizes(quantized, batch, tmp_path):
    x = batch("vit")
    packed = ptq.export(quantized("vit", 4), tmp_path / "packed", example_input=x)
    plain = ptq.export(quantized("vit", 4), tmp_path / "plain", example_input=x, packed=False)
    weights = sum(p.numel() for p in quantized("vit", 4).parameters() if p.dim() > 1)
    saved = sum(plain.files.values()) - sum(packed.files.values())
    assert plain.ratio < 0.32 and saved > 0.45 * weights
    assert torch.equal(
        ptq.load(tmp_path / "packed.safetensors")(x), ptq.load(tmp_path / "plain.safetensors")(x)
    )


def test_smooth_quants_factors_stay(float_model, batch, tmp_path):
    steps = [
        "smooth_quant",
        {"algorithm": "ptq4vit", "search_range": {"n": 10}, "rounds": 1},
    ]
    model = ptq.quantize(float_model("vit"), [batch("vit")], steps)
    x = batch("vit", 4, seed=1)
    report = ptq.export(model, tmp_path / "smooth", example_input=x)
    assert report.sqnr_db > 25


class HiddenProducts(torch.nn.Module):
    """Attention by one function that hides its products; no timm model."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(48, 48 * 3), torch.nn.Linear(48, 10)

    def forward(self, x):
        tokens = F.unfold(x, 4, stride=4).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(len(x), -1, 3, 2, 24).permute(2, 0, 3, 1, 4).unbind()
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(x.mean(1))


class ComputedWeight(torch.nn.Module):
    """A linear whose weight is no parameter, between two whose weights are."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Linear(48, 24), torch.nn.Linear(24, 10)
        self.weight = torch.nn.Parameter(torch.randn(24, 24))

    def forward(self, x):
        tokens = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        return self.head(F.linear(tokens, self.weight.softmax(1)).mean(1))


def test_target_integer_leaves_what_the_checkpoint_cannot_keep(tmp_path):
    torch.manual_seed(0)
    model, x = ComputedWeight().eval(), torch.randn(4, 3, 16, 16)
    config = {"algorithm": "ptq4vit", "search_range": {"n": 5}, "rounds": 1}
    quantized = ptq.quantize(model, [x], config)
    with pytest.raises(ModelError, match="target: integer"):
        ptq.export(quantized, tmp_path / "model", example_input=x)
    quantized = ptq.quantize(model, [x], {**config, "target": "integer"})
    assert ptq.export(quantized, tmp_path / "model", example_input=x).facts["integer_ops"] == 2


@pytest.mark.parametrize(("kind", "port"), [("matmul", 1), ("linear", 0)])
def test_rows_are_refused_where_no_factor_can_be_taken_out(kind, port):
    rows = [Branch(torch.ones(1), 0, 255, per_row=True)]
    op = QuantizedOp("attn/op/0", kind, kind, None, {port: rows})
    with pytest.raises(ModelError, match="attn/op/0: only the left factor"):
        check_rows([op])
    check_rows([QuantizedOp("attn/op/0", "matmul", "attention_v", None, {0: rows})])


def test_hidden_products_and_models_that_are_not_timms(tmp_path):
    torch.manual_seed(0)
    model, x = HiddenProducts().eval(), torch.randn(4, 3, 16, 16)
    quantized = ptq.quantize(model, [x], {"algorithm": "ptq4vit", "search_range": {"n": 5}})
    report = ptq.export(quantized, tmp_path / "model", example_input=x)
    assert report.facts["integer_ops"] == 4
    loaded = ptq.load(tmp_path / "model.safetensors", HiddenProducts())
    with torch.no_grad():
        assert logit_sqnr(quantized(x), loaded(x)) > 25
    with pytest.raises(CheckpointError, match="model="):
        ptq.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("named", [False, True])
def test_ops_with_one_float_operand_in_every_type(dtype, named):
    generator = torch.Generator().manual_seed(0)
    grid = Branch(torch.tensor([0.25]), -8, 7)
    for function, shape, family in (
        (F.linear, (6, 5), IntegerLinear),
        (F.conv2d, (6, 5, 3, 3), IntegerConv2d),
    ):
        x = torch.randn(2, 5, *[9] * (len(shape) - 2), generator=generator).to(dtype)
        weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in (shape, 6))
        rest, more = ((), {"bias": bias}) if named else ((bias,), {})
        rounded = (weight.float() / 0.25).round().clamp(-8, 7)
        one = family(None, rounded.to(torch.int8), torch.full((6,), 0.25))
        expected = function(x.float(), rounded * 0.25, bias.float()).to(dtype)
        assert torch.equal(one(function, (x, weight, *rest), more), expected)
        codes = (x.float() / 0.25).round().clamp(-8, 7)
        expected = function(codes * 0.25, weight.float(), bias.float()).to(dtype)
        other = FloatWeightOp(Grids([grid]))
        assert torch.equal(other(function, (x, weight, *rest), more), expected)


class Casts(torch.nn.Linear):
    """Takes what it is given in the type and to the device of its weight, as some norms do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype).to(self.weight.device))


class CastsItself(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = Casts(48, 24), Casts(24, 10)

    def forward(self, x):
        tokens = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2).float())
        return self.head(F.layer_norm(tokens, self.head.weight.shape[1:]).mean(1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_kept_as_codes_says_of_itself_what_it_did(dtype, tmp_path):
    torch.manual_seed(0)
    model, x = CastsItself().eval().to(dtype), torch.randn(4, 3, 16, 16)
    images = x.to(dtype)
    quantized = ptq.quantize(model, [images], {"algorithm": "ptq4vit", "search_range": {"n": 5}})
    ptq.export(quantized, tmp_path / "model", example_input=x)
    made = [integer_model(quantized)[0], ptq.load(tmp_path / "model.safetensors", CastsItself())]
    with torch.no_grad():
        for integer in made:
            out = integer(images)
            assert out.dtype == dtype and torch.equal(out, made[0](images))
            assert logit_sqnr(quantized(images), out) > 25
    for integer in (*made, copy.deepcopy(made[0])):
        for kind, device in ((dtype, "cpu"), (torch.float64, "cpu"), (torch.float64, "meta")):
            weight = integer.to(device, kind).model.embed.weight
            assert weight.dtype == kind and weight.device.type == device
            assert weight.shape == (24, 48) and weight.untyped_storage().nbytes() <= 8
        assert not any(name.endswith("weight") for name in integer.state_dict())


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_points_and_softmax_rows_compute_in_integers(
    bits, quantized, batch, tmp_path, monkeypatch
):
    model, x = quantized("vit", bits, algorithm="ptq4vit_plus"), batch("vit", 8, seed=4)
    operands = [o for op in ptq.describe(model) for o in op.operands]
    assert {"piecewise", "numerator"} < {o.quantizer for o in operands}
    report = ptq.export(model, tmp_path / "m", example_input=x)
    assert report.facts["float_ops"] == []
    loaded = ptq.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        out = loaded(x)
        assert logit_sqnr(model(x), out) > 25
        monkeypatch.setattr(product, "has_int8_dot", lambda device: True)
        assert torch.equal(ptq.load(tmp_path / "m.safetensors")(x), out)
    softmax = codes(loaded, x)["blocks/0/attn/matmul/1"][0]
    peaks = softmax.amax(-1)  # of every row: 1 over the step of its head
    assert softmax.dtype == torch.uint8 and (peaks == peaks[:1, :, :1]).all()


def test_a_new_process_computes_the_same_bit_for_bit(float_model, batch, tmp_path):
    config = {
        "algorithm": "ptq4vit",
        "weights": {"bits": 4},
        "activations": {"bits": 8, "quantizer": "asymmetric"},
        "search_range": {"n": 10},
        "rounds": 1,
        "scope_overrides": {"{re}fc2|head|patch_embed": {"weights": {"bits": 8}}},
    }
    model = ptq.quantize(float_model("vit"), [batch("vit")], config)
    integer, found = integer_model(model)
    assert {op.kind for op in found} == {"linear", "conv2d", "matmul"}
    operands = {o.quantizer for op in ptq.describe(model) for o in op.operands}
    assert operands == {"uniform", "asymmetric", "twin_softmax", "twin_gelu"}
    ptq.export(model, tmp_path / "model", example_input=batch("vit"))
    weights = [op for op in read_metadata(tmp_path / "model.safetensors").ops if op.shape]
    assert {(op.bits[1], op.packed) for op in weights} == {(4, True), (8, False)}
    x = batch("vit", 4, seed=2)
    with torch.no_grad():
        assert torch.equal(in_a_new_process(tmp_path / "model.safetensors", x), integer(x))


def test_a_file_that_was_changed_or_cut_is_refused(quantized, batch, tmp_path):
    path = tmp_path / "model.safetensors"
    ptq.export(quantized("vit", 8), path, example_input=batch("vit"))
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    spoiled = {
        "cut": content[:-100],
        "tensor": content[: header + 99]
        + bytes([content[header + 99] ^ 1])
        + content[header + 100 :],
        "metadata": content.replace(b'\\"highest\\":127', b'\\"highest\\":126', 1),
        "empty": b"",
    }
    for name, bytes_ in spoiled.items():
        assert bytes_ != content
        bad = tmp_path / f"{name}.safetensors"
        bad.write_bytes(bytes_)
        with pytest.raises(CheckpointError):
            ptq.load(bad)
    newer = tmp_path / "newer.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["ptq4vit_integer"] = json.dumps(
        json.loads(metadata["ptq4vit_integer"]) | {"format_version": 9}
    )
    save_file(load_file(path), newer, metadata)
    with pytest.raises(CheckpointError, match="version 9"):
        ptq.load(newer)


def test_export_that_is_not_close_enough_leaves_nothing(quantized, batch, tmp_path):
    with pytest.raises(ExportError, match="min_sqnr"):
        ptq.export(quantized("vit", 8), tmp_path / "m", example_input=batch("vit"), min_sqnr=500)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "intger"}, "did you mean 'integer'"),
        ({"pakced": True}, "pakced"),
        ({"path": "model.xml"}, "safetensors"),
    ],
)
def test_wrong_arguments(arguments, message, quantized, tmp_path):
    arguments = {"path": "model", **arguments}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(PTQ4ViTError, match=message):
        ptq.export(quantized("vit", 8), **arguments)


def test_every_key_of_the_file_is_described():
    described = (Path(__file__).parents[2] / "docs" / "integer-format.md").read_text("utf-8")
    rows = [line for line in described.splitlines() if line.startswith("| `")]
    keys = " ".join(row.split("|")[1] for row in rows)
    for entry in (Metadata, OpEntry, GridEntry):
        for name in entry.model_fields:
            assert f"`{name}`" in keys, name
