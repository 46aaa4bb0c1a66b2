"""Labels: from what a data source has to the class indices of a model.

ImageNet's classes are known by their WordNet ids (wnids, ``n01440764``), so a subset of ImageNet
has the right labels whatever else is in its folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from ptq4vit_plugin.data.images import names_of
from ptq4vit_plugin.errors import DataError, nearest
from ptq4vit_plugin.integrations.timm.images import imagenet_wnids

WNID = re.compile(r"n\d{8}")


class Relabelled(Dataset):
    """A data set whose labels are mapped to a model's class indices.

    Parameters
    ----------
    table
        The model's class index of each label.
    label_problem
        Why the labels cannot be used with the model, or None.
    """

    def __init__(self, dataset: Dataset, table: Sequence[int], label_problem: str | None = None):
        self.names = names_of(dataset)
        self.label_problem = label_problem
        self._dataset = dataset
        self._table = table

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        return image, self._table[label] if label >= 0 else label


def class_indices(
    classes: Sequence[str], num_classes: int | None, class_map: Sequence[str] | None = None
) -> tuple[list[int], str | None]:
    """Return the model's class index of each class, and why there is none.

    By the class map if there is one; by wnid when all classes are wnids and the model is an
    ImageNet classifier; unchanged when there are as many classes as the model has.

    Returns
    -------
    indices
        -1 for a class that the model does not have.
    problem
        What is wrong with the classes that have none; None when nothing is.
    """
    if class_map is not None:
        index_of = {name: index for index, name in enumerate(class_map)}
        problem = (
            None
            if num_classes in (None, len(class_map))
            else f"data.options.class_map lists {len(class_map)} classes and the model has "
            f"{num_classes}; allowed: all the model's class names in order, one per line"
        )
        return [index_of[name] for name in classes], problem
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


def label_file(text: str, images: Sequence[str], origin: str) -> list[str]:
    """Return the label of each image from a text of lines ``<image> <label>``.

    Raises
    ------
    DataError
        A line of another form, or none for an image.
    """
    labels = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.rsplit(maxsplit=1)
        if len(words) == 2:
            labels[words[0]] = words[1]
        elif words:
            raise DataError(f"{origin} line {number} is '{line}'; allowed: '<image> <label>'")
    missing = [image for image in images if image not in labels]
    if missing:
        raise DataError(f"{origin}: no line for image {missing[0]}")
    return [labels[image] for image in images]


def class_map(text: str, classes: Sequence[str], origin: str) -> list[str]:
    """Return the model's class names from a text with one per line; it must list `classes`.

    Raises
    ------
    DataError
        It lacks one.
    """
    names = [line.strip() for line in text.split("\n") if line.strip()]
    for name in classes:
        if name not in names:
            raise DataError(f"{origin} does not list class '{name}'" + nearest(name, names))
    return names
