"""Plans keep to what a runtime multiplies in integers."""

import pytest
import torch
from models import images, small_vit, sqnr

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.target import fitted
from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.pipeline import plan as plan_of
from ptq4vit_plugin.plan import Op, Operand, Plan
from ptq4vit_plugin.record import record_of


def product(left="twin_softmax", right="uniform"):
    operands = (
        Operand(port=0, source="softmax", quantizer=left, bits=8, granularity="head"),
        Operand(port=1, source="activation", quantizer=right, bits=8, granularity="head"),
    )
    return Op(name="attn/matmul/1", kind="matmul", role="attention_v", operands=operands, macs=9)


def weighted(kind, parameter="w"):
    operands = (
        Operand(port=0, source="image", quantizer="uniform", bits=8),
        Operand(port=1, source="weight", parameter=parameter, quantizer="uniform", bits=8),
    )
    return Op(name=f"{kind}/0", kind=kind, role=kind, operands=operands, macs=5)


PLAN = Plan(ops=(weighted("conv2d"), product(right="numerator"), weighted("linear", None)))


def shown(plan):
    return [(o.quantizer, o.granularity) for op in plan.ops for o in op.operands]


def test_any_changes_nothing():
    assert fitted(PLAN, "any") == PLAN


def test_openvino_has_one_scale_per_factor_and_signed_right_factors():
    uniform = ("uniform", "tensor")
    expected = [uniform, uniform, ("twin_softmax", "tensor"), uniform, uniform, uniform]
    assert shown(fitted(PLAN, "openvino")) == expected


def test_onnx_convolves_in_float_with_8_bit_weights():
    plan = fitted(PLAN, "onnx")
    left, right = plan.ops[0].operands
    assert left.quantizer is None and left.bits is None and "target onnx" in left.reason
    assert right == PLAN.ops[0].operands[1]
    assert shown(plan)[2:4] == [("twin_softmax", "tensor"), ("numerator", "tensor")]


def test_integer_leaves_weights_that_are_no_parameters():
    plan = fitted(PLAN, "integer")
    assert plan.ops == PLAN.ops[:2]
    assert [(op.name, op.macs) for op in plan.left_out] == [("linear/0", 5)]
    assert "no parameter" in plan.left_out[0].reason


@pytest.mark.parametrize("algorithm", ["base_ptq", "ptq4vit", "ptq4vit_plus"])
def test_every_search_takes_a_target(algorithm):
    config = {"algorithm": algorithm, "target": "openvino"}
    plan = plan_of(small_vit(1), images(1)[0], config)
    granularities = {o.granularity for op in plan.ops if op.kind == "matmul" for o in op.operands}
    assert granularities == {"tensor"}


def test_a_quantized_model_has_the_scales_that_the_target_takes():
    config = {"algorithm": "ptq4vit", "target": "onnx", "search_range": {"n": 4}, "rounds": 1}
    model = ptq.quantize(small_vit(1), images(1), config)
    groups = [o.groups for op in ptq.describe(model) if op.kind == "matmul" for o in op.operands]
    assert groups == [1, 1, 1, 1]
    assert record_of(model).settings["target"] == "onnx"
    assert torch.isfinite(model(images(1)[0])).all()


def test_an_unknown_target_is_named():
    with pytest.raises(ConfigError, match="target: 'openvin' is .*'any', 'openvino', 'onnx'"):
        plan_of(small_vit(1), images(1)[0], {"algorithm": "ptq4vit", "target": "openvin"})


def test_settings_are_those_that_were_given():
    model = ptq.quantize(small_vit(1), images(1), {"algorithm": "ptq4vit", "rounds": 1})
    assert record_of(model).settings == {"rounds": 1}


@pytest.mark.parametrize("algorithm", ["ptq4vit", "ptq4vit_plus"])
def test_openvino_converts_a_model_with_gradients_switched_on(algorithm):
    openvino = pytest.importorskip("openvino")
    config = {"algorithm": algorithm, "target": "openvino", "rounds": 1, "search_range": {"n": 10}}
    (x,) = images(1)
    model = ptq.quantize(small_vit(1), x, config)
    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    output = torch.from_numpy(next(iter(compiled(x.numpy()).values())))
    assert sqnr(model(x), output) > 30
