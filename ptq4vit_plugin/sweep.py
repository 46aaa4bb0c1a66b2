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
import errno
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

from .config import Config, UserPath, load_file, parse, yaml_value
from .errors import ConfigError, nearest, one_line
from .evaluation import Metrics
from .files import NOT_FINITE, json_text, unwritable

RESULTS = "results.jsonl"
#: Bytes of a cell's folder name that its labels may take.
LONGEST = 200

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
    published: UserPath | None = None
    output: UserPath = Path("runs/sweep")


class Parts(BaseModel):
    """Which of the paper's three ideas are on."""

    hessian: bool
    softmax_twin: bool
    gelu_twin: bool


class Seconds(BaseModel):
    """What a cell took."""

    calibration: float
    evaluation: float = 0.0


class Result(BaseModel):
    """What a line of ``results.jsonl`` has at least, so that tables can be made of it.

    Attributes
    ----------
    key, cell
        The cell's key and labels.
    """

    key: str
    cell: dict[str, str]
    model: str
    algorithm: str
    parts: Parts
    weight_bits: int | None
    activation_bits: int | None
    samples: int
    metrics: Metrics
    seconds: Seconds


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
        Not readable, not of the form that `Sweep` describes, or an axis without a value.
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
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(item) for item in problem["loc"][:2])
        raise ConfigError(
            f"{path}: {key}: {problem['msg']}; an axis is a list of values, or a mapping from "
            "labels to mappings of config keys"
        ) from error
    for axis, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"{path}: grid.{axis}: {values}; allowed: at least one value")
    return sweep


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
    fixed = dict(assignment(text) for text in overrides)
    axes = {axis: [fixed[axis]] if axis in fixed else values for axis, values in sweep.grid.items()}
    wanted = _patterns(only, axes)
    found = []
    for choice in product(*(_settings(axis, values, origin) for axis, values in axes.items())):
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


def assignment(text: str) -> tuple[str, Any]:
    """Read what ``--set`` is given, ``"key=value"`` with the value in YAML.

    Raises
    ------
    ConfigError
        No key, no ``=``, or the value is not valid YAML.
    """
    key, value = _split(text, "--set")
    try:
        return key, yaml_value(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or one_line(error)
        raise ConfigError(f"--set {text}: not valid YAML: {reason}") from error


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

    Raises
    ------
    PTQ4ViTError
        The file cannot be written to, or no longer: the disk is full.
    """
    text = json_text(line, separators=(",", ":")) + "\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            os.lseek(handle, max(0, size - 1), os.SEEK_SET)
            torn = size > 0 and os.read(handle, 1) != b"\n"
            data = ("\n" if torn else "").encode() + text.encode()
            if os.write(handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritable(path, error) from error


def results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file, of every key the last one; lines that were cut off are skipped.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is something else than a result.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found[result_of(row).key] = row
        except ValidationError as error:
            problem = error.errors()[0]
            key = "".join(f"{item}: " for item in problem["loc"])
            value = problem["input"]
            if key and not isinstance(value, (dict, list)):
                key += f"{json.dumps(value)}: "
            raise _no_result(path, number, f"{key}{problem['msg']}") from error
        except RecursionError as error:
            raise _no_result(path, number, "lists or objects too deep in each other") from error
        except ValueError as error:
            if line and not line.startswith(b"{"):  # neither empty nor cut off by a kill
                raise _no_result(path, number, "not JSON") from error
    return list(found.values())


def result_of(row: Any) -> Result:
    """Return what a line of ``results.jsonl`` says; only `json_text`'s strings pass for numbers.

    Raises
    ------
    ValidationError
        It is something else than a result.
    """
    if isinstance(row, dict) and isinstance(metrics := row.get("metrics"), dict):
        numbers = {k: float(v) if v in NOT_FINITE else v for k, v in metrics.items()}
        row = {**row, "metrics": numbers}
    return Result.model_validate_json(json.dumps(row), strict=True)


def _no_result(path: Path, number: int, reason: str) -> ConfigError:
    return ConfigError(
        f"{path}, line {number}: {reason}; allowed: lines that `ptq4vit sweep` wrote, as in "
        f"{RESULTS}"
    )


def _cell(labels: dict[str, str], data: dict[str, Any], output: Path, origin: str) -> Cell:
    title = ", ".join(f"{axis}={label}" for axis, label in labels.items())
    config = parse(data, f"{origin} ({title})")
    content = config.dump()
    del content["output"]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(labels.values()))
    name = name.encode()[:LONGEST].decode(errors="ignore")
    return Cell(labels, config.model_copy(update={"output": output / f"{name}_{key[:6]}"}), key)


def _settings(axis: str, values: Values, origin: str) -> list[tuple[str, dict[str, Any]]]:
    """An axis as (label, config keys that it sets)."""
    if isinstance(values, dict):
        return list(values.items())
    return [(_label(axis, value, origin), {axis: value}) for value in values]


def _label(axis: str, value: Any, origin: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError as error:  # YAML has dates, sets and bytes, too
        raise ConfigError(
            f"{origin}: grid.{axis}: {value!s}; allowed: what JSON has; text that looks like a "
            "date needs quotes"
        ) from error


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
        axis, patterns = _split(text, "--only")
        if axis not in axes:
            raise ConfigError(
                f"--only {text}: no axis '{axis}'; allowed: {', '.join(axes)}" + nearest(axis, axes)
            )
        found[axis] = patterns.split(",")
    return found


def _split(text: str, option: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"{option} {text}: allowed: key=value")
    return key, value
