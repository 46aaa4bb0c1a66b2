"""Images for calibration and evaluation: data sources, labels, subsets and batches.

A data source is a callable ``(config, split, transform, **options)``, registered in the entry-point
group ``ptq4vit_plugin.datasets``. ``config`` is the config's ``data`` section, whose ``options``
are the further arguments; ``transform`` turns a PIL image into the model's input. What follows a
slash in ``config.source`` is the source's own: ``hfds/<name>`` is the source ``hfds``.

It returns a map-style data set of ``(image, label)``: float32 ``[C, H, W]`` ready for the model,
and an int, -1 for an unknown label. Three attributes are optional: ``names``, what to call each
image in messages and what subsets are drawn from after sorting; ``classes``, the class names in the
order of the labels; and ``class_map``, the model's class names in order, when an option tells them.
An image that cannot be decoded raises `UnreadableImage`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from ptq4vit_plugin import registry
from ptq4vit_plugin.data.batches import Loader, calibration_images, loader, selection
from ptq4vit_plugin.data.images import Images, Transform, UnreadableImage, check_images
from ptq4vit_plugin.data.labels import Relabelled, class_indices
from ptq4vit_plugin.data.options import checked_options
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.timm.images import image_transform

__all__ = [
    "Images",
    "Loader",
    "Transform",
    "UnreadableImage",
    "calibration_images",
    "check_images",
    "loader",
    "open_dataset",
    "selection",
]


def open_dataset(config: Any, split: str, model: nn.Module) -> Dataset:
    """Open a split of the config's ``data`` section as inputs and labels of `model`.

    Labels become the model's class indices: by the source's class map if it has one; by wnid when
    all classes are wnids and the model is an ImageNet classifier, so that a subset of ImageNet has
    the right labels; unchanged when there are as many classes as the model has.

    Raises
    ------
    DataError
        Nothing there, not readable, empty, or an option of a wrong type. Labels that do not fit the
        model are no error before they are used (`loader`, `evaluate`): calibration does without.
    RegistryError
        The source is not registered.
    """
    source = registry.load("datasets", registry.source_name(config.source))
    options = checked_options(source, config.options)
    dataset = source(config, split, image_transform(model), **options)
    if len(dataset) == 0:
        raise DataError(f"data source '{config.source}' has no images in split '{split}'")
    classes = getattr(dataset, "classes", None)
    class_map = getattr(dataset, "class_map", None)
    num_classes = getattr(model, "num_classes", None)
    if classes is None or (num_classes is None and class_map is None):
        return dataset
    if getattr(dataset, "label_problem", None):
        return dataset
    return Relabelled(dataset, *class_indices(classes, num_classes, class_map))
