"""Block reconstruction: learn rounding, steps and biases of a quantized model, block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.calibrated import CalibratedAlgorithm
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.reconstruction.learner import Comparison, Learner
from ptq4vit_plugin.algorithms.reconstruction.optimise import learn
from ptq4vit_plugin.algorithms.reconstruction.variations import varied
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.device import device_of
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.blocks import WHOLE, Block, find_blocks, watch_block
from ptq4vit_plugin.integrations.nncf.passes import frozen
from ptq4vit_plugin.integrations.nncf.streams import one_size
from ptq4vit_plugin.reporting.events import event
from ptq4vit_plugin.reporting.progress import progress

#: One image in so many is held out: it decides what is kept.
HELD_OUT = 4
#: By how many images, variations of the held-out ones among them, the whole model is judged.
CHECKED = 64
#: What is learned in float32 instead.
HALF = (torch.float16, torch.bfloat16)


def split(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The images that are learned from, and every fourth, which is held out.

    Raises
    ------
    DataError
        There are too few to hold any out.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    images = 0
    for batch in data:
        held = torch.arange(images, images + len(batch)) % HELD_OUT == HELD_OUT - 1
        for part, wanted in zip(parts, (~held, held), strict=True):
            if wanted.any():
                # Places in the part: what is drawn for an image does not depend on the batches.
                some = batch.of(wanted.nonzero()[:, 0])
                part.append(replace(some, first=sum(map(len, part))))
        images += len(batch)
    if images < HELD_OUT:
        raise DataError(
            f"reconstruct: {images} calibration images; allowed: at least {HELD_OUT}, because "
            "every fourth is held out"
        )
    return parts


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

    iterations: int = Field(default=50, ge=0, description="steps per block")
    finish: int = Field(default=250, ge=0, description="steps on the whole model after that")
    batch_size: int = Field(default=16, ge=1, description="images per step")
    drop: float = Field(
        default=0.5, ge=0, lt=1, description="share of tokens left in float while a block learns"
    )
    gradient: Gradient | None = Gradient(probes=4)
    seed: int = Field(default=0, ge=-(2**63), le=2**63 - 1)  # what a torch.Generator takes


class Reconstruct(CalibratedAlgorithm, Learning):
    """After quantization, learn what a block's output needs to be like the float model's.

    Lifecycle of `apply`: the blocks are found on the module tree; one after the other, in the order
    of execution, each gets the inputs that the quantized model gives it and the float model's
    output as target; weights in units of their steps, the steps themselves, zero points, biases and
    the factors of norms are learned with straight-through gradients; what is best on images that
    are held out is kept, the start included. Then the whole model is learned in the same way
    against the float model's outputs, from other variations of the images in every step. The
    result is written into the same quantizers and parameters.
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
        if next(hooks.quantizers(module), None) is None:
            raise ModelError("reconstruct: the model has no quantizers; quantize it before that")
        if _is_rounded(module):
            raise ModelError(
                "reconstruct: all weights lie on their quantizers' levels already, so the float "
                "model that would be the target is gone; use it in place of 'compensate', or the "
                "algorithm 'ptq4vit_recon'"
            )
        self.reconstruct(module, without_quantizers(module), *split(data))
        return model

    def reconstruct(
        self, module: nn.Module, teacher: nn.Module, fit: Sequence[Batch], check: Sequence[Batch]
    ) -> None:
        """`apply` for a bare quantized module, its float model, and images by `split`.

        Raises
        ------
        DataError
            The images are of several sizes.
        """
        one_size([*fit, *check])
        with widened(module), widened(teacher):
            self._reconstruct(module, teacher, _widened(fit), _widened(check))

    def _reconstruct(
        self, module: nn.Module, teacher: nn.Module, fit: Sequence[Batch], check: Sequence[Batch]
    ) -> None:
        blocks = find_blocks(module, fit[0]) if self.iterations else []
        with progress("Reconstructing", len(blocks) + 1) as advance, frozen(module):
            for place, block in enumerate(blocks):
                random = _Random(module, self.seed + place)
                exact = [
                    watch_block(teacher, block.name, part, self.gradient) for part in (fit, check)
                ]
                seen = [watch_block(module, block.name, part) for part in (fit, check)]
                # A block may be one that cannot be called by itself.
                if None not in (*seen, *exact):
                    pairs = [Comparison(*pair) for pair in zip(seen, exact, strict=True)]
                    self._learn_block(module, block, *pairs, random)
                advance(block.name)
            if self.finish:
                random = _Random(module, self.seed + len(blocks))
                exact = [watch_block(teacher, WHOLE.name, part) for part in (fit, check)]
                if None not in exact:
                    # The whole model sees the same images, quantized or not.
                    pairs = [Comparison(call, call) for call in exact]
                    self._learn_whole(module, teacher, *pairs, random)
            advance("whole model")

    def _learn_block(
        self, module: nn.Module, block: Block, fit: Comparison, check: Comparison, random: _Random
    ) -> None:
        learner = Learner(module, block, random.device)
        self._learn(
            learner,
            lambda images: learner.loss(fit, images, self.drop),
            fit,
            check,
            self.iterations,
            random,
        )

    def _learn_whole(
        self,
        module: nn.Module,
        teacher: nn.Module,
        fit: Comparison,
        check: Comparison,
        random: _Random,
    ) -> None:
        learner = Learner(module, WHOLE, random.device)
        args, kwargs = fit.exact.args, fit.exact.kwargs
        if not kwargs and len(args) == 1 and args[0].ndim == 4:  # images and nothing else

            def loss(images: Tensor) -> Tensor:
                some, _ = fit.exact.of(images.to(args[0].device))
                seen = _compared(teacher, [varied(some[0], random.host)])
                return learner.loss(seen, torch.arange(len(images)), 0.0)

            # A handful of images cannot tell a better state from a worse one.
            (held_out,) = check.exact.args
            more = range(len(held_out), CHECKED, len(held_out))
            views = [varied(held_out, random.host) for _ in more]
            check = _compared(teacher, [held_out, *views])
        else:

            def loss(images: Tensor) -> Tensor:
                return learner.loss(fit, images, 0.0)

        self._learn(learner, loss, fit, check, self.finish, random)

    def _learn(
        self,
        learner: Learner,
        loss: Callable[[Tensor], Tensor],
        fit: Comparison,
        check: Comparison,
        iterations: int,
        random: _Random,
    ) -> None:
        try:
            outcome = learn(
                loss,
                lambda: learner.error(check, self.batch_size),
                learner.groups(),
                len(fit),
                iterations,
                self.batch_size,
                random.host,
            )
        finally:
            learner.finish()
        event("block", name=learner.block.name, before=outcome.before, after=outcome.after)


class _Random:
    """Two sources of randomness from one seed: on the CPU, and where the model is."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self.host = torch.Generator().manual_seed(seed)
        self.device = torch.Generator(device_of(module)).manual_seed(seed)


def _compared(teacher: nn.Module, images: Sequence[Tensor]) -> Comparison:
    """Batches of images as the whole model sees them: the same ones, quantized or not."""
    call = watch_block(teacher, WHOLE.name, [Batch((batch,), {}) for batch in images])
    return Comparison(call, call)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Keep what a model has in half precision in float32: gradients and small steps need that."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in HALF]
    types = [t.dtype for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, types, strict=True):
            tensor.data = tensor.data.to(dtype)


def _widened(data: Sequence[Batch]) -> list[Batch]:
    return [batch.changed(lambda x: x.float() if x.dtype in HALF else x) for batch in data]


def without_quantizers(module: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes in float; factors of SmoothQuant are part of it."""
    copied = copy.deepcopy(module)
    for hook in list(hooks.quantizers(copied)):
        hooks.replace(copied, hook.module, nn.Identity())
    return copied


@torch.no_grad()
def _is_rounded(module: nn.Module) -> bool:
    """Whether every quantized weight is what its quantizer makes of it."""
    parameters = dict(module.named_parameters())
    pairs = [(parameters[h.op], h.module) for h in hooks.hooks(module) if h.op in parameters]
    return bool(pairs) and all(
        torch.allclose(quantizer(weight), weight, rtol=0, atol=1e-6 * float(weight.abs().max()))
        for weight, quantizer in pairs
    )
