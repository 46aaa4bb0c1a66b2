"""A run folder as one self-contained page: ``report.html``, drawings inside, no requests outside.

Needs matplotlib and jinja2, which ``pip install ptq4vit-plugin[report]`` brings.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import yaml
from pydantic import BaseModel

from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.files import written_whole
from ptq4vit_plugin.record import QuantizationRecord
from ptq4vit_plugin.reporting.tables import twin_trial

REPORT = "report.html"
NEEDED = ("matplotlib", "jinja2")
WORST = 10


class Checkpoint(BaseModel):
    """The file that a run wrote."""

    file: str
    bytes: int


class Results(BaseModel):
    """What a run's ``results.json`` says; no metrics if there was nothing to evaluate on."""

    metrics: Metrics | None
    calibration: QuantizationRecord | None
    seconds: dict[str, float] = {}
    environment: dict[str, str] = {}
    checkpoint: Checkpoint | None = None


def missing() -> list[str]:
    """The packages that a report needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run folder from its ``results.json`` and ``config.yaml``.

    Raises
    ------
    PTQ4ViTError
        A package is missing, or the folder is none that `ptq4vit quantize` or `ptq4vit sweep`
        wrote.
    """
    if absent := missing():
        raise PTQ4ViTError(
            f"a report needs {' and '.join(absent)}: pip install 'ptq4vit-plugin[report]'"
        )
    folder = Path(folder)
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        results = Results.model_validate(content)
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        title = yaml.safe_load(config)["model"]["name"]
    except OSError as error:
        raise PTQ4ViTError(
            f"'{folder}' is no run folder: {error.filename}: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())[:200]
        raise PTQ4ViTError(f"'{folder}': its results are damaged: {detail}") from error
    html = page(title, results, config)
    with written_whole(folder / REPORT) as part:
        part.write_text(html, encoding="utf-8")
    return folder / REPORT


def page(title: str, results: Results, config: str) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ptq4vit_plugin.reporting import figures

    environment = Environment(
        loader=PackageLoader("ptq4vit_plugin.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics, record = results.metrics, results.calibration
    drawings = []
    worst = []
    if record is not None:
        drawings = figures.draw(record)
        total = sum(op.objective_after for op in record.ops) or 1.0
        ordered = sorted(record.ops, key=lambda op: -op.objective_after)[:WORST]
        worst = [(op, figures.role_of(op), 100 * op.objective_after / total) for op in ordered]
    return environment.get_template("report.html.j2").render(
        title=title,
        metrics=metrics,
        rows=[] if metrics is None else _accuracy(metrics),
        record=record,
        bits=_bits(record),
        worst=worst,
        twins=_twins(record),
        floats=_floats(record),
        drawings=drawings,
        costs=_costs(results),
        environment=results.environment,
        config=config,
    )


def _accuracy(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Name, float model, quantized model."""
    low, high = metrics.top1_interval
    reference = "" if metrics.reference_top1 is None else f"{metrics.reference_top1:.2f} %"
    rows = [
        ("top-1", reference, f"{metrics.top1:.2f} %"),
        ("95 % interval of top-1", "", f"{low:.2f} … {high:.2f} %"),
        ("top-5", "", None if metrics.top5 is None else f"{metrics.top5:.2f} %"),
        ("loss", "", f"{metrics.loss:.4f}"),
        (
            "same class as the float model",
            "",
            None if metrics.agreement is None else f"{metrics.agreement:.2f} %",
        ),
        (
            "logit SQNR",
            "",
            None if metrics.sqnr_db is None else f"{metrics.sqnr_db:.2f} dB",
        ),
        ("images", "", f"{metrics.images:,}"),
        ("unreadable images", "", f"{len(metrics.unreadable)}" if metrics.unreadable else None),
    ]
    return [(name, left, right) for name, left, right in rows if right is not None]


def _bits(record: QuantizationRecord | None) -> str:
    """The widths that occur, of weights and of activations."""
    operands = [operand for op in record.ops for operand in op.operands] if record else []
    parts = []
    for name, weights in (("weights", True), ("activations", False)):
        widths = {o.bits for o in operands if o.bits and (o.parameter is not None) == weights}
        if widths:
            parts.append(f"{name} {'/'.join(map(str, sorted(widths)))} bit")
    return ", ".join(parts)


def _twins(record: QuantizationRecord | None) -> list[tuple[str, str, str]]:
    """Op, source, and what `twin: auto` compared."""
    return [
        (op.name, operand.source, twin_trial(operand.twin))
        for op in (record.ops if record else ())
        for operand in op.operands
        if operand.twin is not None
    ]


def _floats(record: QuantizationRecord | None) -> list[tuple[str, str, str]]:
    """Name, what, and why it is in float: ops left out, and operands of ops that are not."""
    if record is None:
        return []
    ops = [(op.name, op.kind, op.reason) for op in record.plan.left_out]
    operands = [
        (op.name, f"{operand.source} of {op.role}", operand.reason or "")
        for op in record.ops
        for operand in op.operands
        if operand.quantizer is None
    ]
    return ops + operands


def _costs(results: Results) -> list[tuple[str, str]]:
    rows = [(f"{what}, with images and model", f"{t:.1f} s") for what, t in results.seconds.items()]
    record = results.calibration
    if record is not None:
        rows.append(("search alone", f"{sum(op.seconds for op in record.ops):.1f} s"))
        evaluations = sum(op.evaluations for op in record.ops)
        rows.append(("candidates evaluated, in units of all data", f"{evaluations:,.0f}"))
        rows.append(("calibration images", str(record.images)))
        if record.peak_memory:
            peak = f"{record.peak_memory / 2**30:.2f} GiB"
            rows.append(("peak memory of the process, calibration", peak))
    if results.checkpoint is not None:
        rows.append(("checkpoint", f"{results.checkpoint.bytes / 2**20:.1f} MiB"))
    if results.metrics is not None:
        speed = results.metrics.images_per_second
        rows.append(("evaluation speed of the quantized model", f"{speed:.1f} images/s"))
    return rows
