"""A promised accuracy: raise bits, or leave ops out, until a drop is held on validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Model = TypeVar("Model")

#: An op's objective falls by this factor when its operands get two bits more: a step is a quarter.
PER_TWO_BITS = 16.0
#: The widest an op can be quantized.
WIDEST = 8


@dataclass(frozen=True)
class Move:
    """Give an op two bits more; ``bits`` None leaves it in floating point."""

    op: str
    bits: int | None


@dataclass(frozen=True)
class Trial:
    """One model that was made and measured: after how many moves, and its drop in points."""

    moves: int
    drop: float


def ranked_moves(objectives: dict[str, float], bits: dict[str, int]) -> list[Move]:
    """All moves to the float model, the op that hurts most at its present width always next.

    Parameters
    ----------
    objectives
        By op name: Hessian objective at `bits`. The largest is assumed to hurt most; it falls by
        `PER_TWO_BITS` with every move.
    """
    hurts, width = dict(objectives), dict(bits)
    moves = []
    while width:
        op = max(width, key=lambda name: hurts[name])
        if width[op] >= WIDEST:
            del width[op]
            moves.append(Move(op, None))
            continue
        width[op] = min(width[op] + 2, WIDEST)
        hurts[op] /= PER_TWO_BITS
        moves.append(Move(op, width[op]))
    return moves


def hold_drop(
    make: Callable[[Sequence[Move]], Model],
    drop_of: Callable[[Model], float],
    first: Model,
    moves: Sequence[Move],
    max_drop: float,
) -> tuple[Model, list[Trial]]:
    """The model with the fewest moves whose measured drop is at most `max_drop`.

    The number of moves is doubled until the promise holds, then bisected; what is returned was
    itself measured. All moves together give the float model, so there always is one.

    Parameters
    ----------
    make
        Quantizes anew after the moves that it is given.
    drop_of
        Measures a model: points lost.
    first
        The model without any move.
    """
    drop = drop_of(first)
    trials = [Trial(0, drop)]
    if drop <= max_drop:
        return first, trials
    failing, passing, best = 0, len(moves), None
    count = max(1, len(moves) // 32)
    while failing + 1 < passing or best is None:
        model = make(moves[:count])
        drop = drop_of(model)
        trials.append(Trial(count, drop))
        if drop <= max_drop:
            passing, best = count, model
        else:
            failing = count
        if best is None:
            if failing == len(moves):  # the float model itself differs: nothing more can be done
                return model, trials
            count = min(2 * count, len(moves))
        else:
            count = (failing + passing) // 2
    return best, trials
