"""Data source ``folder``: image files in class folders, or flat with a file of labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from ptq4vit_plugin.data.images import Images, Transform
from ptq4vit_plugin.data.labels import class_map as model_classes
from ptq4vit_plugin.data.labels import label_file
from ptq4vit_plugin.data.sources.root import data_name, existing_root, text_file
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.timm.images import ImageFiles, class_order, split_path


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
        Text file with one class name per line, all the model's classes in order. Without it,
        folders named by ImageNet's wnids are the model's classes by wnid, and other folders are
        taken in timm's order when there are as many as the model has classes.
    labels
        Text file with a line ``<image> <label>`` for each image, for images that are not in class
        folders; the label is the model's class index or a class name.
    """
    data_name(config, wanted=False)
    root = existing_root(config)
    if not root.is_dir():
        raise DataError(f"data.root {root} is a file; source 'folder' needs a folder of images")
    files = ImageFiles(split_path(root, split))
    classes, of_image = files.classes, files.folders
    listed = problem = None
    if labels is not None:
        text = text_file(root, "labels", labels)
        of_image = label_file(text, files.names, f"data.options.labels {labels}")
        classes = class_order(of_image)
    elif classes == [""]:
        problem = f"{files.root} has no class folders; give data.options.labels, or class folders"
    if class_map is not None:
        text = text_file(root, "class_map", class_map)
        listed = model_classes(text, classes, f"data.options.class_map {class_map}")
    are_indices = labels is not None and listed is None and all(map(str.isdecimal, classes))
    index_of = {name: int(name) if are_indices else i for i, name in enumerate(classes)}
    return Images(
        read=partial(_read, files, [index_of[name] for name in of_image]),
        names=files.names,
        transform=transform,
        classes=None if are_indices else classes,
        class_map=listed,
        label_problem=problem,
    )


def _read(files: ImageFiles, labels: Sequence[int], index: int) -> tuple[Image.Image, int]:
    return files[index], labels[index]
