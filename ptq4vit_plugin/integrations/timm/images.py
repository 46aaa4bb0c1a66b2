"""What timm knows about images: a model's own transform, image folders, ImageNet's class index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.layers import to_2tuple
from timm.utils.misc import natural_key
from torch import nn

from ...errors import DataError, nearest, one_line
from .models import recipe_of

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# timm's own synonyms for the folders of a data set
SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def input_channels(model: nn.Module) -> int | None:
    """Channels the model expects, from its ``in_chans`` or its timm config; None when unknown."""
    declared = getattr(model, "in_chans", None)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return declared or (size[0] if size else None)


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width the model insists on, in pixels; None when it takes any size.

    timm's ``pretrained_cfg`` keeps the pretrained size when a model is created with another
    ``img_size``, so the patch embedding is asked.
    """
    embedding = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    if size is None or not getattr(embedding, "strict_img_size", True):
        return None
    return tuple(size)


def _created_size(model: nn.Module) -> tuple[int, int] | None:
    """The ``img_size`` that a model was created with, if its patch embedding says none."""
    recipe = recipe_of(model)
    size = None if recipe is None else recipe.args.get("img_size")
    if size is None or getattr(getattr(model, "patch_embed", None), "img_size", None) is not None:
        return None
    return to_2tuple(size)


class ImageTransform:
    """A model's own evaluation transform, from a PIL image to its input.

    Attributes
    ----------
    channels
        Channels of the result: 1 (grey), 3 (RGB) or 4 (RGBA); images are converted.
    size
        Height and width of the result in pixels.
    pipeline
        timm's transform: resize, centre crop, to ``[0, 1]``, normalise.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        pipeline: Callable[[Image.Image], torch.Tensor],
    ):
        self.channels = channels
        self.size = size
        self.pipeline = pipeline

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the model's input, float32 ``[channels, *size]``."""
        if self.channels not in MODES:
            raise DataError(
                f"the model takes {self.channels} channels and images have 1, 3 or 4: give "
                "float32 arrays (npz) that are ready for the model"
            )
        return self.pipeline(eight_bits(image).convert(MODES[self.channels]))


def image_transform(model: nn.Module) -> ImageTransform:
    """Return the transform the model was trained to be evaluated with.

    Size, crop, interpolation, mean and standard deviation come from the model's ``pretrained_cfg``
    (`timm.data.resolve_model_data_config`); the size and channels of the model itself win, because
    a model created with other ``img_size`` or ``in_chans`` keeps the pretrained ones in its config.
    Three colour means become their average when the model has another number of channels.
    """
    config = _transform_config(model)
    channels, *size = config["input_size"]
    return ImageTransform(channels, tuple(size), create_transform(**config, is_training=False))


def _transform_config(
    model: nn.Module, input_size: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """`timm.data.resolve_model_data_config` with the model's own size and channels, or those
    given."""
    config = resolve_model_data_config(model)
    channels = input_channels(model) or config["input_size"][0]
    size = fixed_size(model) or _created_size(model) or tuple(config["input_size"][1:])
    if input_size is not None:
        channels, *size = input_size
    for key in ("mean", "std"):
        values = tuple(config[key])
        if len(values) != channels:
            config[key] = (sum(values) / len(values),) * channels
    return config | {"input_size": (channels, *size)}


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8: Pillow's `convert` makes everything from 256 on white.

    Raises
    ------
    ValueError
        Integers of 32 bits or floats outside 0 to 255, or floats up to 1: what is white is not
        known.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        outside = not ((values >= 0) & (values <= 255)).all()
        if outside or (image.mode == "F" and 0 < values.max() <= 1):
            raise ValueError(
                f"values from {values.min():g} to {values.max():g} in mode {image.mode}; allowed: "
                "0 to 255 (not floats of 0 to 1), or 16 bits without sign"
            )
    return image


def decoded(file: BinaryIO | str | Path) -> Image.Image:
    """Decode an image to 8 bits; raises whatever Pillow raises, and what `eight_bits` does."""
    with Image.open(file) as image:
        image.load()
        return eight_bits(image)


def open_image(path: Path) -> Image.Image:
    """Decode one image file.

    Raises
    ------
    DataError
        It cannot be read.
    """
    try:
        return decoded(path)
    except Exception as error:  # OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise DataError(f"'{path}' cannot be read as an image: {one_line(error)}") from error


class Preprocessing(BaseModel):
    """What a model's images need, and its classes' names: travels with an exported model.

    Attributes
    ----------
    input_size
        Channels, height and width.
    mean, std
        Per channel, of pixels in ``[0, 1]``.
    interpolation, crop_pct, crop_mode
        As `timm.data.create_transform` takes them.
    labels
        Names of the classes in order; empty when they are not known.
    classes
        How many there are; 0 for a model that returns features, None when it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    labels: tuple[str, ...] = ()
    classes: int | None = None

    def transform(self) -> ImageTransform:
        """The transform that these values describe."""
        settings = self.model_dump(exclude={"labels", "classes"})
        pipeline = create_transform(**settings, is_training=False)
        return ImageTransform(self.input_size[0], self.input_size[1:], pipeline)


def preprocessing(
    model: nn.Module, input_size: tuple[int, int, int] | None = None
) -> Preprocessing:
    """What `image_transform` does for a model, as values, with ImageNet's class names; for images
    of another size if one is given."""
    config = _transform_config(model, input_size)
    classes = getattr(model, "num_classes", None)
    subset = infer_imagenet_subset({"num_classes": classes or 0})
    labels = ImageNetInfo(subset).label_descriptions() if subset else ()
    names = Preprocessing.model_fields.keys() - {"labels", "classes"}
    settings = {name: config[name] for name in names}
    return Preprocessing(**settings, labels=tuple(labels), classes=classes)


def split_path(root: Path, split: str, suffix: str = "") -> Path:
    """Return the folder of a split: ``root/split`` or timm's synonym of it; ``.`` is `root` itself.
    With a suffix, ``.tar``, the file of that name instead.

    Unlike timm this never falls back to `root`, which would mix the splits.

    Raises
    ------
    DataError
        There is none; the message lists those there are.
    """
    synonyms = next((group for group in SPLITS if split in group), ())
    exists = Path.is_file if suffix else Path.is_dir
    for name in (split, *synonyms):
        path = root / f"{name}{suffix}"
        if exists(path):
            return path
    kind = f"{suffix} file" if suffix else "folder"
    there = sorted(path.name for path in root.glob(f"*{suffix}") if exists(path))
    allowed = [", ".join(there[:10]) + (" ..." if len(there) > 10 else "")] if there else []
    allowed += [] if suffix else [f"{'or ' if there else ''}'.' for the folder itself"]
    raise DataError(
        f"data split '{split}': no {kind} of that name in {root}; allowed: "
        f"{', '.join(allowed) or 'none'}" + nearest(split, there)
    )


def check_split(split: str, source: str, allowed: Sequence[str]) -> None:
    """Raise `DataError` unless a split is one of `allowed` or a synonym that timm has."""
    known = [*allowed, *SPLITS[0], *SPLITS[1]]
    if split not in known:
        raise DataError(
            f"data split '{split}' of {source}; allowed: {', '.join(allowed)}"
            + nearest(split, known)
        )


def class_order(names: Iterable[str]) -> list[str]:
    """Different class names in timm's order, in which numbers count as numbers.

    timm leaves names that it takes for equal (``a1`` and ``a01``) to chance; here they are sorted.
    """
    return sorted(sorted(set(names)), key=natural_key)


class ImageFiles:
    """The image files under a folder and the class folder each one is in, sorted by name.

    Files are found by timm's reader. They are decoded here and not by timm's ``ImageDataset``,
    which replaces an unreadable image by the next one.

    Attributes
    ----------
    names
        File names relative to `root`, with forward slashes, sorted.
    folders
        The class folder of each file; empty for a file directly in `root`.
    classes
        The class folders in the order of `class_order`.
    """

    def __init__(self, root: Path):
        try:
            reader = ReaderImageFolder(str(root))
        except RuntimeError as error:  # timm's "Found 0 images"
            raise DataError(one_line(error)) from error
        folders = list(reader.class_to_idx)
        self.classes = class_order(folders)
        files = sorted(
            (Path(path).relative_to(root).as_posix(), folders[index])
            for path, index in reader.samples
        )
        self.root = root
        self.names = [name for name, _ in files]
        self.folders = [folder for _, folder in files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """Decode one file; raises whatever Pillow raises when it cannot."""
        return decoded(self.root / self.names[index])


def imagenet_wnids(num_classes: int) -> Sequence[str] | None:
    """WordNet ids of an ImageNet classifier in class order, or None when it is not one.

    1,000 classes are ImageNet-1k; timm knows the larger sets by their number of classes, too.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return None if subset is None else ImageNetInfo(subset).label_names()
