"""What loading a checkpoint of either kind begins with: its header, and the model it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptq4vit_plugin.errors import CheckpointError
from ptq4vit_plugin.integrations.nncf.prepare import bare
from ptq4vit_plugin.integrations.timm.models import Recipe, create

Header = TypeVar("Header", bound=BaseModel)


#: What the files of this package are, by the key of their metadata.
KINDS = {
    "ptq4vit": "a checkpoint, which `ptq4vit evaluate` and `ptq4vit export` read",
    "ptq4vit_integer": "an exported integer model, which `ptq4vit run` runs",
}


def read_header(path: Path, key: str, kind: str, schema: type[Header]) -> Header:
    """The JSON in the metadata of a safetensors file; no tensor is read.

    Parameters
    ----------
    key
        Of the metadata.
    kind
        What such a file is called in messages.
    schema
        Its field ``format_version`` has the version that is read as its default.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, foreign or too new.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' cannot be read as a .safetensors file: {error}") from error
    if key not in said:
        other = next((f"; it is {what}" for name, what in KINDS.items() if name in said), "")
        raise CheckpointError(
            f"'{path}' was not written by ptq4vit as {kind}: its metadata has no '{key}'{other}"
        )
    text = said[key]
    try:
        version = json.loads(text).get("format_version")
        known = schema.model_fields["format_version"].default
        if version != known:
            raise CheckpointError(
                f"'{path}', {kind}, has format version {version}; this release reads version "
                f"{known}: install a newer ptq4vit-plugin"
            )
        return schema.model_validate_json(text)
    except (ValueError, AttributeError, RecursionError) as error:  # pydantic's is a ValueError
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"'{path}' has damaged metadata: {detail}") from error


def match_types(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model's tensors the types they were saved in.

    Recipes build models in float32, and NNCF makes hooks in it. Buffers that are not saved go with
    the others where the model was cast.
    """
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    types = {name: value.dtype for name, value in state.items()}
    own = [n for n, x in tensors.items() if x.is_floating_point() and not n.startswith("__nncf")]
    cast = next((types[n] for n in own if n in types and types[n] != tensors[n].dtype), None)
    if cast is not None:
        types = dict.fromkeys(own, cast) | types
    for name, value in tensors.items():
        value.data = value.data.to(types.get(name, value.dtype))


def architecture(path: Path, recipe: Recipe | None, model: nn.Module | None) -> nn.Module:
    """A model to load a file into: the one that is given, or made as the file says.

    Raises
    ------
    CheckpointError
        Neither is there.
    """
    if model is None:
        if recipe is None:
            raise CheckpointError(
                f"'{path}' does not say how its model is built; give load(path, model=...)"
            )
        model = create(recipe)
    return bare(model)
