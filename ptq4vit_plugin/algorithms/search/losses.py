"""What the candidates of an op lose: evaluated when asked for, remembered, counted."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.objective import View, is_angle, view
from ptq4vit_plugin.algorithms.search.problem import Problem, as_bytes

#: Columns with so many candidates are evaluated with those alone that have as many; beyond, with
#: those up to the next power of two.
ALONE = 8


def order(values: Tensor) -> Tensor:
    """``values.argsort(0, stable=True)``, in a third of the time for many short columns."""
    return values.movedim(0, -1).contiguous().argsort(dim=-1, stable=True).movedim(-1, 0)


class Losses:
    """Losses of one operand's candidates at the present choice of the other's.

    Attributes
    ----------
    problem
        The op on all rows that have a gradient.
    choice
        By operand, the chosen rows of the quantizer's table, of group shape: at first the start
        scales; None for a float operand. Searches replace them.
    reduce
        Sums a tensor over the processes that hold a share of the rows each.
    evaluations
        Evaluations made, in units of one candidate on all data (dropped rows cost nothing).
    curves
        By operand, the objective over all candidates as it was last evaluated.
    """

    def __init__(self, problem: Problem, reduce: Callable[[Tensor], Tensor]) -> None:
        self.problem = problem
        self.reduce = reduce
        self.choice: dict[str, Tensor | None] = {"a": None, "b": None}
        self.evaluations = 0.0
        self.curves: dict[str, list[float]] = {}
        self._views: dict[str, View] = {}
        self._known: dict[tuple, Tensor] = {}
        quantizers = {k: q for k, q in problem.quantizers.items() if q is not None}
        columns = problem.output.shape[3]
        per_column = any(1 < q.grouping.shape[3] == columns for q in quantizers.values())
        for operand, quantizer in quantizers.items():
            shape, blocks = quantizer.grouping.shape, quantizer.grouping.blocks
            self._views[operand] = view(problem.metric, shape, blocks, columns, per_column)
            self.choice[operand] = torch.full(shape, quantizer.n, device=problem.a.device)

    def chosen(self, operand: str) -> Tensor:
        """The present choice of a quantized operand."""
        index = self.choice[operand]
        assert index is not None
        return index

    def candidates(self, operand: str) -> Tensor:
        """All table rows to try, ``[n, *group shape]``; the start scales are not among them."""
        quantizer, current = self.problem.quantizers[operand], self.chosen(operand)
        assert quantizer is not None
        rows = torch.arange(quantizer.n, device=current.device).view(-1, *[1] * current.dim())
        return rows.expand(-1, *current.shape)

    def distinct(self, operand: str) -> Tensor:
        """Which candidates have another value than the one before in some group, ``[n]``."""
        quantizer = self.problem.quantizers[operand]
        assert quantizer is not None
        table = quantizer.table[: quantizer.n].flatten(1)
        first = torch.ones(1, dtype=torch.bool, device=table.device)
        return torch.cat([first, (table[1:] != table[:-1]).any(1)])

    def keep_curve(self, operand: str, losses: Tensor) -> None:
        """Keep the losses of all distinct candidates, ``[n, ...]``, as the operand's curve."""
        place = self.distinct(operand).cumsum(0) - 1
        self.curves[operand] = losses.flatten(1).sum(1)[place].tolist()

    def summed(self, operand: str, losses: Tensor) -> Tensor:
        """Losses ``[n, 1, H, 1, 1 or O]`` per group, ``[n, *group shape]``."""
        quantizer = self.problem.quantizers[operand]
        assert quantizer is not None
        return torch.vmap(quantizer.grouping.sum)(losses)

    def objective(self) -> float:
        """The op's loss at the present choice, on all data."""
        operand = "a" if self.choice["b"] is None else "b"
        index = self.choice[operand]
        return 0.0 if index is None else float(self.at(self.problem, operand, index).sum())

    def at(self, problem: Problem, operand: str, index: Tensor) -> Tensor:
        """Loss ``[1, H, 1, 1 or O]`` on the rows of `problem` at `index` of `operand`."""
        return self.at_each(problem, operand, index[None])[0]

    def at_each(self, problem: Problem, operand: str, indices: Tensor) -> Tensor:
        """`at`, stacked, of several choices ``[n, *group shape]``."""
        keys = [self.key(operand, index, problem) for index in indices]
        new = {k: index for k, index in zip(keys, indices, strict=True) if k not in self._known}
        if new:
            self._known |= zip(new, self._evaluated(problem, operand, [*new.values()]), strict=True)
        return torch.stack([self._known[k] for k in keys])

    def key(self, operand: str, index: Tensor, problem: Problem | None = None) -> tuple:
        """What identifies a choice: `index` of `operand`, on the rows of `problem` (all)."""
        choice = {**self.choice, operand: index}
        return (
            id(self.problem if problem is None else problem),
            self._views[operand],
            *(None if choice[k] is None else as_bytes(choice[k]) for k in ("a", "b")),
        )

    def remember(self, problem: Problem, operand: str, index: Tensor, loss: Tensor) -> None:
        """Take `loss` for what `at` finds."""
        self._known[self.key(operand, index, problem)] = loss

    def of(self, problem: Problem, operand: str, which: Tensor) -> Tensor:
        """Losses ``[n, 1, H, 1, 1 or O]`` of candidates `which`, ``[n, *group shape]``.

        One evaluation takes another candidate for every group. Groups have different numbers of
        them, so that columns with scales of their own are put together with others of their kind.
        """
        found: Tensor | None = None
        for part, columns in self._alike(problem, operand, which):
            some = which if columns is None else which[..., columns]
            count = some.sum(0)
            ordered = order((~some).byte())
            indices = [
                torch.where(number < count, ordered[number], ordered[0])
                for number in range(int(count.max()))
            ]
            for index, loss in zip(indices, self._evaluated(part, operand, indices), strict=True):
                if found is None:
                    width = loss.shape[3] if columns is None else which.shape[-1]
                    found = loss.new_zeros(len(which), *loss.shape[:3], width)
                if columns is None:
                    found.scatter_(0, index.expand(loss.shape)[None], loss[None])
                else:
                    found[index.flatten(), 0, 0, 0, columns] = loss.flatten()
        assert found is not None, "at least one group has candidates"
        return found

    def best(self, problem: Problem, operand: str, which: Tensor) -> Tensor:
        """The first best of candidates `which`, ``[n, *group shape]``, on the rows of `problem`.

        Groups for which all are equal keep their choice, unless it is known to lose more.
        """
        current, every = self.chosen(operand), len(self.candidates(operand))
        if len(which) == every:  # the start scales, behind the candidates, may be the choice
            which = torch.cat([which, torch.zeros_like(which[:1])])
        known = self._known.get(self.key(operand, current, problem))
        rows = torch.arange(every + 1, device=which.device)
        its = rows.view(-1, *[1] * current.dim()) == current
        if known is None:
            losses = self.of(problem, operand, which)
        elif (which & ~its).any():
            losses = self.of(problem, operand, which & ~its)
            losses = torch.where((which & its).expand_as(losses), known[None], losses)
        else:
            return current
        totals = self.summed(operand, losses).masked_fill(~which, torch.inf)
        distinct = self.distinct(operand)
        if which[:every][distinct].all():
            self.keep_curve(operand, totals[:every][distinct])
        equal = totals.masked_fill(~which, -torch.inf).amax(0) <= totals.amin(0)
        equal &= which.sum(0) > 1
        # They may all be better, or worse, than a choice that is not among them.
        own = its & equal & ~which
        if own.any():
            losses = torch.where(own.expand_as(losses), self.of(problem, operand, own), losses)
            totals = torch.where(own, self.summed(operand, losses), totals)
        stays = equal & (totals.gather(0, current[None])[0] <= totals.amin(0))
        choice = torch.where(stays, current, totals.argmin(0))
        # Groups do not interact: the loss of the mixed choice is known without evaluating it.
        at = choice.expand(losses.shape[1:])[None]
        self._known[self.key(operand, choice, problem)] = losses.gather(0, at)[0]
        return choice

    def _evaluated(self, problem: Problem, operand: str, indices: Sequence[Tensor]) -> Tensor:
        """Losses ``[n, 1, H, 1, 1 or O]`` of at least one choice."""
        choice, view = dict(self.choice), self._views[operand]
        count, found = problem.together(operand), []
        for start in range(0, len(indices), count):
            some = indices[start : start + count]
            if len(some) > 1:
                other = choice["b" if operand == "a" else "a"]
                found.append(problem.losses(some, other, operand, view))
            else:
                choice[operand] = some[0]
                found.append(problem.loss(choice["a"], choice["b"], operand, view)[None])
        self.evaluations += len(indices) * problem.cost
        # All at once: processes whose rows differ in number take differently many together.
        return self.reduce(torch.cat(found))

    def _alike(
        self, problem: Problem, operand: str, which: Tensor
    ) -> Iterator[tuple[Problem, Tensor | None]]:
        """The problem in parts whose columns have about as many candidates; None: all columns."""
        quantizer = problem.quantizers[operand]
        assert quantizer is not None
        count, columns = which.sum(0).flatten(), problem.output.shape[3]
        apart = quantizer.grouping.blocks == 0 and not is_angle(problem.metric)
        if not len(count) == columns == which.shape[-1] > 1 or not apart:
            yield problem, None
            return
        problem.fixed("a", self.choice["a"])  # once for all parts
        size = torch.where(count > ALONE, 2 ** count.clamp_min(1).log2().ceil(), count)
        for value in size[count > 0].unique():
            chosen = (size == value).nonzero()[:, 0]
            # To gather columns takes about as long as to evaluate them once.
            if len(chosen) == columns or (value == 1 and 2 * len(chosen) > columns):
                yield problem, None
            else:
                yield problem.of_columns(chosen), chosen
