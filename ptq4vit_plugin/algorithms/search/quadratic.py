"""What the errors of a weight's candidates add to the loss by themselves: the quadratic part.

For an output column with the metric's weights ``w`` and an error ``d`` of its weights, that is
``sum_n w_n^2 (a^_n . d)^2``. It can be summed over a sample of the rows (`Sampled`), or over all of
them at the price of an approximation (`Curvature`).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import product
from ptq4vit_plugin.algorithms.search.problem import CHUNK, Problem, picked

#: Rows of a block that `Curvature` sums one by one.
LARGEST = 64
#: Rows over inner dimensions, from which on `Curvature` is worth its price, and inner dimensions
#: over columns, up to which it is.
ROWS, COLUMNS = 4, 2
#: One in how many columns tells how exact it is.
TOLD = 4


class Quadratic(Protocol):
    """The quadratic part of some candidates.

    Attributes
    ----------
    together
        How many errors to ask for at a time.
    cost, cost_each
        Evaluations that it took to make it, and that a candidate takes.
    """

    together: int
    cost: float
    cost_each: float

    def __call__(self, errors: list[Tensor]) -> Tensor:
        """Of errors ``[1, H, I, O]`` of the weight, ``[n, 1, H, 1, O]``, float64."""
        ...


class Sampled:
    """The quadratic part, estimated on a sample of the rows.

    Parameters
    ----------
    sample
        Of the op.
    a_index
        The choice of ``a``; None for a float operand.
    """

    def __init__(self, sample: Problem, a_index: Tensor | None) -> None:
        self.together = max(1, CHUNK // max(sample.output.numel(), sample.b.numel()))
        self.cost, self.cost_each = 0.0, sample.cost
        self._sample, self._a = sample, sample.fixed("a", a_index)

    def __call__(self, errors: list[Tensor]) -> Tensor:
        """As `Quadratic` says."""
        sample = self._sample
        together = torch.cat([sample.in_blocks(error) for error in errors], 3)
        made = product(self._a, [(together, None)]).unflatten(3, (len(errors), -1))
        if sample.weight is not None:
            made.mul_(sample.weight[:, :, :, None])
        squares = made.square_().sum(2).double()  # [1, H or blocks, n, columns]
        heads, columns = errors[0].shape[1], errors[0].shape[3]
        return squares.transpose(0, 2).transpose(1, 2).reshape(len(errors), 1, heads, 1, columns)


class Curvature:
    """The quadratic part on all rows, from one matrix per block of columns.

    Exactly it takes a matrix ``sum_n w_n^2 a^_n a^_n^T`` per column, which is more work than to
    evaluate all candidates. But in a block of columns it is much the same rows that matter: with
    the block's mean squared weights in place of each column's, one matrix serves them all, and a
    factor per column makes up for its size. What that gets wrong evens out over the rows, if they
    are many; so the `LARGEST` rows of every block are summed one by one. (Where the metric has no
    weights all is exact, and the matrix is GPTQ's.)

    A block is as wide as the inner dimension, so that making all matrices is as much work as one
    evaluation; queries, keys and values of a fused projection have one each. After that a candidate
    takes ``(I + LARGEST) / N`` of an evaluation.

    Parameters
    ----------
    problem
        The op on all data, with one batch entry.
    a_index
        The choice of ``a``; None for a float operand.
    """

    together = 1

    def __init__(self, problem: Problem, a_index: Tensor | None) -> None:
        rows, columns = problem.output.shape[2:]
        inner = problem.b.shape[2]
        a = problem.values("a", a_index)
        size = a.square().sum(3, keepdim=True)
        self._blocks: list[_Block] = []
        for start in range(0, columns, inner):
            block = slice(start, min(start + inner, columns))
            weight = _weight(problem, block)
            largest, mean, factor = _shared(weight.square(), size)
            matrix = torch.matmul((a * mean).transpose(2, 3), a)
            self._blocks.append(
                _Block(block, picked(a, largest), picked(weight, largest), matrix, factor)
            )
        self.cost = problem.cost * len(self._blocks) * inner / columns
        self.cost_each = problem.cost * (inner + LARGEST) / rows

    @staticmethod
    def uncertainty(problem: Problem) -> Tensor:
        """How exact it will be, before it is made.

        Returns
        -------
        Tensor
            ``[2]``, float64: of errors that are alike in all columns, the variance of what they
            add to the loss, and that itself. The variance is infinite where a curvature is not
            worth its price.
        """
        rows, columns = problem.output.shape[2:]
        inner = problem.b.shape[2]
        if inner > COLUMNS * columns or ROWS * inner > rows:
            return problem.a.new_tensor([math.inf, 1.0], dtype=torch.float64)
        size = problem.a.square().sum(3, keepdim=True)
        found = problem.a.new_zeros(2, dtype=torch.float64)
        for start in range(0, columns, inner):
            energy = _weight(problem, slice(start, start + inner, TOLD)).square()
            _, mean, factor = _shared(energy, size)
            wrong = torch.where(mean > 0, energy - mean * factor, 0.0).mul_(size)
            # The square of a^_n . d, a sum of many terms, has three times its mean's square.
            found[0] += wrong.square_().sum(2).mul_(3).sqrt_().sum()
            found[1] += energy.mul_(size).sum()
        found[0].square_()
        return found

    def __call__(self, errors: list[Tensor]) -> Tensor:
        """As `Quadratic` says."""
        parts = [torch.cat([block.of(error) for block in self._blocks], 3) for error in errors]
        return torch.stack(parts).double()


def _weight(problem: Problem, columns: slice) -> Tensor:
    """The metric's weights of some columns, ``[1, H, N, columns]``."""
    if problem.weight is None:
        return torch.ones_like(problem.output[..., columns])
    return problem.weight[..., columns]


def _shared(energy: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What columns share: the largest rows, and how much the others matter.

    Parameters
    ----------
    energy
        The metric's squared weights, ``[1, H, N, O]``.
    size
        Of every row, its square, ``[1, H, N, 1]``.

    Returns
    -------
    tuple
        The `LARGEST` rows, ``[1, H, LARGEST, 1]``; the mean energy of the others, 0 at the largest,
        ``[1, H, N, 1]``; over that a column's own, ``[1, H, 1, O]``.
    """
    mean = energy.mean(3, keepdim=True)
    largest = (mean * size).topk(min(LARGEST, energy.shape[2]), dim=2).indices
    mean.scatter_(2, largest, 0.0)
    factor = (energy * size.scatter(2, largest, 0.0)).sum(2, keepdim=True)
    return largest, mean, factor / (mean * size).sum(2, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class _Block:
    """Some columns: their largest rows, and a matrix and factors for the others."""

    columns: slice
    a: Tensor  #: ``[1, H, LARGEST, I]``
    weight: Tensor  #: ``[1, H, LARGEST, O]``
    matrix: Tensor  #: ``[1, H, I, I]``
    factor: Tensor  #: ``[1, H, 1, O]``

    def of(self, error: Tensor) -> Tensor:
        """Quadratic part ``[1, H, 1, O]`` of these columns of an error ``[1, H, I, ..]``."""
        error = error[..., self.columns]
        one_by_one = torch.matmul(self.a, error).mul_(self.weight).square_().sum(2, keepdim=True)
        others = torch.matmul(self.matrix, error).mul_(error).sum(2, keepdim=True)
        return one_by_one + others.mul_(self.factor)
