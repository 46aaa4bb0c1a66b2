"""Exact folds before quantization: norms into linears (RepQ-ViT), inside attention, and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.calibrated import CalibratedAlgorithm
from ptq4vit_plugin.algorithms.folding.factors import balance, channel_scale
from ptq4vit_plugin.algorithms.folding.rescale import (
    fold_norm,
    transform_columns,
    transform_rows,
)
from ptq4vit_plugin.algorithms.folding.statistics import Channels, Heads
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch, example_of
from ptq4vit_plugin.integrations.nncf.channels import (
    NormPath,
    ScorePath,
    ValuePath,
    attention_paths,
    norm_paths,
    unreached_linears,
)
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.passes import run, tensors_of, traced
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.nncf.runs import run_by_all, run_untraced
from ptq4vit_plugin.integrations.timm.attention import fuse_attention
from ptq4vit_plugin.plan import FoundOp

# Largest difference of outputs before and after, relative to the largest output, above which a
# fold is refused, or so many steps between the numbers of the model's type. Float32 rounding leaves
# about 1e-6; that of float16 and bfloat16 one to three steps, the latter in a model of 24 blocks.
TOLERANCE, STEPS = 1e-4, 16


class Folds(BaseModel):
    """Which channels are rescaled.

    Attributes
    ----------
    norms
        Norm to linears: a scale and, where there are biases, a shift per channel.
    attention
        A transform per head between queries and keys, a scale per channel between values and
        projection; keys and values lose their mean where softmax makes up for it.
    smooth
        A factor per channel in front of the linears that neither of them reaches, such as an MLP's
        second (SmoothQuant): one multiplication of the activation when the model runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    norms: bool = Field(default=True, description="fold scales and shifts of norms into linears")
    attention: bool = Field(
        default=True, description="balance queries with keys and values with the projection"
    )
    smooth: bool = Field(
        default=True, description="multiply channels in front of the linears that no fold reaches"
    )


class FoldNorms(CalibratedAlgorithm, Folds):
    """Rescale channels so that one scale per tensor fits them all; the function stays the same.

    Lifecycle of `apply`: norms followed by linears, and attentions whose factors are rows of
    linears, are found on the graph and proved by running it; activations are measured in one
    forward pass per calibration batch; scales (and shifts) are chosen in closed form and written
    into the parameters; the outputs before and after are compared.
    """

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Fold in place and return the model.

        Raises
        ------
        DataError
            No calibration data, or of which the model makes NaN or infinite values, or batches of
            which not all run an op that is measured.
        ModelError
            The model is quantized already, its outputs change, or later batches run more of it.
        """
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        self.fold(module, data)
        hooks.forget_graph(model)
        return model

    @torch.no_grad()
    def fold(self, module: nn.Module, data: Sequence[Batch]) -> None:
        """`apply` for a bare module and checked batches."""
        if next(hooks.quantizers(module), None) is not None:
            raise ModelError("fold_norms: the model is quantized already; fold it before that")
        first = example_of(data).to(module)
        switched = prepare(module, first)
        graph = traced(module, first)
        found, _ = find_ops(graph, len(first), {name for name, _ in module.named_buffers()})
        before = _outputs(module, first)
        kept = {name: value.clone() for name, value in module.named_parameters()}
        norms = norm_paths(module, graph, found, first)
        scores, values = attention_paths(module, graph, found, first)
        reached = {op.name for path in norms for op in path.consumers}
        reached |= {path.projection.name for path in values}
        smoothed = unreached_linears(graph, found, reached) if self.smooth else []
        norms = norms if self.norms else []
        if not self.attention:
            scores, values = [], []
        with run_untraced(module, graph) as untraced:
            measured = _measure(module, data, scores, values, norms, smoothed)
        if untraced:
            raise ModelError(
                f"fold_norms: '{next(iter(untraced))}' runs for some calibration images only, not "
                "for those that the model was traced with, so no fold can reach it; give images "
                "that all run it, or use algorithm: ptq4vit"
            )
        # Attention first: it changes rows whose reach the scales of the norms depend on.
        for path in scores:
            _balance_scores(module, path, measured)
        for path in values:
            _rescale_values(module, path, measured)
        for path in norms:
            _fold_norm(module, path, measured)
        for op in smoothed:
            _smooth(module, op, measured[op.name, 0])
        change = torch.tensor(list(map(_change, before, _outputs(module, first)))).max()
        fuse_attention(module, switched)
        types = {p.dtype for p in module.parameters() if p.is_floating_point()}
        if not change <= max([TOLERANCE, *(STEPS * torch.finfo(dtype).eps for dtype in types)]):
            for op in smoothed:
                hooks.take(module, op.name, 0)
            for name, value in module.named_parameters():
                value.copy_(kept[name])
            raise ModelError(
                f"fold_norms: the outputs of {type(module).__name__} change by {change:.1e} of the "
                "largest, so a fold is not exact for it; leave the step out (in a preset: "
                "fold: {norms: false, attention: false, smooth: false})"
            )


def _outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    return [x.double() for x in tensors_of(run(module, batch)) if x.numel()]


def _change(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest finite number; NaN if only one has one."""
    same = (after == before) | (after.isnan() & before.isnan())  # as of infinities
    difference = (after - before).masked_fill(same, 0).abs().max()
    largest = before.nan_to_num(0, 0, 0).abs().max()
    return float(difference / largest.clamp_min(1e-300))  # an untrained head may give zeros only


def _measure(
    module: nn.Module,
    data: Sequence[Batch],
    scores: Sequence[ScorePath],
    values: Sequence[ValuePath],
    norms: Sequence[NormPath],
    smoothed: Sequence[FoundOp],
) -> dict[tuple[str, int], Heads | Channels]:
    """Statistics at input ports, by op and port; one pass, as no fold changes another's inputs."""
    inputs: dict[tuple[str, int], Heads | Channels] = {}
    for path in scores:
        inputs[path.product.name, 0] = Heads()
        inputs[path.product.name, 1] = Heads(transposed=True)
    # The first consumer's input has the norm's numbers, whatever reshapes lie in between.
    linears = [*(path.projection for path in values), *(path.consumers[0] for path in norms)]
    for op in (*linears, *smoothed):
        inputs[op.name, 0] = Channels()
    ops = [*(path.product for path in scores), *linears, *smoothed]
    with run_by_all(module, data, ops) as ran, hooks.watching(module, inputs, {}):
        for batch in data:
            run(module, batch.to(module))
            ran()
    for (op, _), seen in inputs.items():
        if seen.count and not seen.finite:
            largest = max(float(batch.images.abs().max()) for batch in data)
            raise DataError(
                f"fold_norms: the input of {op} has NaN or infinite values; the largest number of "
                f"the calibration images is {largest:.1e}; allowed: images and weights of which "
                "the model makes finite numbers"
            )
    return inputs


def _fold_norm(module: nn.Module, path: NormPath, measured: dict) -> None:
    weights = [module.get_parameter(op.sources[1].parameter) for op in path.consumers]
    seen = measured[path.consumers[0].name, 0]
    scale, shift = _scale_and_shift(seen, torch.cat(weights), path.shift)
    fold_norm(module, path, scale, shift)


def _smooth(module: nn.Module, op: FoundOp, seen: Channels) -> None:
    weight = module.get_parameter(op.sources[1].parameter)
    scale, _ = _scale_and_shift(seen, weight, shifts=False)
    # The weight gets what the factor's dtype leaves, so both together stay exact.
    factor = (1 / scale).to(weight.dtype)
    weight.copy_(weight.double() / factor.double())
    hooks.multiply(module, op.name, 0, factor)


def _scale_and_shift(seen: Channels, weight: Tensor, shifts: bool) -> tuple[Tensor, Tensor]:
    """Of the channels of an activation that linears with this weight take."""
    shift = seen.centre() if shifts else torch.zeros_like(seen.origin)
    return channel_scale(seen.reach(shift), seen.moment(2, shift), weight), shift


def _balance_scores(module: nn.Module, path: ScorePath, measured: dict) -> None:
    queries = measured[path.product.name, 0]
    keys = measured[path.product.name, 1]
    to_queries, to_keys = balance(queries.covariance(False), keys.covariance(path.shift))
    transform_rows(module, path.queries, to_queries)
    transform_rows(module, path.keys, to_keys, keys.mean if path.shift else None)


def _rescale_values(module: nn.Module, path: ValuePath, measured: dict) -> None:
    """The projection's input is a mean of values: what fits the one fits the other."""
    weight = module.get_parameter(path.projection.sources[1].parameter)
    scale, shift = _scale_and_shift(measured[path.projection.name, 0], weight, path.shift)
    columns = path.columns.to(scale.device)
    scale, given = scale[columns], shift[columns] if path.shift else None
    transform_rows(module, path.values, torch.diag_embed(1 / scale), given)
    transform_columns(module, path.projection, path.columns, torch.diag_embed(scale), given)
