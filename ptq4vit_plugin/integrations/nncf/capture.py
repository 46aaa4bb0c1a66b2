"""Record the operands of ops and the Fisher information of their outputs, one pass for many ops."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.hooks import watching
from ptq4vit_plugin.integrations.nncf.passes import backward, frozen, outputs_of, run
from ptq4vit_plugin.integrations.nncf.runs import run_by_all
from ptq4vit_plugin.plan import FoundOp

#: Bytes that the operands and outputs of all ops may take for images that go forward and backward
#: together; the autograd graph takes about as much. A constant: what is free must not decide what
#: is computed.
TOGETHER = 2 * 2**30


@dataclass
class Recorded:
    """What one op saw, a tensor per calibration batch, in the model's own shapes.

    Attributes
    ----------
    inputs
        Values by input port, after the hooks that were there before.
    fisher
        Mean over probes of the squared gradient at the op's output.
    """

    inputs: dict[int, list[Tensor]] = field(default_factory=lambda: {0: [], 1: []})
    fisher: list[Tensor] = field(default_factory=list)


def recorded_bytes(op: FoundOp) -> int:
    """What an op's operands and output take, for the images whose shapes it has."""
    floats = prod(op.shapes[0]) + prod(op.output_shape)
    return 4 * (floats + (0 if op.sources[1].parameter else prod(op.shapes[1])))


def in_parts(data: Sequence[Batch], ops: Iterable[FoundOp], images: int) -> list[Batch]:
    """The batches, cut where the graph of one would be too large (`TOGETHER`).

    Parameters
    ----------
    ops
        All ops of the model.
    images
        How many images their shapes are of.
    """
    size = int(TOGETHER * images / max(1, sum(map(recorded_bytes, ops))))
    return [part for batch in data for part in batch.parts(max(1, size))]


def record(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Iterable[FoundOp],
    gradient: Gradient | None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Recorded]:
    """Run the calibration batches once and record what every op in ``ops`` sees.

    What an op's gradient is does not depend on which other ops are recorded.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode, on the device where everything is to stay.
    gradient
        None when the metric needs no gradient; then there is no backward pass.
    progress
        Called after each batch.

    Raises
    ------
    ModelError
        The gradient is not finite.
    DataError
        Labels are asked for and the data has none; or the model cannot take the images.
    """
    with recording(model, ops, gradient) as (recorded, kept), frozen(model):
        for batch in data:
            with torch.set_grad_enabled(gradient is not None):
                result = run(model, batch.to(model))
                kept.forget()
                if gradient:
                    backward(outputs_of(model, result), gradient, batch)
            progress()
    return recorded


@contextmanager
def recording(
    model: nn.Module, ops: Iterable[FoundOp], gradient: Gradient | None
) -> Iterator[tuple[dict[str, Recorded], Copies]]:
    """Record what ops see for as long as the context lasts, whoever runs them.

    Yields
    ------
    tuple
        What was recorded, by op name; and the copies, to be forgotten between batches.

    Raises
    ------
    ModelError
        On leaving: a gradient is not finite.
    """
    ops = list(ops)
    recorded = {op.name: Recorded() for op in ops}
    kept = Copies()

    def keep_input(name: str, port: int) -> Callable[[Tensor], None]:
        return lambda x: recorded[name].inputs[port].append(kept.copy(x))

    def keep_squared_gradient(name: str) -> Callable[[Tensor], Tensor | None]:
        def see(y: Tensor) -> Tensor | None:
            fisher = recorded[name].fisher
            place = len(fisher)
            # Zeros without memory: the backward pass frees what the squares then take.
            fisher.append(torch.zeros((), device=y.device).expand(y.shape))
            added = False

            def add_square(grad: Tensor) -> None:
                nonlocal added
                square = grad.float().square().div_(gradient.probes)
                fisher[place] = fisher[place].add_(square) if added else square
                added = True

            return with_gradient(y, add_square)

        return see

    inputs = {
        (op.name, port): keep_input(op.name, port)
        for op in ops
        for port, source in op.sources.items()
        if source.parameter is None
    }
    outputs = {op.name: keep_squared_gradient(op.name) for op in ops} if gradient else {}
    with watching(model, inputs, outputs):
        yield recorded, kept
    for name, seen in recorded.items():
        if not all(value.isfinite().all() for value in seen.fisher):
            raise ModelError(
                f"the gradient at {name} is not finite; check the model's weights and the images"
            )


def with_gradient(y: Tensor, see: Callable[[Tensor], None]) -> Tensor | None:
    """Show the gradient at a value to a function; what is returned, if anything, takes its place.

    Parameters are frozen: autograd follows the forward pass from the first value that is watched,
    not from the images. Then that is a copy, because what comes next may write in place.

    Raises
    ------
    ModelError
        The model has switched gradients off.
    """
    if not torch.is_grad_enabled():
        raise ModelError(
            "the model runs some of its ops under torch.no_grad(), where nothing can be weighed by "
            "a gradient; take that out of its forward, or use a metric without gradient, 'mse'"
        )
    first = None if y.requires_grad else y.detach().requires_grad_().clone()
    # A tensor hook, unlike torch.autograd.grad, still speaks of this value when the model goes on
    # to write into it in place (an in-place activation function, a residual added in place). What
    # it returns, None, leaves autograd's own gradient as it is.
    (y if first is None else first).register_hook(see)
    return first


def token_weights(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Iterable[FoundOp],
    gradient: Gradient,
    in_order: Callable[[str, Tensor, int], Tensor] = lambda name, x, images: x,
) -> dict[str, Tensor]:
    """How much the loss depends on every token of an op: its mean squared gradient at the output.

    Parameters
    ----------
    in_order
        Puts the images of a batch in front in what has an entry per token of a named op.

    Returns
    -------
    dict
        By op name, ``[tokens of all images]``, float32; positions for a convolution.

    Raises
    ------
    DataError
        Not every batch runs all ops.
    """
    kept: dict[str, list[Tensor]] = {op.name: [] for op in ops}

    def add(total: Tensor, part: Tensor) -> None:
        total.add_(part)

    def keep(op: FoundOp) -> Callable[[Tensor], Tensor | None]:
        channel = 1 if op.kind == "conv2d" else -1

        def see(y: Tensor) -> Tensor | None:
            total = torch.zeros_like(y.detach().movedim(channel, -1)[..., 0].float())
            kept[op.name].append(total)
            return with_gradient(y, lambda grad: add(total, grad.float().square().mean(channel)))

        return see

    outputs = {op.name: keep(op) for op in ops}
    with watching(model, {}, outputs), run_by_all(model, data, ops) as ran, frozen(model):
        for batch in data:
            with torch.enable_grad():
                result = run(model, batch.to(model))
                backward(outputs_of(model, result), gradient, batch)
            ran()
    return {
        name: torch.cat(
            [
                in_order(name, part, len(batch)).flatten()
                for part, batch in zip(parts, data, strict=True)
            ]
        )
        for name, parts in kept.items()
        if parts
    }


class Copies:
    """Copies of tensors, one for all ops that see the same one.

    Copies, because a later op of the model may write into the tensor in place.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, int, Tensor]] = {}

    def copy(self, x: Tensor) -> Tensor:
        original, version, copy = self._known.get(id(x), (lambda: None, 0, x))
        if original() is not x or version != x._version:
            copy = x.detach().clone()
            self._known[id(x)] = (weakref.ref(x), x._version, copy)
        return copy

    def forget(self) -> None:
        """Share nothing with what comes next."""
        self._known.clear()
