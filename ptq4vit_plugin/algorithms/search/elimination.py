"""The best candidate of every group for certain, without evaluating them all on all rows.

Losses of rows add up and are never negative, so what a candidate has lost on some rows is a lower
bound of its loss. The rows come in pieces, those first on which most is lost. After every piece the
leader of each group is evaluated on the rest; a candidate that has already lost more than the best
of these is out. What remains after the last piece has been evaluated on everything.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Number of pieces; each ends at the same multiple of the rows where the one before ends.
PIECES = 7
#: The first piece's share of the rows, and its rows at least: with fewer, quantizing a weight costs
#: more than multiplying by it.
SHARE, FIRST = 1 / 128, 64
#: Relative difference of losses that float32 sums may have by themselves.
ROUNDING = 1e-5


def pieces(rows: int) -> list[slice]:
    """Slices of rows that are sorted by what is lost on them, largest first.

    None is empty if there are twice `FIRST` rows.
    """
    first = max(FIRST, rows * SHARE)
    ends = [round(first * (rows / first) ** (piece / (PIECES - 1))) for piece in range(PIECES)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def share_ahead(size: Tensor) -> float:
    """What is left of a sum when its items are added up from the largest, in the mean over items.

    1/2 if they are all alike, near 0 if a few are nearly everything.
    """
    done = size.sort(descending=True).values.double().cumsum(0)
    return float(1 - (done / done[-1].clamp_min(1e-300)).mean())


def best_candidates(
    count: int,
    evaluate: Callable[[int, Tensor], Tensor],
    summed: Callable[[Tensor], Tensor],
    alive: Tensor,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best candidate of every group.

    Parameters
    ----------
    count
        Number of pieces.
    evaluate
        Losses ``[n, 1, H, 1, 1 or O]`` on a piece, given by its number, of the candidates that are
        asked for, ``[n, *group shape]``; any finite number for the others.
    summed
        Losses per group, ``[n, *group shape]``, of losses per head and column.
    alive
        Candidates that are in question, ``[n, *group shape]``, at least one of some group.
    known
        Candidates whose losses are known, one of a group at most, and these losses on every piece,
        ``[pieces, 1, H, 1, 1 or O]``.

    Returns
    -------
    tuple
        The best candidates, of group shape, the first of equals; lower bounds of all candidates'
        losses per group, the loss itself for the best; losses of the best on every piece.
    """
    done = torch.zeros_like(alive, dtype=torch.long)  # pieces that a candidate was evaluated on
    after = torch.full((count, *alive.shape), torch.inf, dtype=torch.float64, device=alive.device)
    losses: list[Tensor | None] = [None] * count

    def add(piece: int, which: Tensor, found: Tensor) -> None:
        before = after[piece - 1] if piece else torch.zeros_like(after[0])
        known = losses[piece]
        losses[piece] = found if known is None else torch.where(which, found, known)
        after[piece] = torch.where(which, before + summed(found), after[piece])
        done.masked_fill_(which, piece + 1)

    def advance(piece: int, which: Tensor) -> None:
        which = which & (done == piece)
        if which.any():
            add(piece, which, evaluate(piece, which))

    if known is not None:
        for piece in range(count):
            add(piece, known[0], known[1][piece].expand(len(alive), *known[1].shape[1:]))
    for piece in range(count):
        advance(piece, alive)
        reached = after[piece].masked_fill(~alive, torch.inf)
        leader = torch.zeros_like(alive).scatter_(0, reached.argmin(0, keepdim=True), True)
        for later in range(piece + 1, count):
            advance(later, leader & alive)
        alive = alive & (after[piece] <= after[-1].amin(0) * (1 + ROUNDING))
    best = after[-1].argmin(0)
    bounds = after.masked_fill(after.isinf(), -torch.inf).amax(0)
    whole = torch.stack([piece for piece in losses if piece is not None])
    at = best.expand(whole.shape[2:])[None, None].expand(count, 1, *whole.shape[2:])
    return best, bounds, whole.gather(1, at)[:, 0]
