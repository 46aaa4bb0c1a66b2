"""A calibration batch: what a model is called with, and what of it belongs to an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import DataError


@dataclass
class Batch:
    """One calibration batch: the model's arguments, and the labels if the data has any.

    ``first`` is the place of its first image in the calibration set.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None = None
    first: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors, in order."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    @property
    def images(self) -> Tensor:
        """The first of its tensors; a single number is none."""
        return next(v for v in self.tensors if v.ndim)

    @property
    def example(self) -> Any:
        """A copy of the arguments in the form in which NNCF takes an example input."""
        own = self.copied()
        return own.kwargs or own.args

    def copied(self) -> Batch:
        """The batch for one call of a model, which may write into its arguments."""
        return self.changed(torch.clone)

    def to(self, model: nn.Module) -> Batch:
        """A copy on the device of a model's parameters."""
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
        return self.changed(lambda value: value.to(device, copy=True))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function of every tensor in its place."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(map(changed, self.args)),
            kwargs={k: changed(v) for k, v in self.kwargs.items()},
            labels=changed(self.labels),
        )

    def of(self, images: Tensor) -> Batch:
        """Some of its images, given by their places in it."""

        def cut(value: Any) -> Any:
            per_image = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)
            return value[images] if per_image else value

        return replace(
            self,
            args=tuple(map(cut, self.args)),
            kwargs={k: cut(v) for k, v in self.kwargs.items()},
            labels=cut(self.labels),
        )

    def parts(self, size: int) -> Iterator[Batch]:
        """Its images in order, `size` at a time."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            images = torch.arange(start, min(start + size, len(self)))
            yield replace(self.of(images), first=self.first + start)

    def joined(self, other: Batch) -> Batch:
        """The images of both. What is the same for all images stays as it is.

        Raises
        ------
        RuntimeError
            The images differ in size.
        """
        images = self.images

        def join(value: Any, more: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or len(value) != len(self):
                return value
            # Of one image it does not show whether a tensor of length 1 is of the image or of all.
            if value is not images and len(self) == 1 and torch.equal(value, more):
                return value
            return torch.cat([value, more])

        labelled = self.labels is not None and other.labels is not None
        return replace(
            self,
            args=tuple(map(join, self.args, other.args)),
            kwargs={key: join(value, other.kwargs[key]) for key, value in self.kwargs.items()},
            labels=torch.cat([self.labels, other.labels]) if labelled else None,
        )

    def __len__(self) -> int:
        return len(self.images)


def batches(dataset: Any) -> list[Batch]:
    """The calibration batches of an ``nncf.Dataset`` or any iterable, checked.

    An item is a tensor, a tuple of a model's arguments or a dict of them by name. The pair
    (images, integer vector) that a data loader gives is images and labels; where such a vector is
    an argument of the model, give a dict. What the transform of an ``nncf.Dataset`` returns are
    arguments in any case, and the labels are those of the item before it.

    Raises
    ------
    DataError
        There is no batch, or one has NaN or infinite values. Minus infinity is allowed behind the
        images: masks have it.
    """
    result: list[Batch] = []
    for index, (item, batch) in enumerate(_items(dataset)):
        images = next((value for value in batch.tensors if value.ndim), None)
        for value in batch.tensors:
            if not value.is_floating_point():
                continue
            allowed = value.isfinite()
            if not (allowed if value is images else allowed | value.isneginf()).all():
                raise DataError(
                    f"calibration batch {index} has NaN or infinite values; allowed: finite numbers"
                )
        if images is None or not len(images):
            raise DataError(f"calibration batch {index} has no images")
        if result and batch is not item:
            batch.first = result[-1].first + len(result[-1])
        result.append(batch)
    if not result:
        raise DataError("the calibration set is empty; give at least one batch of images")
    return result


def example_of(data: Sequence[Batch]) -> Batch:
    """The batch by which a model is traced: the first, or one of two images if that has only one.

    One image alone does not tell a dimension (image, head) from one of heads. If there is no other
    of its size it is taken twice.
    """
    first, *rest = data
    if len(first) > 1:
        return first
    return first.joined(next((b for b in rest if _shapes(b) == _shapes(first)), first))


def _shapes(batch: Batch) -> list[Any]:
    """Of an image."""
    values = (*batch.args, *batch.kwargs.values())
    return [v.shape[1:] if isinstance(v, Tensor) else None for v in values]


def _items(dataset: Any) -> Iterator[tuple[Any, Batch]]:
    if isinstance(dataset, nncf.Dataset):
        # NNCF's own two iterators go through the data twice, and a loader may shuffle it anew.
        transform = dataset._transform_func
        for raw in dataset.get_data():
            labels = raw[1] if _is_labelled(raw) else None
            yield raw, _batch(raw) if transform is None else _arguments(transform(raw), labels)
    else:
        for item in [dataset] if isinstance(dataset, Tensor) else dataset:
            yield item, _batch(item)


def _batch(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    return _arguments(*item) if _is_labelled(item) else _arguments(item, None)


def _arguments(item: Any, labels: Tensor | None) -> Batch:
    args, kwargs = (item,), {}
    if isinstance(item, dict):
        args, kwargs = (), item
    elif isinstance(item, (tuple, list)):
        args = tuple(item)
    # Autograd refuses what was made in inference mode.
    return Batch(args, kwargs, labels).changed(lambda x: x.clone() if x.is_inference() else x)


def _is_labelled(item: Any) -> bool:
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and all(isinstance(part, Tensor) for part in item)
        and item[1].ndim == 1
        and not item[1].is_floating_point()
    )
