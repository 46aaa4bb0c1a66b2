"""WebDataset shards, read at random places.

A shard is a tar file in which neighbouring members of one name make a sample: ``0001.jpg`` and
``0001.cls`` are the image and the label of ``0001``. The package webdataset, through which timm
reads them, gives a stream and passes over what it cannot decode. A seeded subset that does not
depend on the order, and an error that names the image, need places: here the shards' headers are
read once, and images when they are asked for.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ptq4vit_plugin.errors import DataError, nearest, one_line
from ptq4vit_plugin.integrations.timm.images import SPLITS

INFO = ("_info.json", "info.json")
END = 1024  # zero bytes that end a tar file


@dataclass(frozen=True)
class Sample:
    """Where the members of a sample are: byte offset and size by extension."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """The bytes of a member."""
        offset, size = self.members[extension]
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


class Shards:
    """The images of a split.

    Parameters
    ----------
    root
        Folder of the shards.
    split
        A split of ``_info.json``; a file name with ranges, ``train-{0000..0031}.tar``; or a word
        that the file names have.
    image_keys
        Extensions of images, the first that a sample has is taken.
    target_key
        Label's name in the samples' ``.json``; the label is the ``.cls`` member by default.

    Attributes
    ----------
    names
        ``<shard>:<key>`` of each image.
    classes
        None: labels are class indices.

    Raises
    ------
    DataError
        No such split, no such shard, or a shard that is not an uncompressed tar file.
    """

    classes = None

    def __init__(
        self, root: Path, split: str, image_keys: Sequence[str], target_key: str | None = None
    ):
        self._image_keys = image_keys
        shards, target = split_files(root, split)
        self._target_key = target_key or target
        self._samples = [
            sample
            for shard in shards
            for sample in indexed(shard)
            if any(key in sample.members for key in image_keys)
        ]
        self.names = [f"{sample.shard.name}:{sample.key}" for sample in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode one image; raises whatever its decoder raises."""
        sample = self._samples[index]
        key = next(key for key in self._image_keys if key in sample.members)
        with Image.open(io.BytesIO(sample.read(key))) as image:
            image.load()
            return image, self._label(sample)

    def _label(self, sample: Sample) -> int | None:
        if self._target_key is not None:
            return int(json.loads(sample.read("json"))[self._target_key])
        return int(sample.read("cls")) if "cls" in sample.members else None


def indexed(shard: Path) -> list[Sample]:
    """The samples of a shard, from the headers of its members.

    Raises
    ------
    DataError
        It is not an uncompressed tar file, or is cut off.
    """
    samples: list[Sample] = []
    try:
        with open(shard, "rb") as file:
            file.seek(-END, io.SEEK_END)
            if any(file.read()):  # which tarfile does not notice everywhere
                raise tarfile.ReadError("it is cut off")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(Sample(shard, key, {}))
                samples[-1].members[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {shard} is not a whole .tar file: {one_line(error)}") from error
    return samples


def split_files(root: Path, split: str) -> tuple[list[Path], str | None]:
    """The shards of a split in order, and the label's name in ``.json`` members if it is said.

    Raises
    ------
    DataError
        There are none; the message lists what there is.
    """
    if ".tar" in split:
        files = [root / name for part in split.split("::") for name in expanded(part)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise DataError(f"data split '{split}': no shard {missing[0]} in {root}")
        return files, None
    splits = _described(root)
    if split in splits:
        files = [root / name for name in splits[split]["filenames"]]
        return files, splits[split].get("alt_label") or None
    synonyms = {split}.union(*(group for group in SPLITS if split in group))
    there = sorted(root.glob("*.tar"))
    files = [file for file in there if synonyms.intersection(re.split(r"[-_.]", file.name))]
    if not files:
        known = [*splits, *(file.name for file in there)]
        raise DataError(
            f"data split '{split}': no shards of that name in {root}; allowed: "
            f"{', '.join(known[:10]) or 'none, it has no .tar files'}" + nearest(split, known)
        )
    return files, None


def expanded(pattern: str) -> list[str]:
    """File names of a pattern with ranges: ``a-{00..02}.tar`` is three."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        name
        for number in range(int(first), int(last) + 1)
        for name in expanded(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )
    ]


def _described(root: Path) -> dict[str, dict]:
    """The splits that a folder's ``_info.json`` tells."""
    for name in INFO:
        if (root / name).is_file():
            try:
                return json.loads((root / name).read_text(encoding="utf-8")).get("splits", {})
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{root / name} cannot be read: {one_line(error)}") from error
    return {}
