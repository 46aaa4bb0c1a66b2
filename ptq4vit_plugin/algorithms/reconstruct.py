"""Block reconstruction: learn rounding, steps and biases of a quantized model, block by block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.calibrated import CalibratedAlgorithm
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.reconstruction.learned import LearnedActivation, LearnedWeight
from ptq4vit_plugin.algorithms.reconstruction.optimise import Group, learn, weighted_error
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.device import device_of
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.blocks import (
    Call,
    find_blocks,
    hooks_within,
    run_block,
    watch_block,
)
from ptq4vit_plugin.integrations.nncf.capture import Batch, frozen
from ptq4vit_plugin.reporting.events import event
from ptq4vit_plugin.reporting.progress import progress

#: One image in so many is held out: it decides what is kept.
HELD_OUT = 4
#: Learning rates of Adam: weights in steps, steps by their logarithm, zero points in codes, biases
#: and factors of norms relative to their root mean square.
WEIGHT_RATE, STEP_RATE, ZERO_RATE, BIAS_RATE = 1e-2, 3e-3, 1e-2, 2e-3
#: Rates and kind of the pass over the whole model.
WHOLE = ""


class Learning(BaseModel):
    """How long and how a quantized model is learned.

    Attributes
    ----------
    iterations
        Steps per block.
    finish
        Steps on the whole model after that.
    drop
        Probability with which, while a block is learned, a token of an activation stays in float,
        and one of the block's input is the float model's (QDrop).
    gradient
        How output errors are weighed; None weighs all alike.
    seed
        Of the batches and of what is dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(default=200, ge=0, description="steps per block")
    finish: int = Field(default=200, ge=0, description="steps on the whole model after that")
    batch_size: int = Field(default=16, ge=1, description="images per step")
    drop: float = Field(
        default=0.5, ge=0, lt=1, description="share of tokens left in float while a block learns"
    )
    gradient: Gradient | None = Gradient(probes=4)
    seed: int = 0


class Reconstruct(CalibratedAlgorithm, Learning):
    """After quantization, learn what a block's output needs to be like the float model's.

    Lifecycle of `apply`: the blocks are found on the module tree; one after the other, in the order
    of execution, each gets the inputs that the quantized model gives it and the float model's
    output as target; weights in units of their steps, the steps themselves, zero points, biases and
    the factors of norms are learned with straight-through gradients; what is best on images that
    are held out is kept, the start included. Then the whole model is learned in the same way
    against the float model's outputs. The result is written into the same quantizers and
    parameters.
    """

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Learn in place and return the model.

        Raises
        ------
        DataError
            No calibration data, or too few images to hold any out.
        ModelError
            The model is not quantized, or its weights are rounded already.
        """
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        if next(hooks.hooks(module), None) is None:
            raise ModelError("reconstruct: the model has no quantizers; quantize it before that")
        with hooks.switched_off(module):
            teacher = copy.deepcopy(module)
        if _is_rounded(module):
            raise ModelError(
                "reconstruct: all weights lie on their quantizers' levels already, so the float "
                "model that would be the target is gone; use it in place of 'compensate', or the "
                "algorithm 'ptq4vit_recon'"
            )
        self.reconstruct(module, teacher, data)
        return model

    def reconstruct(self, module: nn.Module, teacher: nn.Module, data: Sequence[Batch]) -> None:
        """`apply` for a bare quantized module, the float model and checked batches."""
        images = sum(map(len, data))
        if images < HELD_OUT:
            raise DataError(
                f"reconstruct: {images} calibration images; allowed: at least {HELD_OUT}, of which "
                "every fourth is held out"
            )
        names = find_blocks(module, data[0]) if self.iterations else []
        iterations = dict.fromkeys(names, self.iterations)
        if self.finish:
            iterations[WHOLE] = self.finish
        with progress("Reconstructing", len(iterations)) as advance, frozen(module):
            for place, (name, steps) in enumerate(iterations.items()):
                outcome = self._learn(module, teacher, data, name, steps, place)
                advance(name or "whole model")
                if outcome is not None:
                    event("block", name=name, before=outcome.before, after=outcome.after)

    def _learn(
        self,
        module: nn.Module,
        teacher: nn.Module,
        data: Sequence[Batch],
        name: str,
        iterations: int,
        place: int,
    ) -> Any:
        """Learn one block; None if it cannot be called by itself."""
        whole = name == WHOLE
        exact = watch_block(teacher, name, data, None if whole else self.gradient)
        with torch.no_grad():
            seen = watch_block(module, name, data)
        if exact is None or seen is None:
            return None
        block = _Block(module, name, seen, exact, 0.0 if whole else self.drop, self.seed + place)
        place_of = torch.arange(len(exact.output))
        out = place_of % HELD_OUT == HELD_OUT - 1
        try:
            outcome = learn(
                block.loss,
                lambda: block.error(place_of[out], self.batch_size),
                block.groups(),
                place_of[~out],
                iterations,
                self.batch_size,
                torch.Generator().manual_seed(self.seed + place),
            )
        finally:
            block.finish()
        return outcome


class _Block:
    """A block (or the whole model) whose quantizers are exchanged for learned ones."""

    def __init__(
        self, module: nn.Module, name: str, seen: Call, exact: Call, drop: float, seed: int
    ) -> None:
        self.module, self.name, self.seen, self.exact, self.drop = module, name, seen, exact, drop
        importance = exact.importance
        self.importance = None if importance is None else importance / importance.mean()
        self.generator = torch.Generator(device_of(module)).manual_seed(seed)
        self.activations: list[LearnedActivation] = []
        self.weights: list[LearnedWeight] = []
        parameters = dict(module.named_parameters())
        found = list(hooks.hooks(module))
        taken = {id(p) for hook in found for p in hook.module.parameters()}
        taken |= {id(parameters[hook.op]) for hook in found if hook.op in parameters}
        self.others = [
            p
            for p in module.get_submodule(name).parameters()
            if p.ndim == 1 and p.is_floating_point() and id(p) not in taken
        ]
        for hook in hooks_within(module, name):
            if hook.when == "pre" and LearnedActivation.can_learn(hook.module):
                learned = LearnedActivation(hook.module, self.generator)
                self.activations.append(learned)
            elif hook.op in parameters and LearnedWeight.can_learn(hook.module):
                learned = LearnedWeight(hook.module, parameters[hook.op])
                self.weights.append(learned)
            else:
                continue
            hooks.replace(module, hook.module, learned)

    def groups(self) -> list[Group]:
        """What is learned, and how fast."""
        steps = [m.growth for m in (*self.activations, *self.weights)]
        zeros = [m.zero for m in self.activations if m.zero is not None]
        groups = [
            Group([m.codes for m in self.weights], WEIGHT_RATE),
            Group(steps, STEP_RATE),
            Group(zeros, ZERO_RATE),
            *(
                Group([p], BIAS_RATE * max(float(p.detach().square().mean().sqrt()), 1e-3))
                for p in self.others
            ),
        ]
        for group in groups:
            for parameter in group.parameters:
                parameter.requires_grad_(True)
        return groups

    def loss(self, images: Tensor) -> Tensor:
        """The weighted error on some images, with random activations in float."""
        images = images.to(self.exact.output.device)
        args, kwargs = self.seen.of(images)
        if self.drop:
            exact_args, exact_kwargs = self.exact.of(images)
            args = tuple(map(self._mixed, args, exact_args))
            kwargs = {key: self._mixed(kwargs[key], exact_kwargs[key]) for key in kwargs}
        return self._error(args, kwargs, images, self.drop)

    @torch.no_grad()
    def error(self, images: Tensor, batch_size: int) -> float:
        """The weighted error on some images, everything quantized."""
        total = 0.0
        for some in images.to(self.exact.output.device).split(batch_size):
            total += float(self._error(*self.seen.of(some), some, 0.0)) * len(some)
        return total / len(images)

    def finish(self) -> None:
        """Put the quantizers back, with what was learned."""
        for learned in (*self.activations, *self.weights):
            hooks.replace(self.module, learned, learned.finish())
        for parameter in self.others:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _error(self, args: Any, kwargs: Any, images: Tensor, drop: float) -> Tensor:
        for learned in self.activations:
            learned.drop = drop
        output = run_block(self.module, self.name, args, kwargs)
        importance = None if self.importance is None else self.importance[images]
        return weighted_error(output, self.exact.output[images], importance)

    def _mixed(self, seen: Any, exact: Any) -> Any:
        """Tokens of the quantized model's input, some of them the float model's."""
        if not isinstance(seen, Tensor) or not seen.is_floating_point():
            return seen
        shape = (*seen.shape[:-1], 1)
        chance = torch.rand(shape, generator=self.generator, device=seen.device)
        return torch.where(chance < self.drop, exact, seen)


@torch.no_grad()
def _is_rounded(module: nn.Module) -> bool:
    """Whether every quantized weight is what its quantizer makes of it."""
    parameters = dict(module.named_parameters())
    pairs = [(parameters[h.op], h.module) for h in hooks.hooks(module) if h.op in parameters]
    return bool(pairs) and all(
        torch.allclose(quantizer(weight), weight, rtol=0, atol=1e-6 * float(weight.abs().max()))
        for weight, quantizer in pairs
    )
