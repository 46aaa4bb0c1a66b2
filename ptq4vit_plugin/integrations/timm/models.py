"""timm models from recipes: what has to be known to build the same architecture again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import timm
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ptq4vit_plugin.errors import ModelError, nearest, one_line

_ATTRIBUTE = "ptq4vit_recipe"


class Recipe(BaseModel):
    """Arguments of ``timm.create_model`` that determine an architecture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    args: dict[str, Any] = {}


def create(recipe: Recipe, pretrained: bool = False, checkpoint: Path | None = None) -> nn.Module:
    """Build a timm model in evaluation mode.

    Parameters
    ----------
    pretrained
        Load timm's weights for the name, from its hub.
    checkpoint
        A ``.safetensors`` file of weights to load instead.

    Raises
    ------
    ModelError
        The name is unknown, an argument is not taken, or the weights cannot be had or do not fit.
    """
    known = timm.list_models()
    if recipe.name.split(".")[0] not in known and ":" not in recipe.name:
        raise ModelError(
            f"model.name: '{recipe.name}' is not a timm model; allowed: the {len(known)} names of "
            f"timm.list_models()" + nearest(recipe.name, known)
        )
    if "checkpoint_path" in recipe.args:  # timm's other way to weights, which are no architecture
        raise ModelError(
            "model.args.checkpoint_path: not allowed; give model.checkpoint, a local .safetensors "
            "file, instead"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # an error follows
            model = timm.create_model(recipe.name, pretrained=pretrained, **recipe.args)
    except Exception as error:  # constructors of many people, given any arguments
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise ModelError(
                f"model: the pretrained weights of '{recipe.name}' cannot be had: {reason}; "
                "give model.checkpoint, a local .safetensors file, instead"
            ) from error
        raise ModelError(
            f"model: timm cannot build '{recipe.name}' with {recipe.args}: {reason}"
        ) from error
    if checkpoint is not None:
        _load_weights(model, checkpoint)
    setattr(model, _ATTRIBUTE, recipe)
    return model.eval()


def recipe_of(model: nn.Module) -> Recipe | None:
    """How a model was built, if `create` built it."""
    return getattr(model, _ATTRIBUTE, None)


def _load_weights(model: nn.Module, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ModelError(
            f"model.checkpoint: '{path}' is not a .safetensors file; other formats are pickles, "
            "which run code when they are opened: convert it with safetensors.torch.save_file"
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.checkpoint: '{path}' cannot be read: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ModelError(f"model.checkpoint: '{path}' does not fit the model: {detail}") from error
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"model.checkpoint: '{path}': tensor '{name}' has NaN or infinite values; allowed: "
                "finite numbers"
            )
