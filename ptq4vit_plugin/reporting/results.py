"""Results of a sweep as tables in the paper's layout, with published numbers beside them.

A published number belongs to a result of the same model (timm's name without the tag), bits and
method. The method is the algorithm; where a sweep switches PTQ4ViT's parts one by one, it is which
of the three parts are on: Hessian metric, softmax twin, GELU twin.

The CSV file of published numbers has the columns ``table`` (results or ablation), ``model``,
``timm_name``, ``float_top1``, ``algorithm`` or the three ``hessian``, ``softmax_twin``,
``gelu_twin`` (yes or no), ``weight_bits``, ``activation_bits`` and ``top1``.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4vit_plugin import __version__
from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.sweep import Cell, Result, result_of

PARTS = ("hessian", "softmax_twin", "gelu_twin")
_COLUMNS = {"timm_name", "algorithm", *PARTS, "weight_bits", "activation_bits", "top1"}
#: What the parts are when an algorithm is used as it is.
_WHOLE = {"base_ptq": (False, False, False), "ptq4vit": (True, True, True)}


@dataclass(frozen=True)
class Row:
    """One result beside the published one; percentages, minutes."""

    labels: dict[str, str]
    model: str
    algorithm: str
    parts: tuple[bool, bool, bool]
    weight_bits: int | None
    activation_bits: int | None
    samples: int
    float_top1: float | None
    top1: float
    interval: tuple[float, float]
    agreement: float | None
    sqnr_db: float | None
    images: int
    minutes: float
    published_float: float | None = None
    published: float | None = None

    @property
    def bits(self) -> str:
        """As papers write it, W6A6; empty for an algorithm that has no such setting."""
        if self.weight_bits is None:
            return ""
        return f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return None if self.published is None else self.top1 - self.published


def line(cell: Cell, results: dict[str, Any]) -> dict[str, Any]:
    """What ``results.jsonl`` keeps of a cell."""
    steps = cell.config.compression
    step = next((s for s in reversed(steps) if "weights" in s), steps[-1])
    twin = step.get("twin", {})
    return {
        "key": cell.key,
        "cell": cell.labels,
        "model": cell.config.model.name,
        "algorithm": step["algorithm"],
        "parts": {
            "hessian": step.get("metric") == "hessian",
            "softmax_twin": twin.get("softmax", False) not in (False, "uniform"),
            "gelu_twin": twin.get("gelu", False) not in (False, "uniform"),
        },
        "weight_bits": step.get("weights", {}).get("bits"),
        "activation_bits": step.get("activations", {}).get("bits"),
        "samples": cell.config.data.calibration.samples,
        "metrics": results["metrics"],
        "seconds": results["seconds"],
        "config": cell.config.dump(),
        "environment": results["environment"],
        "version": __version__,
    }


def read_published(path: Path | None) -> list[dict[str, str]]:
    """Read a CSV file of published numbers; none without a file.

    Raises
    ------
    ConfigError
        It cannot be read, lacks a column, or an accuracy is no number.
    """
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            numbered = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"published: '{path}' cannot be read: {error}") from error
    missing = sorted(_COLUMNS - set(reader.fieldnames or ()))
    if missing:
        raise ConfigError(f"published: '{path}' has no column {', '.join(missing)}")
    for number, row in numbered:
        for column in ("top1", "float_top1"):
            if not _is_number(row.get(column)):
                raise ConfigError(
                    f"published: '{path}', line {number}: {column}: '{row[column]}'; allowed: a "
                    "number, or nothing"
                )
    return [row for _, row in numbered]


def compare(results: Sequence[dict[str, Any]], published: Sequence[dict[str, str]]) -> list[Row]:
    """Return the results in order, each with its published number if there is one."""
    read = [result_of(result) for result in results]
    ablation = any(_is_partial(result.algorithm, _parts(result)) for result in read)
    return [_row(result, published, ablation) for result in read]


def markdown(rows: Sequence[Row]) -> str:
    """Paper layout as a Markdown table."""
    header, body = _layout(rows)
    body = [[text.replace("|", r"\|") for text in line] for line in body]
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latex(rows: Sequence[Row]) -> str:
    """Paper layout as a LaTeX tabular (package booktabs)."""
    header, body = _layout(rows)
    escaped = [[_tex(text) for text in line] for line in [header, *body]]
    lines = [" & ".join(line) + r" \\" for line in escaped]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def as_csv(rows: Sequence[Row]) -> str:
    """One line per result with everything that is known of it."""
    labels = sorted({axis for row in rows for axis in row.labels} - {"model.name"})
    fields = ("model", "algorithm", *PARTS, "weight_bits", "activation_bits", "samples")
    numbers = (
        "published_float published_top1 difference float_top1 top1 top1_low top1_high agreement "
        "sqnr_db images minutes"
    ).split()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fields, *labels, *numbers])
    for row in rows:
        writer.writerow(
            [
                row.model,
                row.algorithm,
                *("yes" if on else "no" for on in row.parts),
                row.weight_bits,
                row.activation_bits,
                row.samples,
                *(row.labels.get(axis, "") for axis in labels),
                row.published_float,
                row.published,
                _rounded(row.difference),
                row.float_top1,
                row.top1,
                *map(_rounded, row.interval),
                row.agreement,
                _rounded(row.sqnr_db),
                row.images,
                _rounded(row.minutes),
            ]
        )
    return out.getvalue()


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
}


def _row(result: Result, published: Sequence[dict[str, str]], ablation: bool) -> Row:
    metrics = result.metrics
    name = result.model.split(".")[0].removeprefix("hf_hub:").split("/")[-1]
    parts = _parts(result)
    bits = (result.weight_bits, result.activation_bits)
    match = next(
        (
            number
            for number in published
            if number["timm_name"] == name
            and (number["weight_bits"], number["activation_bits"]) == tuple(map(str, bits))
            and (
                tuple(number[part] == "yes" for part in PARTS) == parts and not number["algorithm"]
                if ablation
                else number["algorithm"] == result.algorithm
            )
        ),
        None,
    )
    return Row(
        labels=result.cell,
        model=result.model,
        algorithm=result.algorithm,
        parts=parts,
        weight_bits=bits[0],
        activation_bits=bits[1],
        samples=result.samples,
        float_top1=metrics.reference_top1,
        top1=metrics.top1,
        interval=metrics.top1_interval,
        agreement=metrics.agreement,
        sqnr_db=metrics.sqnr_db,
        images=metrics.images,
        minutes=result.seconds.calibration / 60,
        published_float=_number(match and match.get("float_top1")),
        published=_number(match and match["top1"]),
    )


def _layout(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line per model and per everything that is neither method nor bits; a column per method and
    bits. Methods that are parts of PTQ4ViT are lines, as in the paper's ablation."""
    ablation = any(_is_partial(row.algorithm, row.parts) for row in rows)
    columns = sorted({_column(row, ablation) for row in rows}, key=_order)
    # A sweep that was edited has appended to the results of the one before, with other axes.
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels))
    varying = [
        axis
        for axis in axes
        if len({row.labels.get(axis) for row in rows}) > 1 and not _in_column(rows, axis, ablation)
    ]
    samples = len({row.samples for row in rows}) > 1
    header = ["model", *(part.replace("_", " ") for part in PARTS if ablation)]
    header += ["images" for _ in [0] if samples] + varying + ["float"]
    header += [f"{method} {bits}".strip() for method, bits in columns]
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        key = [row.model, *("yes" if on else "no" for on in row.parts if ablation)]
        key += [str(row.samples) for _ in [0] if samples]
        key += [row.labels.get(axis, "") for axis in varying]
        lines.setdefault(tuple(key), []).append(row)
    body = []
    for key, members in lines.items():
        by_column = {_column(row, ablation): row for row in members}
        first = members[0]
        body.append(
            [
                *key,
                _beside(first.float_top1, first.published_float),
                *(
                    _beside(by_column[c].top1, by_column[c].published) if c in by_column else ""
                    for c in columns
                ),
            ]
        )
    return header, body


def _parts(result: Result) -> tuple[bool, bool, bool]:
    return tuple(getattr(result.parts, part) for part in PARTS)


def _is_partial(algorithm: str, parts: tuple[bool, ...]) -> bool:
    """Whether some parts of an algorithm of the paper are switched off or on."""
    return _WHOLE.get(algorithm, parts) != parts


def _column(row: Row, ablation: bool) -> tuple[str, str]:
    return ("" if ablation else row.algorithm, row.bits)


def _order(column: tuple[str, str]) -> tuple[str, str]:
    """Algorithms by name, more bits first."""
    return column[0], "".join(chr(255 - ord(letter)) for letter in column[1])


def _in_column(rows: Sequence[Row], axis: str, ablation: bool) -> bool:
    """Whether model, method, bits and images already tell an axis' labels apart."""
    seen: dict[tuple, str | None] = {}
    for row in rows:
        key = (row.model, row.parts, row.samples, *_column(row, ablation))
        if seen.setdefault(key, row.labels.get(axis)) != row.labels.get(axis):
            return False
    return True


def _beside(ours: float | None, published: float | None) -> str:
    if ours is None:
        return ""
    if published is None:
        return f"{ours:.2f}"
    return f"{ours:.2f} ({published:.2f}, {ours - published:+.2f})"


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _is_number(text: str | None) -> bool:
    try:
        value = _number(text)
    except ValueError:
        return False
    return value is None or math.isfinite(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _tex(text: str) -> str:
    return re.sub(r"([_%&#${}])", r"\\\1", text)
