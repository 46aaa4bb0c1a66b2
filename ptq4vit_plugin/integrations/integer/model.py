"""A quantized model as one that computes with integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.integer.ops import (
    FloatWeightOp,
    Grids,
    IntegerConv2d,
    IntegerLinear,
    IntegerMatmul,
    IntegerOp,
    WeightedOp,
)
from ptq4vit_plugin.integrations.lowering import QuantizedOp, check_rows, factors, take_apart
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps


class IntegerModel(ReplacedOps):
    """A model whose quantized ops compute with codes; see `drop_weight`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModel:
        # As of `to`: a copy of a tensor that repeats one number would take memory for all of them.
        def changed(value: Tensor) -> Tensor:
            if value.numel() < 2 or any(value.stride()):
                return fn(value)
            return fn(value[(0,) * value.dim()].clone()).expand(value.shape)

        return super()._apply(changed, recurse)


def integer_model(model: nn.Module) -> tuple[IntegerModel, list[QuantizedOp]]:
    """A copy of a quantized model whose quantized ops compute with codes, and these ops.

    Raises
    ------
    ModelError
        See `take_apart` and `check_rows`; or a weight is quantized to a sum of grids, which has no
        int8 form.
    """
    taken, found = take_apart(model)
    check_rows(found)
    ops = {op.name: _integer_op(taken, op) for op in found}
    for op in found:
        if isinstance(ops[op.name], WeightedOp):
            drop_weight(taken, op.parameter)
    return IntegerModel(taken, ops).eval(), found


def drop_weight(model: nn.Module, name: str) -> None:
    """Replace a parameter by a buffer that takes no memory and is not saved.

    What uses it is computed by a module that has the codes. A forward may still ask for its shape,
    or cast something to its type or device.
    """
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    if attribute in owner._parameters:
        weight = owner._parameters.pop(attribute)
        repeated = weight.new_zeros(()).expand(weight.shape)
        owner.register_buffer(attribute, repeated, persistent=False)


@torch.inference_mode()
def codes(model: nn.Module, images: Tensor) -> dict[str, dict[int, Tensor]]:
    """The integers that enter every quantized op.

    Parameters
    ----------
    model
        A quantized model, or an integer model that `load` returned.
    images
        A batch, as the model takes them.

    Returns
    -------
    dict
        By op name and input port: k-bit codes of activations in the model's own shape, one call
        of the op. Softmax twins are uint8 with the range in the top bit, GELU twins int8 whose
        sign is the range. Weights are in the checkpoint.
    """
    if not isinstance(model, ReplacedOps):
        model, _ = integer_model(model)
    seen: dict[str, dict[int, Tensor]] = {}
    with _watched(model, lambda name, op, a, b: seen.update({name: op.input_codes(a, b)})):
        model(images)
    return seen


@contextmanager
def _watched(
    model: ReplacedOps, see: Callable[[str, IntegerOp, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[[IntegerOp, Any], None]:
        def on_call(op: IntegerOp, call: Any) -> None:
            see(name, op, *factors(*call)[:2])

        return on_call

    handles = [
        op.register_forward_pre_hook(hook(name))
        for name, op in model.named_ops().items()
        if isinstance(op, IntegerOp)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _integer_op(model: nn.Module, op: QuantizedOp) -> IntegerOp:
    left, right = (Grids(op.grids[port]) if port in op.grids else None for port in (0, 1))
    if op.kind == "matmul":
        return IntegerMatmul(left, right)
    if right is None:
        return FloatWeightOp(left)
    if op.parameter is None:
        raise ModelError(
            f"{op.name}: its weight is computed while the model runs, and an integer checkpoint "
            "keeps parameters only; quantize with target: integer, or leave the op out with "
            "ignored_scopes"
        )
    branches = op.grids[1]
    if len(branches) > 1 or branches[0].highest > 127 or branches[0].lowest < -128:
        raise ModelError(
            f"{op.name}: a weight needs one grid of signed codes to be kept as int8; quantize "
            "weights with 'uniform', or leave the op out with ignored_scopes"
        )
    weight = model.get_parameter(op.parameter).detach().float()
    family = IntegerLinear if op.kind == "linear" else IntegerConv2d
    return family(left, branches[0].codes(weight).to(torch.int8), branches[0].scale)
