"""One forward pass in which the float model and the quantized model run side by side.

The calibration images go in twice, as the two halves of one batch. At every op the first half
carries what the float model computes, the second half what the model computes whose ops so far are
quantized; so each op can be treated knowing its real inputs and its float target, and nothing has
to be stored or run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import ModelError
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


@dataclass(frozen=True)
class Images:
    """Where the images of a batch lie in the tensors of one op.

    Attributes
    ----------
    dim
        The dimension along which they lie, together with others perhaps: windows, heads, tokens.
    inner
        Whether the image is the fastest index of that dimension and not the slowest, as in rows
        ``[L · B, C]``.
    """

    dim: int = 0
    inner: bool = False

    def first(self, x: Tensor, count: int) -> Tensor:
        """The tensor with its images in front, perhaps with a dimension more."""
        if self.dim == 0 and not self.inner:
            return x
        if self.inner:
            return x.unflatten(self.dim, (-1, count)).movedim(self.dim + 1, 0)
        return x.unflatten(self.dim, (count, -1)).movedim(self.dim, 0)

    def back(self, x: Tensor, count: int) -> Tensor:
        """What `first` was made from."""
        if self.dim == 0 and not self.inner:
            return x
        if self.inner:
            return x.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 1)
        return x.movedim(0, self.dim).flatten(self.dim, self.dim + 1)


@torch.no_grad()
def find_images(model: nn.Module, batch: Batch, ops: Sequence[FoundOp]) -> dict[str, Images]:
    """Where the images lie in every op, proved by running it: not a number in the second of two
    images marks all that is computed from it.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode.
    batch
        Any images; the first is taken. What has no floating-point tensors cannot be marked, and is
        taken to have its images in front everywhere.

    Raises
    ------
    ModelError
        An op's operand depends on several images.
    """
    found: dict[str, Images] = {}

    def see_in(op: FoundOp, port: int) -> Callable[[Tensor], None]:
        channel = 1 if op.kind == "conv2d" else -1

        def see(x: Tensor) -> None:
            place = _marked(x.isnan().any(channel))
            if place is None or (op.kind != "linear" and place != Images()):
                raise ModelError(
                    f"compensate: {op.name} computes with the images of a batch together, so that "
                    "the float and the quantized model cannot run side by side; use algorithm: "
                    "ptq4vit"
                )
            found.setdefault(op.name, place)

        return see

    def marked(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return torch.cat([value, value]) if isinstance(value, Tensor) else value
        return torch.cat([value, torch.full_like(value, torch.nan)])

    one = batch.of(torch.arange(1)).to(model)
    ports = [(op, port) for op in ops for port in _ports(op)]
    with hooks.watching(model, {(op.name, port): see_in(op, port) for op, port in ports}, {}):
        model(*map(marked, one.args), **{key: marked(value) for key, value in one.kwargs.items()})
    return found


def _marked(mask: Tensor) -> Images | None:
    """Where the images lie in a tensor of two of which the second is marked; None if nowhere."""
    if not mask.any():
        return Images()
    for dim, inner in ((0, False), *((dim, False) for dim in range(1, mask.ndim)), (0, True)):
        if mask.shape[dim] % 2 == 0:
            parts = mask.unflatten(dim, (-1, 2) if inner else (2, -1))
            if not parts.select(dim + inner, 0).any():
                return Images(dim, inner)
    return None


def _ports(op: FoundOp) -> tuple[int, ...]:
    """Ports of activations."""
    return (0, 1) if op.kind == "matmul" else (0,)


@torch.no_grad()
def run_side_by_side(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Sequence[FoundOp],
    visit: Callable[[FoundOp, Seen], Tensor],
    places: Mapping[str, Images],
) -> None:
    """Visit every op in the order of execution; what `visit` returns goes on as its output.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode, with its own hooks switched off.
    data
        All batches run as one.
    places
        The result of `find_images`. What an op sees has its images in front.
    """
    images = sum(map(len, data))
    traced = len(data[0])
    arrived: dict[tuple[str, int], Tensor] = {}

    def keep(place: tuple[str, int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            arrived[place] = x

        return see

    def halves_of(x: Tensor, shape: tuple[int, ...], place: Images) -> tuple[Tensor, Tensor]:
        """Float and quantized half; the same tensor twice where there is no image in it."""
        as_traced = len(x) == shape[0] and traced != 2 * images
        if place == Images() and (as_traced or len(x) * traced != shape[0] * 2 * images):
            return x, x
        x = place.first(x, 2 * images)
        return x[: len(x) // 2], x[len(x) // 2 :]

    def treat(op: FoundOp) -> Callable[[Tensor], Tensor]:
        place = places.get(op.name, Images())

        def see(y: Tensor) -> Tensor:
            halves = {
                port: halves_of(arrived.pop((op.name, port)), op.shapes[port], place)
                for port in _ports(op)
            }
            output = halves_of(y, op.output_shape, place)
            seen = Seen(
                {port: half[0] for port, half in halves.items()},
                {port: half[1] for port, half in halves.items()},
                output[0],
            )
            result = visit(op, seen).to(y.dtype)
            if output[0] is output[1]:
                return result
            return place.back(torch.cat([output[0], result]), 2 * images)

        return see

    inputs = {(op.name, port): keep((op.name, port)) for op in ops for port in _ports(op)}
    outputs = {op.name: treat(op) for op in ops}
    args, kwargs = _twice([batch.to(model) for batch in data])
    with hooks.watching(model, inputs, outputs):
        model(*args, **kwargs)


def _twice(data: Sequence[Batch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def join(values: list[Any]) -> Any:
        return torch.cat([*values, *values]) if isinstance(values[0], Tensor) else values[0]

    args = tuple(join(list(values)) for values in zip(*(b.args for b in data), strict=True))
    return args, {key: join([b.kwargs[key] for b in data]) for key in data[0].kwargs}
