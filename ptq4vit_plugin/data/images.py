"""Data sets of images: decoded when asked for, named in messages, checked before use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ptq4vit_plugin.errors import DataError, one_line
from ptq4vit_plugin.integrations.timm.images import fixed_size, input_channels

Transform = Callable[[Image.Image], Tensor]


class UnreadableImage(DataError):
    """One image cannot be decoded.

    Attributes
    ----------
    name
        The file, as the data source names it.
    cause
        What the decoder said.
    """

    def __init__(self, name: str, cause: str):
        super().__init__(f"unreadable image {name}: {cause}")
        self.name = name
        self.cause = cause

    def __reduce__(self):  # raised in a loader's worker process, it must survive the way back
        return UnreadableImage, (self.name, self.cause)


@dataclass
class Images(Dataset):
    """Images that are decoded and transformed when asked for.

    Attributes
    ----------
    read
        Decoded image and label of an index. The image is PIL's, or a float32 tensor ``[C, H, W]``
        that is ready; the label is an int, None or -1 when unknown.
    names
        One name for each image.
    transform
        From PIL image to tensor.
    classes
        Class names in the order of the labels, or None when the labels already are the model's.
    class_map
        The model's class names in order, when an option tells them.
    label_problem
        Why the labels cannot be used with the model, or None.
    """

    read: Callable[[int], tuple[Image.Image | Tensor, int | None]]
    names: Sequence[str]
    transform: Transform
    classes: Sequence[str] | None = None
    class_map: Sequence[str] | None = None
    label_problem: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.read(index)
        except DataError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            cause = one_line(error) or type(error).__name__
            raise UnreadableImage(self.names[index], cause) from error
        ready = image if isinstance(image, Tensor) else self.transform(image)
        try:
            return ready, -1 if label is None else int(label)
        except (TypeError, ValueError) as error:  # a column of text, or of several labels
            raise DataError(
                f"label of image {self.names[index]} is {repr(label)[:60]}; allowed: an integer"
            ) from error


def names_of(dataset: Dataset) -> Sequence[str]:
    """What a data set calls its images; their numbers when it has no names."""
    names = getattr(dataset, "names", None)
    return numbered(len(dataset)) if names is None else names


def numbered(count: int, what: str = "") -> list[str]:
    """Names ``what[007]`` from numbers of one width, so that sorting keeps their order."""
    width = len(str(count))
    return [f"{what}[{index:0{width}d}]" for index in range(count)]


def check_images(
    images: Tensor, model: nn.Module | None = None, names: Sequence[str] | None = None
) -> None:
    """Raise `DataError` unless `images` is a batch of finite numbers that `model` takes.

    Parameters
    ----------
    images
        Float ``[B, C, H, W]``.
    model
        Compared with its channels and, when it insists on one, its size.
    names
        What to call each image in messages; its position in the batch by default.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}; allowed: float [batch, channels, "
            "height, width]"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        name = names[first] if names is not None else f"{first} of the batch"
        kind = "NaN" if images[first].isnan().any() else "infinite"
        raise DataError(f"image {name} has {kind} values; allowed: finite numbers")
    if model is None:
        return
    channels, size = input_channels(model), fixed_size(model)
    if channels not in (None, images.shape[1]) or size not in (None, tuple(images.shape[2:])):
        height, width = size or ("any", "any")
        raise DataError(
            f"images are {list(images.shape[1:])} (channels, height, width); the model takes "
            f"[{channels or 'any'}, {height}, {width}]"
        )
