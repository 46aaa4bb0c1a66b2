"""Record the operands of ops and the Fisher information of their outputs, one pass for many ops."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient, generators, output_loss, probe_loss
from ptq4vit_plugin.errors import DataError, ModelError, PTQ4ViTError
from ptq4vit_plugin.integrations.nncf.hooks import watching
from ptq4vit_plugin.plan import FoundOp


@dataclass
class Batch:
    """One calibration batch: the model's arguments, and the labels if the data has any.

    ``first`` is the place of its first image in the calibration set.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None = None
    first: int = 0

    @property
    def example(self) -> Any:
        """The arguments in the form in which NNCF takes an example input."""
        return self.kwargs or self.args

    def to(self, model: nn.Module) -> Batch:
        """The batch, on the device of a model's parameters."""
        parameter = next(model.parameters(), None)
        if parameter is None:
            return self
        device = parameter.device

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(map(move, self.args)),
            kwargs={k: move(v) for k, v in self.kwargs.items()},
        )

    def of(self, images: Tensor) -> Batch:
        """Some of its images, given by their places in it."""

        def cut(value: Any) -> Any:
            per_image = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)
            return value[images] if per_image else value

        return replace(
            self,
            args=tuple(map(cut, self.args)),
            kwargs={k: cut(v) for k, v in self.kwargs.items()},
            labels=cut(self.labels),
        )

    def parts(self, size: int) -> Iterator[Batch]:
        """Its images in order, `size` at a time."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            images = torch.arange(start, min(start + size, len(self)))
            yield replace(self.of(images), first=self.first + start)

    def joined(self, other: Batch) -> Batch:
        """The images of both. What is the same for all images stays as it is.

        Raises
        ------
        RuntimeError
            The images differ in size.
        """
        images = next(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

        def join(value: Any, more: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or len(value) != len(self):
                return value
            # Of one image it does not show whether a tensor of length 1 is of the image or of all.
            if value is not images and len(self) == 1 and torch.equal(value, more):
                return value
            return torch.cat([value, more])

        labelled = self.labels is not None and other.labels is not None
        return replace(
            self,
            args=tuple(map(join, self.args, other.args)),
            kwargs={key: join(value, other.kwargs[key]) for key, value in self.kwargs.items()},
            labels=torch.cat([self.labels, other.labels]) if labelled else None,
        )

    def __len__(self) -> int:
        return next(len(v) for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))


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


def batches(dataset: Any) -> list[Batch]:
    """The calibration batches of an ``nncf.Dataset`` or any iterable, checked.

    An item is what NNCF accepts for a model: a tensor, a tuple of arguments or a dict of them; the
    pair (images, integer labels) that a data loader gives is recognised.

    Raises
    ------
    DataError
        There is no batch, or one has NaN or infinite values.
    """
    result: list[Batch] = []
    for index, (item, raw) in enumerate(_items(dataset)):
        batch = _batch(item, raw)
        for value in (*batch.args, *batch.kwargs.values()):
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not value.isfinite().all()
            ):
                raise DataError(
                    f"calibration batch {index} has NaN or infinite values; allowed: finite numbers"
                )
        if not any(
            isinstance(v, Tensor) and v.ndim and len(v)
            for v in (*batch.args, *batch.kwargs.values())
        ):
            raise DataError(f"calibration batch {index} has no images")
        if result and not isinstance(item, Batch):
            batch.first = result[-1].first + len(result[-1])
        result.append(batch)
    if not result:
        raise DataError("the calibration set is empty; give at least one batch of images")
    return result


def example_of(data: Sequence[Batch]) -> Batch:
    """The batch by which a model is traced: the first, or one of two images if that has only one.

    One image alone does not tell a dimension (image, head) from one of heads. If there is no other
    of its size it is taken twice.
    """
    first, *rest = data
    if len(first) > 1:
        return first
    return first.joined(next((b for b in rest if _shapes(b) == _shapes(first)), first))


def _shapes(batch: Batch) -> list[Any]:
    """Of an image."""
    values = (*batch.args, *batch.kwargs.values())
    return [v.shape[1:] if isinstance(v, Tensor) else None for v in values]


def _items(dataset: Any) -> Iterator[tuple[Any, Any]]:
    if hasattr(dataset, "get_inference_data"):
        yield from zip(dataset.get_inference_data(), dataset.get_data(), strict=True)
    elif isinstance(dataset, Tensor):
        yield dataset, dataset
    else:
        yield from ((item, item) for item in dataset)


def _batch(item: Any, raw: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    labels = raw[1] if _is_labelled(raw) else None
    if isinstance(item, dict):
        return Batch((), item, labels)
    if _is_labelled(item):
        return Batch((item[0],), {}, labels)
    if isinstance(item, (tuple, list)):
        return Batch(tuple(item), {}, labels)
    return Batch((item,), {}, labels)


def _is_labelled(item: Any) -> bool:
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and all(isinstance(part, Tensor) for part in item)
        and item[1].ndim == 1
        and not item[1].is_floating_point()
    )


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

    with watching(model, {}, {op.name: keep(op) for op in ops}), frozen(model):
        for batch in data:
            with torch.enable_grad():
                result = run(model, batch.to(model))
                backward(outputs_of(model, result), gradient, batch)
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


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's result for a batch that is on its device.

    Raises
    ------
    DataError
        The model cannot take the images.
    """
    with taken_by_the_model(batch):
        return model(*batch.args, **batch.kwargs)


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


@contextmanager
def taken_by_the_model(batch: Batch) -> Iterator[None]:
    """Turn what a model raises on images that it cannot take into a `DataError`."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, PTQ4ViTError):
            raise
        shapes = [
            tuple(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)
        ]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the model cannot take calibration images of shape {shapes}: {reason}"
        ) from error


@dataclass
class Outputs:
    """What a model returns: class scores ``[B, classes]``, or tensors of any other meaning."""

    tensors: list[Tensor]
    are_logits: bool


def outputs_of(model: nn.Module, result: Any) -> Outputs:
    """Tell class scores from features.

    ``logits`` in a mapping are class scores, and so is an output, or the first of several, of two
    dimensions, unless the model says that it has no classes (``num_classes == 0``, as timm's do).

    Raises
    ------
    ModelError
        There is no floating-point tensor in the result.
    """
    if isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor):
        return Outputs([result["logits"]], are_logits=True)
    tensors = list(_tensors(result))
    if not tensors:
        raise ModelError(f"the model returns no tensor but {type(result).__name__}")
    if tensors[0].ndim == 2 and getattr(model, "num_classes", None) != 0:
        return Outputs(tensors[:1], are_logits=True)
    return Outputs(tensors, are_logits=False)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        yield from _tensors(list(result.values()))
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def backward(outputs: Outputs, gradient: Gradient, batch: Batch) -> None:
    if gradient.kind == "labels" and not outputs.are_logits:
        raise DataError(
            "gradient.kind is 'labels' but the model returns no class scores; use 'output'"
        )
    if gradient.kind == "labels" and batch.labels is None:
        raise DataError(
            "gradient.kind is 'labels' but the calibration data has none; give "
            "(images, labels) batches, or use 'fisher' or 'gauss_newton'"
        )
    if not any(output.requires_grad for output in outputs.tensors):
        return  # they depend on no op that is recorded
    if not all(output.isfinite().all() for output in outputs.tensors):
        raise ModelError(
            "the model's output for the calibration images has NaN or infinite values; its weights "
            "are damaged, or its data type is too narrow"
        )
    random = generators(gradient.seed, batch.first, len(outputs.tensors[0]))
    for probe in range(gradient.probes):
        if gradient.kind == "output" or not outputs.are_logits:
            loss = output_loss(outputs.tensors, random)
        else:
            loss = probe_loss(outputs.tensors[0], gradient.kind, random, batch.labels)
        loss.backward(retain_graph=probe + 1 < gradient.probes)


class frozen:
    """Evaluation mode and no gradients for parameters, restored on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = {module: module.training for module in self.model.modules()}
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in self.trainable:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for module, training in self.training.items():
            module.training = training
        for parameter in self.trainable:
            parameter.requires_grad_(True)
