"""A grid of configs: which cells it has, which of them are done, and one result line for each.

A sweep file has a base config and a grid of axes::

    base:
      model: {pretrained: true}
      data: {source: folder, root: imagenet}
    grid:
      model.name: [deit_small_patch16_224.fb_in1k, deit_base_patch16_224.fb_in1k]
      compression.algorithm: [base_ptq, ptq4vit]
      bits:
        W8A8: {compression.weights.bits: 8, compression.activations.bits: 8}
        W6A6: {compression.weights.bits: 6, compression.activations.bits: 6}
    output: runs/deit

An axis is a key of the config with a list of its values, or a name of one's own with a mapping
from a label to the keys that the label sets. The cells are all combinations; the first axis changes
slowest. Every finished cell appends one line to ``<output>/results.jsonl``, in one write, and a
cell whose line is there is not run again: the key of a line is a hash of the cell's whole config.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import Config, load_file, parse
from .errors import ConfigError, nearest

RESULTS = "results.jsonl"

Values = list[Any] | dict[str, dict[str, Any]]


class Sweep(BaseModel):
    """What a sweep file says.

    Attributes
    ----------
    base
        A config, or what all cells' configs have in common.
    grid
        Axes by name.
    published
        CSV file of published numbers to show beside the results, see `reporting.results`.
    output
        Folder for ``results.jsonl`` and a folder per cell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: dict[str, Any]
    grid: dict[str, Values] = Field(min_length=1)
    published: Path | None = None
    output: Path = Path("runs/sweep")


@dataclass(frozen=True)
class Cell:
    """One combination of the grid.

    Attributes
    ----------
    labels
        The label on every axis, in the order of the grid.
    config
        The cell's whole config; its ``output`` is the cell's own folder.
    key
        Hash of the config without its output.
    """

    labels: dict[str, str]
    config: Config
    key: str

    @property
    def title(self) -> str:
        """The labels in one line."""
        return " ".join(self.labels.values())


def read(path: Path) -> Sweep:
    """Read a sweep file, YAML or JSON.

    Raises
    ------
    ConfigError
        Not readable, or not of the form that `Sweep` describes.
    """
    data = load_file(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: allowed: a mapping with {', '.join(Sweep.model_fields)}")
    for key in data:
        if key not in Sweep.model_fields:
            known = ", ".join(Sweep.model_fields)
            raise ConfigError(
                f"{path}: {key}: unknown key; allowed: {known}" + nearest(key, Sweep.model_fields)
            )
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(item) for item in problem["loc"][:2])
        raise ConfigError(
            f"{path}: {key}: {problem['msg']}; an axis is a list of values, or a mapping from "
            "labels to mappings of config keys"
        ) from error


def cells(
    sweep: Sweep, only: Sequence[str] = (), overrides: Sequence[str] = (), origin: str = "sweep"
) -> list[Cell]:
    """Return the cells of a grid, every config checked.

    Parameters
    ----------
    only
        ``"axis=pattern,pattern"``: keep the cells whose label on that axis matches a shell pattern.
    overrides
        ``"key=value"``: set a config key in all cells, value in YAML. An axis of that key is
        replaced by the one value.
    origin
        Where the grid comes from, for messages.

    Raises
    ------
    ConfigError
        A cell's config is wrong (the message names the cell), an axis of `only` is unknown, or no
        cell is left.
    """
    last = dict(_assignment(text, "--set") for text in overrides)
    fixed = {key: yaml.safe_load(value) for key, value in last.items()}
    axes = {axis: [fixed[axis]] if axis in fixed else values for axis, values in sweep.grid.items()}
    wanted = _patterns(only, axes)
    found = []
    for choice in product(*(_settings(axis, values) for axis, values in axes.items())):
        labels = {axis: label for axis, (label, _) in zip(axes, choice, strict=True)}
        if not all(
            any(fnmatch(labels[axis], pattern) for pattern in patterns)
            for axis, patterns in wanted.items()
        ):
            continue
        data = copy.deepcopy(sweep.base)
        for settings in (*(settings for _, settings in choice), fixed):
            for key, value in settings.items():
                _set(data, key, value, origin)
        found.append(_cell(labels, data, sweep.output, origin))
    if not found:
        raise ConfigError(f"{origin}: no cell matches {' '.join(only)}")
    return found


def share(all_cells: Sequence[Cell], rank: int, ranks: int) -> list[Cell]:
    """Return the cells of one of several processes; together they have each cell once."""
    return list(all_cells[rank::ranks])


def torchrun() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; 0 and 1 without it.

    Cells do not talk to each other, so no process group is needed.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one result.

    The line goes out in a single write to a file that is open for appending, which the operating
    system does not mix with other processes' writes, and is on the disk when this returns. A line
    that a kill cut off is closed first, so that nothing is glued to it.
    """
    text = json.dumps(line, separators=(",", ":")) + "\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        os.lseek(handle, max(0, size - 1), os.SEEK_SET)
        torn = size > 0 and os.read(handle, 1) != b"\n"
        data = ("\n" if torn else "").encode() + text.encode()
        if os.write(handle, data) != len(data):
            raise OSError(f"{path}: the disk is full")
        os.fsync(handle)
    finally:
        os.close(handle)


def results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file, of every key the last one; lines that were cut off are skipped.

    Raises
    ------
    ConfigError
        The file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
            found[row["key"]] = row
        except (ValueError, TypeError, KeyError):  # empty, cut off by a kill, or not ours
            continue
    return list(found.values())


def _cell(labels: dict[str, str], data: dict[str, Any], output: Path, origin: str) -> Cell:
    title = ", ".join(f"{axis}={label}" for axis, label in labels.items())
    config = parse(data, f"{origin} ({title})")
    content = config.dump()
    del content["output"]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(labels.values()))
    return Cell(labels, config.model_copy(update={"output": output / f"{name}_{key[:6]}"}), key)


def _settings(axis: str, values: Values) -> list[tuple[str, dict[str, Any]]]:
    """An axis as (label, config keys that it sets)."""
    if isinstance(values, dict):
        return list(values.items())
    return [(_label(value), {axis: value}) for value in values]


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _set(data: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if isinstance(node, list):
            parent = _position(node, parent, key, origin)
        elif node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"{origin}: {key}: '{parent}' is {node!r} and has no keys of its own")
    if isinstance(node, list):
        node[_position(node, last, key, origin)] = value
    else:
        node[last] = value


def _position(node: list, item: str, key: str, origin: str) -> int:
    if not item.isdecimal() or int(item) >= len(node):
        raise ConfigError(
            f"{origin}: {key}: '{item}' of a list; allowed: a position from 0 to {len(node) - 1}"
        )
    return int(item)


def _patterns(only: Iterable[str], axes: Mapping[str, Any]) -> dict[str, list[str]]:
    found = {}
    for text in only:
        axis, patterns = _assignment(text, "--only")
        if axis not in axes:
            raise ConfigError(
                f"--only {text}: no axis '{axis}'; allowed: {', '.join(axes)}" + nearest(axis, axes)
            )
        found[axis] = patterns.split(",")
    return found


def _assignment(text: str, option: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"{option} {text}: allowed: key=value")
    return key, value
