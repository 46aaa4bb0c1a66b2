"""A block in the middle of learning: its quantizers exchanged for learned ones, and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.reconstruction.learned import LearnedActivation, LearnedWeight
from ptq4vit_plugin.algorithms.reconstruction.optimise import Group, weighted_error
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.blocks import Block, Call, hooks_within, run_block

#: Learning rates of Adam: weights in steps, steps by their logarithm, zero points in codes, biases
#: and factors of norms relative to their root mean square.
WEIGHT_RATE, STEP_RATE, ZERO_RATE, BIAS_RATE = 1e-2, 3e-3, 1e-2, 2e-3


class Comparison:
    """Some images as a block sees them in the quantized and in the float model."""

    def __init__(self, seen: Call, exact: Call) -> None:
        self.seen, self.exact = seen, exact
        importance = exact.importance
        self.importance = None if importance is None else importance / importance.mean()

    def __len__(self) -> int:
        return len(self.exact.output)


class Learner:
    """A block (or the whole model) whose quantizers are exchanged for learned ones."""

    def __init__(self, module: nn.Module, block: Block, generator: torch.Generator) -> None:
        self.module, self.block, self.generator = module, block, generator
        self.activations: list[LearnedActivation] = []
        self.weights: list[LearnedWeight] = []
        parameters = dict(module.named_parameters())
        found = list(hooks.hooks(module))
        taken = {id(p) for hook in found for p in hook.module.parameters()}
        taken |= {id(parameters[hook.op]) for hook in found if hook.op in parameters}
        self.others = [
            p
            for p in module.get_submodule(block.name).parameters()
            if p.ndim == 1 and p.is_floating_point() and id(p) not in taken
        ]
        for hook in hooks_within(module, block):
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

    def loss(self, of: Comparison, images: Tensor, drop: float) -> Tensor:
        """The weighted error on some images, with random tokens in float."""
        images = images.to(of.exact.output.device)
        args, kwargs = of.seen.of(images)
        if drop:
            exact_args, exact_kwargs = of.exact.of(images)
            args = tuple(self._mixed(*pair, drop) for pair in zip(args, exact_args, strict=True))
            kwargs = {k: self._mixed(v, exact_kwargs[k], drop) for k, v in kwargs.items()}
        return self._error(of, args, kwargs, images, drop)

    @torch.no_grad()
    def error(self, of: Comparison, batch_size: int) -> float:
        """The weighted error on all images, everything quantized."""
        images, total = torch.arange(len(of), device=of.exact.output.device), 0.0
        for some in images.split(batch_size):
            total += float(self._error(of, *of.seen.of(some), some, 0.0)) * len(some)
        return total / len(of)

    def finish(self) -> None:
        """Put the quantizers back, with what was learned."""
        for learned in (*self.activations, *self.weights):
            hooks.replace(self.module, learned, learned.finish())
        for parameter in self.others:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _error(self, of: Comparison, args: Any, kwargs: Any, images: Tensor, drop: float) -> Tensor:
        for learned in self.activations:
            learned.drop = drop
        output = run_block(self.module, self.block, args, kwargs)
        importance = None if of.importance is None else of.importance[images]
        return weighted_error(output, of.exact.output[images], importance)

    def _mixed(self, seen: Any, exact: Any, drop: float) -> Any:
        """Tokens of the quantized model's input, some of them the float model's."""
        if not isinstance(seen, Tensor) or not seen.is_floating_point():
            return seen
        chance = torch.rand((*seen.shape[:-1], 1), generator=self.generator, device=seen.device)
        return torch.where(chance < drop, exact, seen)
