"""Plans, records and measurements as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.exporting import ExportReport
from ptq4vit_plugin.plan import Operand, Plan
from ptq4vit_plugin.record import OperandRecord, OpRecord, QuantizationRecord, TwinTrial

#: Ops that an export's table names, those with the largest differences.
WORST = 5


def plan_table(plan: Plan) -> Table:
    """Every op: its two operands' quantizers, or why it is left out."""
    table = Table(
        "op",
        "role",
        "left operand",
        "right operand",
        "MACs",
        box=box.SIMPLE_HEAD,
        caption=f"{len(plan.ops)} ops quantized, {len(plan.left_out)} left out, "
        f"{plan.macs_quantized:.1%} of multiply-accumulates quantized on both sides",
    )
    for op in plan.ops:
        table.add_row(op.name, op.role, *map(_operand, op.operands), f"{op.macs:,}")
    for op in plan.left_out:
        table.add_row(
            op.name, op.kind, f"left out: {op.reason}", "", f"{op.macs:,}" if op.macs else ""
        )
    return table


def export_table(report: ExportReport) -> Table:
    """What an export wrote, and how far it is from the simulated model."""
    table = Table("export", report.format, box=box.SIMPLE_HEAD)
    for name, size in report.files.items():
        table.add_row(name, f"{size / 1e6:.2f} MB")
    table.add_row("size over float32", f"{report.ratio:.3f}")
    kind = "random images" if report.random else "images"
    table.add_row(f"same class as simulated, {report.images} {kind}", f"{report.agreement:.1f} %")
    table.add_row("logit SQNR against simulated", f"{report.sqnr_db:.1f} dB")
    if report.exact_sqnr_db is not None:
        table.add_row("the same, in float arithmetic", f"{report.exact_sqnr_db:.1f} dB")
    table.add_row("image size", report.image_size)
    differences = report.op_differences or {}
    for name in sorted(differences, key=differences.get, reverse=True)[:WORST]:
        table.add_row(f"largest difference, {name}", f"{differences[name]:.2g}")
    for name, fact in report.facts.items():
        table.add_row(name.replace("_", " "), str(fact))
    return table


def record_table(records: list[OpRecord]) -> Table:
    """Every op: quantizers with their searched parameter, objective, evaluations, seconds."""
    table = Table(
        "op",
        "left operand",
        "right operand",
        "objective",
        "lowered by",
        "evaluations",
        "seconds",
        box=box.SIMPLE_HEAD,
    )
    for record in records:
        lowered = (
            1 - record.objective_after / record.objective_before if record.objective_before else 0.0
        )
        table.add_row(
            record.name,
            *map(_operand_with_scale, record.operands),
            f"{record.objective_after:.4g}",
            f"{lowered:.0%}",
            f"{record.evaluations:.0f}",
            f"{record.seconds:.2f}",
        )
    return table


def metrics_table(metrics: Metrics) -> Table:
    """Measurements of one model, a row each."""
    low, high = metrics.top1_interval
    rows = [
        ("top-1", f"{metrics.top1:.2f} %  (95 % interval {low:.2f} ... {high:.2f})"),
        ("top-5", None if metrics.top5 is None else f"{metrics.top5:.2f} %"),
        ("loss", f"{metrics.loss:.4f}"),
        (
            "agreement with float",
            None if metrics.agreement is None else f"{metrics.agreement:.2f} %",
        ),
        ("logit SQNR", None if metrics.sqnr_db is None else f"{metrics.sqnr_db:.2f} dB"),
        ("images", str(metrics.images)),
        ("images/s", f"{metrics.images_per_second:.1f}"),
    ]
    table = Table("measure", "value", box=box.SIMPLE_HEAD)
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    return table


def cost_line(record: QuantizationRecord) -> str:
    """What a calibration took."""
    line = f"calibrated {len(record.ops)} ops on {record.images} images in {record.seconds:.1f} s"
    line += f", {record.passes} forward/backward {'pass' if record.passes == 1 else 'passes'}"
    if record.replays:
        line += f" and {record.replays} of single blocks"
    if record.peak_memory is not None:
        line += f", peak memory {record.peak_memory / 2**30:.2f} GiB"
    return line


def _operand(operand: Operand | OperandRecord) -> str:
    if operand.quantizer is None:
        return f"{operand.source}: float ({operand.reason})"
    choice = getattr(operand, "alternative", None)
    name = f"{operand.quantizer} or {choice}" if choice else operand.quantizer
    return f"{operand.source}: {name} {operand.bits} bit per {operand.granularity}"


def _operand_with_scale(operand: OperandRecord) -> str:
    if operand.quantizer is None:
        return _operand(operand)
    low, high = operand.searched_min, operand.searched_max
    scale = f"{low:.3g}" if low == high else f"{low:.3g} ... {high:.3g}"
    text = f"{operand.quantizer} {operand.bits} bit, {scale}"
    return text if operand.twin is None else f"{text}; {twin_trial(operand.twin)}"


def twin_trial(trial: TwinTrial) -> str:
    """What `twin: auto` compared, in words."""
    verdict = "kept" if trial.kept else "not kept"
    return f"twin {verdict}: objective {trial.twin:.3g}, uniform {trial.uniform:.3g}"
