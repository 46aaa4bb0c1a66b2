"""Search of the scales of one op, from what was recorded of it to its hooks and its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptq4vit_plugin import registry
from ptq4vit_plugin.algorithms.diagnosis import histogram, output_sqnr, thinned
from ptq4vit_plugin.algorithms.finished import Place
from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.algorithms.twin_choice import choose_twins
from ptq4vit_plugin.algorithms.views import GemmView, MatmulView, view_of
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations import distributed
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.capture import Recorded
from ptq4vit_plugin.integrations.nncf.passes import frozen, run
from ptq4vit_plugin.plan import FoundOp, Op, Operand, Plan
from ptq4vit_plugin.quantizers.base import OperandQuantizer, SearchRange
from ptq4vit_plugin.record import OperandRecord, OpRecord


@torch.no_grad()
def check_products(
    module: nn.Module, data: Sequence[Batch], plan: Plan, found: Mapping[str, FoundOp]
) -> None:
    """Refuse batches whose matrix products cannot be searched together: they differ in more than
    the number of matrices.

    One batch of every shape is run, and none if all have the same.

    Raises
    ------
    DataError
        There is such a product.
    """
    tensors = [(*batch.args, *batch.kwargs.values()) for batch in data]
    shapes = [tuple(getattr(x, "shape", None) for x in given) for given in tensors]
    different = list(dict(zip(shapes, data, strict=True)).values())
    if len(different) == 1:
        return
    names = [op.name for op in plan.ops if isinstance(view_of(found[op.name]), MatmulView)]
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    inputs = {
        (name, port): lambda x, name=name: seen[name].append(tuple(x.shape))
        for name in names
        for port in (0, 1)
    }
    with hooks.watching(module, inputs, {}), frozen(module):
        for batch in different:
            run(module, batch.to(module))
    for name, shapes_of in seen.items():
        left, right, *others = shapes_of or [(), ()]  # `recorded_in` refuses what does not run
        for a, b in zip(others[::2], others[1::2], strict=True):
            if (a[-2:], b[-2:]) != (left[-2:], right[-2:]):
                raise DataError(
                    f"{name}: multiplies {left} with {right} in one calibration batch and {a} with "
                    f"{b} in another, which cannot be searched together; allowed: batches of one "
                    "shape"
                )


class OpSearch:
    """Searches the ops of a model one by one.

    Parameters
    ----------
    module
        Its weights are read.
    metric, rounds, strategy, search_range
        As in `ScaleSearch`, whose key `search` the strategy is.
    """

    def __init__(
        self,
        module: nn.Module,
        metric: str,
        rounds: int,
        strategy: Literal["fast", "exhaustive"],
        search_range: SearchRange,
    ) -> None:
        self.module = module
        self.metric = metric
        self.rounds = rounds
        self.strategy = strategy
        self.search_range = search_range
        self._families: dict[str, type[OperandQuantizer]] = {}

    @torch.no_grad()
    def search(
        self,
        op: Op,
        found: FoundOp,
        seen: Recorded,
        images: int,
        quantizers: dict[Place, nn.Module],
    ) -> tuple[OpRecord, dict[Place, nn.Module]]:
        """Choose the op's scales.

        Parameters
        ----------
        op, found
            What is planned for it, and what it is on the graph.
        seen
            Recorded of it; emptied.
        images
            How many were recorded.
        quantizers
            By place, of the ops before, whose weights this one may share.

        Returns
        -------
        tuple
            The op's record, and its quantizers by place.
        """
        started = time.perf_counter()
        view = view_of(found)
        gemm = _gemm(self.module, op, found, view, seen, quantizers)

        def searched(op: Op) -> tuple[Any, ...]:
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
                strategy=self.strategy,
                images=1 if op.kind == "matmul" else _told_apart(gemm, images),
                reduce=distributed.total,
            )
            return result, left, right

        op, (result, left, right), twins = choose_twins(op, searched)
        operands, made = [], {}
        for name, operand, quantizer, index in zip(
            "ab", op.operands, (left, right), (result.a_index, result.b_index), strict=True
        ):
            if quantizer is not None:
                place = (operand.parameter, None) if operand.parameter else (op.name, operand.port)
                hook = quantizer.module(index, lambda s, port=operand.port: view.layout(port, s))
                made[place] = hook
            operands.append(
                _operand_record(operand, quantizer, index).model_copy(
                    update={
                        "histogram": histogram(getattr(gemm, name), operand.source),
                        "curve": thinned(result.curves.get(name, [])),
                        "twin": twins.get(operand.port),
                    }
                )
            )
        chosen = OpRecord(
            name=op.name,
            kind=op.kind,
            role=op.role,
            operands=tuple(operands),
            objective_before=result.before,
            objective_after=result.after,
            evaluations=result.evaluations,
            sqnr_db=output_sqnr(gemm, left, right, result),
            seconds=time.perf_counter() - started,
        )
        return chosen, made

    def _quantizer(self, operand: Operand, view: GemmView, x: Tensor) -> OperandQuantizer | None:
        if operand.quantizer is None:
            return None
        family = self._families.get(operand.quantizer)
        if family is None:  # looking it up reads all installed packages' metadata
            family = self._families[operand.quantizer] = registry.load(
                "quantizers", operand.quantizer
            )
        grouping = view.grouping(operand.port, operand.granularity)
        quantizer = family(operand.bits, grouping, self.search_range, **operand.options)
        quantizer.observe(x)
        for extreme in (distributed.smallest(quantizer.low), distributed.largest(quantizer.high)):
            quantizer.observe(extreme)
        return quantizer


def _told_apart(gemm: Gemm, images: int) -> int:
    """How many images an angle is taken of by itself: 1 means all rows together.

    So it is where an image has one row only, as in a classifier, in which a column's angle says no
    more than a sign; and where images are of several sizes, whose rows cannot be told apart.
    """
    rows = gemm.a.shape[2]
    return 1 if rows == images or rows % images else images


def _gemm(
    module: nn.Module,
    op: Op,
    found: FoundOp,
    view: GemmView,
    seen: Recorded,
    quantizers: dict[Place, nn.Module],
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
    bias = view.bias(attrgetter(found.bias)(module).detach().float()) if found.bias else None
    del right
    seen.inputs.clear()
    a, b = ([pair[port] for pair in pairs] for port in (0, 1))
    del pairs
    fisher = [view.output(f) for f in seen.fisher]
    seen.fisher.clear()
    return Gemm(
        a=_whole(a, view.batch_dim),
        b=_whole(b, 0) if view.batch_dim == 0 else b[0].contiguous(),
        bias=bias,
        fisher=_whole(fisher, view.batch_dim) if fisher else None,
    )


def _whole(parts: list[Tensor], dim: int) -> Tensor:
    """All parts as one tensor; they are let go."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    parts.clear()
    return whole


def _operand_record(
    operand: Operand, quantizer: OperandQuantizer | None, index: Any
) -> OperandRecord:
    if quantizer is None:
        return OperandRecord(**operand.model_dump(exclude={"options", "alternative"}))
    searched = quantizer.at(index)
    return OperandRecord(
        **operand.model_dump(exclude={"options", "alternative"}),
        searched_min=float(searched.min()),
        searched_max=float(searched.max()),
        groups=searched.numel(),
    )
