"""A quantized model taken apart for a runtime: the float model, and the quantized ops as grids.

Every exporter starts here: quantizers leave the model's hooks, and modules compute the quantized
ops instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.plan import OpKind
from ptq4vit_plugin.quantizers.branches import Branch, branches_of
from ptq4vit_plugin.record import record_of


@dataclass(frozen=True)
class QuantizedOp:
    """One op of the plan with its quantizers as grids; an operand without any stays float.

    Attributes
    ----------
    grids
        Branches by input port. A weight's scales broadcast against the parameter.
    bits
        Width of a code by input port.
    parameter
        Name of the weight, whose value in the taken model is quantized already.
    """

    name: str
    kind: OpKind
    role: str
    parameter: str | None
    grids: dict[int, list[Branch]] = field(default_factory=dict)
    bits: dict[int, int] = field(default_factory=dict)

    @property
    def integer(self) -> bool:
        """Whether both operands are quantized, so that the product is one of integers."""
        return len(self.grids) == 2


@torch.no_grad()
def take_apart(model: nn.Module) -> tuple[nn.Module, list[QuantizedOp]]:
    """A copy of a quantized model without the plan's quantizers, and the ops that had them.

    Weights of the copy have their quantized values. Hooks that are no quantizers of the plan (for
    example SmoothQuant's factors) stay.

    Raises
    ------
    ModelError
        The model was not quantized by this plugin, or a quantizer has no integer form.
    """
    record = record_of(model)
    if record is None:
        raise ModelError(
            f"{type(model).__name__} carries no record of a calibration; call quantize first"
        )
    taken = copy.deepcopy(model).eval()
    weights: dict[str, list[Branch]] = {}
    bits: dict[str, int] = {}
    for op in record.plan.ops:
        for operand in op.operands:
            if operand.parameter and operand.quantizer:
                parameter = taken.get_parameter(operand.parameter)
                for hook in hooks.take(taken, operand.parameter, None):
                    parameter.copy_(hook(parameter))
                    last = hook
                weights[operand.parameter] = _branches(op.name, operand.port, last)
                bits[operand.parameter] = operand.bits
    ops = []
    for op in record.plan.ops:
        found = QuantizedOp(op.name, op.kind, op.role, op.operands[1].parameter)
        for operand in op.operands:
            if operand.parameter in weights:
                found.grids[operand.port] = weights[operand.parameter]
                found.bits[operand.port] = bits[operand.parameter]
            elif operand.quantizer:
                *before, quantizer = hooks.take(taken, op.name, operand.port)
                for hook in before:
                    hooks.insert(taken, op.name, operand.port, hook)
                found.grids[operand.port] = _branches(op.name, operand.port, quantizer)
                found.bits[operand.port] = operand.bits
        if found.grids:
            ops.append(found)
    return taken, ops


def _branches(op: str, port: int, quantizer: nn.Module) -> list[Branch]:
    try:
        return branches_of(quantizer)
    except ModelError as error:
        raise ModelError(f"{op}, operand {port}: {error}") from None


def check_rows(ops: Sequence[QuantizedOp]) -> None:
    """Refuse operands quantized row by row where no factor can be taken out of their rows.

    Raises
    ------
    ModelError
        Such an operand is not the left factor of a matrix product.
    """
    for op in ops:
        for port, branches in op.grids.items():
            if branches[0].per_row and (op.kind != "matmul" or port == 1):
                raise ModelError(
                    f"{op.name}: only the left factor of a matrix product can be quantized row by "
                    "row; set twin: {softmax: true}, or leave the op out with ignored_scopes"
                )


def factors(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]:
    """The two operands of a call of linear, conv2d or matmul, and its remaining arguments."""
    rest = dict(kwargs)
    given = list(args)
    for name in ("input", "weight", "other", "mat2"):
        if name in rest:
            given.append(rest.pop(name))
    if function.__name__ == "__rmatmul__":
        given[:2] = given[1::-1]
    return given[0], given[1], tuple(given[2:]), rest
