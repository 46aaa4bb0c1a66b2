"""Bits per op by sensitivity: the least total objective within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ptq4vit_plugin.errors import ConfigError


def choose_bits(
    losses: Sequence[Sequence[float]],
    costs: Sequence[float],
    choices: Sequence[int],
    average_bits: float,
) -> list[int]:
    """Minimise ``Σ_op losses[op][choice]`` with ``Σ costs · bits <= average_bits · Σ costs``.

    Solved as an integer program (HiGHS, through SciPy).

    Parameters
    ----------
    losses
        ``[ops][choices]``: the objective of every op at every width.
    costs
        ``[ops]``: multiply-accumulates or weights.
    choices
        Widths.
    average_bits
        Cost-weighted mean width that must not be exceeded.

    Returns
    -------
    list of int
        Width of every op.

    Raises
    ------
    ConfigError
        Even the smallest width everywhere exceeds the budget.
    """
    if average_bits < min(choices):
        raise ConfigError(
            f"mixed_precision.average_bits: {average_bits} is below the smallest choice, "
            f"{min(choices)}"
        )
    loss = np.asarray(losses, dtype=float)
    ops, widths = loss.shape
    # More bits never hurt but by the noise of a search; a lower loss at fewer bits is that noise.
    order = np.argsort(choices)
    loss[:, order] = np.maximum.accumulate(loss[:, order][:, ::-1], axis=1)[:, ::-1]
    share = np.asarray(costs, dtype=float) / max(float(np.sum(costs)), 1e-300)
    budget = (share[:, None] * np.asarray(choices)[None, :]).ravel()
    one_each = np.kron(np.eye(ops), np.ones((1, widths)))
    # The solver stops within an absolute gap: losses are in units of the least that all ops can
    # lose. No op can lose more than all do at one width; what would is no matter how much.
    reached = int(np.argmax([c if c <= average_bits else 0 for c in choices]))
    most = max(float(loss[:, reached].sum()), 1e-300)
    unit = max(float(loss.min(1).sum()), 1e-9 * most)
    solution = milp(
        np.minimum(loss, 2 * most).ravel() / unit,
        integrality=np.ones(ops * widths),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(budget[None, :], -np.inf, average_bits + 1e-9),
        ],
        options={"mip_rel_gap": 0},
    )
    picked = solution.x.reshape(ops, widths).argmax(1)
    return [int(choices[i]) for i in picked]
