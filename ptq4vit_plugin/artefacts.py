"""Quantized models as folders that can be handed on: checkpoint and model card, local or on the
Hugging Face hub.

A folder holds `checkpoint.save`'s file under the name ``model.safetensors`` and ``README.md``, a
model card made from what the checkpoint knows. Nothing else is read when it is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from ptq4vit_plugin import __version__
from ptq4vit_plugin import checkpoint as checkpoints
from ptq4vit_plugin.config import yaml_text
from ptq4vit_plugin.errors import CheckpointError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.files import output_folder, written_whole
from ptq4vit_plugin.integrations.timm.models import Recipe, recipe_of
from ptq4vit_plugin.record import QuantizationRecord, record_of

CHECKPOINT = "model.safetensors"
CARD = "README.md"
# timm's prefixes of model names
HUB = ("hf-hub:", "hf_hub:")
LOCAL = "local-dir:"
# All but the last part of a path that is absolute, or begins at the home folder or further up. A
# prefix of timm's model names or a data source's name may stand before it.
_FOLDERS = re.compile(
    r"^(local-dir:|file:|[\w.-]+/)?(?:/|~|\.\.?(?=[/\\])|[A-Za-z]:(?=[/\\])|\\\\)(?:.*[/\\])?"
)


def save(
    model: nn.Module,
    path: str | Path,
    recipe: Recipe | dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    metrics: Metrics | None = None,
) -> Path:
    """Write a quantized model: one file if the path ends in ``.safetensors``, else a folder with
    that file and a model card.

    Parameters
    ----------
    recipe, extra
        See `checkpoint.save`. ``extra["config"]``, the run's resolved config, tells the card which
        images the scales come from and whether the weights are timm's pretrained ones.
    metrics
        What `evaluate` measured, for the card.

    Returns
    -------
    Path
        The ``.safetensors`` file.

    Raises
    ------
    CheckpointError
        The model is not quantized.
    PTQ4ViTError
        The place cannot be written to.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return checkpoints.save(model, path, recipe, extra)
    file = checkpoints.save(model, output_folder(path) / CHECKPOINT, recipe, extra)
    write_card(model, path, recipe, extra, metrics)
    return file


def write_card(
    model: nn.Module,
    folder: Path,
    recipe: Recipe | dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    metrics: Metrics | None = None,
) -> None:
    """Write the model card of a folder that `save` has written; the arguments are `save`'s.

    Raises
    ------
    PTQ4ViTError
        The place cannot be written to.
    """
    recipe = recipe_of(model) if recipe is None else Recipe.model_validate(recipe)
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    text = card(recipe, record_of(model), (extra or {}).get("config"), metrics, pretrained)
    with written_whole(folder / CARD) as part:
        part.write_text(text, encoding="utf-8")


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model; its logits are bit for bit those of the model that was saved.

    Parameters
    ----------
    path
        A ``.safetensors`` file, a folder with ``model.safetensors``, or a name like timm's:
        ``hf-hub:<user>/<name>[@<revision>]`` (or ``hf_hub:``) on the Hugging Face hub,
        ``local-dir:<folder>``.
    model
        See `checkpoint.load`.

    Raises
    ------
    CheckpointError
        As `checkpoint.load`; or the hub does not give the file.
    """
    return checkpoints.load(locate(path), model)


def locate(path: str | Path) -> Path:
    """The ``.safetensors`` file that a path, folder or hub name means; downloaded if need be.

    Raises
    ------
    CheckpointError
        The hub does not give the file.
    """
    if str(path).startswith(HUB):
        name, _, revision = str(path).split(":", 1)[1].partition("@")
        try:
            return Path(
                huggingface_hub.hf_hub_download(name, CHECKPOINT, revision=revision or None)
            )
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"'{path}' cannot be had from the hub: {detail}") from error
    path = Path(str(path).removeprefix(LOCAL))
    # Unlike the method of Path, this takes any text: no file has so long a name, say.
    return path / CHECKPOINT if os.path.isdir(path) else path


def upload(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload the checkpoint and the card of a folder to the Hugging Face hub.

    The checkpoint holds the run's whole config, so that `evaluate` finds its images again: also the
    folders that it names, which the card leaves out.

    Parameters
    ----------
    folder
        What `save` wrote.
    name
        ``<user>/<name>``; the repository is made if there is none. The user must be logged in
        (``hf auth login``).

    Returns
    -------
    str
        The address of the upload.

    Raises
    ------
    CheckpointError
        The folder lacks a file, or the hub refuses.
    """
    folder = Path(folder)
    for file in (CHECKPOINT, CARD):
        if not (folder / file).is_file():
            raise CheckpointError(f"'{folder}' has no {file}; save(model, folder) writes it")
    checkpoints.read_metadata(folder / CHECKPOINT)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=[CHECKPOINT, CARD]
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"'{name}': the hub refuses the upload: {detail}") from error
    return str(done)


def card(
    recipe: Recipe | None,
    record: QuantizationRecord | None,
    config: dict[str, Any] | None,
    metrics: Metrics | None,
    pretrained: dict[str, Any],
) -> str:
    """The model card: Markdown with the hub's YAML header."""
    of_timm = bool(config and config["model"].get("pretrained"))
    licence = pretrained.get("license") if of_timm else None
    header: dict[str, Any] = {
        "library_name": "ptq4vit-plugin",
        "pipeline_tag": "image-classification",
        "tags": ["quantization", "post-training-quantization", "nncf", "timm"],
    }
    if licence:
        header["license"] = licence
    tag = pretrained.get("tag")
    name = "a model" if recipe is None else _without_folders(recipe.name)
    config = config and _public(config)
    if of_timm and recipe is not None:
        full = name if "." in name or not tag else f"{name}.{tag}"
        header["base_model"] = f"timm/{full}"
    lines = [
        "---",
        yaml_text(header).strip(),
        "---",
        "",
        f"# {name}, quantized",
    ]
    lines += ["", f"Made with ptq4vit-plugin {__version__}.", ""]
    if metrics is not None:
        lines += ["## Accuracy", "", "| | float | quantized |", "| --- | --- | --- |"]
        reference = metrics.reference_top1
        low, high = metrics.top1_interval
        lines.append(
            f"| top-1 | {'' if reference is None else f'{reference:.2f} %'} | {metrics.top1:.2f} % "
            f"({low:.2f} ... {high:.2f}) |"
        )
        for title, value, unit in (
            ("top-5", metrics.top5, "%"),
            ("same class as float", metrics.agreement, "%"),
            ("logit SQNR", metrics.sqnr_db, "dB"),
        ):
            if value is not None:
                lines.append(f"| {title} | | {value:.2f} {unit} |")
        where = f" of `{config['data']['source']}`" if config else ""
        lines += ["", f"On {metrics.images} images{where}; top-1 with its 95 % interval.", ""]
    if record is not None:
        lines += ["## Where the scales come from", "", *_provenance(record, config), ""]
    if config is not None:
        lines += ["## Config", "", "```yaml"]
        lines += [yaml_text(config).strip(), "```", ""]
    lines += [
        "## Licence of the weights",
        "",
        f"{licence}, as timm says of the pretrained weights."
        if licence
        else "Not known to the tool that wrote this card: the float weights were not timm's "
        "pretrained ones, or timm does not say.",
        "",
        "## Use",
        "",
        "```python",
        "import ptq4vit_plugin",
        "",
        'model = ptq4vit_plugin.load("hf-hub:<user>/<name>")  # or this folder',
        "```",
        "",
    ]
    return "\n".join(lines)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without the folders of the machine that it ran on."""
    sections = {key: value for key, value in config.items() if key != "output"}
    sections["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    if checkpoint := config["model"].get("checkpoint"):
        sections["model"] = {**config["model"], "checkpoint": Path(checkpoint).name}
    return _without_folders(sections)


def _without_folders(value: Any) -> Any:
    """A value of a config with the last part alone of every path like that."""
    if isinstance(value, str):
        return _FOLDERS.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return value


def _provenance(record: QuantizationRecord, config: dict[str, Any] | None) -> list[str]:
    operands = [operand for op in record.ops for operand in op.operands]
    kinds: dict[str, int] = {}
    for operand in operands:
        kind = f"{operand.quantizer} {operand.bits} bit" if operand.quantizer else "float"
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = [
        f"- algorithm: {record.algorithm}; settings other than its defaults: "
        f"`{_without_folders(record.settings) or 'none'}`",
        f"- {len(record.ops)} ops, {record.plan.macs_quantized:.1%} of multiply-accumulates "
        "quantized on both sides",
        "- operands: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"- calibrated on {record.images} images in {record.seconds:.0f} s",
    ]
    if config:
        data = config["data"]
        wanted = data["calibration"]
        lines.append(
            f"- images: source `{data['source']}`, split `{wanted['split']}`, seed {wanted['seed']}"
        )
    return lines
