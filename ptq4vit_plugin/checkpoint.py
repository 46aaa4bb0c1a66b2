"""A quantized model in one ``.safetensors`` file: tensors, and in its metadata everything to
rebuild it.

Nothing is unpickled, and classes are imported only from where `hooks.restore` allows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq4vit_plugin.errors import CheckpointError, one_line
from ptq4vit_plugin.files import json_text, written_whole
from ptq4vit_plugin.integrations.device import device_of
from ptq4vit_plugin.integrations.integer import checkpoint as integer
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.decompose import decompose, is_decomposed
from ptq4vit_plugin.integrations.timm.attention import (
    fuse_attention,
    fused_attention,
    unfuse_attention,
)
from ptq4vit_plugin.integrations.timm.models import Recipe, recipe_of
from ptq4vit_plugin.loading import architecture, match_types, read_header
from ptq4vit_plugin.record import QuantizationRecord, attach, record_of

FORMAT_VERSION = 1
_KEY = "ptq4vit"


class Metadata(BaseModel):
    """What a checkpoint says beside its tensors.

    Attributes
    ----------
    recipe
        How timm builds the architecture; None for a model that is not timm's.
    fused_attention
        Value of every ``fused_attn`` switch by module name: op names depend on them.
    decomposed
        Whether calls that hide products were taken apart: op names depend on that, too.
    nncf
        ``nncf.torch.get_config`` of the model: which hook sits where.
    record
        What the calibration did.
    extra
        The resolved config of the run, if there was one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    recipe: Recipe | None = None
    fused_attention: dict[str, bool] = {}
    decomposed: bool = False
    nncf: dict[str, Any]
    record: QuantizationRecord | None = None
    extra: dict[str, Any] = {}


def save(
    model: nn.Module,
    path: str | Path,
    recipe: Recipe | dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a quantized model to a ``.safetensors`` file.

    Parameters
    ----------
    recipe
        ``{"name": timm name, "args": {...}}``; known for models that a config
        built. Without one, `load` has to be given a model of the same architecture.
    extra
        JSON values to keep with it.

    Raises
    ------
    CheckpointError
        The model is not quantized.
    PTQ4ViTError
        The file cannot be written. A file that was there before is untouched then.
    """
    if next(hooks.quantizers(model), None) is None:
        raise CheckpointError(f"{type(model).__name__} has no quantizers; call quantize first")
    metadata = Metadata(
        recipe=recipe_of(model) if recipe is None else Recipe.model_validate(recipe),
        fused_attention=fused_attention(model),
        decomposed=is_decomposed(model),
        nncf=nncf.torch.get_config(model),
        record=record_of(model),
        extra=extra or {},
    )
    # Clones: parameters that share memory are allowed in a model and not in the file.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    with written_whole(Path(path)) as part:
        save_file(state, part, {_KEY: json_text(metadata.model_dump(mode="json"))})
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model; its logits are bit for bit those of the model that was saved.

    An integer checkpoint that `export` wrote is read into a model that computes with integers.

    Parameters
    ----------
    model
        A float model of the same architecture, used instead of building the checkpoint's recipe.
        It is changed in place.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, foreign, too new, of another model, or names a class from a
        module that is not allowed.
    """
    path = Path(path)
    if integer.is_integer(path):
        return integer.load(path, model)
    metadata = read_metadata(path)
    model = architecture(path, metadata.recipe, model)
    unfuse_attention(model)
    try:
        fuse_attention(model, (name for name, fused in metadata.fused_attention.items() if fused))
    except AttributeError as error:
        raise CheckpointError(f"'{path}' is of another model: {error}") from error
    if metadata.decomposed:
        decompose(model)
    device = device_of(model)
    hooks.wrap(model)
    try:
        model = hooks.restore(model, metadata.nncf).to(device)
    except nncf.InternalError as error:
        raise CheckpointError(f"'{path}': {one_line(error)}") from error
    # A config that was edited can fail anywhere in the classes that it names.
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise CheckpointError(f"'{path}': its quantizers cannot be rebuilt: {detail}") from error
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
        match_types(model, state)
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        detail = one_line(error)[:300]
        raise CheckpointError(f"'{path}' is of another model: {detail}") from error
    if metadata.record is not None:
        attach(model, metadata.record)
    # In training mode timm's attention forgets the position biases that it kept of the old weights.
    return model.train().eval()


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint says about itself; no tensor is read.

    Raises
    ------
    CheckpointError
        As `load`.
    """
    return read_header(path, _KEY, "a checkpoint", Metadata)
