"""The best candidate of every group, without evaluating them all on all rows.

Losses of rows add up and are never negative, so what a candidate has lost on some rows is a lower
bound of its loss. The rows come in pieces, those first on which most is lost. After every piece the
leader of each group is evaluated on the rest; a candidate that has already lost more than the best
of these is out. What remains after the last piece has been evaluated on everything.

Where few rows carry nearly everything (often a class token's), most candidates are out early. If
they carry so much that with a sample of the others they tell every loss to `SURE`, only these rows
come; otherwise all do, and the best candidate is the best for certain. In a product of attention
these rows are quickly multiplied, but each candidate of the other operand has to be quantized, all
rows of it; there the pieces are images (`by_images`).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.losses import Losses
from ptq4vit_plugin.algorithms.search.problem import Problem
from ptq4vit_plugin.algorithms.search.sampling import shares

#: Each piece ends at about this multiple of the rows where the one before ends.
GROWTH = 2.15
#: The first piece's share of the rows, and its rows at least: with fewer, quantizing a weight costs
#: much more than multiplying by it.
SHARE, FIRST = 1 / 128, 32
#: Pieces where they are images, the first of one, and images at least: none is empty then.
IMAGE_PIECES, FEWEST_IMAGES = 4, 8
#: Share of the loss that is still ahead, in the mean over rows that are sorted by it, up to which
#: few rows carry nearly everything.
AHEAD = 0.1
#: Loss over the best one's, beyond which later searches leave a candidate out. They fix the other
#: operand at another scale, which changes the root of a loss by no more than the root of that
#: operand's own share of it: about as much as the best candidate's whole loss. (Where the other
#: operand stood at its start scale that is not enough: even 64 put objectives of a ViT-S at 4 bits
#: 0.2 % higher.)
HOPELESS = 16.0
#: Relative standard error up to which some rows stand for all. (With 2e-4 a trained model's linear
#: ended 0.8 % above `exhaustive` at 4 bits.)
SURE = 5e-5
#: Relative difference of losses that float32 sums may have by themselves.
ROUNDING = 1e-5


class Elimination:
    """Search of the operands of an op by elimination.

    Parameters
    ----------
    losses
        Of the op.
    problem
        The op, or what stands for it.
    pieces
        It in parts, those first on which most is lost; as many in all processes.
    """

    def __init__(self, losses: Losses, problem: Problem, pieces: Sequence[Problem]) -> None:
        self.losses = losses
        self._problem, self._pieces = problem, pieces
        #: Positive where a head and column has a gradient.
        self._weighed = (
            torch.ones_like(problem.output[:1, :, :1])
            if problem.weight is None
            else losses.reduce(problem.weight.amax((0, 2), keepdim=True))
        )
        #: Of the last search's choice, its losses on every piece.
        self._known: tuple[tuple, Tensor] | None = None
        #: Candidates that later searches begin with.
        self._alive: dict[str, Tensor] = {}

    def best(self, operand: str, turn: int, again: bool) -> Tensor:
        """The best candidate of every group; `turn` and `again` as for `Halving.best`."""
        losses, current = self.losses, self.losses.chosen(operand)
        candidates = losses.candidates(operand)
        weighed = losses.summed(operand, self._weighed[None]) > 0
        alive = self._alive.get(operand, torch.ones_like(candidates, dtype=torch.bool))
        alive = (alive | (candidates == current)) & weighed
        if not alive.any():
            return current
        known = None
        if self._known is not None and self._known[0] == self._key(operand, current):
            known = (candidates == current) & alive, self._known[1]
        choice, bounds, on_pieces = best_candidates(
            len(self._pieces),
            lambda piece, which: self._on_piece(piece, operand, which),
            lambda found: losses.summed(operand, found),
            alive,
            known,
        )
        if not again:
            least = bounds.gather(0, choice[None])
            self._alive.setdefault(operand, bounds <= HOPELESS * least)
        # A group without a gradient keeps its choice; what it loses is zero anyway.
        choice = torch.where(weighed[0], choice, current)
        self._known = self._key(operand, choice), on_pieces
        losses.remember(self._problem, operand, choice, on_pieces.sum(0))
        return choice

    def _key(self, operand: str, index: Tensor) -> tuple:
        return self.losses.key(operand, index, self._problem)

    def _on_piece(self, piece: int, operand: str, which: Tensor) -> Tensor:
        found = self.losses.of(self._pieces[piece], operand, which)
        if piece == 0 and operand not in self._alive:  # all candidates
            self.losses.curves[operand] = found.flatten(1).sum(1).tolist()
        return found


def by_rows(losses: Losses, parts: Sequence[Tensor]) -> Elimination | None:
    """Elimination for an op with one batch entry if few of its rows carry nearly everything.

    On these and a sample of the others, if all processes have that, or else on all rows, which are
    sorted in `losses` then. Processes decide alike.

    Parameters
    ----------
    losses, parts
        Of the op, and what every row loses, as `rows.look` returns it.
    """
    if losses.problem.output.shape[0] > 1:
        return None
    size = shares([x.sum((0, 1, 3))[None] for x in parts])[0]
    refused = float(len(size) < 2 * FIRST or share_ahead(size) > AHEAD)
    if losses.reduce(torch.tensor(refused, device=size.device)) > 0:
        return None
    few = losses.problem.weighty(parts, SURE, 2 * FIRST)
    told = [float(len(size) if few is None else few.output.shape[2]), float(few is None), 1.0]
    total, without, processes = losses.reduce(torch.tensor(told, device=size.device)).tolist()
    if few is not None and not without:
        problem = few
    else:
        problem = losses.problem = losses.problem.of_rows(size.argsort(descending=True))
    mean, rows = total / processes, problem.output.shape[2]
    # As many pieces in all processes, whatever their own rows.
    number = 1 + max(1, round(math.log(mean / max(FIRST, mean * SHARE), GROWTH)))
    slices = pieces(rows, max(FIRST, rows * SHARE), number)
    return Elimination(losses, problem, [problem.of_rows(part) for part in slices])


def by_images(losses: Losses, problem: Problem, parts: Sequence[Tensor]) -> Elimination | None:
    """Elimination for rows of every image and head that stand for all (`Problem.weighty`).

    Where they are few, most of the time is spent on quantizing the other operand, all of whose
    rows every candidate needs: of few images first. None if there are too few images. Processes
    decide alike.

    Parameters
    ----------
    losses, parts
        As for `by_rows`.
    problem
        These rows.
    """
    size = shares([x.sum((2, 3)).T for x in parts]).mean(0)
    refused = torch.tensor(float(len(size) < FEWEST_IMAGES), device=size.device)
    if losses.reduce(refused) > 0:
        return None
    problem = problem.of_images(size.argsort(descending=True))
    slices = pieces(len(size), 1, IMAGE_PIECES)
    return Elimination(losses, problem, [problem.of_images(part) for part in slices])


def pieces(count: int, first: float, number: int) -> list[slice]:
    """Slices of `count` rows or images, the largest first: the end grows by the same factor."""
    ends = [round(first * (count / first) ** (piece / (number - 1))) for piece in range(number)]
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
