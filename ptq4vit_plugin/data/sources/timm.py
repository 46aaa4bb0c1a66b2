"""Data sources that are named as in `timm.data.create_dataset`.

``hfds/<name>`` is a data set of the Hugging Face hub or a folder that `datasets.load_dataset`
reads, ``torch/<name>`` one of torchvision's, ``tar`` an image folder in a tar file, ``wds/<name>``
WebDataset shards, ``hfids/<name>`` and ``tfds/<name>`` streams. They have random access but for the
streams, which are gone through in their order, and calibration images are found by their number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ptq4vit_plugin.data.images import Images, Transform, numbered
from ptq4vit_plugin.data.labels import class_map as model_classes
from ptq4vit_plugin.data.sources.root import data_name, existing_root, text_file
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.timm.datasets import opened_by_timm
from ptq4vit_plugin.integrations.timm.images import check_split, split_path
from ptq4vit_plugin.integrations.webdataset import Shards

#: Of torchvision's sets, those that refuse a split they do not have.
OWN_SPLITS = ("imagenet", "places365", "inaturalist", "inat")


def hugging_face(
    config: Any,
    split: str,
    transform: Transform,
    input_key: str | None = None,
    target_key: str | None = None,
    class_map: str | None = None,
) -> Dataset:
    """``hfds/<name>`` or, as a stream, ``hfids/<name>``; `root` is the cache. Needs `datasets`.

    Parameters
    ----------
    input_key, target_key
        Columns of images and labels; ``image`` and ``label`` by default.
    class_map
        As of the source ``folder``, for data sets that name their classes.
    """
    data_name(config, wanted=True)
    return _opened(config, split, transform, class_map, input_key=input_key, target_key=target_key)


def tensorflow(
    config: Any, split: str, transform: Transform, class_map: str | None = None
) -> Dataset:
    """``tfds/<name>``, a stream; `root` is the data folder. Needs `tensorflow_datasets`.

    Parameters
    ----------
    class_map
        As of the source ``folder``, for data sets that name their classes.
    """
    data_name(config, wanted=True)
    return _opened(config, split, transform, class_map)


def torchvision(
    config: Any,
    split: str,
    transform: Transform,
    download: bool = False,
    class_map: str | None = None,
) -> Dataset:
    """``torch/<name>``: cifar10, cifar100, mnist, imagenet, places365, folder, ...; under `root`.

    Parameters
    ----------
    download
        Let torchvision fetch what is not there.
    class_map
        As of the source ``folder``.
    """
    name = data_name(config, wanted=True).rpartition("/")[2].lower()
    root = existing_root(config)
    if name in ("folder", "image_folder"):
        root, split = split_path(root, split), "."
    elif name not in OWN_SPLITS:  # timm takes the test set for whatever is not 'train'
        check_split(split, config.source, ("train", "val", "test"))
    changed = {"root": root, "download": download or None}
    return _opened(config, split, transform, class_map, **changed)


def tar(config: Any, split: str, transform: Transform, class_map: str | None = None) -> Dataset:
    """A tar file of class folders, or a tar file of tar files by class; `root` is the file, or a
    folder with ``<split>.tar``.

    Parameters
    ----------
    class_map
        As of the source ``folder``.
    """
    data_name(config, wanted=False)
    root = existing_root(config)
    file = root if root.is_file() else split_path(root, split, ".tar")
    if file.suffix != ".tar":
        raise DataError(f"data.root {file} is not a .tar file; source 'tar' reads no other")
    # timm would keep a pickle of the headers beside a large file, and read it the next time
    return _opened(config, split, transform, class_map, root=file, cache_tarinfo=False)


def webdataset(
    config: Any,
    split: str,
    transform: Transform,
    input_key: str = "jpg;jpeg;png;webp",
    target_key: str | None = None,
) -> Images:
    """``wds/<name>``: WebDataset shards in the folder `root`; the name is for the reader.

    Parameters
    ----------
    input_key
        Extensions of images, separated by semicolons.
    target_key
        The label's name in ``.json`` members; a ``.cls`` member is the label by default.
    """
    root = existing_root(config)
    if not root.is_dir():
        raise DataError(f"data.root {root} is a file; source 'wds' needs a folder of shards")
    shards = Shards(root, split, input_key.lower().split(";"), target_key)
    return Images(
        read=shards.__getitem__,
        names=shards.names,
        transform=transform,
        label_problem=shards.label_problem,
    )


def _opened(
    config: Any,
    split: str,
    transform: Transform,
    class_map: str | None,
    root: Path | None = None,
    **options: Any,
) -> Images:
    root = root or config.root
    opened = opened_by_timm(config.source, None if root is None else str(root), split, **options)
    names = opened.names or numbered(len(opened), config.source)
    images = Images(opened.__getitem__, names, transform, opened.classes)
    if class_map is None:
        return images
    origin = f"data.options.class_map {class_map}"
    if opened.classes is None:
        raise DataError(f"{origin}: the classes of '{config.source}' have no names to look up")
    text = text_file(config.root or Path(), "class_map", class_map)
    images.class_map = model_classes(text, opened.classes, origin)
    return images
