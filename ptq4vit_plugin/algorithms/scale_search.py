"""The lifecycle that algorithms which search scales share, as an NNCF algorithm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from nncf.common.graph.graph import NNCFGraph
from pydantic import Field, PrivateAttr, field_serializer, model_validator
from torch import nn

from ptq4vit_plugin import __version__
from ptq4vit_plugin.algorithms.calibrated import CalibratedAlgorithm
from ptq4vit_plugin.algorithms.finished import FinishedOps, Place, key_of
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.mixed_precision import choose_bits
from ptq4vit_plugin.algorithms.op_search import OpSearch, check_products
from ptq4vit_plugin.algorithms.planning import make_plan, matches
from ptq4vit_plugin.algorithms.recording import (
    GIB,
    Part,
    default_budget,
    recorded_in,
    replays,
    schedule,
)
from ptq4vit_plugin.algorithms.settings import (
    Accuracy,
    Activations,
    MixedPrecision,
    Override,
    Scope,
    Twin,
    Weights,
)
from ptq4vit_plugin.algorithms.target import Target, fitted
from ptq4vit_plugin.algorithms.twin_choice import settled
from ptq4vit_plugin.errors import ConfigError, ModelError
from ptq4vit_plugin.integrations import distributed
from ptq4vit_plugin.integrations.device import device_of, free_memory, peak_memory
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch, example_of
from ptq4vit_plugin.integrations.nncf.batch_norm import fold_batch_norms
from ptq4vit_plugin.integrations.nncf.capture import in_parts, recorded_bytes
from ptq4vit_plugin.integrations.nncf.decompose import is_decomposed
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.passes import traced
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.nncf.replay import replayable_blocks
from ptq4vit_plugin.integrations.nncf.runs import run_untraced
from ptq4vit_plugin.integrations.timm.attention import fuse_attention
from ptq4vit_plugin.plan import FoundOp, LeftOut, Op, Plan
from ptq4vit_plugin.quantizers.base import SearchRange
from ptq4vit_plugin.quantizers.half import in_float32
from ptq4vit_plugin.record import OpRecord, QuantizationRecord, attach
from ptq4vit_plugin.reporting.events import event
from ptq4vit_plugin.reporting.progress import progress

# Candidates of the search that only ranks ops.
SENSITIVITY_STEPS = 25
LATE = "runs for some calibration images only, not for those that the model was traced with"
Metric = Literal[
    "hessian", "cosine", "mse", "l1", "linear_weighted_l2", "square_weighted_l2", "pearson"
]


class ScaleSearch(CalibratedAlgorithm):
    """Choose every scale by searching for the one that disturbs the op's output least.

    Lifecycle of `apply`: attention is unfused; batch normalization is folded into convolutions; ops
    are found on the NNCF graph; a plan gives each operand a quantizer; operands and gradients are
    recorded in as few forward/backward passes as fit the memory, block by block where not all fit;
    the search runs op by op, always against the floating-point model; quantizers are inserted as
    NNCF hooks.
    """

    weights: Weights = Weights()
    activations: Activations = Activations()
    granularity: Literal["paper"] | None = Field(
        default=None,
        description="'paper': shorthand that sets the granularity of weights and activations",
    )
    ignored_scopes: tuple[Scope, ...] = Field(
        default=(),
        description="ops that stay in float: names as `plan` prints them, or '{re}' and a pattern",
    )
    scope_overrides: dict[Scope, Override] = Field(
        default={}, description="sections for some ops only, by name or '{re}' and a pattern"
    )
    twin: Twin = Twin()
    target: Target = Field(
        default="any", description="runtime whose integer kernels the plan keeps to"
    )
    scale_ratio: Literal["free", "power_of_two"] = Field(
        default="free", description="ratio between the two steps of a GELU twin"
    )
    metric: Metric = "hessian"
    search: Literal["fast", "exhaustive"] = "fast"
    search_range: SearchRange = SearchRange()
    rounds: int = Field(default=3, ge=1)
    gradient: Gradient = Gradient()
    mixed_precision: MixedPrecision | None = Field(
        default=None, description="bits per op by sensitivity instead of one width for all"
    )
    accuracy: Accuracy | None = Field(
        default=None,
        description="raise bits until this drop is held on validation images (verb quantize)",
    )
    memory_budget: float | None = Field(
        default=None,
        gt=0,
        description="GiB for recorded activations; default: a fifth of what all would take, 0.5 at "
        "least, a quarter of what is free at most",
    )

    _finished: Path | None = PrivateAttr(default=None)

    def keep_finished_ops(self, folder: Path | None) -> None:
        """Keep finished ops in a folder, and take from there those of an interrupted run."""
        self._finished = folder

    @model_validator(mode="after")
    def _expand_granularity(self) -> ScaleSearch:
        if self.granularity == "paper":
            paper = {"granularity": "paper"}
            # The model is frozen for its users; the shorthand is part of its making.
            object.__setattr__(self, "weights", self.weights.model_copy(update=paper))
            object.__setattr__(self, "activations", self.activations.model_copy(update=paper))
        return self

    @field_serializer("scope_overrides")
    def _as_given(self, overrides: dict[str, Override]) -> dict[str, Any]:
        # Defaults of an override, filled in, would take the place of the algorithm's own values.
        return {
            scope: override.model_dump(mode="json", exclude_unset=True)
            for scope, override in overrides.items()
        }

    def overridden(self, op_name: str) -> ScaleSearch:
        """The settings that hold for one op; overrides are applied in the order of the config."""
        settings = self
        for scope, override in self.scope_overrides.items():
            if matches(scope, op_name):
                update = {
                    key: getattr(settings, key).model_copy(
                        update=section.model_dump(exclude_unset=True)
                    )
                    for key, section in override
                    if section is not None
                }
                settings = settings.model_copy(update=update)
        return settings

    def plan(
        self, model: nn.Module, graph: NNCFGraph, batch_size: int
    ) -> tuple[Plan, dict[str, FoundOp]]:
        """The plan for a model's graph, and the ops found on it by name.

        Raises
        ------
        ModelError
            There is nothing to quantize, or the model is quantized already.
        """
        name = type(model).__name__
        if next(hooks.quantizers(model), None) is not None:
            raise ModelError(
                f"{name} is quantized already; allowed: a float model, and one step that quantizes"
            )
        buffers = {name for name, _ in model.named_buffers()}
        found, left_out = find_ops(graph, batch_size, buffers)
        plan = fitted(make_plan(found, left_out, self), self.target)
        # A model of which the config ignores all but convolutions is still a transformer.
        if not plan.ops or not any(op.kind in ("linear", "matmul") for op in found):
            reasons = ", ".join(f"{op.name} ({op.reason})" for op in plan.left_out)
            raise ModelError(
                f"{name} has no transformer op (linear or matrix product) to "
                f"quantize; left out: {reasons or 'nothing'}"
            )
        return plan, {op.name: op for op in found}

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: Any = None,
        dataset: Any = None,
    ) -> Any:
        """Quantize the model in place and return it.

        Parameters
        ----------
        model
            A module, wrapped by NNCF or not.
        graph
            Its NNCF graph. It is traced again if its attention was fused.
        statistic_points
            Not used.
        dataset
            Calibration data; by default the constructor's.

        Raises
        ------
        DataError
            No calibration data, or data that the model cannot take.
        ModelError
            Nothing to quantize, a model that is quantized already, or gradients that cannot rank
            anything.
        """
        started = time.perf_counter()
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        example = example_of(data).to(module)
        before = is_decomposed(module)
        switched = prepare(module, example)
        if switched or is_decomposed(module) != before:
            graph = traced(module, example)
        fold_batch_norms(module, graph)
        plan, found = self.plan(module, graph, len(example))
        check_products(module, in_parts(data, found.values(), len(example)), plan, found)
        if self.mixed_precision is not None:
            plan = self._mixed(module, data, plan, found)
        with run_untraced(module, graph) as untraced:
            quantizers, records, runs = self._calibrate(module, data, plan, found)
        late = [
            LeftOut(name=name.replace(".", "/"), kind=kind, reason=LATE)
            for name, kind in untraced.items()
        ]
        plan = plan.model_copy(update={"left_out": (*plan.left_out, *late)})
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())
        for place, quantizer in quantizers.items():
            hooks.insert(module, *place, in_float32(quantizer) if half else quantizer)
        fuse_attention(module, _without_products(module, switched, plan))
        hooks.forget_graph(model)
        attach(
            module,
            QuantizationRecord(
                algorithm=type(self).__name__,
                settings=self.model_dump(
                    mode="json",
                    exclude_defaults=True,
                    # Its serializer makes pydantic take it for another value than the default.
                    exclude=None if self.scope_overrides else {"scope_overrides"},
                ),
                plan=settled(plan, records),
                ops=tuple(records),
                images=sum(map(len, data)),
                seconds=time.perf_counter() - started,
                passes=len(runs),
                replays=replays(runs),
                peak_memory=peak_memory(device_of(module)),
            ),
        )
        return model

    def _mixed(
        self, module: nn.Module, data: Sequence[Batch], plan: Plan, found: dict[str, FoundOp]
    ) -> Plan:
        """The plan with the bits that the objective asks for within the budget."""
        wanted = self.mixed_precision
        coarse = self.model_copy(
            update={"rounds": 1, "search_range": replace(self.search_range, n=SENSITIVITY_STEPS)}
        )
        coarse.keep_finished_ops(None)  # they are not the ops of the result
        ops = [op for op in plan.ops if not self._pins_bits(op.name)]
        if not ops:
            return plan
        objectives = [
            {r.name: r.objective_after for r in coarse._calibrate(module, data, at, found)[1]}
            for at in (plan.at_bits({op.name: bits for op in ops}) for bits in wanted.choices)
        ]
        cost = {
            op.name: op.macs if wanted.budget == "macs" else _size(found[op.name])
            for op in plan.ops
        }
        fixed = sum(cost[op.name] * _width(op) for op in plan.ops if op not in ops)
        free = sum(cost[op.name] for op in ops)
        average = wanted.average_bits
        if free:
            average = (average * sum(cost.values()) - fixed) / free
        if average < min(wanted.choices):
            raise ConfigError(
                f"mixed_precision.average_bits: {wanted.average_bits:g} leaves {average:.2f} bits "
                "for the ops whose bits no override sets; allowed: at least "
                f"{min(wanted.choices)} for them"
            )
        chosen = choose_bits(
            [[objective[op.name] for objective in objectives] for op in ops],
            [cost[op.name] for op in ops],
            wanted.choices,
            average,
        )
        return plan.at_bits({op.name: bits for op, bits in zip(ops, chosen, strict=True)})

    def _pins_bits(self, op_name: str) -> bool:
        """Whether an override says how many bits an op has; then they are not chosen."""
        sections = [
            section
            for scope, override in self.scope_overrides.items()
            if matches(scope, op_name)
            for section in (override.weights, override.activations)
        ]
        return any(section and "bits" in section.model_fields_set for section in sections)

    def _calibrate(
        self, module: nn.Module, data: Sequence[Batch], plan: Plan, found: dict[str, FoundOp]
    ) -> tuple[dict[Place, nn.Module], list[OpRecord], list[list[Part]]]:
        """Search all ops; returns quantizers by place, records, and what was recorded when."""
        finished = FinishedOps(
            self._finished, self._key(module, data, plan, found) if self._finished else ""
        )
        records, quantizers = _restored(finished, plan, module)
        waiting = plan.ops[len(records) :]
        example = len(example_of(data))
        data = in_parts(distributed.share(data), found.values(), example)
        gradient = self.gradient if self.metric == "hessian" else None
        images = sum(map(len, data))
        op_search = OpSearch(module, self.metric, self.rounds, self.search, self.search_range)
        ops = [found[op.name] for op in waiting]
        passes = self._schedule(module, data, ops, images / example, gradient)
        event("calibration", ops=len(plan.ops), finished=len(records), passes=len(passes))
        ranked = gradient is None or len(records) > 0  # is there any gradient to rank by?
        with progress(
            "Calibrating",
            len(data) * len(passes) + replays(passes) + len(waiting),
            visible=distributed.rank() == 0,
        ) as advance:

            def batch_done(number: int) -> None:
                advance("forward and backward")
                event("forward_backward", number=number, passes=len(passes))

            def block_done(block: str) -> None:
                advance(f"forward and backward in {block}")
                event("block_recorded", block=block)

            recorded = recorded_in(passes, module, data, gradient, batch_done, block_done)
            for op, seen in zip(waiting, recorded, strict=True):
                advance(f"{op.kind} {op.name}")
                ranked = ranked or any(value.any() for value in seen.fisher)
                result, made = op_search.search(op, found[op.name], seen, images, quantizers)
                quantizers |= made
                records.append(result)
                if distributed.rank() == 0:
                    finished.save(result, made)
                event("op", done=len(records), ops=len(plan.ops), **_facts(result))
        if not distributed.largest(torch.tensor(float(ranked), device=device_of(module))):
            raise ModelError(
                "the gradient is zero at every op, so nothing can be ranked; the model's output "
                "does not depend on its ops, or its softmax is saturated: use gradient kind "
                "'output', or metric 'mse' or 'cosine'"
            )
        return quantizers, records, passes

    def _key(
        self, module: nn.Module, data: Sequence[Batch], plan: Plan, found: dict[str, FoundOp]
    ) -> str:
        """Everything that the scales depend on; how much memory they may take is not of it."""
        settings = self.model_dump(mode="json", exclude={"memory_budget"})
        structure = [type(self).__name__, str(module), str(plan), str(found)]
        return key_of(
            [__version__, distributed.ranks(), settings, structure],
            module,
            [[batch.args, batch.kwargs, batch.labels] for batch in data],
        )

    def _schedule(
        self,
        module: nn.Module,
        data: Sequence[Batch],
        ops: Sequence[FoundOp],
        batches: float,
        gradient: Gradient | None,
    ) -> list[list[Part]]:
        """What is recorded when. `batches` is how many there are of the size of the ops' shapes."""
        sizes = [recorded_bytes(op) * batches for op in ops]
        if self.memory_budget:
            budget = self.memory_budget * GIB
        else:
            budget = default_budget(sizes, free_memory(device_of(module)))
        blocks = {}
        if sum(sizes) > budget:
            per_image = replayable_blocks(module, ops, data[0], gradient)
            images = sum(map(len, data))
            blocks = {block: size * images for block, size in per_image.items()}
        return schedule(ops, sizes, blocks, budget)


def _width(op: Op) -> int:
    """The larger of an op's widths; what stays in float does not count."""
    return max((operand.bits for operand in op.operands if operand.bits), default=0)


def _size(found: FoundOp) -> int:
    return 0 if found.kind == "matmul" else prod(found.shapes[1])


def _restored(
    finished: FinishedOps, plan: Plan, module: nn.Module
) -> tuple[list[OpRecord], dict[Place, nn.Module]]:
    """The ops at the beginning of the plan that an interrupted run has finished."""
    device = device_of(module)
    records, quantizers = [], {}
    for op in plan.ops:
        kept = finished.load(op.name)
        # Processes that do not share a disk know different ops.
        everywhere = distributed.smallest(torch.tensor(float(kept is not None), device=device))
        if kept is None or not everywhere:
            break
        records.append(kept[0])
        quantizers |= {place: hook.to(device) for place, hook in kept[1].items()}
    return records, quantizers


def _facts(record: OpRecord) -> dict[str, Any]:
    """What an event tells of an op."""
    facts = record.model_dump(exclude={"operands"})
    facts["quantizers"] = {
        operand.port: operand.quantizer and f"{operand.quantizer} {operand.bits} bits"
        for operand in record.operands
    }
    return facts


def _without_products(module: nn.Module, names: Sequence[str], plan: Plan) -> list[str]:
    """Of the attention modules that were unfused, those in which no product is quantized."""
    quantized = [op.name.split("/")[:-2] for op in plan.ops if op.kind == "matmul"]
    modules = {name for name, _ in module.named_modules()}
    if any(".".join(path) not in modules for path in quantized):
        # Where a model calls modules past their parents, NNCF's names give a part of the path, and
        # nobody can tell which module an op is in.
        return []
    return [
        name
        for name in names
        if not any(path[: name.count(".") + 1] == name.split(".") for path in quantized)
    ]
