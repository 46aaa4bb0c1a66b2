"""Record the operands of ops and the Fisher information of their outputs, one pass for many ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient, output_loss, probe_loss
from ptq4vit_plugin.errors import DataError, ModelError, PTQ4ViTError
from ptq4vit_plugin.integrations.nncf.hooks import watching
from ptq4vit_plugin.plan import FoundOp


@dataclass
class Batch:
    """One calibration batch: the model's arguments, and the labels if the data has any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None = None

    @property
    def example(self) -> Any:
        """The arguments in the form in which NNCF takes an example input."""
        return self.kwargs or self.args

    def to(self, model: nn.Module) -> Batch:
        """The batch, on the device of a model's parameters."""
        device = next(model.parameters()).device

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(
            tuple(map(move, self.args)), {k: move(v) for k, v in self.kwargs.items()}, self.labels
        )

    def __len__(self) -> int:
        return next(len(v) for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))


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
    result = []
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
        result.append(batch)
    if not result:
        raise DataError("the calibration set is empty; give at least one batch of images")
    return result


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


def record(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Iterable[FoundOp],
    gradient: Gradient | None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Recorded]:
    """Run the calibration batches once and record what every op in ``ops`` sees.

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
        The gradient is not finite, or zero at every op.
    DataError
        Labels are asked for and the data has none; or the model cannot take the images.
    """
    ops = list(ops)
    recorded = {op.name: Recorded() for op in ops}
    generator = torch.Generator().manual_seed(gradient.seed) if gradient else None

    def keep_input(name: str, port: int) -> Callable[[Tensor], None]:
        # A copy: a later op of the model may write into the tensor in place.
        return lambda x: recorded[name].inputs[port].append(x.detach().clone())

    def add_square(fisher: Tensor, grad: Tensor) -> None:
        grad = grad.float()
        fisher.addcmul_(grad, grad, value=1 / gradient.probes)

    def keep_squared_gradient(name: str) -> Callable[[Tensor], None]:
        def see(y: Tensor) -> None:
            fisher = torch.zeros_like(y, dtype=torch.float32, requires_grad=False)
            recorded[name].fisher.append(fisher)
            if not y.requires_grad:
                return  # computed from constants: no image reaches it
            # A tensor hook, unlike torch.autograd.grad, still speaks of this value when the model
            # goes on to write into it in place (an in-place activation function, a residual added
            # in place).
            y.register_hook(lambda grad: add_square(fisher, grad))

        return see

    inputs = {
        (op.name, port): keep_input(op.name, port)
        for op in ops
        for port, source in op.sources.items()
        if source.parameter is None
    }
    outputs = {op.name: keep_squared_gradient(op.name) for op in ops} if gradient else {}
    with watching(model, inputs, outputs), _frozen(model):
        for batch in data:
            with torch.set_grad_enabled(gradient is not None):
                result = run(model, batch.to(model), needs_grad=gradient is not None)
                if gradient:
                    _backward(outputs_of(model, result), gradient, generator, batch.labels)
            progress()
    if gradient:
        _check(recorded)
    return recorded


def token_weights(
    model: nn.Module, data: Sequence[Batch], ops: Iterable[FoundOp], gradient: Gradient
) -> dict[str, Tensor]:
    """How much the loss depends on every token of an op: its mean squared gradient at the output.

    Returns
    -------
    dict
        By op name, ``[tokens of all images]``, float32; positions for a convolution.
    """
    kept: dict[str, list[Tensor]] = {op.name: [] for op in ops}
    generator = torch.Generator().manual_seed(gradient.seed)

    def add(total: Tensor, part: Tensor) -> None:
        total.add_(part.flatten())

    def keep(op: FoundOp) -> Callable[[Tensor], None]:
        channel = 1 if op.kind == "conv2d" else -1

        def see(y: Tensor) -> None:
            total = torch.zeros_like(y.detach().movedim(channel, -1)[..., 0].float()).flatten()
            kept[op.name].append(total)
            if not y.requires_grad:
                return  # computed from constants: no image reaches it
            # The hook returns None: autograd's own gradient goes on unchanged.
            y.register_hook(lambda grad: add(total, grad.float().square().mean(channel)))

        return see

    with watching(model, {}, {op.name: keep(op) for op in ops}), _frozen(model):
        for batch in data:
            with torch.enable_grad():
                result = run(model, batch.to(model), needs_grad=True)
                _backward(outputs_of(model, result), gradient, generator, batch.labels)
    return {name: torch.cat(parts) for name, parts in kept.items() if parts}


def run(model: nn.Module, batch: Batch, needs_grad: bool = False) -> Any:
    """The model's result for a batch that is on its device.

    Parameters
    ----------
    needs_grad
        Attach the images to the autograd graph.

    Raises
    ------
    DataError
        The model cannot take the images.
    """

    def attach(value: Any) -> Any:
        # Parameters are frozen, so it is the images that make autograd follow the forward pass.
        if needs_grad and isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().requires_grad_()
        return value

    with taken_by_the_model(batch):
        return model(*map(attach, batch.args), **{k: attach(v) for k, v in batch.kwargs.items()})


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


def _backward(
    outputs: Outputs, gradient: Gradient, generator: torch.Generator, labels: Tensor | None
) -> None:
    if gradient.kind == "labels" and not outputs.are_logits:
        raise DataError(
            "gradient.kind is 'labels' but the model returns no class scores; use 'output'"
        )
    if gradient.kind == "labels" and labels is None:
        raise DataError(
            "gradient.kind is 'labels' but the calibration data has none; give "
            "(images, labels) batches, or use 'fisher' or 'gauss_newton'"
        )
    for probe in range(gradient.probes):
        if gradient.kind == "output" or not outputs.are_logits:
            loss = output_loss(outputs.tensors, generator)
        else:
            loss = probe_loss(outputs.tensors[0], gradient.kind, generator, labels)
        loss.backward(retain_graph=probe + 1 < gradient.probes)


def _check(recorded: dict[str, Recorded]) -> None:
    for name, seen in recorded.items():
        if not all(value.isfinite().all() for value in seen.fisher):
            raise ModelError(
                f"the gradient at {name} is not finite; check the model's weights and the images"
            )
    if recorded and not any(value.any() for seen in recorded.values() for value in seen.fisher):
        raise ModelError(
            "the gradient is zero at every op, so nothing can be ranked; the model's output does "
            "not depend on its ops, or its softmax is saturated: use metric 'mse' or 'cosine'"
        )


class _frozen:
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
