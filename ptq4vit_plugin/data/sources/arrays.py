"""Data source ``npz``: images and labels as arrays in a ``.npz`` or ``.safetensors`` file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from ptq4vit_plugin.data.images import Images, Transform, numbered
from ptq4vit_plugin.data.sources.root import data_name, existing_root
from ptq4vit_plugin.errors import DataError, nearest, one_line


def npz(
    config: Any,
    split: str,
    transform: Transform,
    images: str | None = None,
    labels: str | None = None,
) -> Images:
    """Arrays in a ``.npz`` or ``.safetensors`` file; `root` is the file or holds ``<split>.npz``.

    Images are uint8 ``[N, H, W, C]`` or ``[N, H, W]`` and get the model's transform, or float
    ``[N, C, H, W]`` that are ready for the model; labels are integers ``[N]``.

    Parameters
    ----------
    images, labels
        Names of the arrays; ``{split}`` stands for the split. Without them: ``{split}_images`` and
        ``{split}_labels`` when the file has them, else ``images`` and ``labels``.
    """
    data_name(config, wanted=False)
    path = existing_root(config)
    if path.is_dir():
        candidates = [path / f"{split}.npz", path / f"{split}.safetensors"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise DataError(
                f"data.root {path} has neither {' nor '.join(c.name for c in candidates)}"
            )
        path = found[0]
    arrays = _arrays(path)
    key = _array_name("images", images, arrays, split, path)
    if key is None:
        raise DataError(f"{path} has no images; arrays: {', '.join(sorted(arrays))}")
    pixels = arrays[key]
    _check_pixels(pixels, f"{path}: array '{key}'")
    of_labels = _array_name("labels", labels, arrays, split, path)
    targets = np.full(len(pixels), -1) if of_labels is None else arrays[of_labels]
    if targets.shape != (len(pixels),) or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"{path}: array '{of_labels}' is {targets.dtype} {list(targets.shape)}; allowed: "
            f"integers [{len(pixels)}], one for each image of '{key}'"
        )
    return Images(
        read=partial(_read, pixels, targets),
        names=numbered(len(pixels), f"{path}:{key}"),
        transform=transform,
        label_problem=None if of_labels else f"{path} has no labels",
    )


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of the file; nothing is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one .npy array, without names")
        with file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # OSError, BadZipFile, zlib.error, NotImplementedError, ...
        raise DataError(
            f"{path} is not a readable .npz or .safetensors file: {one_line(error)}"
        ) from error


def _read(pixels: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image | Tensor, int]:
    image, label = pixels[index], int(labels[index])
    if image.dtype != np.uint8:
        return torch.from_numpy(image.astype(np.float32)), label
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image), label


def _check_pixels(pixels: np.ndarray, what: str) -> None:
    if pixels.dtype == np.uint8 and pixels.ndim in (3, 4):
        if pixels.ndim == 4 and pixels.shape[-1] not in (1, 3, 4):
            raise DataError(
                f"{what} has {pixels.shape[-1]} channels in its last dimension; allowed: 1, 3 or 4 "
                "(uint8 images are [N, H, W, C])"
            )
    elif not (np.issubdtype(pixels.dtype, np.floating) and pixels.ndim == 4):
        raise DataError(
            f"{what} is {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [N, H, W, C] or "
            "[N, H, W], or float [N, C, H, W]"
        )
    if 0 in pixels.shape[1:]:
        raise DataError(f"{what} is {list(pixels.shape)}; allowed: images of one pixel or more")


def _array_name(
    role: str, option: str | None, arrays: Mapping[str, np.ndarray], split: str, path: Path
) -> str | None:
    """Name of the array of images or labels; None when there is none and none was asked for."""
    if option is None:
        return next((name for name in (f"{split}_{role}", role) if name in arrays), None)
    name = option.replace("{split}", split)
    if name not in arrays:
        raise DataError(
            f"data.options.{role}: {path} has no array '{name}'; allowed: "
            f"{', '.join(sorted(arrays))}" + nearest(name, arrays)
        )
    return name
