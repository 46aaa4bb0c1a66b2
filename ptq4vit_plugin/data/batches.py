"""Seeded subsets of a data set, and its images in batches for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import nncf
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ptq4vit_plugin.data.images import UnreadableImage, check_images, names_of
from ptq4vit_plugin.errors import DataError

Batch = tuple[Tensor, Tensor]
Item = tuple[int, Tensor, int]


def selection(dataset: Dataset, samples: int | None, seed: int) -> list[int]:
    """Return the indices of a seeded random subset, or of all images in random order (None).

    The images are sorted by name and then permuted, so the same files give the same subset in
    whatever order a file system or data source lists them.

    Raises
    ------
    DataError
        Fewer images than asked for, or none asked for; a seed that numpy does not take.
    """
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed}; allowed: 0 to {2**32 - 1}")
    total = len(dataset)
    if samples is not None and not 0 < samples <= total:
        raise DataError(f"{samples} samples asked for; allowed: 1 to {total}, the images there are")
    names = names_of(dataset)
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
    skip_unreadable
        How many there may be.
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
        self.skip_unreadable = skip_unreadable
        self._names = names_of(dataset)
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
            for item in items:
                if isinstance(item, DataError) and not isinstance(item, UnreadableImage):
                    raise item
            causes += [item for item in items if isinstance(item, UnreadableImage)]
            self.unreadable = [cause.name for cause in causes]
            if len(causes) > self.skip_unreadable:
                raise too_many_unreadable(
                    [f"{cause.name} ({cause.cause})" for cause in causes], self.skip_unreadable
                )
            good = [item for item in items if not isinstance(item, UnreadableImage)]
            if good:
                yield self._batch(good)

    def _batch(self, items: list[Item]) -> Batch:
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
        it is an error.
    share
        This process's number and how many there are; each takes every so-many-th image.

    Raises
    ------
    DataError
        The labels cannot be used with the model, or `samples` is more than there are.
    """
    problem = getattr(dataset, "label_problem", None)
    if problem:
        raise DataError(
            f"no labels to evaluate with: {problem}; data.evaluation: null quantizes without"
        )
    indices = range(len(dataset))
    if samples is not None:
        indices = sorted(selection(dataset, samples, seed))
    return Loader(
        dataset,
        indices,
        batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
        share=share,
    )


def too_many_unreadable(images: Sequence[str], allowed: int) -> DataError:
    """The error to raise when more images are unreadable than may be skipped."""
    plural = "s" if len(images) > 1 else ""
    return DataError(
        f"{len(images)} unreadable image{plural} (allowed: {allowed}): {'; '.join(images)}"
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


class _Items(Dataset):
    """``(index, image, label)`` of chosen indices; an error is returned, not raised.

    A raised exception would end the pass, and come out of a worker process with a traceback in it.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self._dataset = dataset
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, positions: list[int]) -> list[Item | DataError]:
        """A batch; images are read in the order of the data set, in which a stream is fast."""
        indices = [self._indices[position] for position in positions]
        found = {index: self._read(index) for index in sorted(indices)}
        return [found[index] for index in indices]

    def _read(self, index: int) -> Item | DataError:
        try:
            image, label = self._dataset[index]
        except UnreadableImage as error:
            return UnreadableImage(error.name, error.cause)  # without the traceback's references
        except DataError as error:
            return DataError(str(error))
        return index, image, int(label)


def _images_of(batch: Batch) -> Tensor:
    return batch[0]
