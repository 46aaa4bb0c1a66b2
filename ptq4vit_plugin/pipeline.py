"""Run the steps of a compression config on a copy of a model, as an NNCF pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.quantization.algorithms.pipeline import Pipeline
from pydantic import BaseModel
from torch import Tensor, nn

from ptq4vit_plugin import config as configs
from ptq4vit_plugin.algorithms.accuracy import WIDEST, Move, hold_drop, ranked_moves
from ptq4vit_plugin.algorithms.scale_search import ScaleSearch
from ptq4vit_plugin.algorithms.settings import Accuracy, Override
from ptq4vit_plugin.errors import ConfigError, DataError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch, batches, example_of
from ptq4vit_plugin.integrations.nncf.passes import (
    TRACE,
    frozen,
    outputs_of,
    run,
    taken_by_the_model,
    traced,
)
from ptq4vit_plugin.integrations.nncf.prepare import bare, prepare
from ptq4vit_plugin.integrations.timm.attention import fuse_attention
from ptq4vit_plugin.plan import Plan
from ptq4vit_plugin.record import TrialRecord, attach, record_of

Step = tuple[type[BaseModel], dict[str, Any]]


@torch.inference_mode(False)  # in which autograd records nothing
def quantize(
    model: nn.Module,
    calibration_dataset: Any,
    compression: Any = "ptq4vit",
    validation_dataset: Iterable[Any] | None = None,
    resume: Path | None = None,
) -> nn.Module:
    """Quantize a model; the model that is given stays as it is.

    Parameters
    ----------
    model
        A timm transformer, or any model made of linears, convolutions and attention, on any device.
        Of a compiled or data-parallel model the one inside is quantized.
    calibration_dataset
        An ``nncf.Dataset``, or any iterable of image batches ``[B, C, H, W]`` or (images, labels)
        pairs. The paper uses 32 training images with the model's own test transform.
    compression
        A registered algorithm's name, a mapping ``{"algorithm": ..., fields}``, a list of these
        (steps of one NNCF pipeline), or a `config.Config`.
    validation_dataset
        Labelled batches (images, labels) that can be gone through several times, for a step with
        `accuracy`. What was tried is in the model's record.
    resume
        Folder in which finished ops are kept. A call that was interrupted goes on from there when
        it is repeated with the same arguments; of several searches (`accuracy`) this is the first.
        The caller removes it.

    Returns
    -------
    nn.Module
        An ordinary NNCF-compressed model in evaluation mode. If every op had to be left out to
        hold the accuracy, a copy of the float model.

    Notes
    -----
    When torch.distributed is running, every process gives the same arguments, calibrates with its
    share of the batches, and gets the same scales.

    Raises
    ------
    ConfigError
        The compression says something that is not allowed.
    DataError
        The calibration set is empty, not finite, or of a shape that the model does not take.
    ModelError
        The model has nothing to quantize.
    """
    model = bare(model)
    steps = configs.compression(compression)
    data = batches(calibration_dataset)
    promises = [i for i, (_, fields) in enumerate(steps) if fields.get("accuracy")]
    if len(promises) > 1:
        raise ConfigError("compression: more than one step promises an accuracy; allowed: one")
    if promises:
        return _within_drop(model, data, steps, promises[0], validation_dataset, resume)
    return _quantized(model, data, steps, resume)


def _quantized(
    model: nn.Module, data: list[Batch], steps: Sequence[Step], resume: Path | None = None
) -> nn.Module:
    """Run the steps on a copy."""
    model = copy.deepcopy(model).eval()
    # Without its calls taken apart NNCF cannot trace every model; each step decides on its own
    # whether it needs attention unfused.
    example = example_of(data).to(model)
    fuse_attention(model, prepare(model, example))
    wrapper = hooks.with_graph(model, example.example)
    with taken_by_the_model(example, TRACE):
        wrapper.get_graph()
    made = [algorithm(dataset=data, **fields) for algorithm, fields in steps]
    for algorithm in made:
        if isinstance(algorithm, ScaleSearch):
            algorithm.keep_finished_ops(resume)
    pipeline = Pipeline([[algorithm] for algorithm in made])
    result = pipeline.run(wrapper, nncf.Dataset([batch.to(model).example for batch in data]))
    return hooks.unwrap(result)


def _within_drop(
    model: nn.Module,
    data: list[Batch],
    steps: Sequence[Step],
    step: int,
    validation: Any,
    resume: Path | None,
) -> nn.Module:
    """Quantize with the fewest bits that hold the accuracy which one of the steps promises."""
    algorithm, fields = steps[step]
    wanted = Accuracy.model_validate(fields["accuracy"])
    if validation is None:
        raise DataError("accuracy: needs validation images: quantize(..., validation_dataset=...)")
    labels, reference = _predictions(model, validation, wanted.metric == "top1")

    def drop_of(quantized: nn.Module) -> float:
        found = _predictions(quantized, validation, False)[1]
        if wanted.metric == "agreement":
            return 100 * (found != reference).double().mean().item()
        right, before = (found == labels).double().mean(), (reference == labels).double().mean()
        return 100 * (before - right).item()

    def raised_to(op: str, width: int) -> dict[str, Any]:
        settings = algorithm(**fields).overridden(op)
        kept = {key: getattr(settings, key).model_dump() for key in Override.model_fields}
        for key, present in zip(("activations", "weights"), widths[op], strict=True):
            kept[key]["bits"] = max(present, width)
        return kept

    def make(moves: Sequence[Move]) -> nn.Module:
        bits = {**start, **{move.op: move.bits for move in moves}}
        left_out = [op for op, width in bits.items() if width is None]
        if len(left_out) == len(bits):
            return copy.deepcopy(model).eval()
        raised = {op: raised_to(op, width) for op, width in bits.items() if width is not None}
        # All that is said of an op, and last: an override that comes later takes the bits back.
        others = {k: v for k, v in fields["scope_overrides"].items() if k not in raised}
        changed = {
            **fields,
            "accuracy": None,
            "mixed_precision": None,
            "ignored_scopes": [*fields["ignored_scopes"], *left_out],
            "scope_overrides": {**others, **raised},
        }
        return _quantized(model, data, [*steps[:step], (algorithm, changed), *steps[step + 1 :]])

    first = _quantized(model, data, steps, resume)
    record = record_of(first)
    widths = {op.name: [operand.bits or WIDEST for operand in op.operands] for op in record.ops}
    start = {name: min(pair) for name, pair in widths.items()}
    moves = ranked_moves({op.name: op.objective_after for op in record.ops}, start)
    best, trials = hold_drop(make, drop_of, first, moves, wanted.max_drop)
    if (record := record_of(best)) is not None:
        tried = tuple(TrialRecord(moves=trial.moves, drop=trial.drop) for trial in trials)
        attach(best, record.model_copy(update={"trials": tried}))
    return best


@torch.no_grad()
def _predictions(
    model: nn.Module, validation: Iterable[Any], labelled: bool
) -> tuple[Tensor | None, Tensor]:
    """Labels (if they are needed) and the model's best class of every validation image."""
    labels, classes = [], []
    with frozen(model):
        for batch in (batches([item])[0] for item in validation):
            if labelled and batch.labels is None:
                raise DataError("accuracy: metric 'top1' needs (images, labels) batches")
            labels.append(batch.labels)
            logits = outputs_of(model, run(model, batch.to(model))).tensors[0]
            classes.append(logits.argmax(-1).cpu())
    if not classes:
        raise DataError("accuracy: the validation set is empty")
    return (torch.cat(labels).cpu() if labelled else None), torch.cat(classes)


def plan(model: nn.Module, example_input: Any, compression: Any = "ptq4vit") -> Plan:
    """What `quantize` would do with a model, without calibrating.

    Parameters
    ----------
    example_input
        A batch of images, as the model takes them.

    Raises
    ------
    ConfigError
        No step of the compression is a scale search.
    """
    searches = [
        algorithm(**fields)
        for algorithm, fields in configs.compression(compression)
        if issubclass(algorithm, ScaleSearch)
    ]
    if not searches:
        raise ConfigError("compression: no step of it searches scales, so there is no plan to show")
    model = copy.deepcopy(bare(model)).eval()
    batch = example_of(batches([example_input])).to(model)
    prepare(model, batch)
    return searches[-1].plan(model, traced(model, batch), len(batch))[0]
