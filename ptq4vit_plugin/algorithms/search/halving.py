"""Successive halving: all candidates on a few rows, the best on more, the last on nearly all.

What a sample tells depends on how many rows it has, not on how many there are. A row is drawn with
a probability proportional to its share of what is lost, which differs between output columns (those
of q, k, v), so that a weight's columns draw their own rows in blocks of up to 64. Of a weight's
losses only the quadratic part is left to the sample (see `expansion`), or summed over all rows
where columns can share a matrix (see `quadratic`). A weight's first search is a rough one, because
its choice is made again when the other operand has its scale. What an operand with one scale loses
is a smooth curve where many rows matter: a descent on all rows finds its minimum from where a small
sample has it. Survivors of products of attention are compared on the largest rows and a sample of
the others, so many that the loss of every head is known to `SURE`; where these are no more than a
sample takes, all candidates are, by elimination.

From the second round on survivors are compared together with the present choice, so that the
objective on the rows compared never rises.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.elimination import Elimination, by_images
from ptq4vit_plugin.algorithms.search.expansion import Expansion
from ptq4vit_plugin.algorithms.search.losses import Losses, order
from ptq4vit_plugin.algorithms.search.objective import is_angle
from ptq4vit_plugin.algorithms.search.problem import Problem
from ptq4vit_plugin.algorithms.search.quadratic import Curvature, Quadratic, Sampled


@dataclass(frozen=True)
class Stage:
    """One stage of successive halving; left out where its sample would be most rows."""

    rows: int  #: output rows that are evaluated, or `ALL` for a weight's `Curvature`
    keep: int  #: candidates per group that go on to the next stage
    far: float = math.inf  #: loss over the best one's from which on they do not


#: In place of a number of rows; `far` follows from the curvature's error then.
ALL = 0
#: The survivors of the last stage are compared on (nearly) all rows.
SCHEDULE = (Stage(128, 48), Stage(512, 24, 1.3))
#: The same for a weight whose losses are known but for their quadratic part (see `expansion`).
EXPANDED_SCHEDULE = (Stage(64, 48), Stage(256, 24), Stage(768, 12, 1.15), Stage(6144, 6, 1.08))
#: The same for its first search, whose choice is made again when the other operand has its scale.
ROUGH_SCHEDULE = (Stage(256, 16), Stage(1024, 4, 1.1))
#: Both where a `Curvature` is worth its price.
CURVED_SCHEDULE = (Stage(64, 48), Stage(ALL, 8))
ROUGH_CURVED_SCHEDULE = (Stage(64, 48), Stage(ALL, 3))
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
#: The same where a descent follows, from the best.
DESCENT_SCHEDULE = (Stage(32, 24), Stage(128, 12), Stage(512, 1))
#: Rows up to which a descent takes fewer evaluations than the last stages of samples.
DESCENT_ROWS = 32768
#: Rows with equal gradients that would tell as much as those there are (Kish's effective number),
#: and values in them: with fewer, a few decide, and the loss has several minima.
EVEN_ROWS, EVEN_VALUES = 2048, 2**19
#: So many candidates from the present choice, a descent begins there, where the loss is known.
NEAR = 4
#: The same for angle metrics, which have no gradient to tell which rows matter.
ANGLE_SCHEDULE = (Stage(1024, 24),)
#: Schedules in which only the quadratic part of a weight's losses is estimated.
EXPANDED = (EXPANDED_SCHEDULE, ROUGH_SCHEDULE, CURVED_SCHEDULE, ROUGH_CURVED_SCHEDULE)
#: Relative standard error up to which a curvature will do, and how many of them a candidate may
#: seem to lose more than the best.
ERROR, ERRORS = 0.1, 3
#: Relative standard error up to which rows stand for all when survivors are compared.
SURE = 2e-4


class Halving:
    """Search of an op's operands by successive halving.

    Parameters
    ----------
    losses
        Of the op.
    parts
        What every row loses, as `rows.look` returns it; None for angle metrics.
    """

    def __init__(self, losses: Losses, parts: Sequence[Tensor] | None) -> None:
        self.losses = losses
        self._parts = parts
        self._samples: dict[tuple[Stage, bool, bool], Problem | None] = {}
        self._finals = losses.problem  #: on what the last survivors are compared
        if parts is not None and losses.problem.output.shape[0] > 1:
            self._finals = self._together(losses.problem.weighty(parts, SURE)) or losses.problem

    def best(self, operand: str, turn: int, again: bool) -> Tensor:
        """The best candidate of every group, in round `turn`, from 0.

        `again` says that the operand will be searched again whatever the choice is.
        """
        losses, current = self.losses, self.losses.chosen(operand)
        schedule = self._schedule(operand, again)
        candidates = self._survivors(operand, schedule)
        if schedule == DESCENT_SCHEDULE and len(candidates) == 1:
            return self._descended(operand, candidates[0], turn)
        if schedule == BATCHED_SCHEDULE and len(candidates) == losses.distinct(operand).sum():
            elimination = self._elimination
            if elimination is not None:
                return elimination.best(operand, turn, again)
        if turn > 0:
            candidates = torch.cat([candidates, current[None]])
        # The start scales, the last row, may be a group's choice still.
        every = len(losses.candidates(operand)) + 1
        which = torch.zeros(every, *current.shape, dtype=torch.bool, device=current.device)
        return losses.best(self._finals, operand, which.scatter_(0, candidates, True))

    def _descended(self, operand: str, start: Tensor, turn: int) -> Tensor:
        """The candidate of one scale that loses less, on all rows, than those next to it."""
        losses, current = self.losses, self.losses.chosen(operand)
        candidates = losses.candidates(operand)
        rungs = losses.distinct(operand).nonzero()[:, 0]  # equal scales are one step

        def loss(index: Tensor) -> float:
            return float(losses.at(self._finals, operand, index).sum())

        # The start scales are behind the last candidate and next to none.
        if turn > 0 and int(current) < len(candidates) and int((start - current).abs()) <= NEAR:
            start = current
        best = int((rungs <= start.item()).sum()) - 1
        while True:
            around = (best, best - 1, best + 1)
            least = min(
                (i for i in around if 0 <= i < len(rungs)), key=lambda i: loss(candidates[rungs[i]])
            )
            if least == best:
                break
            best = least
        return min(([current] if turn > 0 else []) + [candidates[rungs[best]]], key=loss)

    def _survivors(self, operand: str, schedule: tuple[Stage, ...]) -> Tensor:
        """The candidates ``[n, *group shape]`` that survive the stages of `schedule`."""
        losses, current = self.losses, self.losses.chosen(operand)
        candidates = everything = losses.candidates(operand)[losses.distinct(operand)]
        expansion: Expansion | None = None
        for stage in schedule:
            if len(candidates) <= stage.keep:
                continue
            far = stage.far
            if schedule in EXPANDED:
                quadratic = self._quadratic(stage)
                if quadratic is None:
                    continue
                if expansion is None:
                    expansion = Expansion(losses.problem, losses.choice["a"])
                    losses.evaluations += expansion.cost
                found = losses.reduce(expansion.losses(quadratic, candidates))
                losses.evaluations += quadratic.cost + len(candidates) * quadratic.cost_each
                if stage.rows == ALL:
                    far = 1 + ERRORS * self._error
            else:
                sample = self._sample(stage, operand)
                if sample is None:
                    break  # the next ones have more rows
                found = losses.at_each(sample, operand, candidates)
            if candidates is everything:
                losses.keep_curve(operand, found)
            groups = losses.summed(operand, found)
            candidates = best_of(candidates, groups, stage.keep, far, current)
        if schedule == ROUGH_SCHEDULE:
            self._samples.clear()  # nothing else has been sampled yet, and these are done with
        return candidates

    def _schedule(self, operand: str, again: bool) -> tuple[Stage, ...]:
        problem = self.losses.problem
        if is_angle(problem.metric):
            return ANGLE_SCHEDULE
        if problem.output.shape[0] > 1:
            return BATCHED_SCHEDULE
        if self.losses.chosen(operand).numel() == 1:
            return DESCENT_SCHEDULE if self._is_smooth else SINGLE_SCHEDULE
        if operand == "a" or problem.metric == "l1":
            return SCHEDULE
        if self._error <= ERROR:
            return ROUGH_CURVED_SCHEDULE if again else CURVED_SCHEDULE
        return ROUGH_SCHEDULE if again else EXPANDED_SCHEDULE

    @cached_property
    def _elimination(self) -> Elimination | None:
        """For products of attention that are too small, as they are compared, for samples."""
        if self._parts is None:
            return None
        return by_images(self.losses, self._finals, self._parts)

    @cached_property
    def _is_smooth(self) -> bool:
        """Whether the loss is a smooth curve of an operand's one scale; processes find the same."""
        if self._parts is None:
            return False
        of_rows = self._parts[0].sum(3, dtype=torch.float64)
        sums = torch.stack(
            [of_rows.sum(), of_rows.square().sum(), of_rows.new_tensor(of_rows.numel())]
        )
        whole, squares, rows = self.losses.reduce(sums).tolist()
        least = max(EVEN_ROWS, EVEN_VALUES / self.losses.problem.a.shape[3])
        return rows <= DESCENT_ROWS and whole**2 >= least * squares > 0

    @cached_property
    def _error(self) -> float:
        """Relative standard error of a weight's `Curvature`; processes find the same."""
        variance, whole = self.losses.reduce(Curvature.uncertainty(self.losses.problem)).tolist()
        return math.sqrt(variance) / max(whole, 1e-300)

    def _quadratic(self, stage: Stage) -> Quadratic | None:
        """What estimates the quadratic part of a weight's losses; None to leave the stage out."""
        a_index = self.losses.choice["a"]
        if stage.rows == ALL:
            return Curvature(self.losses.problem, a_index)
        sample = self._sample(stage, "b", expanded=True)
        return None if sample is None else Sampled(sample, a_index)

    def _sample(self, stage: Stage, operand: str, expanded: bool = False) -> Problem | None:
        problem = self.losses.problem
        quantizer = problem.quantizers[operand]
        assert quantizer is not None
        batch, heads, _, columns = problem.output.shape
        in_blocks = batch == heads == 1 and 1 < quantizer.grouping.shape[3] == columns
        key = (stage, in_blocks, expanded)
        if key not in self._samples:
            parts = self._parts
            if expanded and parts is not None:
                # What a weight's error makes of a row grows with the row.
                parts = [parts[0] * problem.a.square().sum(3, keepdim=True)]
            self._samples[key] = self._together(problem.sample(stage.rows, parts, in_blocks))
        return self._samples[key]

    def _together(self, sample: Problem | None) -> Problem | None:
        """The sample if it spares work; processes decide alike, one without a sample gives all."""
        problem = self.losses.problem
        spared = 0.0 if sample is None else self._finals.cost - sample.cost
        if self.losses.reduce(torch.tensor(spared, device=problem.a.device)) <= 0:
            return None
        return replace(problem, _kept={}) if sample is None else sample


def best_of(candidates: Tensor, groups: Tensor, keep: int, far: float, current: Tensor) -> Tensor:
    """The best of every group, those that lose far more replaced by the very best.

    A group without a gradient on the sample, where nothing is lost, keeps its choice.

    Parameters
    ----------
    candidates, groups
        ``[n, *group shape]``: rows of the table, and what they lose.
    keep, far
        As in `Stage`.
    current
        The present choice, of group shape.
    """
    first = order(groups)[:keep]
    best, least = candidates.gather(0, first), groups.gather(0, first)
    best = torch.where(least > far * least[0], best[0], best)
    # Candidates differ while their losses do not: nothing to choose by.
    indifferent = (candidates != candidates[0]).any(0) & (groups.abs().amax(0) == 0)
    return torch.where(indifferent, current, best)
