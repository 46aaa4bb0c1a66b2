"""How unevenly the rows of an op matter: what is lost on each, at a few scales."""

import math

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.losses import Losses
from ptq4vit_plugin.algorithms.search.sampling import block_width

#: Candidates, as a share of the table, at which clipping shows, and one output column in so many on
#: which they are looked at.
PROBES, PROBED_COLUMNS = (0.25, 0.5), 4


def look(losses: Losses) -> tuple[float, list[Tensor]]:
    """What every row loses (error metrics).

    Returns
    -------
    tuple
        The objective at the start scales. The gradient's energy and the loss, at the start scales
        and at two that clip, of every row and block of columns, ``[B, H, N, G]`` each.
    """
    problem = losses.problem
    columns = problem.output.shape[3]
    groups = columns // block_width(columns)
    loss = problem.row_loss(losses.choice["a"], losses.choice["b"], groups)
    losses.evaluations += problem.cost
    parts = [problem.row_energy(groups), loss]
    step = math.gcd(PROBED_COLUMNS, columns // groups)
    some = torch.arange(0, columns, step, device=problem.a.device)
    part = problem if step == 1 else problem.of_columns(some)
    moved = ("a", "b") if problem.output.shape[0] > 1 else ("a",)
    for share in PROBES:
        probe = {"a": losses.choice["a"], "b": _of_columns(losses.choice["b"], some)}
        for operand in moved:
            quantizer, index = part.quantizers[operand], probe[operand]
            if quantizer is not None and index is not None:
                probe[operand] = torch.full_like(index, int(share * quantizer.n))
        parts.append(part.row_loss(probe["a"], probe["b"], groups))
        losses.evaluations += part.cost
    return float(losses.reduce(loss.sum())), parts


def _of_columns(index: Tensor | None, columns: Tensor) -> Tensor | None:
    return index if index is None or index.shape[3] == 1 else index[..., columns]
