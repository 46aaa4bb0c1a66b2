"""The lifecycle that algorithms which search scales share, as an NNCF algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from operator import attrgetter
from typing import Any, Literal, Self

import psutil
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from torch import Tensor, nn

from ptq4vit_plugin import registry
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.mixed_precision import choose_bits
from ptq4vit_plugin.algorithms.planning import make_plan, matches
from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.algorithms.settings import (
    Accuracy,
    Activations,
    MixedPrecision,
    Override,
    Twin,
    Weights,
)
from ptq4vit_plugin.algorithms.views import GemmView, view_of
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch_norm import fold_batch_norms
from ptq4vit_plugin.integrations.nncf.capture import Batch, Recorded, batches, record
from ptq4vit_plugin.integrations.nncf.decompose import is_decomposed
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.timm.attention import fuse_attention
from ptq4vit_plugin.plan import FoundOp, Op, Operand, Plan
from ptq4vit_plugin.quantizers.base import OperandQuantizer, SearchRange
from ptq4vit_plugin.record import OperandRecord, OpRecord, QuantizationRecord, attach
from ptq4vit_plugin.reporting.progress import progress

GIB = 2**30
# Candidates of the search that only ranks ops.
SENSITIVITY_STEPS = 25
Metric = Literal[
    "hessian", "cosine", "mse", "l1", "linear_weighted_l2", "square_weighted_l2", "pearson"
]


class ScaleSearch(BaseModel, Algorithm):
    """Choose every scale by searching for the one that disturbs the op's output least.

    Lifecycle of `apply`: attention is unfused; batch
    normalization is folded into convolutions; ops are found on the NNCF graph; a plan gives each
    operand a quantizer; operands and gradients are recorded in as few forward/backward passes as
    fit the memory; the search runs op by op, always against the floating-point model; quantizers
    are inserted as NNCF hooks.

    Fields are the algorithm's config. Constructor: ``Algorithm(dataset, **fields)``, because an
    NNCF pipeline does not pass the dataset on to its steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Weights = Weights()
    activations: Activations = Activations()
    granularity: Literal["paper"] | None = Field(
        default=None,
        description="'paper': shorthand that sets the granularity of weights and activations",
    )
    ignored_scopes: tuple[str, ...] = Field(
        default=(),
        description="ops that stay in float: names as `plan` prints them, or '{re}' and a pattern",
    )
    scope_overrides: dict[str, Override] = Field(
        default={}, description="sections for some ops only, by name or '{re}' and a pattern"
    )
    twin: Twin = Twin()
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
        description="GiB for recorded activations; default: a quarter of what is free",
    )

    _dataset: Any = PrivateAttr(default=None)

    def __init__(self, dataset: Any = None, **fields: Any) -> None:
        super().__init__(**fields)
        self._dataset = dataset

    @model_validator(mode="after")
    def _expand_granularity(self) -> Self:
        if self.granularity == "paper":
            paper = {"granularity": "paper"}
            # The model is frozen for its users; the shorthand is part of its making.
            object.__setattr__(self, "weights", self.weights.model_copy(update=paper))
            object.__setattr__(self, "activations", self.activations.model_copy(update=paper))
        return self

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch only."""
        return [BackendType.TORCH]

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """NNCF collects nothing for this algorithm: it records what it needs itself."""
        return StatisticPointsContainer()

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
            There is nothing to quantize.
        """
        buffers = {name for name, _ in model.named_buffers()}
        found, left_out = find_ops(graph, batch_size, buffers)
        plan = make_plan(found, left_out, self)
        if not any(op.kind in ("linear", "matmul") for op in plan.ops):
            reasons = ", ".join(f"{op.name} ({op.reason})" for op in plan.left_out)
            raise ModelError(
                f"{type(model).__name__} has no transformer op (linear or matrix product) to "
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
            Nothing to quantize, or gradients that cannot rank anything.
        """
        started = time.perf_counter()
        module = hooks.unwrap(model)
        source = self._dataset if dataset is None else dataset
        if source is None:
            name = type(self).__name__
            raise DataError(f"{name} needs calibration images: {name}(dataset, ...)")
        data = batches(source)
        example = data[0].to(module)
        before = is_decomposed(module)
        switched = prepare(module, example)
        if switched or is_decomposed(module) != before:
            graph = hooks.trace(module, example.example)
        fold_batch_norms(module, graph)
        plan, found = self.plan(module, graph, len(data[0]))
        if self.mixed_precision is not None:
            plan = self._mixed(module, data, plan, found)
        quantizers, records = self._calibrate(module, data, plan, found)
        for place, quantizer in quantizers.items():
            hooks.insert(module, *place, quantizer)
        fuse_attention(module, _without_products(switched, plan))
        hooks.forget_graph(model)
        attach(
            module,
            QuantizationRecord(
                algorithm=type(self).__name__,
                settings=self.model_dump(mode="json", exclude_defaults=True),
                plan=plan,
                ops=tuple(records),
                images=sum(map(len, data)),
                seconds=time.perf_counter() - started,
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
        objectives = [
            {r.name: r.objective_after for r in coarse._calibrate(module, data, at, found)[1]}
            for at in (plan.at_bits(dict.fromkeys(found, bits)) for bits in wanted.choices)
        ]
        chosen = choose_bits(
            [[objective[op.name] for objective in objectives] for op in plan.ops],
            [op.macs if wanted.budget == "macs" else _size(found[op.name]) for op in plan.ops],
            wanted.choices,
            wanted.average_bits,
        )
        return plan.at_bits({op.name: bits for op, bits in zip(plan.ops, chosen, strict=True)})

    def _calibrate(
        self, module: nn.Module, data: Sequence[Batch], plan: Plan, found: dict[str, FoundOp]
    ) -> tuple[dict[tuple[str, int | None], nn.Module], list[OpRecord]]:
        """Search all ops; returns quantizers by (op name, port) or (parameter name, None)."""
        quantizers: dict[tuple[str, int | None], nn.Module] = {}
        records = []
        gradient = self.gradient if self.metric == "hessian" else None
        groups = list(_groups(plan.ops, found, data, self._budget()))
        with progress("Calibrating", total=len(data) * len(groups) + len(plan.ops)) as advance:
            for group in groups:
                recorded = record(
                    module,
                    data,
                    [found[op.name] for op in group],
                    gradient,
                    lambda: advance("forward and backward"),
                )
                for op in group:
                    advance(op.name)
                    records.append(
                        self._search_op(
                            module, op, found[op.name], recorded.pop(op.name), quantizers
                        )
                    )
        return quantizers, records

    def _budget(self) -> float:
        return (
            self.memory_budget * GIB
            if self.memory_budget
            else psutil.virtual_memory().available / 4
        )

    @torch.no_grad()
    def _search_op(
        self,
        module: nn.Module,
        op: Op,
        found: FoundOp,
        seen: Recorded,
        quantizers: dict[tuple[str, int | None], nn.Module],
    ) -> OpRecord:
        started = time.perf_counter()
        view = view_of(found)
        images = 1 if op.kind == "matmul" else sum(map(len, seen.inputs[0]))
        gemm = _gemm(module, op, found, view, seen, quantizers)
        left, right = (
            self._quantizer(operand, view, x)
            for operand, x in zip(op.operands, (gemm.a, gemm.b), strict=True)
        )
        result = search(
            gemm,
            left,
            right,
            metric=self.metric,
            rounds=self.rounds,
            order=("a", "b") if op.kind == "matmul" else ("b", "a"),
            strategy=self.search,
            images=images,
        )
        operands = []
        for operand, quantizer, index in zip(
            op.operands, (left, right), (result.a_index, result.b_index), strict=True
        ):
            if quantizer is not None:
                place = (operand.parameter, None) if operand.parameter else (op.name, operand.port)
                hook = quantizer.module(index, lambda s, port=operand.port: view.layout(port, s))
                quantizers[place] = hook
            operands.append(_operand_record(operand, quantizer, index))
        return OpRecord(
            name=op.name,
            kind=op.kind,
            role=op.role,
            operands=tuple(operands),
            objective_before=result.before,
            objective_after=result.after,
            evaluations=result.evaluations,
            seconds=time.perf_counter() - started,
        )

    def _quantizer(self, operand: Operand, view: GemmView, x: Tensor) -> OperandQuantizer | None:
        if operand.quantizer is None:
            return None
        family = registry.load("quantizers", operand.quantizer)
        grouping = view.grouping(operand.port, operand.granularity)
        quantizer = family(operand.bits, grouping, self.search_range, **operand.options)
        quantizer.observe(x)
        return quantizer


def _size(found: FoundOp) -> int:
    return 0 if found.kind == "matmul" else prod(found.shapes[1])


def _gemm(
    module: nn.Module,
    op: Op,
    found: FoundOp,
    view: GemmView,
    seen: Recorded,
    quantizers: dict[tuple[str, int | None], nn.Module],
) -> Gemm:
    """The op's operands in canonical shape, all calibration batches together, in float32."""
    weight = op.operands[1].parameter
    if weight:
        value = module.get_parameter(weight).detach().float()
        shared = quantizers.get((weight, None))
        right = [value if shared is None else shared(value)] * len(seen.inputs[0])
    elif op.kind != "matmul":
        right = seen.inputs[1][:1] * len(seen.inputs[0])  # computed from constants: always the same
    else:
        right = seen.inputs[1]
    pairs = [
        view.operands(a.float(), b.float()) for a, b in zip(seen.inputs[0], right, strict=True)
    ]
    batched = op.kind == "matmul"
    bias = view.bias(attrgetter(found.bias)(module).detach().float()) if found.bias else None
    return Gemm(
        a=torch.cat([a for a, _ in pairs], view.batch_dim),
        b=torch.cat([b for _, b in pairs], view.batch_dim) if batched else pairs[0][1].contiguous(),
        bias=bias,
        fisher=torch.cat([view.output(f) for f in seen.fisher], view.batch_dim)
        if seen.fisher
        else None,
    )


def _groups(
    ops: Sequence[Op], found: dict[str, FoundOp], data: Sequence[Batch], budget: float
) -> Iterator[list[Op]]:
    """Consecutive ops whose recorded tensors fit the budget together; one op at least."""
    batches = sum(map(len, data)) / len(data[0])
    group: list[Op] = []
    used = 0.0
    for op in ops:
        shapes = found[op.name].shapes
        floats = prod(shapes[0]) + prod(found[op.name].output_shape)
        floats += 0 if op.operands[1].parameter else prod(shapes[1])
        size = 4 * floats * batches
        if group and used + size > budget:
            yield group
            group, used = [], 0.0
        group.append(op)
        used += size
    if group:
        yield group


def _without_products(names: Sequence[str], plan: Plan) -> list[str]:
    """Of the attention modules that were unfused, those in which no product is quantized."""
    quantized = [op.name.split("/") for op in plan.ops if op.kind == "matmul"]
    return [
        name
        for name in names
        if not any(path[: name.count(".") + 1] == name.split(".") for path in quantized)
    ]


def _operand_record(
    operand: Operand, quantizer: OperandQuantizer | None, index: Any
) -> OperandRecord:
    if quantizer is None:
        return OperandRecord(**operand.model_dump(exclude={"options"}))
    searched = quantizer.at(index)
    return OperandRecord(
        **operand.model_dump(exclude={"options"}),
        searched_min=float(searched.min()),
        searched_max=float(searched.max()),
        groups=searched.numel(),
    )
