"""What a runtime multiplies in integers, as changes of a plan before the scales are searched.

The rules follow measurements, which ``docs/deployment.md`` lists.
"""

from __future__ import annotations

from typing import Literal

from ptq4vit_plugin.plan import LeftOut, Op, Operand, Plan

Target = Literal["any", "openvino", "onnx", "integer"]
# Their codes may have a zero point, or need all 256 unsigned codes.
UNSIGNED = frozenset({"asymmetric", "numerator"})


def fitted(plan: Plan, target: Target) -> Plan:
    """The plan with what the target's integer kernels do not take replaced by what they take.

    ``openvino``: one scale for each factor of a product of activations, signed codes without a
    zero point on its right. ``onnx``: one scale too; inputs of convolutions stay float.
    ``integer``: an op whose weight is computed while the model runs stays float.
    """
    if target == "any":
        return plan
    if target == "integer":
        return _with_parameters_only(plan)
    fit = {"openvino": _for_openvino, "onnx": _for_onnx}[target]
    return plan.model_copy(update={"ops": tuple(map(fit, plan.ops))})


def _for_openvino(op: Op) -> Op:
    if op.kind != "matmul":
        return op
    left, right = map(_per_tensor, op.operands)
    if right.quantizer in UNSIGNED:
        right = right.model_copy(update={"quantizer": "uniform", "options": {}})
    return op.model_copy(update={"operands": (left, right)})


def _for_onnx(op: Op) -> Op:
    if op.kind == "matmul":
        return op.model_copy(update={"operands": tuple(map(_per_tensor, op.operands))})
    if op.kind != "conv2d":
        return op
    images, weight = op.operands
    reason = "target onnx: ONNX Runtime convolves in float unless the output is quantized too"
    update = {"quantizer": None, "bits": None, "options": {}, "reason": reason}
    return op.model_copy(update={"operands": (images.model_copy(update=update), weight)})


def _per_tensor(operand: Operand) -> Operand:
    return operand.model_copy(update={"granularity": "tensor"})


def _with_parameters_only(plan: Plan) -> Plan:
    computed = [op for op in plan.ops if op.kind != "matmul" and not op.operands[1].parameter]
    reason = "target integer: its weight is computed while the model runs, and is no parameter"
    left_out = [LeftOut(name=o.name, kind=o.kind, reason=reason, macs=o.macs) for o in computed]
    return Plan(
        ops=tuple(op for op in plan.ops if op not in computed),
        left_out=(*left_out, *plan.left_out),
    )
