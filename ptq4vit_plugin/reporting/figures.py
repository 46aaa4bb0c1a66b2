"""The report's drawings as SVG text, all made from a calibration's record."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from ptq4vit_plugin.plan import Operand
from ptq4vit_plugin.record import OperandRecord, OpRecord, QuantizationRecord

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A000", "#666666")
RANGE1, RANGE2 = "#D55E00", "#0072B2"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable
    "svg.hashsalt": "ptq4vit",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titley": 1.0,  # otherwise looked for, which takes long
    "grid.color": "#e6e6e6",
    "path.simplify": True,
}
#: Inches, for up to two dozen blocks and for more; the page is as wide as the latter.
WIDTH, WIDE = 9.0, 11.25
#: An SQNR to draw where there is no noise at all; minus it, where there is nothing but noise.
CEILING_DB = 100.0


@dataclass(frozen=True)
class Drawing:
    """A headline, what it shows, and the SVG."""

    title: str
    text: str
    svg: str


def draw(record: QuantizationRecord) -> list[Drawing]:
    """Every drawing of a report for which the record has the data."""
    planned = {op.name: op for op in record.plan.ops}
    with matplotlib.rc_context(STYLE):
        drawings = [
            Drawing(
                "Which ops hurt",
                "The objective that is left at the chosen scales, as a share of all ops together "
                "(above; with the Hessian metric it estimates the loss that the op adds), and the "
                "signal-to-noise ratio of the op's own output (below; higher is better).",
                _sensitivity(record.ops),
            )
        ]
        for source, title in (("softmax", "Softmax outputs"), ("activation", "GELU outputs")):
            panels = [
                (op.name, operand, planned[op.name].operands[position])
                for op in record.ops
                for position, operand in enumerate(op.operands)
                if operand.histogram and (operand.source == "softmax") == (source == "softmax")
            ]
            if panels:
                drawings.append(Drawing(title, _TEXTS[source], _histograms(panels, source)))
        curves = _curves(record.ops)
        if curves:
            drawings.append(
                Drawing(
                    "Search curves",
                    "Objective over the candidates of the searched scale (or exponent, for the "
                    "softmax twin), relative to the best, one line per block from the first "
                    "(light) to the last (dark).",
                    curves,
                )
            )
    return drawings


_TEXTS = {
    "softmax": "How often values occur (half an octave per bar), with the ranges of the twin "
    "quantizer: orange from zero to 2^-m is the fine range (between the smallest and the largest m "
    "of the heads), blue is the coarse one.",
    "activation": "How often values occur, with the quantizer's ranges: orange is the fixed "
    "negative range of a twin, blue the searched one; what lies outside is clipped.",
}


def _sensitivity(ops: Sequence[OpRecord]) -> str:
    roles = list(dict.fromkeys(role_of(op) for op in ops))
    colour = {role: COLOURS[i % len(COLOURS)] for i, role in enumerate(roles)}
    colours = [colour[role_of(op)] for op in ops]
    total = sum(op.objective_after for op in ops) or 1.0
    shares = [100 * op.objective_after / total for op in ops]
    noise = [
        CEILING_DB if op.sqnr_db is None else max(-CEILING_DB, min(op.sqnr_db, CEILING_DB))
        for op in ops
    ]
    figure = Figure(figsize=(WIDTH if len(ops) <= 150 else WIDE, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    place = range(len(ops))
    above.bar(place, shares, color=colours, width=0.85)
    above.set_ylabel("share of objective, %")
    below.bar(place, noise, color=colours, width=0.85)
    below.set_ylabel("output SQNR, dB")
    starts = _block_starts(ops)
    every = max(1, math.ceil(len(starts) / 30))
    below.set_xticks([at for at, _ in starts[::every]], [name for _, name in starts[::every]])
    below.set_xlabel("block")
    for axes in (above, below):
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-1, len(ops))
    figure.legend(
        handles=[Patch(color=colour[role], label=role) for role in roles],
        loc="outside upper center",
        ncols=len(roles),
        frameon=False,
    )
    return _svg(figure)


def _histograms(panels: Sequence[tuple[str, OperandRecord, Operand]], source: str) -> str:
    columns, width = (4, WIDTH) if len(panels) <= 24 else (6, WIDE)
    figure, grid = _panels(len(panels), columns, width, 1.7, sharex=source == "softmax")
    occupied = [
        edge
        for _, operand, _ in panels
        for edge, count in zip(operand.histogram.edges[1:], operand.histogram.counts, strict=True)
        if count
    ]
    lowest = min(occupied) / 16  # of the softmax panels' common axis
    for axes, (name, operand, planned) in zip(grid, panels, strict=True):
        assert operand.histogram is not None
        edges, counts = list(operand.histogram.edges), operand.histogram.counts
        if source == "softmax":
            edges[0] = edges[1] / 4  # zero has no place on a logarithmic axis
            axes.set_xscale("log", base=2)
            axes.set_xlim(lowest, 1.5)
            axes.xaxis.set_minor_locator(NullLocator())
        axes.stairs(counts, edges, fill=True, color="#9a9a9a")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(0.7, 3 * max(counts))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _ranges(axes, operand, planned, lowest if source == "softmax" else edges[0])
        axes.set_title(_block(name) or name, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.grid(visible=False)
    return _svg(figure)


def _panels(
    count: int, columns: int, width: float, height: float, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` small panels in rows, `width` and `height` of a row in inches.

    Margins are fixed: Matplotlib's constrained layout takes seconds for dozens of panels.
    """
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, height * rows))
    left, right, above, below, between = 0.4, 0.1, 0.25, 0.25, 0.45
    panel = (width - left - right - (columns - 1) * between) / columns
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=sharex,
        gridspec_kw={
            "left": left / width,
            "right": 1 - right / width,
            "bottom": below / (height * rows),
            "top": 1 - above / (height * rows),
            "wspace": between / panel,
            "hspace": (above + below) / (height - above - below),
        },
    )
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _ranges(axes: Axes, operand: OperandRecord, planned: Operand, lowest: float) -> None:
    """Shade what the chosen quantizer covers."""
    low, high, bits = operand.searched_min, operand.searched_max, operand.bits
    if low is None or high is None or bits is None:
        return
    q = 2 ** (bits - 1)
    if operand.quantizer == "twin_softmax":
        axes.axvspan(2.0**-low, 1.0, color=RANGE2, alpha=0.15, linewidth=0)
        axes.axvspan(lowest, 2.0**-high, color=RANGE1, alpha=0.2, linewidth=0)
        axes.axvspan(2.0**-high, 2.0**-low, color=RANGE1, alpha=0.08, linewidth=0)
        for exponent in {low, high}:
            axes.axvline(2.0**-exponent, color=RANGE1, linewidth=0.8)
    elif operand.quantizer == "twin_gelu":
        minimum = planned.options.get("minimum") or operand.histogram.edges[0]
        axes.axvspan(minimum, 0, color=RANGE1, alpha=0.25, linewidth=0)
        axes.axvspan(0, (q - 1) * high, color=RANGE2, alpha=0.15, linewidth=0)
        axes.axvline((q - 1) * high, color=RANGE2, linewidth=0.8)
    else:
        left = max(-q * high, lowest)
        axes.axvspan(left, (q - 1) * high, color=RANGE2, alpha=0.15, linewidth=0)
        axes.axvline((q - 1) * high, color=RANGE2, linewidth=0.8)


def _curves(ops: Sequence[OpRecord]) -> str:
    """A panel per role and operand, a line per op; empty when nothing was recorded."""
    panels: dict[str, list[tuple[float, ...]]] = {}
    for op in ops:
        for operand in op.operands:
            if len(operand.curve) > 1 and max(operand.curve) > 0:
                panels.setdefault(f"{role_of(op)}: {operand.source}", []).append(operand.curve)
    if not panels:
        return ""
    figure, grid = _panels(len(panels), 4, WIDTH, 1.7)
    blues = matplotlib.colormaps["Blues"]
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        highest = 1.0
        for number, curve in enumerate(curves):
            best = min(value for value in curve if value > 0)
            shade = 0.35 + 0.65 * (number + 1) / len(curves)
            places = [i / (len(curve) - 1) for i in range(len(curve))]
            relative = [max(value, best) / best for value in curve]
            axes.plot(places, relative, color=blues(shade), linewidth=0.8)
            highest = max(highest, *relative)
        axes.set_yscale("log")
        # On less than half a decade no power of ten but 1 would be a tick.
        axes.yaxis.set_major_locator(MaxNLocator(4) if highest < 5 else LogLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=8)
        axes.set_xticks([0, 1], ["first", "last"])
        axes.tick_params(labelsize=6)
    return _svg(figure)


def role_of(op: OpRecord) -> str:
    """What an op is for: a linear by its own module's name (proj, fc1, ...)."""
    if op.role != "linear":
        return op.role
    parts = [part for part in op.name.split("/") if not part.isdecimal() and part != "linear"]
    return parts[-1] if parts else op.role


def _block(name: str) -> str:
    """The numbered part of an op's name: ``blocks/3``, ``layers/0/blocks/1``."""
    match = re.match(r"(?:[^/]+/\d+/)+", name)
    parts = re.findall(r"[^/]+/\d+", match.group(0)) if match else []
    # a trailing number belongs to the call (``matmul/1``), not to a block
    return "/".join(part for part in parts if not part.startswith(("matmul/", "linear/")))


def _block_starts(ops: Sequence[OpRecord]) -> list[tuple[int, str]]:
    """Where each block begins, and its number."""
    starts: list[tuple[int, str]] = []
    last = None
    for position, op in enumerate(ops):
        block = _block(op.name)
        if block and block != last:
            numbers = [part for part in block.split("/") if part.isdecimal()]
            starts.append((position, ".".join(numbers)))
            last = block
    return starts


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    return text[text.index("<svg") :]
