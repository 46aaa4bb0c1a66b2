"""The loop: make a block's output, computed by learned quantizers, like the float model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: How often the held-out error is looked at while a block is learned.
CHECKS = 4


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate."""

    parameters: Sequence[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Outcome:
    """Error on the held-out images before and after; the best state seen is what is left."""

    before: float
    after: float


def learn(
    loss: Callable[[Tensor], Tensor],
    error: Callable[[], float],
    groups: Sequence[Group],
    images: int,
    iterations: int,
    batch_size: int,
    generator: torch.Generator,
) -> Outcome:
    """Minimise `loss` by Adam; leave the parameters as they were when `error` was least.

    The start counts: what is left is never worse than that.

    Parameters
    ----------
    loss
        Of some images, given by their places; differentiable.
    error
        On images that are held out.
    images
        How many there are to be learned from.
    iterations
        Steps; rates fall to zero along a cosine.
    batch_size
        Images per step.
    generator
        Draws the batches, on the CPU.
    """
    groups = [group for group in groups if group.parameters]
    parameters = [p for group in groups for p in group.parameters]
    before = least = error()
    if not parameters:
        return Outcome(before, before)
    best = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam([{"params": list(g.parameters), "lr": g.rate} for g in groups])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    every = math.ceil(iterations / CHECKS)
    for step in range(1, iterations + 1):
        adam.zero_grad()
        loss(torch.randperm(images, generator=generator)[:batch_size]).backward()
        adam.step()
        cosine.step()
        if step % every == 0 or step == iterations:
            found = error()
            if found < least:  # never true for NaN
                least, best = found, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return Outcome(before, least)


def weighted_error(output: Tensor, target: Tensor, importance: Tensor | None) -> Tensor:
    """Mean of ``importance (output - target)²``: the diagonal Fisher approximation (BRECQ)."""
    square = (output.float() - target.float()).square()
    return (square if importance is None else square * importance).mean()
