"""A calibration batch: what a model is called with, and what of it belongs to an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    def example(self) -> Any:
        """The arguments in the form in which NNCF takes an example input."""
        return self.kwargs or self.args

    def to(self, model: nn.Module) -> Batch:
        """The batch, on the device of a model's parameters."""
        parameter = next(model.parameters(), None)
        if parameter is None:
            return self
        device = parameter.device

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(map(move, self.args)),
            kwargs={k: move(v) for k, v in self.kwargs.items()},
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
        images = next(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

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
        return next(len(v) for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))


def batches(dataset: Any) -> list[Batch]:
    """The calibration batches of an ``nncf.Dataset`` or any iterable, checked.

    An item is what NNCF accepts for a model: a tensor, a tuple of arguments or a dict of them; the
    pair (images, integer labels) that a data loader gives is recognised.

    Raises
    ------
    DataError
        There is no batch, or one has NaN or infinite values.
    """
    result: list[Batch] = []
    for index, (item, raw) in enumerate(_items(dataset)):
        batch = _batch(item, raw)
        for value in (*batch.args, *batch.kwargs.values()):
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not value.isfinite().all()
            ):
                raise DataError(
                    f"calibration batch {index} has NaN or infinite values; allowed: finite numbers"
                )
        if not any(
            isinstance(v, Tensor) and v.ndim and len(v)
            for v in (*batch.args, *batch.kwargs.values())
        ):
            raise DataError(f"calibration batch {index} has no images")
        if result and not isinstance(item, Batch):
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


def _items(dataset: Any) -> Iterator[tuple[Any, Any]]:
    if hasattr(dataset, "get_inference_data"):
        yield from zip(dataset.get_inference_data(), dataset.get_data(), strict=True)
    elif isinstance(dataset, Tensor):
        yield dataset, dataset
    else:
        yield from ((item, item) for item in dataset)


def _batch(item: Any, raw: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    labels = raw[1] if _is_labelled(raw) else None
    if isinstance(item, dict):
        return Batch((), item, labels)
    if _is_labelled(item):
        return Batch((item[0],), {}, labels)
    if isinstance(item, (tuple, list)):
        return Batch(tuple(item), {}, labels)
    return Batch((item,), {}, labels)


def _is_labelled(item: Any) -> bool:
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and all(isinstance(part, Tensor) for part in item)
        and item[1].ndim == 1
        and not item[1].is_floating_point()
    )
