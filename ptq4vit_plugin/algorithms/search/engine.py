"""Search of the scales of one op (PTQ4ViT, section 3.3; algorithm 1).

A *round* searches one operand with the other fixed, then the other way round. Every group (tensor,
head, output channel, row block) takes its own best candidate; the groups of one operand do not
interact, so candidate i is evaluated for all of them in one pass.

`exhaustive` evaluates every candidate on all data. `fast` is successive halving: all candidates on
a small sample of rows, the best few of every group on a larger one, the last survivors on all data
(`SCHEDULE`). For an error metric, a row is drawn with a probability proportional to its share of
the gradient's energy and of the loss at the start scales and at two clipping ones. Both are very
uneven, and differ between output columns (those of q, k, v; of each head), so that a weight's
columns draw their own rows in blocks of up to 32.

Exact: rows without gradient are dropped; the fixed operand is quantized once; no pair of choices is
evaluated twice; an operand is not searched again while the other's choice stands; survivors are
compared on all data, from the second round on together with the current choice, so that with an
error metric the objective never rises. Heuristic, in `fast` only: a candidate that loses on a
sample is dropped, and from the third round on only the second round's survivors are tried.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import Gemm, Terms, difference
from ptq4vit_plugin.algorithms.search.objective import (
    View,
    angle_loss,
    error_loss,
    error_weight,
    is_angle,
    view,
)
from ptq4vit_plugin.integrations.device import has_int8_dot

#: Elements of the output per chunk: 1 MB, which stays in a core's share of the last-level cache.
CHUNK = 1 << 18


class _Grouping(Protocol):
    shape: tuple[int, ...]
    blocks: int

    def sum(self, err: Tensor) -> Tensor: ...


class _Quantizer(Protocol):
    """What the engine needs of `ptq4vit_plugin.quantizers.base.OperandQuantizer`."""

    n: int
    grouping: _Grouping

    def fake_quantize(self, x: Tensor, index: Tensor | int) -> Tensor: ...

    def terms(self, x: Tensor, index: Tensor | int) -> list[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Stage:
    """One stage of successive halving."""

    fraction: float  #: of the output rows that are evaluated
    minimum: int  #: rows, for small ops
    keep: int  #: candidates per group that go on to the next stage


#: Stages of `fast`; the survivors of the last one are compared on all rows. The first round and
#: the second (the first one had to work with the other operand's start scale) begin with all
#: candidates, later rounds with those that survived the first stage in the second round.
SCHEDULE = (Stage(1 / 64, 128, 16), Stage(1 / 12, 512, 3))
#: The same for angle metrics, which have no gradient to tell which rows matter.
ANGLE_SCHEDULE = (Stage(1 / 8, 512, 24),)
#: Candidates, as a share of the table, at which `fast` looks where clipping shows.
PROBES = (0.25, 0.5)
#: Widest block of output columns that draws its own sample of rows.
BLOCK = 32


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
        `fast` on the first stage's sample.
    """

    a_index: Tensor | None
    b_index: Tensor | None
    before: float
    after: float
    evaluations: float
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Problem:
    """An op, or a sample of it, ready to be evaluated.

    `output` is the full-precision product without bias, contiguous. `weight` multiplies the error
    before it is squared (error metrics) or the loss of a row (angle metrics).
    """

    metric: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    output: Tensor
    weight: Tensor | None
    images: int
    quantizers: dict[str, _Quantizer | None]
    integer: bool
    cost: float  #: output elements, as a share of the whole op's
    blocks: int = 1  #: column blocks that stand where the heads are, each with its own rows
    fixed: dict[str, tuple[bytes, Terms]] = field(default_factory=dict)

    def quantize(self, operand: str, x: Tensor, index: Tensor | None) -> Terms:
        quantizer = self.quantizers[operand]
        if quantizer is None or index is None:
            return [(x, None)]
        if self.integer:
            return quantizer.terms(x, index)
        x = quantizer.fake_quantize(x, index)
        if operand == "b" and self.blocks > 1:
            x = x.unflatten(3, (self.blocks, -1))[0, 0].transpose(0, 1)[None]
        return [(x, None)]

    def whole(self, operand: str, index: Tensor | None) -> Terms:
        """The quantized operand, kept until another choice is asked for."""
        key = b"" if index is None else _bytes(index)
        kept = self.fixed.get(operand)
        if kept is None or kept[0] != key:
            self.fixed[operand] = (key, self.quantize(operand, getattr(self, operand), index))
        return self.fixed[operand][1]

    def chunks(self, view: View) -> list[tuple[slice, slice]]:
        """Slices of the first and the third dimension whose outputs fit `CHUNK`."""
        batch, heads, rows, columns = self.output.shape
        if batch > 1:
            step = max(1, CHUNK // (heads * rows * columns))
            return [(slice(i, min(i + step, batch)), slice(None)) for i in range(0, batch, step)]
        unit = rows // self.images if view.kind == "column" else 1
        step = unit * max(1, CHUNK // (heads * columns * unit))
        return [(slice(None), slice(i, min(i + step, rows))) for i in range(0, rows, step)]

    def errors(self, a_index: Tensor | None, b_index: Tensor | None, searched: str, view: View):
        """Yield ``(error, output, weight)`` of every chunk at the given choice."""
        batched = self.output.shape[0] > 1
        a_whole = None if searched == "a" else self.whole("a", a_index)
        # A weight is quantized once per candidate; a batched operand chunk by chunk.
        b_whole = None if searched == "b" and batched else self.whole("b", b_index)
        for images, rows in self.chunks(view):
            if a_whole is None:
                a = self.quantize("a", self.a[images, :, rows], a_index)
            else:
                a = [(codes[images, :, rows], scale) for codes, scale in a_whole]
            if b_whole is None:
                b = self.quantize("b", self.b[images], b_index)
            else:
                b = [(codes[images] if batched else codes, scale) for codes, scale in b_whole]
            output = self.output[images, :, rows]
            if not output.is_contiguous():
                output = output.contiguous()
            weight = self.weight
            if weight is not None:
                weight = weight[images, :, rows]
            yield difference(a, b, output), output, weight

    def loss(
        self, a_index: Tensor | None, b_index: Tensor | None, searched: str, view: View
    ) -> Tensor:
        """Loss per head or head and column at a choice, ``[1,H,1,1 or O]``, float64."""
        total: Tensor | None = None
        for error, output, weight in self.errors(a_index, b_index, searched, view):
            if is_angle(self.metric):
                if self.bias is not None:
                    output = output + self.bias
                whole = error.shape[0] > 1 or self.output.shape[0] > 1
                images = 1 if whole else error.shape[2] * self.images // self.output.shape[2]
                part = angle_loss(self.metric, error, output, view, images, weight)
            else:
                part = error_loss(self.metric, error, view, weight)
            total = part if total is None else total + part
        assert total is not None
        return total.flatten()[None, None, None] if self.blocks > 1 else total

    def row_loss(self, a_index: Tensor | None, b_index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and gradient energy ``[B,H,N,G]`` of rows in G column blocks (error metrics)."""
        width = _block_width(self.output.shape[3])
        losses, energies = [], []
        for error, _, weight in self.errors(a_index, b_index, "a", View("head")):
            energy = torch.ones_like(error) if weight is None else weight.square()
            if weight is not None:
                error.mul_(weight)
            error = error.abs_() if self.metric == "l1" else error.square_()
            losses.append(error.unflatten(3, (-1, width)).sum(4).double())
            energies.append(energy.unflatten(3, (-1, width)).sum(4).double())
        along = 0 if self.output.shape[0] > 1 else 2
        return torch.cat(losses, along), torch.cat(energies, along)

    def sample(
        self, stage: Stage, rows_loss: list[Tensor] | None, in_blocks: bool
    ) -> "_Problem | None":
        """A sample of the rows; None if it would be (almost) everything.

        Error metrics: rows are drawn with probability proportional to size and weighted by the
        inverse (Horvitz-Thompson), so that sampled losses estimate the whole's. Batched ops draw
        images per head, then rows per image; `in_blocks` draws rows per column block. Angle
        metrics: evenly spaced positions of every image.
        """
        batch, heads, rows, columns = self.output.shape
        fraction = max(stage.fraction, stage.minimum / (batch * rows))
        if fraction > 0.7:
            return None
        if rows_loss is None:
            return self._spaced(fraction)
        if batch > 1:
            return self._sample_images(fraction, [x.sum(3) for x in rows_loss])
        count = max(1, round(rows * fraction))
        blocks = rows_loss[0].shape[3] if in_blocks else 1
        if blocks == 1:  # the same rows for all columns and all groups of a convolution
            size = _size([x.sum((0, 1, 3))[None] for x in rows_loss])
            chosen, factor = _draw(size, count)
            index, factor = chosen[0], factor[0, :, None]
            a, output = self.a[:, :, index], self.output[:, :, index]
            weight = None if self.weight is None else self.weight[:, :, index]
        else:
            chosen, factor = _draw(_size([x[0, 0].T for x in rows_loss]), count)
            factor = factor[..., None]
            a = self.a[0, 0][chosen][None]
            column = torch.arange(columns, device=chosen.device).view(blocks, 1, -1)
            output = self.output[0, 0][chosen[..., None], column][None]
            weight = self.weight
            if weight is not None:
                weight = weight[0, 0][chosen[..., None], column][None]
        return self._sampled(a, self.b, output, weight, factor, blocks)

    def _sample_images(self, fraction: float, parts: list[Tensor]) -> "_Problem":
        """Images per head, then rows per image, by sizes of parts ``[B,H,N]``."""
        batch, heads, rows = parts[0].shape
        sizes = _size([x.sum(2).T for x in parts])
        chosen, first = _draw(sizes, max(2, round(batch * fraction**0.5)))
        images, head = chosen.T, torch.arange(heads, device=chosen.device)
        count = min(rows, max(1, round(rows * fraction * batch / len(images))))
        sizes = _size([x[images, head].flatten(0, 1) for x in parts])
        chosen, second = _draw(sizes, count)
        index = chosen.view(*images.shape, count)[..., None]

        def pick(x: Tensor) -> Tensor:
            return x[images, head].gather(2, index.expand(*index.shape[:3], x.shape[3]))

        factor = (second.view(*images.shape, count) * first.T[..., None])[..., None]
        weight = None if self.weight is None else pick(self.weight)
        return self._sampled(pick(self.a), self.b[images, head], pick(self.output), weight, factor)

    def _sampled(
        self,
        a: Tensor,
        b: Tensor,
        output: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        blocks: int = 1,
    ) -> "_Problem":
        factor = (factor if self.metric == "l1" else factor.sqrt()).float()
        return replace(
            self,
            a=a,
            b=b,
            output=output,
            weight=factor.expand(*output.shape[:3], 1) if weight is None else weight * factor,
            integer=self.integer and blocks == 1,
            cost=self.cost * output.numel() / self.output.numel(),
            blocks=blocks,
            fixed={},
        )

    def _spaced(self, fraction: float) -> "_Problem":
        rows = self.output.shape[2]
        images = 1 if self.output.shape[0] > 1 else self.images
        positions = rows // images
        count = max(2, round(positions * fraction))
        step = positions / count
        inside = ((torch.arange(count, device=self.a.device) + 0.5) * step).long()
        index = (torch.arange(images, device=self.a.device)[:, None] * positions + inside).flatten()
        return replace(
            self,
            a=self.a[:, :, index],
            output=self.output[:, :, index],
            images=1,  # an image's few positions make a poor angle: take them all together
            cost=self.cost * len(index) / rows,
            fixed={},
        )


def _bytes(index: Tensor) -> bytes:
    return index.cpu().numpy().tobytes()


def _block_width(columns: int) -> int:
    """The widest block up to `BLOCK` that divides the columns; all of them if none does."""
    width = next((w for w in range(min(BLOCK, columns), 7, -1) if columns % w == 0), columns)
    return width


def _size(parts: list[Tensor]) -> Tensor:
    """Sampling sizes ``[G, n]``: the sum of an item's shares of what its group has of each part."""
    return torch.stack([x / x.sum(1, keepdim=True).clamp_min(1e-300) for x in parts]).sum(0)


def _indifferent(candidates: Tensor, losses: Tensor) -> Tensor:
    """Groups whose candidates differ while their losses do not: nothing to choose by."""
    return (candidates != candidates[0]).any(0) & (losses.amax(0) <= losses.amin(0))


def _draw(importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sample with probability proportional to size, without randomness.

    Parameters
    ----------
    importance
        ``[G, n]``, not negative.
    count
        Items to draw per group.

    Returns
    -------
    tuple
        Indices ``[G, count]`` in ascending order and inverse inclusion probabilities.
    """
    groups, n = importance.shape
    if count >= n:
        index = torch.arange(n, device=importance.device).expand(groups, n)
        return index, torch.ones_like(index, dtype=torch.float64)
    size = importance.double()
    total = size.sum(1, keepdim=True)
    # A tenth of the draws is uniform: no item is impossible and no weight exceeds 10 n / count.
    size = 0.9 * size / total.clamp_min(1e-300) + 0.1 / n
    certain = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(count):  # items whose probability would exceed 1 are taken for certain
        rest = count - certain.sum(1, keepdim=True)
        free = size.masked_fill(certain, 0)
        probability = (free * rest / free.sum(1, keepdim=True)).masked_fill(certain, 1)
        over = probability > 1
        if not over.any():
            break
        certain |= over
    probability = probability.clamp_max(1)
    ends = probability.cumsum(1)
    points = (torch.arange(count, device=size.device, dtype=torch.float64) + 0.5).expand(
        groups, count
    )
    index = torch.searchsorted(ends, points.contiguous()).clamp_max(n - 1)
    return index, 1 / probability.gather(1, index)


def _identity(x: Tensor) -> Tensor:
    return x


def _without_dead_rows(gemm: Gemm) -> Gemm:
    """Drop images and rows whose gradient is zero everywhere: they contribute exactly nothing.

    One is kept if all are such.
    """
    assert gemm.fisher is not None
    a, b, bias, fisher = gemm.a, gemm.b, gemm.bias, gemm.fisher
    alive = fisher.amax(3) > 0
    if not alive.any():
        alive[0, 0, 0] = True
    images, rows = alive.flatten(1).any(1), alive.flatten(0, 1).any(0)
    if not rows.all():
        a, fisher = a[:, :, rows], fisher[:, :, rows]
    if not images.all():
        a, fisher = a[images], fisher[images]
        b = b if b.shape[0] == 1 else b[images]
    return Gemm(a, b, bias, fisher)


def _prepare(
    gemm: Gemm,
    quantizers: dict[str, _Quantizer | None],
    metric: str,
    images: int,
    reduce: Callable[[Tensor], Tensor] = _identity,
) -> _Problem | None:
    """The problem on all data; None if no output has a gradient."""
    bias = gemm.bias
    whole = gemm.a.shape[:3].numel() * gemm.b.shape[3]
    if metric == "hessian" and gemm.fisher is not None:
        if not reduce(gemm.fisher.amax()) > 0:
            return None
        gemm = _without_dead_rows(gemm)
    a, b, fisher = gemm.a.float(), gemm.b.float(), gemm.fisher
    if b.shape[0] == 1 and a.shape[0] > 1:  # one weight for all images: rows of one GEMM
        images = a.shape[0] if images == 1 else images
        a = a.transpose(0, 1).flatten(1, 2)[None]
        if fisher is not None:
            fisher = fisher.transpose(0, 1).flatten(1, 2)[None]
    output = torch.matmul(a, b)
    weight = None
    if not is_angle(metric):
        weight = error_weight(metric, output if bias is None else output + bias, fisher)
    both = all(quantizer is not None for quantizer in quantizers.values())
    integer = both and a.shape[0] == 1 and has_int8_dot(a.device)
    cost = output.numel() / whole
    return _Problem(metric, a, b, bias, output, weight, images, quantizers, integer, cost)


class _Search:
    """State of one op's search: the current choice, the losses known so far, the cost."""

    def __init__(self, problem: _Problem, reduce: Callable[[Tensor], Tensor]) -> None:
        self.problem = problem
        self.reduce = reduce
        self.evaluations = 0.0
        self.curves: dict[str, list[float]] = {}
        self.index: dict[str, Tensor | None] = {"a": None, "b": None}
        self._views: dict[str, View] = {}
        self._losses: dict[tuple, Tensor] = {}
        self._samples: dict[tuple[Stage, bool], _Problem | None] = {}
        self._rows: list[Tensor] | None = None
        self._survivors: dict[str, Tensor] = {}
        quantizers = {k: q for k, q in problem.quantizers.items() if q is not None}
        columns = problem.output.shape[3]
        per_column = any(1 < q.grouping.shape[3] == columns for q in quantizers.values())
        for operand, quantizer in quantizers.items():
            shape, blocks = quantizer.grouping.shape, quantizer.grouping.blocks
            self._views[operand] = view(problem.metric, shape, blocks, columns, per_column)
            self.index[operand] = torch.full(shape, quantizer.n, device=problem.a.device)

    def start(self) -> float:
        """Evaluate the start scales: the objective, and where in the rows the error is."""
        if is_angle(self.problem.metric):
            return self.objective()
        loss, energy = self.problem.row_loss(self.index["a"], self.index["b"])
        self.evaluations += self.problem.cost
        self._rows = [energy, loss]
        return float(self.reduce(loss.sum()))

    def probe(self) -> None:
        """Learn which rows suffer from clipping, so that samples contain them."""
        if self._rows is None:
            return
        moved = ("a", "b") if self.problem.output.shape[0] > 1 else ("a",)
        for part in PROBES:
            probe = dict(self.index)
            for operand in moved:
                quantizer, index = self.problem.quantizers[operand], self.index[operand]
                if quantizer is not None and index is not None:
                    probe[operand] = torch.full_like(index, int(part * quantizer.n))
            self._rows.append(self.problem.row_loss(probe["a"], probe["b"])[0])
            self.evaluations += self.problem.cost

    def objective(self) -> float:
        """The op's loss at the current choice, on all data."""
        operand = "a" if self.index["b"] is None else "b"
        index = self.index[operand]
        return 0.0 if index is None else float(self._loss(self.problem, operand, index).sum())

    def exhaustive(self, operand: str) -> Tensor:
        """The best candidate of every group, all evaluated on all data."""
        return self._decide(operand, self._candidates(operand))

    def fast(self, operand: str, turn: int) -> Tensor:
        """The same by successive halving (see `SCHEDULE`), in round `turn`, from 0."""
        current = self.index[operand]
        assert current is not None
        candidates = self._survivors.get(operand, self._candidates(operand))
        skip = 1 if operand in self._survivors else 0
        schedule = ANGLE_SCHEDULE if is_angle(self.problem.metric) else SCHEDULE
        for stage in schedule[skip:]:
            sample = self._sample(stage, operand)
            if sample is not None and len(candidates) > stage.keep:
                _, groups = self._evaluate(sample, operand, candidates)
                best = groups.argsort(dim=0, stable=True)[: stage.keep]
                best = candidates.gather(0, best)
                # Without a gradient on the sample a group keeps its choice for now.
                candidates = torch.where(_indifferent(candidates, groups), current, best)
                if turn == 1 and stage is schedule[0]:
                    self._survivors[operand] = candidates
        if turn > 0:
            candidates = torch.cat([candidates, current[None]])
        return self._decide(operand, candidates.sort(0).values)

    def _candidates(self, operand: str) -> Tensor:
        """All table rows to try, ``[n, *group shape]``."""
        quantizer, current = self.problem.quantizers[operand], self.index[operand]
        assert quantizer is not None and current is not None
        rows = torch.arange(quantizer.n, device=current.device).view(-1, *[1] * current.dim())
        return rows.expand(-1, *current.shape)

    def _decide(self, operand: str, candidates: Tensor) -> Tensor:
        """First best candidate on all data; groups for which all are equal keep their choice."""
        current = self.index[operand]
        assert current is not None
        problem = self.problem
        losses, groups = self._evaluate(problem, operand, candidates)
        best = groups.argmin(0, keepdim=True)
        choice = candidates.gather(0, best)[0]
        choice = torch.where(_indifferent(candidates, groups), current, choice)
        # Groups do not interact: the loss of the mixed choice is known without evaluating it.
        mixed = losses.gather(0, best.expand(1, *losses.shape[1:]))[0]
        self._losses.setdefault(self._key(problem, operand, choice), mixed)
        return choice

    def _evaluate(
        self, problem: _Problem, operand: str, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of candidates, per head and column and summed per group, stacked."""
        losses = torch.stack([self._loss(problem, operand, c) for c in candidates])
        quantizer = problem.quantizers[operand]
        assert quantizer is not None
        if len(candidates) == quantizer.n and torch.equal(candidates, self._candidates(operand)):
            self.curves[operand] = losses.flatten(1).sum(1).tolist()
        return losses, torch.stack([quantizer.grouping.sum(x) for x in losses])

    def _loss(self, problem: _Problem, operand: str, index: Tensor) -> Tensor:
        """Loss at `index` of `operand` and the current choice of the other; remembered."""
        key = self._key(problem, operand, index)
        if key not in self._losses:
            choice = {**self.index, operand: index}
            self._losses[key] = self.reduce(
                problem.loss(choice["a"], choice["b"], operand, self._views[operand])
            )
            self.evaluations += problem.cost
        return self._losses[key]

    def _key(self, problem: _Problem, operand: str, index: Tensor) -> tuple:
        choice = {**self.index, operand: index}
        return (
            id(problem),
            self._views[operand],
            *(None if choice[k] is None else _bytes(choice[k]) for k in ("a", "b")),
        )

    def _sample(self, stage: Stage, operand: str) -> _Problem | None:
        quantizer = self.problem.quantizers[operand]
        assert quantizer is not None
        batch, heads, _, columns = self.problem.output.shape
        in_blocks = batch == heads == 1 and 1 < quantizer.grouping.shape[3] == columns
        key = (stage, in_blocks)
        if key not in self._samples:
            sample = self.problem.sample(stage, self._rows, in_blocks)
            # Processes take the same decision; one whose share is too small gives all its rows.
            sampling = torch.tensor(float(sample is not None), device=self.problem.a.device)
            if self.reduce(sampling) > 0 and sample is None:
                sample = replace(self.problem, fixed={})
            self._samples[key] = sample
        return self._samples[key]


def search(
    gemm: Gemm,
    a: _Quantizer | None,
    b: _Quantizer | None,
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
    problem = _prepare(gemm, quantizers, metric, images, reduce)
    if problem is None:
        starts = [
            None if q is None else torch.full(q.grouping.shape, q.n, device=gemm.a.device)
            for q in (a, b)
        ]
        return SearchResult(starts[0], starts[1], 0.0, 0.0, 0.0)
    state = _Search(problem, reduce)
    before = state.start()
    if strategy == "fast":
        state.probe()
    searched_with: dict[str, bytes] = {}  # the other operand's choice at the last search
    for turn in range(rounds):
        for operand, other in zip(order, reversed(order), strict=True):
            fixed = state.index[other]
            with_ = b"" if fixed is None else _bytes(fixed)
            if quantizers[operand] is None or searched_with.get(operand) == with_:
                continue
            searched_with[operand] = with_
            if strategy == "exhaustive":
                state.index[operand] = state.exhaustive(operand)
            else:
                state.index[operand] = state.fast(operand, turn)
    after = state.objective()
    return SearchResult(
        state.index["a"],
        state.index["b"],
        before,
        after,
        round(state.evaluations, 3),
        state.curves,
    )
