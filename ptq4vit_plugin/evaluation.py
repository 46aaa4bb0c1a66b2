"""How good a model is: accuracy, loss, and how far its outputs are from a reference model's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch import distributed as dist

from .data.batches import too_many_unreadable
from .data.images import check_images
from .errors import DataError, ModelError
from .integrations.distributed import together

Z95 = 1.959963984540054  # standard normal quantile of 0.975


class Metrics(BaseModel):
    """Result of `evaluate`.

    Attributes
    ----------
    top1, top5
        Accuracy in percent; top-5 only for models of more than five classes.
    top1_interval
        95 % confidence interval of top-1 in percent (Wilson score).
    loss
        Mean cross-entropy, in nats.
    reference_top1
        Top-1 of the reference model in percent.
    agreement
        Images in percent for which model and reference choose the same class.
    sqnr_db
        Signal-to-quantization-noise ratio of the logits in dB: variance of the reference's logits
        over the mean squared difference. Infinite when there is no difference.
    images
        Images evaluated.
    images_per_second
        Throughput of the model alone, without the reference and without reading images.
    unreadable
        Images that were skipped because they could not be decoded.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    top1: float
    top5: float | None
    top1_interval: tuple[float, float]
    loss: float
    reference_top1: float | None
    agreement: float | None
    sqnr_db: float | None
    images: int
    images_per_second: float
    unreadable: tuple[str, ...] = ()


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    reference: nn.Module | None = None,
    progress: bool = False,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Metrics:
    """Measure a classifier, and its distance to a reference when one is given.

    Parameters
    ----------
    model
        Images ``[B, C, H, W]`` to logits ``[B, classes]``; images are moved to the device of its
        parameters. It is evaluated in eval mode and left in the mode it was in.
    loader
        Batches of images and integer labels ``[B]``: `ptq4vit_plugin.data.loader`, or an ordinary
        ``DataLoader``.
    reference
        The model before quantization.
    progress
        Show a bar with the running top-1 on standard error, if that is a terminal.
    precision
        Of matrix products and convolutions, by autocast; everything is measured in float32 or
        better. Of both models.

    With a loader that holds one process's share of the images (`data.loader`, ``share``), every
    process gets the measurements of all images; the speed is that of all processes together.

    Raises
    ------
    DataError
        No images; NaN or infinite ones; another size than the model takes; labels that are not
        class indices of the model.
    ModelError
        The output is not ``[B, classes]``.
    """
    totals = _Totals()
    with ExitStack() as stack:
        for net in (model, reference):
            if net is not None:
                stack.callback(net.train, net.training)
                net.eval()
        stack.enter_context(torch.inference_mode())
        bar = stack.enter_context(_bar()) if progress else None
        task = bar and bar.add_task("evaluating", total=_length(loader), top1="")
        for images, labels, *_ in loader:
            check_images(images, model)
            start = time.perf_counter()
            logits = _logits(model, images, precision)
            totals.seconds += time.perf_counter() - start
            totals.add(logits, _checked(labels, logits))
            if reference is not None:
                totals.compare(logits, _logits(reference, images, precision), labels)
            if bar:
                bar.update(task, advance=1, top1=f"top-1 {totals.top1:.2f} %")
    unreadable = list(getattr(loader, "unreadable", ()))
    if getattr(loader, "ranks", 1) > 1:
        unreadable = totals.gather(unreadable)
        if len(unreadable) > loader.skip_unreadable:  # no process alone had too many
            raise too_many_unreadable(unreadable, loader.skip_unreadable)
    if totals.images == 0:
        raise DataError("no images to evaluate on")
    return totals.metrics(tuple(unreadable))


def logit_sqnr(reference: Tensor, output: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of a model's output in dB.

    The signal is the variance of the reference's logits, not their power: a constant that is added
    to all of them changes no decision. Variance and noise are means over all numbers together.

    Parameters
    ----------
    reference, output
        Logits ``[N, classes]`` of the model before and after quantization, or features of any
        shape, such as tokens ``[N, L, C]`` and maps ``[N, C, H, W]``.

    Raises
    ------
    ModelError
        The shapes differ.
    """
    if reference.shape != output.shape:
        raise ModelError(
            f"the output has the shape {list(output.shape)}; allowed: that of the reference, "
            f"{list(reference.shape)}"
        )
    totals = _Totals()
    totals.add_noise(output, reference)
    return totals.sqnr_db


def wilson_interval(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, both ends between 0 and 1.

    Unlike the normal approximation it is right for few images and near 0 and 100 %
    (E. B. Wilson, 1927).
    """
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class _Totals:
    """Sums over images, from which every metric follows; sums of several processes may be added."""

    def __init__(self) -> None:
        self.images = 0
        self.correct1 = 0
        self.correct5 = 0
        self.loss = 0.0
        self.classes = 0
        self.seconds = 0.0
        self.compared = 0
        self.agree = 0
        self.reference_correct1 = 0
        self.numbers = 0
        self.signal = 0.0
        self.signal_squared = 0.0
        self.noise = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.images += len(labels)
        self.classes = logits.shape[1]
        top = logits.topk(min(5, self.classes), dim=1).indices == labels[:, None]
        # top-1 by argmax and not by topk: the two order ties differently
        self.correct1 += int((logits.argmax(1) == labels).sum())
        self.correct5 += int(top.any(1).sum())
        self.loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()

    def compare(self, logits: Tensor, reference: Tensor, labels: Tensor | None = None) -> None:
        self.classes = logits.shape[1]
        if logits.shape != reference.shape:
            raise ModelError(
                f"the model has {logits.shape[1]} classes and the reference {reference.shape[1]}"
            )
        self.compared += len(logits)
        self.agree += int((logits.argmax(1) == reference.argmax(1)).sum())
        if labels is not None:
            self.reference_correct1 += int((reference.argmax(1) == labels.cpu()).sum())
        self.add_noise(logits, reference)

    def add_noise(self, output: Tensor, reference: Tensor) -> None:
        signal = reference.double()
        self.numbers += signal.numel()
        self.signal += signal.sum().item()
        self.signal_squared += signal.square().sum().item()
        self.noise += (output.double() - signal).square().sum().item()

    def gather(self, names: list[str]) -> list[str]:
        """Add up all processes' sums, and join their lists of names."""
        everyone: list[Any] = [None] * dist.get_world_size()
        with together():
            dist.all_gather_object(everyone, (vars(self), names))
        for key in vars(self):
            values = [sums[key] for sums, _ in everyone]
            # Processes work at the same time, on the same model.
            setattr(self, key, max(values) if key in ("seconds", "classes") else sum(values))
        return [name for _, some in everyone for name in some]

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.images

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        variance = self.signal_squared / self.numbers - (self.signal / self.numbers) ** 2
        ratio = variance / (self.noise / self.numbers)
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    def metrics(self, unreadable: tuple[str, ...]) -> Metrics:
        low, high = wilson_interval(self.correct1, self.images)
        return Metrics(
            top1=self.top1,
            top5=100 * self.correct5 / self.images if self.classes > 5 else None,
            top1_interval=(100 * low, 100 * high),
            loss=self.loss / self.images,
            reference_top1=100 * self.reference_correct1 / self.compared if self.compared else None,
            agreement=100 * self.agree / self.compared if self.compared else None,
            sqnr_db=self.sqnr_db if self.compared else None,
            images=self.images,
            images_per_second=self.images / self.seconds,
            unreadable=unreadable,
        )


def _logits(model: nn.Module, images: Tensor, precision: str = "float32") -> Tensor:
    """Float32 logits on the CPU; the copy waits for the device, so that it can be timed."""
    parameter = next(model.parameters(), None)
    images = images if parameter is None else images.to(parameter.device)
    with torch.autocast(
        images.device.type, getattr(torch, precision), enabled=precision != "float32"
    ):
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != images.shape[:1]:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model's output is {shape}; allowed: [{len(images)}, classes]")
    return logits.float().cpu()


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    classes = logits.shape[1]
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)}; allowed: integers [{len(logits)}]"
        )
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(
            f"label {int(outside[0])} is not a class of the model; allowed: 0 to {classes - 1}"
        )
    return labels.cpu().long()


def _length(loader: Iterable) -> int | None:
    return len(loader) if hasattr(loader, "__len__") else None


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[top1]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
