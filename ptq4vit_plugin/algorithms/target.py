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

    ``openvino`` and ``onnx``: one scale for each factor of a product of activations; for
    ``openvino`` the right factor has signed codes without a zero point. ``integer``: an op whose
    weight is computed while the model runs stays float, because the checkpoint keeps parameters.
    """
    if target == "integer":
        return _with_parameters_only(plan)
    if target == "any":
        return plan
    ops = [_fitted_product(op, target) if op.kind == "matmul" else op for op in plan.ops]
    return plan.model_copy(update={"ops": tuple(ops)})


def _with_parameters_only(plan: Plan) -> Plan:
    computed = [op for op in plan.ops if op.kind != "matmul" and not op.operands[1].parameter]
    reason = "target integer: its weight is computed while the model runs"
    left_out = [LeftOut(name=o.name, kind=o.kind, reason=reason, macs=o.macs) for o in computed]
    return Plan(
        ops=tuple(op for op in plan.ops if op not in computed),
        left_out=(*left_out, *plan.left_out),
    )


def _fitted_product(op: Op, target: Target) -> Op:
    left, right = (o.model_copy(update={"granularity": "tensor"}) for o in op.operands)
    if target == "openvino":
        right = _signed(right)
    return op.model_copy(update={"operands": (left, right)})


def _signed(operand: Operand) -> Operand:
    if operand.quantizer not in UNSIGNED:
        return operand
    return operand.model_copy(update={"quantizer": "uniform", "options": {}})
