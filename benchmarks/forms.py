"""Ways of writing a twin quantizer's product, all exact, timed in OpenVINO and ONNX Runtime.

    python benchmarks/forms.py

Two products of a ViT-S/16-224 at 8 bits: softmax(scores)·V with 197 tokens and 6 heads, and the
second linear of an MLP behind GELU. Every form is checked against codes multiplied in float64, then
all of them run in turns; ratios are to the form that the exporters write. ``--profile`` prints
OpenVINO's own list of nodes and times of every form. With --smoke the sizes are tiny.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4vit_plugin.integrations.onnx_functions import OPSET
from ptq4vit_plugin.integrations.openvino.ir import EXACT, core
from ptq4vit_plugin.integrations.qdq import QDQGrid
from ptq4vit_plugin.quantizers.branches import Branch

BITS_TOP = 127  #: the largest code of a range of an 8-bit twin
FINE = 2.0**-6 / BITS_TOP  #: softmax: step of the lower range, which ends at 2^-6
COARSE = 1 / BITS_TOP  #: softmax: step of the upper range
SPLIT = (2.0**-6 + 3 * COARSE) / 2  #: between the lower range's top and the upper's next level
VALUE = 4 / BITS_TOP  #: step of V
BELOW, ABOVE = 0.16997124 / 128, 5 / BITS_TOP  #: GELU: steps of the two ranges
WEIGHT = 0.1 / BITS_TOP
SIGNED, UNSIGNED = (-128, 127), (0, 255)
WARM_UP = 5


def fq(x: Tensor, step: float, limits: tuple[int, int], zero: int = 0) -> Tensor:
    """torch's fake quantization of 256 levels."""
    return torch.fake_quantize_per_tensor_affine(x, step, zero, *limits)


class Attention(nn.Module):
    """softmax(scores)·V in one of the forms; V's codes are ready to be either kind of integer."""

    def __init__(self, form: Callable[[Tensor], Tensor | list[Tensor]], moved: bool) -> None:
        super().__init__()
        self.form, self.moved = form, moved

    def forward(self, scores: Tensor, value: Tensor) -> Tensor:
        limits, zero = (UNSIGNED, 128) if self.moved else (SIGNED, 0)
        value = fq(value, VALUE, limits, zero)
        if self.form is numerator:
            codes, total = numerator(scores)
            return codes @ value / total
        terms = self.form(scores.softmax(-1))
        return added([(term @ value) for term in terms], scores.shape[-2])


class Linear(nn.Module):
    """The linear behind GELU in one of the forms."""

    def __init__(self, form: Callable[[Tensor], list[Tensor]], weight: Tensor, moved: bool) -> None:
        super().__init__()
        self.form, self.moved = form, moved
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        limits, zero = (UNSIGNED, 128) if self.moved else (SIGNED, 0)
        weight = fq(self.weight, WEIGHT, limits, zero)
        terms = self.form(F.gelu(x))
        return added([F.linear(term, weight) for term in terms], x.shape[-2])


def added(parts: list[Tensor], rows: int) -> Tensor:
    """The sum of the products; one of twice the rows has both ranges' codes below each other."""
    if len(parts) == 2:
        return parts[0] + parts[1]
    if parts[0].shape[-2] == rows:
        return parts[0]
    upper, lower = parts[0].split(rows, -2)
    steps = (COARSE, FINE) if upper.dim() == 4 else (ABOVE, BELOW)
    return upper * steps[0] + lower * steps[1]


def numerator(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s - max s) as codes, and the sum by which the product is divided."""
    above = torch.exp(scores - scores.amax(-1, keepdim=True))
    return fq(above, 1 / 255, UNSIGNED), above.sum(-1, keepdim=True)


def written(*branches: Branch) -> Callable[[Tensor], list[Tensor]]:
    """The form that the exporters write for a twin's two grids."""
    grids = [QDQGrid(branch, False, False, False, False, False) for branch in branches]
    return lambda x: [grid(x)[0] for grid in grids]


def uniform_softmax(p: Tensor) -> list[Tensor]:
    return [fq(p, 1 / 255, UNSIGNED)]


def mask_multiplied(p: Tensor) -> list[Tensor]:
    """A mask, multiplied in; the lower range is what it leaves."""
    high = p * (p > SPLIT).to(p.dtype)
    return [fq(high, COARSE, UNSIGNED), fq(lower(p - high), FINE, UNSIGNED)]


def lower(p: Tensor) -> Tensor:
    """Numbers between the lower range's top level and the border belong to that level."""
    return p.clamp(max=FINE * BITS_TOP)


def two_masks(p: Tensor) -> list[Tensor]:
    high, low = p * (p > SPLIT).to(p.dtype), p * (p <= SPLIT).to(p.dtype)
    return [fq(high, COARSE, UNSIGNED), fq(lower(low), FINE, UNSIGNED)]


def selected(p: Tensor) -> list[Tensor]:
    """torch.where instead of a mask."""
    zero = torch.zeros(1)
    high, low = torch.where(p > SPLIT, p, zero), torch.where(p > SPLIT, zero, p)
    return [fq(high, COARSE, UNSIGNED), fq(lower(low), FINE, UNSIGNED)]


def stacked_softmax(p: Tensor) -> list[Tensor]:
    """One product of twice the rows, of codes as numbers."""
    high = p * (p > SPLIT).to(p.dtype)
    codes = torch.cat([high / COARSE, lower(p - high) / FINE], -2)
    return [fq(codes, 1.0, UNSIGNED)]


def uniform_gelu(x: Tensor) -> list[Tensor]:
    return [fq(x, ABOVE, SIGNED)]


def clamps_in_ranges(x: Tensor) -> list[Tensor]:
    """Each quantizer's range cuts off one side of what belongs to the other."""
    return [fq(x.clamp(max=BITS_TOP * ABOVE), ABOVE, UNSIGNED), fq(x.clamp(max=0), BELOW, SIGNED)]


def relu_and_minimum(x: Tensor) -> list[Tensor]:
    """Two signed quantizers."""
    return [fq(x.relu(), ABOVE, SIGNED), fq(x.clamp(max=0), BELOW, SIGNED)]


def masks_behind_gelu(x: Tensor) -> list[Tensor]:
    high = x * (x > 0).to(x.dtype)
    return [fq(high, ABOVE, SIGNED), fq(x - high, BELOW, SIGNED)]


def stacked_gelu(x: Tensor) -> list[Tensor]:
    """One product of twice the rows, of codes as numbers."""
    codes = torch.cat([x.relu() / ABOVE, x.clamp(max=0) / BELOW], -2)
    return [fq(codes, 1.0, SIGNED)]


TOP = torch.tensor(SPLIT)
SOFTMAX = {
    "a mask, multiplied (written by the exporters)": written(
        Branch(torch.tensor([FINE]), 0, BITS_TOP, TOP, "low"),
        Branch(torch.tensor([COARSE]), 0, BITS_TOP, TOP, "high", bounded=True),
    ),
    "upper range first": mask_multiplied,
    "two masks": two_masks,
    "where instead of masks": selected,
    "one product of twice the rows": stacked_softmax,
    "numerator, divided after the product": numerator,
    "uniform": uniform_softmax,
}
GELU = {
    "clamps in the ranges (written by the exporters)": written(
        Branch(torch.tensor([BELOW]), -128, 0), Branch(torch.tensor([ABOVE]), 0, BITS_TOP)
    ),
    "upper range first": clamps_in_ranges,
    "relu and minimum, both signed": relu_and_minimum,
    "a mask, multiplied": masks_behind_gelu,
    "one product of twice the rows": stacked_gelu,
    "uniform": uniform_gelu,
}
#: Forms of another quantizer, which therefore give other numbers.
OTHERS = (numerator, uniform_softmax, uniform_gelu)


def twin_of(p: Tensor, kind: str) -> Tensor:
    """What the twin quantizer makes of numbers, in float64 and written out."""
    p = p.double()
    if kind == "softmax":
        low = (p / FINE).round().clamp(0, BITS_TOP) * FINE
        return torch.where(p > SPLIT, (p / COARSE).round().clamp(0, BITS_TOP) * COARSE, low)
    low = (p / BELOW).round().clamp(-128, 0) * BELOW
    return torch.where(p > 0, (p / ABOVE).round().clamp(0, BITS_TOP) * ABOVE, low)


def runners(
    model: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...], folder: Path
) -> dict[str, Callable[[], Tensor]]:
    """A form in both runtimes, on as many threads as torch has."""
    threads = torch.get_num_threads()
    names = ["first", "second"][: len(inputs)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = openvino.convert_model(model, example_input=inputs)
        written = folder / "form.onnx"
        axes = {name: {0: "batch"} for name in names}
        torch.onnx.export(
            other,
            inputs,
            written,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            dynamic_axes=axes,
        )
    properties = {**EXACT, "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    properties.pop("LP_TRANSFORMS_MODE", None)
    compiled = core().compile_model(made, "CPU", properties)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    arrays = [x.numpy() for x in inputs]
    feeds = dict(zip(names, arrays, strict=True))
    request = compiled.create_infer_request()

    def in_openvino() -> Tensor:
        request.infer(arrays)
        return torch.from_numpy(request.get_output_tensor().data.copy())

    in_openvino.nodes = lambda: request.profiling_info
    return {
        "OpenVINO": in_openvino,
        "ONNX Runtime": lambda: torch.from_numpy(session.run(None, feeds)[0]),
    }


def measure(kind: str, arguments: argparse.Namespace) -> None:
    """Check and time all forms of one product, and print the table."""
    g = torch.Generator().manual_seed(0)
    tokens, hidden, width = (17, 64, 32) if arguments.smoke else (197, 1536, 384)
    if kind == "softmax":
        inputs = (
            3 * torch.randn(1, 6, tokens, tokens, generator=g),
            torch.randn(1, 6, tokens, 64, generator=g),
        )
        right = fq(inputs[1], VALUE, SIGNED).double()
        expected = twin_of(inputs[0].softmax(-1), kind) @ right
    else:
        inputs = (torch.randn(1, tokens, hidden, generator=g),)
        weight = 0.02 * torch.randn(width, hidden, generator=g)
        expected = twin_of(F.gelu(inputs[0]), kind) @ fq(weight, WEIGHT, SIGNED).double().T
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, form in (SOFTMAX if kind == "softmax" else GELU).items():
            pair = [
                Attention(form, moved) if kind == "softmax" else Linear(form, weight, moved)
                for moved in (False, True)
            ]
            for runtime, run in runners(*pair, inputs, Path(folder)).items():
                runs[title, runtime] = run
                # Without VNNI OpenVINO's products of 8 bits saturate: say how far off it is.
                found = run().double()
                off = 10 * torch.log10(
                    expected.square().mean() / (found - expected).square().mean()
                )
                if form not in OTHERS and runtime == "ONNX Runtime" and off < 60:
                    raise SystemExit(
                        f"{title} in {runtime} is {off:.1f} dB from the twin quantizer"
                    )
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for turn in range(arguments.repeats + WARM_UP):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= WARM_UP:
                    times[key].append(1000 * (time.perf_counter() - start))
    print(f"\n| {kind} | OpenVINO, ms | ratio | ONNX Runtime, ms | ratio |\n|---|---|---|---|---|")
    titles = list(dict.fromkeys(title for title, _ in runs))
    for title in titles:
        cells = []
        for runtime in ("OpenVINO", "ONNX Runtime"):
            mine, first = times[title, runtime], times[titles[0], runtime]
            ratio = statistics.median(a / b for a, b in zip(mine, first, strict=True))
            cells += [f"{statistics.median(mine):.2f}", f"{ratio:.2f}"]
        print(f"| {title} | {' | '.join(cells)} |")
    if arguments.profile:
        for title in titles:
            nodes = [
                f"{node.node_type} {node.exec_type} {1000 * node.real_time.total_seconds():.2f}"
                for node in runs[title, "OpenVINO"].nodes()
                if node.real_time.total_seconds() > 0
            ]
            print(f"\n{kind}, {title}, ms by node: {', '.join(nodes)}")


def main(given: list[str] | None = None) -> None:
    """Both products."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(given)
    print(f"OpenVINO {openvino.__version__}, ONNX Runtime {onnxruntime.__version__}, ", end="")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for kind in ("softmax", "gelu"):
        measure(kind, arguments)


if __name__ == "__main__":
    main()
