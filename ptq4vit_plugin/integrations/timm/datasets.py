"""Data sets that `timm.data.create_dataset` opens, decoded here.

timm's own data sets replace an image that cannot be decoded by the next one, which would change
what is measured without a word.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from ptq4vit_plugin.errors import DataError, one_line
from ptq4vit_plugin.integrations.timm.images import decoded

#: What a name's prefix needs beside timm.
PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}


class TimmImages:
    """Images at random places.

    Attributes
    ----------
    names
        File names, where timm knows them without reading the images; else None.
    classes
        Class names in the order of the labels, if they are known.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._reader = reader = getattr(dataset, "reader", None)
        if reader is None and hasattr(dataset, "loader"):
            dataset.loader = decoded  # torchvision's makes 16 bits white
        # A reader of Hugging Face data sets would read every image to tell its name.
        listed = hasattr(reader, "samples")
        self.names = [str(name) for name in reader.filenames()] if listed else None
        # torchvision's ImageNet, timm's tar reader, and everything else call it differently;
        # ImageNet's `class_to_idx` has several names for a class.
        owners = (
            (dataset, "wnid_to_idx"),
            (reader, "class_name_to_idx"),
            (reader, "class_to_idx"),
            (dataset, "class_to_idx"),
        )
        known = next((getattr(x, key) for x, key in owners if getattr(x, key, None)), None)
        self.classes = sorted(known, key=known.get) if known else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode one image; raises whatever its decoder raises."""
        if self._reader is None:  # torchvision's
            return self._dataset[index]
        file, label = self._reader[index]
        with file:
            return decoded(file), label


class TimmStream:
    """Images one after the other, with numbers as places: the next is cheap, an earlier one starts
    the stream again.

    Attributes
    ----------
    classes
        As `TimmImages`.
    """

    names = None

    def __init__(self, dataset: IterableDataset):
        reader = dataset.reader
        # Processes share the images by number (`data.loader`); the reader must not divide again.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        known = getattr(reader, "class_to_idx", None)
        self.classes = sorted(known, key=known.get) if known else None
        self._dataset = dataset
        self._length = len(dataset) or sum(1 for _ in dataset)  # not every stream says
        self._images: Iterator | None = None
        self._next = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image of a number.

        Raises
        ------
        DataError
            It is asked for in a loader's worker, or the stream breaks. What comes after an image
            that cannot be decoded is lost, so there is nothing to skip.
        """
        if get_worker_info() is not None:
            raise DataError("a stream is read by one process; allowed: data.evaluation.workers 0")
        if self._images is None or index < self._next:
            self._images, self._next = iter(self._dataset), 0
        while True:
            try:
                found = next(self._images)
            except Exception as error:  # StopIteration too: there are fewer than it said
                cause = one_line(error) or "it ends"
                raise DataError(
                    f"the stream breaks at image {self._next} of {len(self)}: {cause}"
                ) from error
            self._next += 1
            if self._next > index:
                return found


def opened_by_timm(
    name: str, root: str | None, split: str, **options: Any
) -> TimmImages | TimmStream:
    """Open a data set with `timm.data.create_dataset`.

    Raises
    ------
    DataError
        timm cannot open it, or a package for it is missing.
    """
    package = PACKAGES.get(name.partition("/")[0])
    if package is not None and importlib.util.find_spec(package) is None:
        raise DataError(f"data source '{name}' needs the package {package}: pip install {package}")
    try:
        dataset = create_dataset(name, root=root, split=split, is_training=False, **options)
        stream = isinstance(dataset, IterableDataset)
        return TimmStream(dataset) if stream else TimmImages(dataset)
    except Exception as error:  # other people's readers: any exception can come out of them
        raise DataError(
            f"timm cannot open data set '{name}' at {root}: {type(error).__name__}: "
            f"{one_line(error)[:300]}"
        ) from error
