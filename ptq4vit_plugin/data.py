"""Images for calibration and evaluation: the registered data sources, subsets and batches.

A data source is a callable ``(config, split, transform, **options)``, registered in the entry-point
group ``ptq4vit_plugin.datasets``. ``config`` is the config's ``data`` section, whose ``options``
are the further arguments; ``transform`` turns a PIL image into the model's input. It returns a
map-style data set of ``(image, label)``: float32 ``[C, H, W]`` ready for the model, and an int, -1
for an unknown label. Two attributes are optional: ``names``, what to call each image in messages
and what subsets are drawn from after sorting, and ``classes``, the class names in the order of the
labels. An image that cannot be decoded raises `UnreadableImage`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import nncf
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import registry
from .errors import DataError, nearest
from .integrations.timm.images import (
    SPLITS,
    ImageFiles,
    TimmImages,
    fixed_size,
    image_transform,
    imagenet_wnids,
    input_channels,
    one_line,
    opened_by_timm,
    split_folder,
)

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor]

WNID = re.compile(r"n\d{8}")
DIGITS_TEST_SHARE = 0.2


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
        Decoded image of an index: a PIL image, or a float32 tensor ``[C, H, W]`` that is ready.
    labels
        One int for each image; -1 when unknown.
    names
        One name for each image.
    transform
        From PIL image to tensor.
    classes
        Class names in the order of the labels, or None when the labels already are the model's.
    label_problem
        Why the labels cannot be used with the model, or None.
    """

    read: Callable[[int], Image.Image | Tensor]
    labels: Sequence[int]
    names: Sequence[str]
    transform: Transform
    classes: Sequence[str] | None = None
    label_problem: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.read(index)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            cause = one_line(error) or type(error).__name__
            raise UnreadableImage(self.names[index], cause) from error
        ready = image if isinstance(image, Tensor) else self.transform(image)
        return ready, int(self.labels[index])


# -------------------------------------------------------------------------------------------------
# Data sources


def digits(config: Any, split: str, transform: Transform) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: ``train`` (80 %) or ``val`` (20 %).

    The split is the same everywhere and for ever: numpy keeps the stream of ``RandomState``.
    """
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    train, val = SPLITS
    if split not in train + val:
        raise DataError(
            f"data split '{split}' of digits; allowed: train, val" + nearest(split, train + val)
        )
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    held_out = round(DIGITS_TEST_SHARE * len(order))
    chosen = np.sort(order[held_out:] if split in train else order[:held_out])
    grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return Images(
        read=partial(_from_array, grey),
        labels=bunch.target[chosen].tolist(),
        names=[f"digits[{index:04d}]" for index in chosen],
        transform=transform,
    )


def folder(
    config: Any,
    split: str,
    transform: Transform,
    class_map: str | None = None,
    labels: str | None = None,
) -> Images:
    """An image folder ``root/split/<class>/<image>``; ``split: .`` means `root` itself.

    Parameters
    ----------
    class_map
        Text file with one class folder per line, in the order of the model's classes. Without it,
        folders named by ImageNet's wnids are the model's classes by wnid, and other folders are
        taken in timm's order when there are as many as the model has classes.
    labels
        Text file with a line ``<image> <label>`` for each image, for images that are not in class
        folders; the label is the model's class index or a class name.
    """
    root = _existing_root(config)
    if not root.is_dir():
        raise DataError(f"data.root {root} is a file; source 'folder' needs a folder of images")
    files = ImageFiles(split_folder(root, split))
    classes, of_image, problem = files.classes, files.folders, None
    if labels is not None:
        listed = _listed_labels(_text_file(root, "labels", labels))
        missing = [name for name in files.names if name not in listed]
        if missing:
            raise DataError(f"data.options.labels {labels}: no line for image {missing[0]}")
        of_image = [listed[name] for name in files.names]
        classes = sorted(set(of_image))
    elif classes == [""]:
        problem = f"{files.root} has no class folders; give data.options.labels, or class folders"
    if class_map is not None:
        names = _text_file(root, "class_map", class_map).split("\n")
        names = [name.strip() for name in names if name.strip()]
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise DataError(
                f"data.options.class_map {class_map} does not list class '{unknown[0]}'"
                + nearest(unknown[0], names)
            )
        classes = names
    index_of = {name: index for index, name in enumerate(classes)}
    indices_given = labels is not None and class_map is None and all(map(str.isdecimal, classes))
    return Images(
        read=files.__getitem__,
        labels=[int(name) if indices_given else index_of[name] for name in of_image],
        names=files.names,
        transform=transform,
        classes=None if indices_given or class_map is not None else classes,
        label_problem=problem,
    )


def timm_dataset(
    config: Any,
    split: str,
    transform: Transform,
    name: str = "",
    class_map: str = "",
    download: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Dataset:
    """Whatever `timm.data.create_dataset` opens at random places: ``hfds/<name>`` (Hugging Face
    datasets), ``torch/<name>`` (torchvision), a tar file or folder of tar files, an image folder.

    Streams (``wds/``, ``tfds/``, ``hfids/``) have no places and are refused: which images a seed
    chooses would depend on their order.

    Parameters
    ----------
    name
        timm's name; empty for files under `root`.
    class_map, download, input_key, target_key
        As timm's; a class map is a text file, as others are pickles.
    """
    if class_map and not class_map.endswith(".txt"):
        raise DataError(f"data.options.class_map: '{class_map}' is not a .txt file")
    root = None if config.root is None else str(config.root)
    keys = {"input_key": input_key, "target_key": target_key}
    opened = opened_by_timm(name, root, split, class_map=class_map, download=download, **keys)
    return _FromTimm(opened, transform)


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
    path = _existing_root(config)
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

    width = len(str(len(pixels)))
    return Images(
        read=partial(_from_array, pixels),
        labels=targets.tolist(),
        names=[f"{path}:{key}[{index:0{width}d}]" for index in range(len(pixels))],
        transform=transform,
        label_problem=None if of_labels else f"{path} has no labels",
    )


def open_dataset(config: Any, split: str, model: nn.Module) -> Dataset:
    """Open a split of the config's ``data`` section as inputs and labels of `model`.

    Labels become the model's class indices: by wnid when all classes are wnids and the model is an
    ImageNet classifier, so that a subset of ImageNet has the right labels; unchanged when there are
    as many classes as the model has.

    Raises
    ------
    DataError
        Nothing there, not readable, empty. Labels that do not fit the model are no error before
        they are used (`loader`, `evaluate`): calibration does without.
    RegistryError
        The source is not registered.
    """
    source = registry.load("datasets", config.source)
    dataset = source(config, split, image_transform(model), **config.options)
    if len(dataset) == 0:
        raise DataError(f"data source '{config.source}' has no images in split '{split}'")
    classes = getattr(dataset, "classes", None)
    num_classes = getattr(model, "num_classes", None)
    if classes is None or num_classes is None or getattr(dataset, "label_problem", None):
        return dataset
    return _Relabelled(dataset, *_class_indices(classes, num_classes))


# -------------------------------------------------------------------------------------------------
# Subsets and batches


def selection(dataset: Dataset, samples: int | None, seed: int) -> list[int]:
    """Return the indices of a seeded random subset, or of all images in random order (None).

    The images are sorted by name and then permuted, so the same files give the same subset in
    whatever order a file system or data source lists them.

    Raises
    ------
    DataError
        Fewer images than asked for, or none asked for.
    """
    total = len(dataset)
    if samples is not None and not 0 < samples <= total:
        raise DataError(f"{samples} samples asked for; allowed: 1 to {total}, the images there are")
    names = _names(dataset)
    by_name = sorted(range(total), key=lambda index: names[index])
    # RandomState and not default_rng: numpy promises to keep its stream
    order = np.random.RandomState(seed).permutation(total)[:samples]
    return [by_name[position] for position in order]


class Loader:
    """Batches of ``(images [B, C, H, W], labels [B])``, every image checked.

    Attributes
    ----------
    unreadable
        Names of the images that could not be decoded, of the current or last pass.
    ranks
        How many processes share the images.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        batch_size: int,
        *,
        workers: int = 0,
        skip_unreadable: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size}; allowed: 1 or more")
        rank, self.ranks = share
        indices = indices[rank :: self.ranks]
        self.unreadable: list[str] = []
        self.batch_size = batch_size
        self._skip_unreadable = skip_unreadable
        self._names = _names(dataset)
        self._total = len(indices)
        self._loader = DataLoader(
            _Items(dataset, indices), batch_size, collate_fn=list, num_workers=workers
        )

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def images(self) -> int:
        """Images to go through, unreadable ones included."""
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; raises `DataError` on images that cannot be used, naming them."""
        self.unreadable = []
        causes: list[UnreadableImage] = []
        for items in self._loader:
            causes += [item for item in items if isinstance(item, UnreadableImage)]
            self.unreadable = [cause.name for cause in causes]
            if len(causes) > self._skip_unreadable:
                raise DataError(
                    f"{len(causes)} unreadable image{'s' if len(causes) > 1 else ''} (allowed: "
                    f"{self._skip_unreadable}): "
                    + "; ".join(f"{cause.name} ({cause.cause})" for cause in causes)
                )
            good = [item for item in items if not isinstance(item, UnreadableImage)]
            if good:
                yield self._batch(good)

    def _batch(self, items: list[tuple[int, Tensor, int]]) -> Batch:
        first, image, _ = items[0]
        for index, other, _ in items[1:]:
            if other.shape != image.shape:
                raise DataError(
                    f"image {self._names[index]} is {list(other.shape)} and "
                    f"{self._names[first]} is {list(image.shape)}; all must have one shape"
                )
        images = torch.stack([image for _, image, _ in items])
        check_images(images, names=[self._names[index] for index, _, _ in items])
        return images, torch.tensor([label for _, _, label in items])


def loader(
    dataset: Dataset,
    batch_size: int = 64,
    *,
    samples: int | None = None,
    seed: int = 0,
    workers: int = 0,
    skip_unreadable: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Loader:
    """Return labelled batches for `evaluate`.

    Parameters
    ----------
    samples, seed
        Evaluate on a seeded random subset (see `selection`); all images when `samples` is None.
    workers
        Processes that decode images; 0 decodes in this one.
    skip_unreadable
        How many images that cannot be decoded are skipped (and named in `Loader.unreadable`) before
        it is an error; of this process's share.
    share
        This process's number and how many there are; each takes every so-many-th image.

    Raises
    ------
    DataError
        The labels cannot be used with the model, or `samples` is more than there are.
    """
    problem = getattr(dataset, "label_problem", None)
    if problem:
        raise DataError(f"no labels to evaluate with: {problem}")
    indices = range(len(dataset)) if samples is None else selection(dataset, samples, seed)
    return Loader(
        dataset,
        indices,
        batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
        share=share,
    )


def calibration_images(
    dataset: Dataset,
    samples: int = 32,
    seed: int = 3,
    batch_size: int = 8,
    skip_unreadable: int = 0,
) -> nncf.Dataset:
    """Return a seeded random subset as batches for calibration, decoded once and kept in memory.

    Unreadable images, up to `skip_unreadable`, are replaced by the next ones of the permutation.

    Returns
    -------
    nncf.Dataset
        ``get_inference_data()`` gives image batches ``[<=batch_size, C, H, W]``, ``get_data()``
        gives ``(images, labels)``.

    Raises
    ------
    DataError
        Fewer images than `samples`; unreadable, NaN or infinite ones (named).
    """
    selection(dataset, samples, seed)  # complains when there are too few
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size}; allowed: 1 or more")
    order = selection(dataset, None, seed)
    batches = Loader(dataset, order, samples, skip_unreadable=skip_unreadable)
    images, labels = [], []
    for some_images, some_labels in batches:
        images += some_images.unbind()
        labels += some_labels.unbind()
        if len(images) >= samples:
            break
    if len(images) < samples:
        raise DataError(
            f"{samples} samples asked for and {len(images)} of {len(order)} images are readable; "
            f"not: {', '.join(batches.unreadable)}"
        )
    starts = range(0, samples, batch_size)
    ends = [min(start + batch_size, samples) for start in starts]
    return nncf.Dataset(
        [
            (torch.stack(images[start:end]), torch.stack(labels[start:end]))
            for start, end in zip(starts, ends, strict=True)
        ],
        _images_of,
    )


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


# -------------------------------------------------------------------------------------------------


class _Items(Dataset):
    """``(index, image, label)`` of chosen indices; an unreadable image is returned, not raised.

    A raised exception would end the pass, and come out of a worker process with a traceback in it.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self._dataset = dataset
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor, int] | UnreadableImage:
        index = self._indices[position]
        try:
            image, label = self._dataset[index]
        except UnreadableImage as error:
            return UnreadableImage(error.name, error.cause)  # without the traceback's references
        return index, image, int(label)


class _FromTimm(Dataset):
    """A data set of timm's, decoded here, as timm replaces an unreadable image by the next one."""

    def __init__(self, opened: TimmImages, transform: Transform):
        self.names, self.classes = opened.names, opened.classes
        self._opened, self._transform = opened, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self._opened[index]
        except Exception as error:  # whatever decoders and readers raise
            cause = one_line(error) or type(error).__name__
            raise UnreadableImage(self.names[index], cause) from error
        return self._transform(image), -1 if label is None else int(label)


class _Relabelled(Dataset):
    """A data set whose labels are mapped to the model's class indices."""

    def __init__(self, dataset: Dataset, table: Sequence[int], label_problem: str | None):
        self.names = _names(dataset)
        self.label_problem = label_problem
        self._dataset = dataset
        self._table = table

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        return image, self._table[label] if label >= 0 else label


def _class_indices(classes: Sequence[str], num_classes: int) -> tuple[list[int], str | None]:
    """The model's class index of each class (-1 if there is none), and what is wrong if so."""
    wnids = imagenet_wnids(num_classes)
    if wnids is not None and all(WNID.fullmatch(name) for name in classes):
        index_of = {wnid: index for index, wnid in enumerate(wnids)}
        strange = [name for name in classes if name not in index_of]
        problem = f"'{strange[0]}' is none of the model's {num_classes} wnids" if strange else None
        return [index_of.get(name, -1) for name in classes], problem
    if len(classes) == num_classes:
        return list(range(num_classes)), None
    shown = ", ".join(map(str, classes[:3])) + (", ..." if len(classes) > 3 else "")
    return [-1] * len(classes), (
        f"there are {len(classes)} classes ({shown}) and the model has {num_classes}; give "
        "data.options.class_map, a text file with the model's class names, one per line"
    )


def _images_of(batch: Batch) -> Tensor:
    return batch[0]


def _names(dataset: Dataset) -> Sequence[str]:
    names = getattr(dataset, "names", None)
    if names is None:
        width = len(str(len(dataset)))
        names = [f"{index:0{width}d}" for index in range(len(dataset))]
    return names


def _existing_root(config: Any) -> Path:
    if config.root is None:
        raise DataError(f"data.root is missing; source '{config.source}' needs a path")
    root = Path(config.root)
    if not root.exists():
        raise DataError(f"data.root {root} does not exist")
    return root


def _text_file(root: Path, key: str, name: str) -> str:
    """Text of a file given by its path, or by its name inside `root`."""
    for path in (Path(name), root / name):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"data.options.{key} {path}: {one_line(error)}") from error
    raise DataError(f"data.options.{key} {name} does not exist, nor {root / name}")


def _listed_labels(text: str) -> dict[str, str]:
    labels = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.rsplit(maxsplit=1)
        if len(words) == 2:
            labels[words[0]] = words[1]
        elif words:
            raise DataError(
                f"data.options.labels line {number} is '{line}'; allowed: '<image> <label>'"
            )
    return labels


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
    except (OSError, ValueError, EOFError, BadZipFile, SafetensorError) as error:
        raise DataError(
            f"{path} is not a readable .npz or .safetensors file: {one_line(error)}"
        ) from error


def _from_array(arrays: np.ndarray, index: int) -> Image.Image | Tensor:
    image = arrays[index]
    if image.dtype != np.uint8:
        return torch.from_numpy(image.astype(np.float32))
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


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
