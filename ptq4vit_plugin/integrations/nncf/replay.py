"""Record a model block by block: one pass for what reaches the blocks, then each by itself.

A block is a function of its arguments, and what the loss makes of it is the gradient at its output.
With both at hand its ops can be recorded without the rest of the model: all blocks in two passes'
time, while no more than one block's recorded tensors need exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.blocks import (
    Block,
    blocks_around,
    copied,
    locate,
    run_block,
)
from ptq4vit_plugin.integrations.nncf.capture import (
    Copies,
    Recorded,
    record,
    recording,
    with_gradient,
)
from ptq4vit_plugin.integrations.nncf.passes import frozen
from ptq4vit_plugin.plan import FoundOp

#: How far what is recorded of a block by itself may be from what is recorded in the model, relative
#: to the largest value: rounding, where the two add up in another order.
ROUNDING = 1e-5


@dataclass
class BlockCall:
    """What reaches a block when a batch goes forward and backward.

    Attributes
    ----------
    args, kwargs
        Of its forward.
    gradients
        Of the loss at its output, one per backward pass; empty if none came.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        values = (*self.args, *self.kwargs.values(), *self.gradients)
        return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))


@contextmanager
def watching_blocks(
    model: nn.Module, names: Iterable[str], gradient: Gradient | None
) -> Iterator[dict[str, list[BlockCall]]]:
    """Note what reaches blocks for as long as the context lasts, call by call.

    A block that does not return one floating-point tensor is taken off the list.
    """
    calls: dict[str, list[BlockCall]] = {name: [] for name in names}
    kept = Copies()

    def see_inputs(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            if name in calls:
                calls[name].append(BlockCall(copied(args, kept.copy), copied(kwargs, kept.copy)))

        return see

    def see_output(name: str) -> Callable[..., Tensor | None]:
        def see(_: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                calls.pop(name, None)
            if gradient is None or name not in calls:
                return None
            return with_gradient(output, calls[name][-1].gradients.append)

        return see

    with ExitStack() as hooks:
        for name in list(calls):
            block = model.get_submodule(name)
            for handle in (
                block.register_forward_pre_hook(see_inputs(name), with_kwargs=True),
                block.register_forward_hook(see_output(name)),
            ):
                hooks.callback(handle.remove)
        yield calls


def replay(
    model: nn.Module,
    block: Block,
    calls: Sequence[BlockCall],
    ops: Iterable[FoundOp],
    gradient: Gradient | None,
) -> dict[str, Recorded]:
    """`record` of ops in one block, from what reached it.

    Raises
    ------
    ModelError
        The gradient is not finite.
    """
    with recording(model, ops, gradient) as (recorded, kept), frozen(model):
        for call in calls:
            with torch.set_grad_enabled(gradient is not None):
                output = run_block(model, block, copied(call.args), copied(call.kwargs))
                kept.forget()
                if output.requires_grad:
                    for left, grad in enumerate(call.gradients, 1 - len(call.gradients)):
                        output.backward(grad, retain_graph=left < 0)
    return recorded


def replayable_blocks(
    model: nn.Module, ops: Iterable[FoundOp], batch: Batch, gradient: Gradient | None
) -> dict[Block, int]:
    """The blocks that give by themselves what they give in the model, proved on one image.

    Parameters
    ----------
    batch
        Its first image is run through the model and through each block.

    Returns
    -------
    dict
        The bytes of what reaches each block per image.
    """
    by_name = {op.name: op for op in ops}
    image = batch.of(torch.tensor([0]))
    blocks = blocks_around(model, locate(model, image), by_name)
    with watching_blocks(model, [block.name for block in blocks], gradient) as calls:
        whole = record(model, [image], by_name.values(), gradient)
    found = {}
    for block in blocks:
        reached = calls.get(block.name, [])
        inside = [by_name[name] for name in block.ops if name in by_name]
        if len(reached) != 1:
            continue
        alone = replay(model, block, reached, inside, gradient)
        if all(_alike(alone[op.name], whole[op.name]) for op in inside):
            found[block] = reached[0].bytes
    return found


def _alike(one: Recorded, other: Recorded) -> bool:
    mine, yours = ([*seen.inputs[0], *seen.inputs[1], *seen.fisher] for seen in (one, other))
    return len(mine) == len(yours) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= ROUNDING * float(b.abs().max())
        for a, b in zip(mine, yours, strict=True)
    )
