"""Export: write a quantized model for a runtime, and prove that the runtime computes the same."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from ptq4vit_plugin import registry
from ptq4vit_plugin.checkpoint import read_metadata
from ptq4vit_plugin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RegistryError,
    nearest,
    one_line,
)
from ptq4vit_plugin.exporter import Exporter
from ptq4vit_plugin.files import file_mode, unwritable, written_whole
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps
from ptq4vit_plugin.integrations.nncf.passes import frozen
from ptq4vit_plugin.integrations.timm.images import preprocessing
from ptq4vit_plugin.verification import Artefact, op_differences

RANDOM_IMAGES = 8


class ExportReport(BaseModel):
    """What was written, and how far it is from the simulated model.

    Attributes
    ----------
    files
        Bytes by file name.
    ratio
        Bytes of all files over those of the model's float32 parameters.
    images
        How many images were compared; ``random`` says that they were noise, because none were
        given.
    agreement
        Images in percent for which the artefact and the simulated model choose the same class.
    sqnr_db
        Logit SQNR in dB of the artefact against the simulated model.
    exact_sqnr_db
        The same with the file's quantizers in float arithmetic, which shows what the file means
        where this CPU's 8-bit kernels saturate; None where the runtime has no such mode.
    image_size
        ``free``: height and width may be others at run time, as far as the model takes them; else
        ``fixed: ...`` with the reason.
    op_differences
        If asked for: by op, the largest absolute difference of its output from the simulated one,
        over the largest absolute value of that. Differences of earlier ops are part of it.
    facts
        What the exporter says.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    format: str
    files: dict[str, int]
    ratio: float
    images: int
    random: bool
    agreement: float
    sqnr_db: float
    exact_sqnr_db: float | None
    image_size: str
    op_differences: dict[str, float] | None
    facts: dict[str, Any]


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "integer",
    example_input: Any = None,
    min_sqnr: float = 10.0,
    per_op: bool = False,
    **options: Any,
) -> ExportReport:
    """Write a quantized model for a runtime; what was written is loaded and compared first.

    Nothing appears at ``path`` unless the comparison succeeds.

    Parameters
    ----------
    model
        What `quantize` or `load` returned.
    path
        File to write; a suffix is added when there is none. In a folder that exists, the file is
        called ``model-<format>``. What is there is replaced, unless it is a checkpoint, other
        tensors in a ``.safetensors`` file, or a ``.bin`` file that belongs to no export.
    format
        A registered exporter: ``integer``, ``openvino`` or ``onnx``.
    example_input
        Images to compare on: a batch, an iterable of batches, or an ``nncf.Dataset``, such as the
        calibration set. By default random noise of the model's input size.
    min_sqnr
        Logit SQNR in dB that the artefact must reach against the simulated model.
    per_op
        Compare the output of every op as well, on the first batch.
    options
        The exporter's own.

    Raises
    ------
    ConfigError
        Unknown options or values, a wrong suffix, or in the file's place something that is kept.
    DataError
        ``example_input`` has no images, or some with NaN or infinite values.
    ModelError
        The model is not quantized by this plugin, or takes no such images.
    ExportError
        The format cannot express the model, or the artefact computes something else.
    """
    check_options(format, options)
    try:
        exporter = registry.load("exporters", format)(**options)
    except TypeError as error:  # one that has no default is missing
        raise ConfigError(f"export: '{format}': {error}") from error
    if not isinstance(min_sqnr, Real) or math.isnan(min_sqnr):
        raise ConfigError(f"export: min_sqnr: {min_sqnr!r} is not allowed; allowed: a number of dB")
    if isinstance(model, ReplacedOps):
        raise ModelError(
            "export: this is an integer model already, which an export wrote; give the quantized "
            "model that it was made from"
        )
    path = _target(Path(path), format, exporter)
    images = _images(model, example_input)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            part = Path(folder) / path.name
            artefact = Artefact(exporter, format, model, part, min_sqnr)
            with frozen(model):
                compared, image_size = artefact.write(images)
                differences = op_differences(exporter, part, model, images[0]) if per_op else None
            files = sorted(Path(folder).iterdir())
            sizes = {file.name: file.stat().st_size for file in files}
            for file in files:
                _not_a_folder(path.parent / file.name)
                file.chmod(file_mode())  # not all libraries leave it to the umask
            for file in files:
                place = path.parent / file.name
                if place.is_symlink():
                    with written_whole(place) as copy:
                        shutil.copyfile(file, copy)
                else:
                    file.replace(place)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    return ExportReport(
        format=format,
        files=sizes,
        ratio=sum(sizes.values()) / sum(4 * p.numel() for p in _parameters(model)),
        images=sum(map(len, images)),
        random=example_input is None,
        agreement=compared.agreement,
        sqnr_db=compared.sqnr,
        exact_sqnr_db=compared.exact,
        image_size=image_size,
        op_differences=differences,
        facts=artefact.facts,
    )


def check_options(format: str, options: Mapping[str, Any], where: str = "export: ") -> None:
    """Refuse options that an exporter does not have, and others than true or false for a switch.

    Parameters
    ----------
    where
        What stands in front of an option's name in messages.

    Raises
    ------
    ConfigError
        The first that is not allowed.
    """
    known = registry.options("exporters", registry.load("exporters", format))
    for key, value in options.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ConfigError(
                f"{where}{key}: not an option of '{format}'; allowed: {allowed}"
                + nearest(key, known)
            )
        if isinstance(known[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"{where}{key}: {value!r} is not allowed; allowed: true or false")


def exporter_of(path: Path) -> Exporter:
    """The exporter whose files have the suffix of a path.

    Raises
    ------
    ConfigError
        There is none.
    """
    known, broken = [], ""
    for entry in registry.entries("exporters"):
        try:
            family = registry.load("exporters", entry.name)
        except RegistryError as error:  # its runtime is not installed, perhaps
            broken += f"; {error}"
            continue
        if family.suffix == path.suffix:
            return family()
        known.append(f"{family.suffix} ({entry.name})")
    allowed = ", ".join(known)
    raise ConfigError(f"'{path}' has no suffix of an exported model; allowed: {allowed}{broken}")


def _target(path: Path, format: str, exporter: Exporter) -> Path:
    """The file to write."""
    suffix = exporter.suffix
    if os.path.isdir(path):
        path = path / f"model-{format}{suffix}"
    elif not path.suffix:
        path = path.with_name(path.name + suffix)
    if path.suffix != suffix:
        raise ConfigError(f"export: '{format}' writes '{suffix}' files, not '{path.name}'")
    _not_a_folder(path)
    try:
        read_metadata(path)
    except CheckpointError:
        other = exporter.in_the_way(path)
        if other is None:
            return path
        raise ConfigError(
            f"export: '{other}' was not written by ptq4vit's export; move it, or give another file"
        ) from None
    raise ConfigError(f"export: '{path}' is a checkpoint, not an export; give another file")


def _not_a_folder(path: Path) -> None:
    if os.path.isdir(path):
        raise ConfigError(f"export: '{path}' is a folder; move it, or give another file")


def _images(model: nn.Module, example_input: Any) -> list[Tensor]:
    if example_input is None:
        size = preprocessing(model).input_size
        noise = torch.randn(RANDOM_IMAGES, *size, generator=torch.Generator().manual_seed(0))
        return [noise]
    try:
        found = batches([example_input] if isinstance(example_input, Tensor) else example_input)
    except (DataError, TypeError) as error:
        reason = one_line(error).replace("calibration ", "")
        raise DataError(
            f"export: example_input: {reason}; allowed: a tensor of images [B, C, H, W], an "
            "iterable of them, or an nncf.Dataset"
        ) from error
    if any(len(batch.args) != 1 or batch.kwargs for batch in found):
        raise ModelError("export: only models of one input, the images, can be exported")
    return [batch.args[0].float().cpu() for batch in found]


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "nncf_hooks" not in name]
