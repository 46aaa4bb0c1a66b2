"""The arithmetic of exact folds: parameters before and after compute the same function.

Everything is computed in float64 and written back in the parameter's own type.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4vit_plugin.integrations.nncf.channels import HeadRows, NormPath
from ptq4vit_plugin.plan import FoundOp


def fold_norm(model: nn.Module, path: NormPath, scale: Tensor, shift: Tensor) -> None:
    """Make a norm give ``(x - shift) / scale`` and the linears behind it undo that.

    Parameters
    ----------
    scale, shift
        ``[C]``; `shift` is zero where the path allows none.
    """
    scale, shift = scale.double(), shift.double()
    for op in path.consumers:
        weight = model.get_parameter(op.sources[1].parameter)
        value = weight.double()
        if path.shift:
            _write(model.get_parameter(op.bias), lambda b, v=value: b + v @ shift)
        _write(weight, lambda w: w * scale)
    _write(model.get_parameter(path.weight), lambda w: w / scale)
    if path.bias is not None:
        _write(model.get_parameter(path.bias), lambda b: (b - shift) / scale)


def transform_rows(
    model: nn.Module, part: HeadRows, matrix: Tensor, shift: Tensor | None = None
) -> None:
    """Make rows y ``[H, D]`` of a linear give ``(y - shift) @ matrix``, head by head.

    Parameters
    ----------
    matrix
        ``[H, D, D]``.
    shift
        ``[H, D]``, or None.
    """
    weight = model.get_parameter(part.linear.sources[1].parameter)
    matrix = matrix.double().to(weight.device)
    rows = part.rows.to(weight.device)

    def turned(w: Tensor) -> Tensor:
        w = w.clone()
        w[rows] = matrix.transpose(1, 2) @ w[rows]
        return w

    def turned_bias(b: Tensor) -> Tensor:
        b = b.clone()
        centred = b[rows] if shift is None else b[rows] - shift.double().to(b.device)
        b[rows] = torch.einsum("hd,hde->he", centred, matrix)
        return b

    _write(weight, turned)
    if part.linear.bias is not None:
        _write(model.get_parameter(part.linear.bias), turned_bias)


def transform_columns(
    model: nn.Module,
    linear: FoundOp,
    columns: Tensor,
    matrix: Tensor,
    shift: Tensor | None = None,
) -> None:
    """Make a linear take ``(x - shift) @ inverse(matrix)^T`` in the columns of every head.

    Parameters
    ----------
    columns
        ``[H, D]``.
    matrix
        ``[H, D, D]``: what the columns of the weight are multiplied with from the right.
    shift
        ``[H, D]``, or None: its contribution moves into the bias.
    """
    weight = model.get_parameter(linear.sources[1].parameter)
    matrix, columns = matrix.double().to(weight.device), columns.to(weight.device)
    if shift is not None:
        moved = weight.double()[:, columns.flatten()] @ shift.double().flatten().to(weight.device)
        _write(model.get_parameter(linear.bias), lambda b: b + moved)

    def turned(w: Tensor) -> Tensor:
        w = w.clone()
        w[:, columns] = torch.einsum("ohd,hde->ohe", w[:, columns], matrix)
        return w

    _write(weight, turned)


@torch.no_grad()
def _write(parameter: nn.Parameter, change) -> None:
    parameter.copy_(change(parameter.double()))
