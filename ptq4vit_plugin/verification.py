"""Whether an exported file computes what the simulated model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4vit_plugin.errors import ExportError, ModelError, PTQ4ViTError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.exporter import Exporter
from ptq4vit_plugin.integrations.device import device_of, dtype_of, has_int8_dot
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.record import record_of

#: Difference in dB between the file in float arithmetic and in the runtime's 8-bit kernels from
#: which on these are said to saturate, and what to do about it.
SATURATED = 3.0
NARROWER = (
    "this CPU's 8-bit kernels saturate; weights and attention of 7 bits do not (docs/deployment.md)"
)


class Comparison(NamedTuple):
    """Agreement in percent, and logit SQNR in dB as the runtime runs the file and in float."""

    agreement: float
    sqnr: float
    exact: float | None


class Artefact:
    """A file in the making: written, loaded fresh and compared with the simulated model."""

    def __init__(
        self, exporter: Exporter, format: str, model: nn.Module, path: Path, min_sqnr: float
    ) -> None:
        self.exporter, self.format, self.model = exporter, format, model
        self.path, self.min_sqnr = path, min_sqnr
        self.facts: dict[str, Any] = {}

    def write(self, images: Sequence[Tensor]) -> tuple[Comparison, str]:
        """Write it with a free image size if model and runtime allow that, else with a fixed one.

        Raises
        ------
        ExportError
            The file computes something else, or cannot be written.
        ModelError
            The model takes no such images, or returns something else than a tensor.
        """
        self.exporter.input_size = tuple(images[0].shape[1:])
        # A model that cannot be compared is not written.
        for some in {batch.shape[1:]: batch[:1] for batch in images}.values():
            try:
                _logits(self.model, [some])
            except PTQ4ViTError:
                raise
            except Exception as error:  # models' own errors have no common base
                raise ModelError(
                    f"export: the model cannot take example_input of {[*some.shape]}: "
                    f"{_in_a_line(error)}"
                ) from error
        try:
            larger, *others = resized(self.model, images[0])
            self.facts = self.exporter.write(self.model, self.path, larger, (0, 2, 3))
            return self._compared(images, *([other] for other in others)), "free"
        except Exception as error:  # runtimes' and models' own errors have no common base
            reason = _in_a_line(error)
        for file in self.path.parent.iterdir():
            file.unlink()
        try:
            self.facts = self.exporter.write(self.model, self.path, images[0], (0,))
            return self._compared(images), f"fixed: {reason}"
        except (PTQ4ViTError, OSError):
            raise
        except Exception as error:
            raise ExportError(f"export: {self.format}: {_in_a_line(error)}") from error

    def _compared(self, *sizes: Sequence[Tensor]) -> Comparison:
        """Compare on batches of every size; returns what the first gave."""
        run, in_float = self.exporter.read(self.path), self.exporter.read_in_float(self.path)
        found = []
        for images in sizes:
            reference = _logits(self.model, images)
            agreement, sqnr = _compare(run, reference, images)
            exact = None if in_float is None else _compare(in_float, reference, images)[1]
            # Without int8 dot products the runtime's own kernels say nothing about the file.
            judged = sqnr if exact is None or has_int8_dot(torch.device("cpu")) else exact
            if not judged >= self.min_sqnr:
                size = "x".join(map(str, images[0].shape[2:]))
                raise ExportError(
                    f"export: the {self.format} artefact is {judged:.1f} dB from the simulated "
                    f"model on images of {size} ({agreement:.1f} % the same class), below min_sqnr "
                    f"{self.min_sqnr:g} dB"
                )
            found.append(Comparison(agreement, sqnr, exact))
        own = found[0]
        saturating = own.exact is not None and not has_int8_dot(torch.device("cpu"))
        if saturating and own.exact > own.sqnr + SATURATED:
            self.facts["saturation"] = NARROWER
        return own


@torch.inference_mode()
def op_differences(
    exporter: Exporter, path: Path, model: nn.Module, images: Tensor
) -> dict[str, float]:
    """See `ExportReport`; in the order of the plan."""
    simulated: dict[str, Tensor] = {}
    names = [op.name for op in record_of(model).plan.ops]

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda output: simulated.update({name: output.float().cpu()})

    with hooks.watching(model, {}, {name: keep(name) for name in names}):
        model(images.to(device_of(model), dtype_of(model)))
    found = exporter.op_outputs(path, names)(images)
    return {
        name: _relative(found[name].cpu().reshape(exact.shape) - exact, exact)
        for name, exact in simulated.items()
        if name in found
    }


def _relative(difference: Tensor, exact: Tensor) -> float:
    # Some op's output may be all zero.
    largest = exact.abs().max().clamp_min(torch.finfo(exact.dtype).tiny)
    return float(difference.abs().max() / largest)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@torch.inference_mode()
def resized(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Two of the images at twice their size, at twice their height and at twice their width.

    Whatever a size must be a multiple of, twice that size is one too. A model is traced on the
    first, because at the size that it was made for it skips what it does for others, such as
    resampling position embeddings.

    Raises
    ------
    Exception
        The model's own: it takes no other size.
    """
    some = images[:2]
    made = [F.interpolate(some, scale_factor=s, mode="bilinear") for s in ((2, 2), (2, 1), (1, 2))]
    _logits(model, made[:1])  # the others are seen when the file is compared
    return made


@torch.inference_mode()
def _logits(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    outputs = [model(batch.to(device_of(model), dtype_of(model))) for batch in images]
    if not isinstance(outputs[0], Tensor):
        raise ModelError(
            f"export: the model returns {type(outputs[0]).__name__}; only models that return one "
            "tensor can be exported"
        )
    return torch.cat([output.float().cpu() for output in outputs])


@torch.inference_mode()
def _compare(
    artefact: Callable[[Tensor], Tensor], reference: Tensor, images: Sequence[Tensor]
) -> tuple[float, float]:
    logits = torch.cat([artefact(batch).float().cpu() for batch in images])
    if logits.shape != reference.shape or not torch.isfinite(logits).all():
        return 0.0, -math.inf
    agreement = (logits.argmax(1) == reference.argmax(1)).double().mean().item()
    return 100 * agreement, logit_sqnr(reference, logits)
