"""Forward and backward passes of a model over calibration batches, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient, generators, output_loss, probe_loss
from ptq4vit_plugin.errors import DataError, ModelError, PTQ4ViTError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch

# What a model is to do with calibration images, as an error says that it cannot.
TAKE, TRACE, GRADIENTS = "take", "be traced by NNCF with", "give gradients for"


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's result for a batch that is on its device.

    Raises
    ------
    DataError
        The model cannot take the images, or not while autograd follows.
    """
    own = batch.copied()
    with taken_by_the_model(batch, GRADIENTS if torch.is_grad_enabled() else TAKE):
        return model(*own.args, **own.kwargs)


def traced(model: nn.Module, batch: Batch) -> NNCFGraph:
    """NNCF's graph of a forward pass of a batch that is on the model's device.

    Raises
    ------
    DataError
        NNCF cannot trace it.
    """
    with taken_by_the_model(batch, TRACE):
        return hooks.trace(model, batch.example)


@contextmanager
def taken_by_the_model(batch: Batch, doing: str = TAKE) -> Iterator[None]:
    """Turn what a model raises on images into a `DataError` that says what it was to do."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError, nncf.InternalError) as error:
        if isinstance(error, PTQ4ViTError):
            raise
        shapes = [tuple(value.shape) for value in batch.tensors]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, TypeError) and len(batch.args) == 1 and batch.labels is not None:
            reason += (
                "; the integers beside the images are taken as labels: "
                "give a dict of arguments where the model takes them"
            )
        if doing == GRADIENTS:
            reason = (
                f"{reason.rstrip('.')}; write nothing in place in its forward, or use a metric "
                "without gradient, 'mse'"
            )
        raise DataError(
            f"the model cannot {doing} calibration images of shape {shapes}: {reason}"
        ) from error


@dataclass
class Outputs:
    """What a model returns: class scores ``[B, classes]``, or tensors of any other meaning."""

    tensors: list[Tensor]
    are_logits: bool


def outputs_of(model: nn.Module, result: Any) -> Outputs:
    """Tell class scores from features.

    ``logits`` in a mapping stand for all of it. Class scores are they, or an output, or the first
    of several, if it has two dimensions, unless the model says that it has no classes
    (``num_classes == 0``, as timm's do). A single number, such as a loss, is left out.

    Raises
    ------
    ModelError
        There is no floating-point tensor with a dimension in the result.
    """
    named = isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor)
    tensors = [x for x in tensors_of(result["logits"] if named else result) if x.ndim]
    if not tensors:
        raise ModelError("the model returns single numbers only; allowed: numbers of every image")
    if tensors[0].ndim == 2 and (named or getattr(model, "num_classes", None) != 0):
        return Outputs(tensors[:1], are_logits=True)
    return Outputs(tensors, are_logits=False)


def tensors_of(result: Any) -> list[Tensor]:
    """All floating-point tensors in what a model returns, in order.

    Parameters
    ----------
    result
        A tensor, or tuples, lists and mappings of any depth.

    Raises
    ------
    ModelError
        There is none.
    """
    tensors = list(_tensors(result))
    if not tensors:
        raise ModelError(f"the model returns no tensor but {type(result).__name__}")
    return tensors


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
        with taken_by_the_model(batch, GRADIENTS):
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
