"""Ops that are searched already, on disk, so that a run that was killed can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nncf
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4vit_plugin.files import json_text, written_whole
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.record import OpRecord

Place = tuple[str, int | None]  # (op, input port), or (parameter, None)
_KEY = "ptq4vit"


class FinishedOps:
    """Quantizers and records of finished ops, one safetensors file each.

    A file that cannot be read is as good as missing: the op is searched again.

    Parameters
    ----------
    folder
        Where the files are; made when the first is written. None: nothing is kept.
    key
        From `key_of`. Files of another key are not looked at.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder = None if folder is None else folder / key

    def save(self, record: OpRecord, quantizers: Mapping[Place, nn.Module]) -> None:
        """Keep one op.

        Raises
        ------
        PTQ4ViTError
            The folder cannot be written to.
        """
        if self.folder is None:
            return
        shell = hooks.wrap(nn.Module())
        for place, quantizer in quantizers.items():
            hooks.insert(shell, *place, quantizer)
        state = {name: t.detach().cpu().contiguous() for name, t in shell.state_dict().items()}
        metadata = {"record": record.model_dump(), "nncf": nncf.torch.get_config(shell)}
        with written_whole(self._path(record.name)) as part:
            save_file(state, part, {_KEY: json_text(metadata)})

    def load(self, op: str) -> tuple[OpRecord, dict[Place, nn.Module]] | None:
        """An op that was kept, or None."""
        if self.folder is None or not self._path(op).exists():
            return None
        try:
            with safe_open(self._path(op), "pt") as file:
                metadata = json.loads(file.metadata()[_KEY])
                state = {name: file.get_tensor(name) for name in file.keys()}
            record = OpRecord.model_validate(metadata["record"])
            shell = hooks.restore(nn.Module(), metadata["nncf"])
            shell.load_state_dict(state)
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            ValidationError,
            nncf.InternalError,
        ):
            return None
        if record.name != op:
            return None
        return record, {
            (hook.op, hook.port if hook.when == "pre" else None): hook.module
            for hook in hooks.hooks(shell)
        }

    def _path(self, op: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{op.replace('/', '.')}.safetensors"


def remove(folder: Path) -> None:
    """Forget all that was kept, of whatever key."""
    shutil.rmtree(folder, ignore_errors=True)


def key_of(settings: Any, model: nn.Module, images: Iterable[Any]) -> str:
    """Hash of everything that scales depend on.

    Parameters
    ----------
    settings
        JSON values.
    model
        Its weights and buffers, and those of the hooks it has already.
    images
        Calibration data: tensors, nested in lists and dicts.
    """
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    _update(hasher, dict(model.state_dict()))
    _update(hasher, list(images))
    return hasher.hexdigest()[:16]


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            hasher.update(name.encode())
            _update(hasher, value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(hasher, item)
    else:
        hasher.update(repr(value).encode())
