"""Search of the scales of one op (PTQ4ViT, section 3.3; algorithm 1).

A *round* searches one operand with the other fixed, then the other way round. Every group (tensor,
head, output channel, row block) takes its own best candidate; the groups of one operand do not
interact, so candidate i is evaluated for all of them in one pass.

`exhaustive` evaluates every candidate on all data. `fast` looks first how unevenly the rows matter:
by the gradient's energy on them, and by what is lost on them at the start scales and at two
clipping ones.

- Few rows carry nearly everything (`AHEAD`; often a class token's): what a candidate loses on these
  rows alone rules most candidates out, for certain (see `elimination`).
- Otherwise, successive halving (`SCHEDULE`): all candidates on a small sample of rows, the best of
  every group on a larger one, the last survivors on all rows. What a sample tells depends on how
  many rows it has, not on how many there are. A row is drawn with a probability
  proportional to its share, which differs between output columns (those of q, k, v), so that a
  weight's columns draw their own rows in blocks of up to 64. Of a weight's losses only the
  quadratic part is left to the sample (see `expansion`), and its first search is a rough one.
- Products of attention: the same, but survivors are compared on the largest rows and a sample of
  the others, so many that the loss of every head is known to `SURE`.

Exact: rows without gradient are dropped; the fixed operand is quantized once; no pair of choices is
evaluated twice; an operand is not searched again while the other's choice stands (but after its
first search, which may have been rough); from the second round on survivors are compared together
with the current choice, so that with an error metric the objective on the rows compared never
rises; objectives that are reported are of all rows. Heuristic, in `fast` only: a candidate that
loses on a sample is dropped, survivors are compared up to `SURE`, and elimination leaves out what
was hopeless in an earlier search (`HOPELESS`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search import elimination
from ptq4vit_plugin.algorithms.search.elimination import share_ahead
from ptq4vit_plugin.algorithms.search.expansion import Expansion
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.algorithms.search.objective import View, is_angle, view
from ptq4vit_plugin.algorithms.search.problem import Problem, Quantizer, as_bytes, problem_of
from ptq4vit_plugin.algorithms.search.sampling import judged_width, shares


@dataclass(frozen=True)
class Stage:
    """One stage of successive halving; left out where its sample would be most rows."""

    rows: int  #: output rows that are evaluated
    keep: int  #: candidates per group that go on to the next stage
    far: float = math.inf  #: loss over the best one's from which on they do not


#: Stages of `fast`; the survivors of the last one are compared on (nearly) all rows.
SCHEDULE = (Stage(128, 48), Stage(512, 24, 1.3))
#: The same for a weight whose losses are known but for their quadratic part (see `expansion`).
EXPANDED_SCHEDULE = (Stage(64, 48), Stage(256, 24), Stage(768, 12, 1.15), Stage(6144, 6, 1.08))
#: The same for its first search, whose choice is made again when the other operand has its scale.
ROUGH_SCHEDULE = (Stage(256, 16), Stage(1024, 4, 1.1))
#: The same for products of attention: whole images are drawn there, which says less.
BATCHED_SCHEDULE = (
    Stage(256, 24),
    Stage(512, 12, 1.2),
    Stage(2048, 6, 1.03),
    Stage(8192, 4, 1.01),
)
#: The same for an operand with one scale, whose loss is a smooth curve.
SINGLE_SCHEDULE = (
    Stage(32, 24),
    Stage(128, 12),
    Stage(512, 8, 1.1),
    Stage(1536, 5, 1.02),
    Stage(8192, 3, 1.01),
)
#: The same for angle metrics, which have no gradient to tell which rows matter.
ANGLE_SCHEDULE = (Stage(1024, 24),)
#: Candidates, as a share of the table, at which `fast` looks where clipping shows, on one output
#: column in so many.
PROBES, PROBED_COLUMNS = (0.25, 0.5), 4
#: Share of the loss that is still ahead, in the mean over rows that are sorted by it, up to which
#: `fast` searches by elimination.
AHEAD = 0.1
#: Loss over the best one's, beyond which later searches leave a candidate out. They fix the other
#: operand at another scale, which changes the root of a loss by no more than the root of that
#: operand's own share of it: about as much as the best candidate's whole loss. (Where the other
#: operand stood at its start scale that is not enough: even 64 put objectives of a ViT-S at 4 bits
#: 0.2 % higher.)
HOPELESS = 16.0
#: Columns with so many candidates are evaluated with those alone that have as many; beyond, with
#: those up to the next power of two.
ALONE = 8
#: Relative standard error up to which `fast` lets rows stand for all when it compares survivors.
SURE = 2e-4


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


def _indifferent(candidates: Tensor, losses: Tensor) -> Tensor:
    """Groups whose candidates differ while their losses do not: nothing to choose by."""
    return (candidates != candidates[0]).any(0) & (losses.amax(0) <= losses.amin(0))


class _Search:
    """State of one op's search: the current choice, the losses known so far, the cost."""

    def __init__(self, problem: Problem, reduce: Callable[[Tensor], Tensor]) -> None:
        self.problem = problem
        self.reduce = reduce
        self.evaluations = 0.0
        self.curves: dict[str, list[float]] = {}
        self.index: dict[str, Tensor | None] = {"a": None, "b": None}
        self._views: dict[str, View] = {}
        self._losses: dict[tuple, Tensor] = {}
        self._samples: dict[tuple[Stage, bool, bool], Problem | None] = {}
        self._rows: list[Tensor] | None = None
        self._finals = problem  #: on what the last survivors are compared
        self._pieces: list[Problem] = []  #: of rows sorted by what is lost on them
        self._weighed = torch.ones(1)  #: positive where a head and column has a gradient
        #: Of the present choice, its losses on every piece.
        self._known: tuple[tuple, Tensor] | None = None
        #: By elimination, the candidates that later searches begin with.
        self._alive: dict[str, Tensor] = {}
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
        columns = self.problem.output.shape[3]
        groups = columns // judged_width(columns)
        loss, energy = self.problem.row_loss(self.index["a"], self.index["b"], groups)
        self.evaluations += self.problem.cost
        self._rows = [energy, loss]
        return float(self.reduce(loss.sum()))

    def probe(self) -> None:
        """Learn which rows suffer from clipping, so that samples contain them."""
        if self._rows is None:
            return
        groups = self._rows[0].shape[3]
        columns = self.problem.output.shape[3]
        step = math.gcd(PROBED_COLUMNS, columns // groups)
        some = torch.arange(0, columns, step, device=self.problem.a.device)
        part = self.problem if step == 1 else self.problem.of_columns(some)
        moved = ("a", "b") if self.problem.output.shape[0] > 1 else ("a",)
        for share in PROBES:
            probe = {"a": self.index["a"], "b": _of_columns(self.index["b"], some)}
            for operand in moved:
                quantizer, index = part.quantizers[operand], probe[operand]
                if quantizer is not None and index is not None:
                    probe[operand] = torch.full_like(index, int(share * quantizer.n))
            self._rows.append(part.row_loss(probe["a"], probe["b"], groups)[0])
            self.evaluations += part.cost

    def arrange(self) -> None:
        """Choose the rows that decide (products of attention), or sort them if few have nearly all.

        Sorted rows are cut in pieces, those first on which most is lost.
        """
        if self._rows is None:
            return
        if self.problem.output.shape[0] > 1:
            self._finals = self._together(self.problem.weighty(self._rows, SURE)) or self.problem
            return
        size = shares([x.sum((0, 1, 3))[None] for x in self._rows])[0]
        refused = float(len(size) < 2 * elimination.FIRST or share_ahead(size) > AHEAD)
        # Processes decide alike: all sort, or none does.
        if not self.reduce(torch.tensor(refused, device=size.device)) > 0:
            self._rows = None  # elimination takes no samples, and they are large
            self.problem = self._finals = self.problem.of_rows(size.argsort(descending=True))
            self._pieces = [self.problem.of_rows(part) for part in elimination.pieces(len(size))]
            weight = self.problem.weight
            if weight is None:
                self._weighed = torch.ones_like(self.problem.output[:, :, :1])
            else:
                self._weighed = self.reduce(weight.amax(2, keepdim=True))

    def objective(self) -> float:
        """The op's loss at the current choice, on all data."""
        operand = "a" if self.index["b"] is None else "b"
        index = self.index[operand]
        return 0.0 if index is None else float(self._loss(self.problem, operand, index).sum())

    def exhaustive(self, operand: str) -> Tensor:
        """The best candidate of every group, all evaluated on all data."""
        every = torch.ones_like(self._candidates(operand), dtype=torch.bool)
        return self._compared(operand, every)

    def fast(self, operand: str, turn: int, again: bool) -> Tensor:
        """The same by successive halving (see `SCHEDULE`), in round `turn`, from 0.

        Or by elimination, for certain, where few rows carry nearly everything. `again` says that
        the operand will be searched again whatever the choice is.
        """
        if self._pieces:
            return self._certain(operand, again)
        current = self.index[operand]
        assert current is not None
        candidates = self._halved(operand, self._schedule(operand, again))
        if turn > 0:
            candidates = torch.cat([candidates, current[None]])
        # The start scales, the last row, may be a group's choice still.
        which = torch.zeros(len(self._candidates(operand)) + 1, *current.shape, dtype=torch.bool)
        which = which.to(current.device).scatter_(0, candidates, True)
        return self._compared(operand, which)

    def _halved(self, operand: str, schedule: tuple[Stage, ...]) -> Tensor:
        """The candidates ``[n, *group shape]`` that survive the stages of `schedule`."""
        current = self.index[operand]
        assert current is not None
        expanded, expansion = schedule in (EXPANDED_SCHEDULE, ROUGH_SCHEDULE), None
        candidates = everything = self._candidates(operand)
        for stage in schedule:
            sample = self._sample(stage, operand, expanded)
            if sample is None or len(candidates) <= stage.keep:
                continue
            if expanded:
                if expansion is None:
                    expansion = Expansion(self.problem, self.index["a"])
                    self.evaluations += expansion.cost
                losses = self.reduce(expansion.losses(sample, candidates))
                self.evaluations += len(candidates) * sample.cost
            else:
                losses = torch.stack([self._loss(sample, operand, c) for c in candidates])
            if candidates is everything:
                self.curves[operand] = losses.flatten(1).sum(1).tolist()
            groups = self._summed(operand, losses)
            candidates = self._best(candidates, groups, stage.keep, stage.far, current)
        if schedule == ROUGH_SCHEDULE:
            self._samples.clear()  # nothing else has been sampled yet, and these are done with
        return candidates

    def _certain(self, operand: str, again: bool) -> Tensor:
        """The best candidate of every group (see `elimination`); `again` as for `fast`."""
        current = self.index[operand]
        assert current is not None
        candidates = self._candidates(operand)
        weighed = self._summed(operand, self._weighed[None]) > 0
        alive = self._alive.get(operand, torch.ones_like(candidates, dtype=torch.bool))
        alive = (alive | (candidates == current)) & weighed
        if not alive.any():
            return current
        known = None
        if self._known is not None and self._known[0] == self._key(self.problem, operand, current):
            known = (candidates == current) & alive, self._known[1]
        choice, bounds, losses = elimination.best_candidates(
            len(self._pieces),
            lambda piece, which: self._on_piece(piece, operand, which),
            lambda losses: self._summed(operand, losses),
            alive,
            known,
        )
        if not again:
            least = bounds.gather(0, choice[None])
            self._alive.setdefault(operand, bounds <= HOPELESS * least)
        # A group without a gradient keeps its choice; what it loses is zero anyway.
        choice = torch.where(weighed[0], choice, current)
        key = self._key(self.problem, operand, choice)
        self._known, self._losses[key] = (key, losses), losses.sum(0)
        return choice

    def _on_piece(self, piece: int, operand: str, which: Tensor) -> Tensor:
        losses = self._losses_of(self._pieces[piece], operand, which)
        if piece == 0 and operand not in self._alive:  # all candidates
            self.curves[operand] = losses.flatten(1).sum(1).tolist()
        return losses

    def _summed(self, operand: str, losses: Tensor) -> Tensor:
        """Losses ``[n, 1, H, 1, 1 or O]`` per group, ``[n, *group shape]``."""
        quantizer = self.problem.quantizers[operand]
        assert quantizer is not None
        return torch.vmap(quantizer.grouping.sum)(losses)

    def _losses_of(self, problem: Problem, operand: str, which: Tensor) -> Tensor:
        """Losses ``[n, 1, H, 1, 1 or O]`` of candidates `which`, ``[n, *group shape]``.

        One evaluation takes another candidate for every group. Groups have different numbers of
        them, so that columns with scales of their own are put together with others of their kind.
        """
        found: Tensor | None = None
        for part, columns in self._alike(problem, operand, which):
            some = which if columns is None else which[..., columns]
            count = some.sum(0)
            ordered = some.int().argsort(dim=0, descending=True, stable=True)
            for number in range(int(count.max())):
                index = torch.where(number < count, ordered[number], ordered[0])
                choice = {**self.index, operand: index}
                loss = self.reduce(
                    part.loss(choice["a"], choice["b"], operand, self._views[operand])
                )
                self.evaluations += part.cost
                if found is None:
                    width = loss.shape[3] if columns is None else which.shape[-1]
                    found = loss.new_zeros(len(which), *loss.shape[:3], width)
                if columns is None:
                    found.scatter_(0, index.expand(loss.shape)[None], loss[None])
                else:
                    found[index.flatten(), 0, 0, 0, columns] = loss.flatten()
        assert found is not None, "at least one group has candidates"
        return found

    def _alike(
        self, problem: Problem, operand: str, which: Tensor
    ) -> Iterator[tuple[Problem, Tensor | None]]:
        """The problem in parts whose columns have about as many candidates; None: all columns."""
        quantizer = problem.quantizers[operand]
        assert quantizer is not None
        count, columns = which.sum(0).flatten(), problem.output.shape[3]
        apart = quantizer.grouping.blocks == 0 and not is_angle(problem.metric)
        if len(count) != columns or columns == 1 or not apart:
            yield problem, None
            return
        problem.fixed("a", self.index["a"])  # once for all parts
        size = torch.where(count > ALONE, 2 ** count.clamp_min(1).log2().ceil(), count)
        for value in size[count > 0].unique():
            chosen = (size == value).nonzero()[:, 0]
            # To gather columns takes about as long as to evaluate them once.
            if len(chosen) == columns or (value == 1 and 2 * len(chosen) > columns):
                yield problem, None
            else:
                yield problem.of_columns(chosen), chosen

    @staticmethod
    def _best(candidates: Tensor, groups: Tensor, keep: int, far: float, current: Tensor) -> Tensor:
        """The best of every group, those that lose far more replaced by the very best.

        A group without a gradient on the sample keeps its choice.
        """
        order = groups.argsort(dim=0, stable=True)[:keep]
        best, losses = candidates.gather(0, order), groups.gather(0, order)
        best = torch.where(losses > far * losses[0], best[0], best)
        return torch.where(_indifferent(candidates, groups), current, best)

    def _schedule(self, operand: str, again: bool) -> tuple[Stage, ...]:
        if is_angle(self.problem.metric):
            return ANGLE_SCHEDULE
        if self.problem.output.shape[0] > 1:
            return BATCHED_SCHEDULE
        if self.index[operand].numel() == 1:
            return SINGLE_SCHEDULE
        if operand == "a" or self.problem.metric == "l1":
            return SCHEDULE
        return ROUGH_SCHEDULE if again else EXPANDED_SCHEDULE

    def _candidates(self, operand: str) -> Tensor:
        """All table rows to try, ``[n, *group shape]``."""
        quantizer, current = self.problem.quantizers[operand], self.index[operand]
        assert quantizer is not None and current is not None
        rows = torch.arange(quantizer.n, device=current.device).view(-1, *[1] * current.dim())
        return rows.expand(-1, *current.shape)

    def _compared(self, operand: str, which: Tensor) -> Tensor:
        """The first best of candidates `which`, ``[n, *group shape]``, on (nearly) all rows.

        Groups for which all are equal keep their choice.
        """
        current = self.index[operand]
        assert current is not None
        known = self._losses.get(self._key(self._finals, operand, current))
        its = (
            torch.arange(len(which), device=which.device).view(-1, *[1] * current.dim()) == current
        )
        if known is None:
            losses = self._losses_of(self._finals, operand, which)
        elif (which & ~its).any():
            losses = self._losses_of(self._finals, operand, which & ~its)
            losses = torch.where((which & its).expand_as(losses), known[None], losses)
        else:
            return current
        totals = self._summed(operand, losses).masked_fill(~which, torch.inf)
        every = len(self._candidates(operand))
        if which[:every].all():
            self.curves[operand] = totals[:every].flatten(1).sum(1).tolist()
        equal = totals.masked_fill(~which, -torch.inf).amax(0) <= totals.amin(0)
        choice = torch.where(equal & (which.sum(0) > 1), current, totals.argmin(0))
        # Groups do not interact: the loss of the mixed choice is known without evaluating it.
        at = choice.clamp_max(len(which) - 1).expand(losses.shape[1:])[None]
        self._losses[self._key(self._finals, operand, choice)] = losses.gather(0, at)[0]
        return choice

    def _loss(self, problem: Problem, operand: str, index: Tensor) -> Tensor:
        """Loss at `index` of `operand` and the current choice of the other; remembered."""
        key = self._key(problem, operand, index)
        if key not in self._losses:
            choice = {**self.index, operand: index}
            self._losses[key] = self.reduce(
                problem.loss(choice["a"], choice["b"], operand, self._views[operand])
            )
            self.evaluations += problem.cost
        return self._losses[key]

    def _key(self, problem: Problem, operand: str, index: Tensor) -> tuple:
        choice = {**self.index, operand: index}
        return (
            id(problem),
            self._views[operand],
            *(None if choice[k] is None else as_bytes(choice[k]) for k in ("a", "b")),
        )

    def _sample(self, stage: Stage, operand: str, expanded: bool) -> Problem | None:
        quantizer = self.problem.quantizers[operand]
        assert quantizer is not None
        batch, heads, _, columns = self.problem.output.shape
        in_blocks = batch == heads == 1 and 1 < quantizer.grouping.shape[3] == columns
        key = (stage, in_blocks, expanded)
        if key not in self._samples:
            rows = self._rows
            if expanded and rows is not None:
                # What a weight's error makes of a row grows with the row.
                rows = [rows[0] * self.problem.a.square().sum(3, keepdim=True)]
            sample = self.problem.sample(stage.rows, rows, in_blocks)
            self._samples[key] = self._together(sample)
        return self._samples[key]

    def _together(self, sample: Problem | None) -> Problem | None:
        """The sample if it spares work; processes decide alike, one without a sample gives all."""
        spared = 0.0 if sample is None else self._finals.cost - sample.cost
        if self.reduce(torch.tensor(spared, device=self.problem.a.device)) <= 0:
            return None
        return replace(self.problem, _kept={}) if sample is None else sample


def _of_columns(index: Tensor | None, columns: Tensor) -> Tensor | None:
    return index if index is None or index.shape[3] == 1 else index[..., columns]


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
    state = _Search(problem_of(gemm, quantizers, metric, images), reduce)
    before = state.start()
    if strategy == "fast":
        state.probe()
        state.arrange()
    searched_with: dict[str, bytes] = {}  # the other operand's choice at the last search
    for turn in range(rounds):
        for operand, other in zip(order, reversed(order), strict=True):
            fixed = state.index[other]
            with_ = b"" if fixed is None else as_bytes(fixed)
            if quantizers[operand] is None or searched_with.get(operand) == with_:
                continue
            if strategy == "exhaustive":
                state.index[operand] = state.exhaustive(operand)
            else:
                again = turn == 0 < rounds - 1 and operand == order[0] and fixed is not None
                state.index[operand] = state.fast(operand, turn, again)
                if again:
                    continue
            searched_with[operand] = with_
    after = state.objective()
    return SearchResult(
        state.index["a"],
        state.index["b"],
        before,
        after,
        round(state.evaluations, 3),
        state.curves,
    )
