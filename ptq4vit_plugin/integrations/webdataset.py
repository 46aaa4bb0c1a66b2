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
from pydantic import BaseModel, ValidationError

from ptq4vit_plugin.errors import DataError, nearest, one_line
from ptq4vit_plugin.integrations.timm.images import SPLITS, decoded

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
    label_problem
        Which sample has no label, or None.

    Raises
    ------
    DataError
        No such split, no such shard, or a shard that is not an uncompressed tar file.
    """

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
        self._member = "cls" if self._target_key is None else "json"
        samples = zip(self.names, self._samples, strict=True)
        bare = next((name for name, sample in samples if self._member not in sample.members), None)
        self.label_problem = bare and f"{bare} has no .{self._member} member"

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode one image; raises whatever its decoder raises, `DataError` for a bad label."""
        sample = self._samples[index]
        key = next(key for key in self._image_keys if key in sample.members)
        return decoded(io.BytesIO(sample.read(key))), self._label(index)

    def _label(self, index: int) -> int | None:
        if self._member not in self._samples[index].members:
            return None  # which calibration does without
        label = self._samples[index].read(self._member)
        key = self._target_key
        try:
            return int(label if key is None else json.loads(label)[key])
        except (ValueError, LookupError, TypeError) as error:
            wanted = "a class index" if key is None else f"a class index as '{key}'"
            raise DataError(
                f"{self.names[index]}.{self._member} is {label[:60]!r}; allowed: {wanted}"
            ) from error


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
        files = [root / name for name in splits[split].filenames]
        return files, splits[split].alt_label or None
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


class _Split(BaseModel):
    filenames: list[str]
    alt_label: str | None = None


class _Info(BaseModel):
    splits: dict[str, _Split] = {}


def _described(root: Path) -> dict[str, _Split]:
    """The splits that a folder's ``_info.json`` tells."""
    for file in (root / name for name in INFO):
        if file.is_file():
            try:
                return _Info.model_validate_json(file.read_text(encoding="utf-8")).splits
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"])) or "the file"
                raise DataError(
                    f"{file}: {where}: {problem['msg']}, but there is "
                    f"{repr(problem['input'])[:60]}; allowed: 'splits', each with 'filenames', a "
                    "list of shards"
                ) from error
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file} cannot be read: {one_line(error)}") from error
    return {}
