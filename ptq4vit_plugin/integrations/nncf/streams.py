"""One forward pass in which the float model and the quantized model run side by side.

The calibration images go in twice, as the two halves of one batch. At every op the first half
carries what the float model computes, the second half what the model computes whose ops so far are
quantized; so each op can be treated knowing its real inputs and its float target, and nothing has
to be stored or run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.capture import Batch
from ptq4vit_plugin.plan import FoundOp


@dataclass(frozen=True)
class Seen:
    """What one op sees. Inputs by port, in the model's own shapes.

    Attributes
    ----------
    exact
        Inputs in the float model.
    inputs
        Inputs in the model that is being quantized.
    target
        The op's output in the float model.
    """

    exact: dict[int, Tensor]
    inputs: dict[int, Tensor]
    target: Tensor


@torch.no_grad()
def run_side_by_side(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Sequence[FoundOp],
    visit: Callable[[FoundOp, Seen], Tensor],
) -> None:
    """Visit every op in the order of execution; what `visit` returns goes on as its output.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode, with its own hooks switched off.
    data
        All batches run as one.
    """
    images = sum(map(len, data))
    traced = len(data[0])
    arrived: dict[tuple[str, int], Tensor] = {}

    def keep(place: tuple[str, int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            arrived[place] = x

        return see

    def treat(op: FoundOp) -> Callable[[Tensor], Tensor]:
        ports = [port for port in (0, 1) if (op.name, port) in inputs]

        def see(y: Tensor) -> Tensor:
            halves = {
                port: _halves(arrived.pop((op.name, port)), op.shapes[port], traced, images)
                for port in ports
            }
            output = _halves(y, op.output_shape, traced, images)
            seen = Seen(
                {port: half[0] for port, half in halves.items()},
                {port: half[1] for port, half in halves.items()},
                output[0],
            )
            result = visit(op, seen).to(y.dtype)
            return result if len(result) == len(y) else torch.cat([output[0], result])

        return see

    inputs = {
        (op.name, port): keep((op.name, port))
        for op in ops
        for port in (0, 1)
        if port == 0 or op.kind == "matmul"
    }
    outputs = {op.name: treat(op) for op in ops}
    args, kwargs = _twice([batch.to(model) for batch in data])
    with hooks.watching(model, inputs, outputs):
        model(*args, **kwargs)


def _halves(x: Tensor, shape: tuple[int, ...], traced: int, images: int) -> tuple[Tensor, Tensor]:
    """Float and quantized half; the same tensor twice if it does not depend on the images."""
    if len(x) * traced != shape[0] * 2 * images or (len(x) == shape[0] and traced != 2 * images):
        return x, x
    return x[: len(x) // 2], x[len(x) // 2 :]


def _twice(data: Sequence[Batch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def join(values: list[Any]) -> Any:
        return torch.cat([*values, *values]) if isinstance(values[0], Tensor) else values[0]

    args = tuple(join(list(values)) for values in zip(*(b.args for b in data), strict=True))
    return args, {key: join([b.kwargs[key] for b in data]) for key in data[0].kwargs}
