"""Search of the scales of one op (PTQ4ViT, section 3.3; algorithm 1).

A *round* searches one operand with the other fixed, then the other way round. Every group (tensor,
head, output channel, row block) takes its own best candidate; the groups of one operand do not
interact, so candidate i is evaluated for all of them in one pass.

`exhaustive` evaluates every candidate on all data. `fast` looks first how unevenly the rows matter
(`rows.py`): by the gradient's energy on them, and by what is lost on them at the start scales and
at two clipping ones. Where few rows carry nearly everything it searches by elimination
(`elimination.py`), on these alone if they stand for all; otherwise by successive halving on samples
(`halving.py`), or by elimination on the few rows of a product of attention that stand for all.

Exact: rows without gradient are dropped; the fixed operand is quantized once; no pair of choices is
evaluated twice; an operand is not searched again while the other's choice stands (but after its
first search, which may have been rough); objectives that are reported are of all rows. Heuristic,
in `fast` only: a candidate that loses on a sample, or by a matrix that columns share, is dropped,
survivors are compared, and few rows stand for all, up to `SURE`, and elimination leaves out what
was hopeless in an earlier search (`HOPELESS`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.elimination import by_rows
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.algorithms.search.halving import Halving
from ptq4vit_plugin.algorithms.search.losses import Losses
from ptq4vit_plugin.algorithms.search.objective import is_angle
from ptq4vit_plugin.algorithms.search.problem import Quantizer, as_bytes, problem_of
from ptq4vit_plugin.algorithms.search.rows import look

#: Finds the best candidate of every group of an operand, in a round (from 0); whether the operand
#: will be searched again whatever the choice is.
Best = Callable[[str, int, bool], Tensor]


@dataclass(frozen=True)
class SearchResult:
    """Outcome for one op.

    Attributes
    ----------
    a_index, b_index
        Rows of the quantizers' tables, long tensors of group shape; None for a float operand.
    before, after
        Objective at the start scales and at the chosen ones, on all data. Lower is better.
    evaluations
        Evaluations made, in units of one candidate on all data (dropped rows cost nothing).
    curves
        By operand, the objective over all candidates as it was last evaluated: on all data, or in
        `fast` on the rows that it looks at first.
    """

    a_index: Tensor | None
    b_index: Tensor | None
    before: float
    after: float
    evaluations: float
    curves: dict[str, list[float]] = field(default_factory=dict)


def _identity(x: Tensor) -> Tensor:
    return x


def search(
    gemm: Gemm,
    a: Quantizer | None,
    b: Quantizer | None,
    *,
    metric: str = "hessian",
    rounds: int = 3,
    order: tuple[str, str] = ("b", "a"),
    strategy: str = "exhaustive",
    images: int = 1,
    reduce: Callable[[Tensor], Tensor] = _identity,
) -> SearchResult:
    """Choose the table rows of an op's quantizers that minimise the metric.

    Parameters
    ----------
    gemm
        The op on the calibration set.
    a, b
        Quantizers of the operands, after `observe`; None leaves the operand in floating point.
    metric
        One of `objective.METRICS`.
    rounds
        Rounds of alternation; fewer are made when a round changes nothing.
    order
        Which operand a round searches first: ``("b", "a")`` for linear layers and convolutions,
        ``("a", "b")`` for matmuls.
    strategy
        ``"exhaustive"`` or ``"fast"`` (see the module's text).
    images
        Images that the N rows hold, if all images share one batch entry (angle metrics with
        scales per output channel compare image by image).
    reduce
        Sums a tensor over the processes that hold a share of the rows each. All take the same
        decisions then.

    Raises
    ------
    ValueError
        Unknown metric or strategy, a metric without its gradient, or N not a multiple of `images`.
    """
    if strategy not in ("exhaustive", "fast"):
        raise ValueError(f"strategy is {strategy!r}; allowed: exhaustive, fast")
    if gemm.a.shape[2] % images:
        raise ValueError(f"{gemm.a.shape[2]} rows do not divide into {images} images")
    quantizers = {"a": a, "b": b}
    if metric == "hessian" and gemm.fisher is not None and not reduce(gemm.fisher.amax()) > 0:
        starts = [
            None if q is None else torch.full(q.grouping.shape, q.n, device=gemm.a.device)
            for q in (a, b)
        ]
        return SearchResult(starts[0], starts[1], 0.0, 0.0, 0.0)
    losses = Losses(problem_of(gemm, quantizers, metric, images), reduce)
    if strategy == "fast":
        before, best = _fast(losses)
    else:
        before, best = losses.objective(), _exhaustive(losses)
    searched_with: dict[str, bytes] = {}  # the other operand's choice at the last search
    for turn in range(rounds):
        for operand, other in zip(order, reversed(order), strict=True):
            fixed = losses.choice[other]
            with_ = b"" if fixed is None else as_bytes(fixed)
            if quantizers[operand] is None or searched_with.get(operand) == with_:
                continue
            first = turn == 0 < rounds - 1 and operand == order[0] and fixed is not None
            again = first and strategy == "fast"
            losses.choice[operand] = best(operand, turn, again)
            if not again:
                searched_with[operand] = with_
    after = losses.objective()
    return SearchResult(
        losses.choice["a"],
        losses.choice["b"],
        before,
        after,
        round(losses.evaluations, 3),
        losses.curves,
    )


def _fast(losses: Losses) -> tuple[float, Best]:
    """The objective at the start scales, and the search that suits the op's rows."""
    if is_angle(losses.problem.metric):
        return losses.objective(), Halving(losses, None).best
    before, parts = look(losses)
    elimination = by_rows(losses, parts)
    if elimination is None:
        return before, Halving(losses, parts).best
    return before, elimination.best


def _exhaustive(losses: Losses) -> Best:
    """All candidates on all data."""

    def best(operand: str, turn: int, again: bool) -> Tensor:
        every = torch.ones_like(losses.candidates(operand), dtype=torch.bool)
        return losses.best(losses.problem, operand, every)

    return best
