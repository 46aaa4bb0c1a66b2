"""Losses of a weight's candidates, of which only the quadratic part is left to a sample.

With the other operand at its choice ``a^``, the error of a candidate ``b^`` is what is lost with
the weight as it is and what the weight's own error adds, ``(a^ b - O) + a^ (b^ - b)``. Squared and
summed with the metric's weights ``w^2``, that is, per output column,

    sum w^2 (a^ b - O)^2  +  2 S . (b^ - b)  +  sum w^2 (a^ (b^ - b))^2,  S = a^T (w^2 (a^ b - O)).

The first two are known for all candidates, on all rows, after two products. Only the third is left
to be estimated (`quadratic.py`): of candidates that lose about the same, a sample tells the
difference 1.5 to 4 times as exactly as with all three (docs/search.md).
"""

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import product
from ptq4vit_plugin.algorithms.search.objective import View
from ptq4vit_plugin.algorithms.search.problem import Problem, of_rows
from ptq4vit_plugin.algorithms.search.quadratic import Quadratic


class Expansion:
    """The loss of operand ``b`` around its floating point values, at a choice of ``a``.

    For metrics that square the error of every output element.

    Parameters
    ----------
    problem
        The op on all data, with one batch entry.
    a_index
        The choice of ``a``; None for a float operand.

    Attributes
    ----------
    cost
        Evaluations that it took: two products on all data.
    """

    def __init__(self, problem: Problem, a_index: Tensor | None) -> None:
        self.cost = 2 * problem.cost
        self._problem = problem
        a = problem.fixed("a", a_index)
        self._constant = problem.output.new_zeros(
            1, problem.output.shape[1], 1, problem.output.shape[3], dtype=torch.float64
        )
        self._slope = torch.zeros_like(problem.b)
        start = 0
        for error, _, weight in problem.errors(a_index, None, "b", View("element")):
            rows = slice(start, start + error.shape[2])
            start = rows.stop
            if weight is not None:
                error.mul_(weight)
            self._constant += error.square().sum(2, keepdim=True)
            if weight is not None:
                error.mul_(weight)
            for codes, scale in a:
                part, its = codes[:, :, rows].transpose(2, 3), error
                if scale is not None and scale.shape[2] > 1:
                    # A row's scale lies along the inner dimension here.
                    its, scale = error * of_rows(scale, rows), None
                self._slope += product([(part, scale)], [(its, None)])

    def losses(self, quadratic: Quadratic, candidates: Tensor) -> Tensor:
        """Estimated losses ``[n, 1, H, 1, O]`` of `candidates`, ``[n, *group shape]``, float64."""
        quantizer, b = self._problem.quantizers["b"], self._problem.b
        assert quantizer is not None
        found = []
        for some in candidates.split(quadratic.together):
            errors = [quantizer.fake_quantize(b, index).sub_(b) for index in some]
            squares = quadratic(errors)
            linear = [2 * error.mul_(self._slope).sum(2, keepdim=True).double() for error in errors]
            found.append(self._constant + torch.stack(linear) + squares)
        return torch.cat(found)
