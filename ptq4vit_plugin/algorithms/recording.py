"""What is recorded when, so that recorded tensors fit the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from torch import nn

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.blocks import Block
from ptq4vit_plugin.integrations.nncf.capture import Recorded, record
from ptq4vit_plugin.integrations.nncf.replay import replay, watching_blocks
from ptq4vit_plugin.integrations.nncf.runs import run_by_all
from ptq4vit_plugin.plan import FoundOp

GIB = 2**30

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Part:
    """An op that a pass records, or a block that is run by itself after it.

    Attributes
    ----------
    groups
        The ops; of a block, those that one run of it records together.
    size
        Bytes that the pass leaves behind: what the op saw, or what reached the block.
    block
        None for an op that the pass records.
    """

    groups: list[list[FoundOp]]
    size: float
    block: Block | None = None


def default_budget(sizes: Sequence[float], free: float) -> float:
    """Bytes of recorded tensors at a time, if nobody says how many.

    A fifth of everything: with the op that does not fit any more, that makes five passes where no
    block can be run by itself. Half a GiB at least, and no more than a quarter of what is free.

    Parameters
    ----------
    sizes
        Bytes that are recorded of each op.
    free
        Bytes that nobody has taken.
    """
    return min(max(sum(sizes) / 5 + max(sizes, default=0), GIB / 2), free / 4)


def schedule(
    ops: Sequence[FoundOp], sizes: Sequence[float], blocks: Mapping[Block, float], budget: float
) -> list[list[Part]]:
    """The passes that record all ops in their order, each with the parts that live on it.

    As few as the budget allows, and after each as few runs of blocks. One op, or what reaches one
    block, may exceed it.

    Parameters
    ----------
    sizes
        Bytes that are recorded of each op.
    blocks
        Bytes that reach each block that can be run by itself.
    """
    size_of = {op.name: size for op, size in zip(ops, sizes, strict=True)}
    block_of = {name: block for block in blocks for name in block.ops}
    runs = [(block, list(run)) for block, run in groupby(ops, lambda op: block_of.get(op.name))]
    times = Counter(block for block, _ in runs)
    parts = []
    for block, run in runs:
        # A block whose ops do not follow each other would have to be run for each of them.
        if block and times[block] == 1:
            parts.append(Part([run], blocks[block], block))
        else:
            parts += [Part([[op]], size_of[op.name]) for op in run]
    # What reaches the blocks leaves room for what is recorded in one.
    share = budget / 2 if any(part.block for part in parts) else budget
    passes = _fitting(parts, [part.size for part in parts], share)
    for number, of_pass in enumerate(passes):
        room = budget - sum(part.size for part in of_pass)
        passes[number] = [
            replace(part, groups=_fitting(run, [size_of[op.name] for op in run], room))
            for part in of_pass
            for run in part.groups
        ]
    return passes


def replays(passes: Sequence[Sequence[Part]]) -> int:
    """How often single blocks are run in a schedule."""
    return sum(len(part.groups) for parts in passes for part in parts if part.block)


def recorded_in(
    passes: Sequence[Sequence[Part]],
    model: nn.Module,
    data: Sequence[Batch],
    gradient: Gradient | None,
    batch_done: Callable[[int], None],
    block_done: Callable[[str], None],
) -> Iterator[Recorded]:
    """Run the passes and the blocks of a schedule; give what every op saw, in order.

    Parameters
    ----------
    batch_done
        Called after each batch, with the number of the pass, from 1.
    block_done
        Called after each run of a block, with its name.

    Raises
    ------
    ModelError, DataError
        As `record` and `run_by_all`; of all ops in the first pass.
    """
    for number, parts in enumerate(passes, 1):
        waiting = [op for later in passes[number - 1 :] for part in later for op in _ops(part)]
        alone = [op for part in parts if not part.block for op in _ops(part)]
        blocks = [part.block.name for part in parts if part.block]
        with (
            run_by_all(model, data, waiting) as ran,
            watching_blocks(model, blocks, gradient) as calls,
        ):

            def done(number: int = number, ran: Callable[[], None] = ran) -> None:
                ran()
                batch_done(number)

            seen = record(model, data, alone, gradient, done)
        for part in parts:
            reached = calls.pop(part.block.name) if part.block else []
            if part.block and len(reached) != len(data):
                raise DataError(
                    f"{part.block.name}: runs {len(reached)} times in {len(data)} batches of "
                    "calibration images; allowed: once in each. Leave its ops in float "
                    "(ignored_scopes)"
                )
            for group in part.groups:
                if part.block:
                    seen |= replay(model, part.block, reached, group, gradient)
                    block_done(part.block.name)
                for op in group:
                    yield seen.pop(op.name)


def _ops(part: Part) -> list[FoundOp]:
    return [op for group in part.groups for op in group]


def _fitting(items: Sequence[_Item], sizes: Sequence[float], budget: float) -> list[list[_Item]]:
    """Consecutive items whose sizes fit the budget together; one item at least."""
    groups: list[list[_Item]] = []
    used = 0.0
    for item, size in zip(items, sizes, strict=True):
        if not groups or used + size > budget:
            groups.append([])
            used = 0.0
        groups[-1].append(item)
        used += size
    return groups
