"""Latency of a model in every form, in one table of one run.

Usage: python benchmarks/latency.py [--model vit_small_patch16_224] [--batches 1 8] [--repeats 15]

Weights are random, which changes no time; forms take turns, and times are medians. Ratios are what
to read: the machine's own speed cancels. Quality belongs to trained models: see
docs/deployment.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nncf
import onnxruntime
import openvino
import timm
import torch
from torch import Tensor, nn

import ptq4vit_plugin as ptq

Form = Callable[[Tensor], object]
FAST_CALIBRATION = {"algorithm": "ptq4vit", "search_range": {"n": 2}, "rounds": 1, "metric": "mse"}
PLANS = {"ours uniform": {"softmax": False, "gelu": False}, "ours full twin": {}}


def openvino_form(model: openvino.Model | Path, hint: str) -> Form:
    """A compiled OpenVINO model on as many threads as torch has."""
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images: compiled(images.numpy())


def onnx_form(path: Path) -> Form:
    """An ONNX Runtime session on as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def forms_of(model: nn.Module, images: Tensor, folder: Path) -> dict[str, Form]:
    """Every form of a model, by name; the first is the float model in PyTorch."""
    hints = ["f32"]
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hints.append("bf16")
    forms: dict[str, Form] = {"PyTorch float": model}
    converted = openvino.convert_model(model, example_input=images)
    converted.reshape([-1, *images.shape[1:]])
    torch.onnx.export(
        model,
        (images,),
        folder / "float.onnx",
        dynamo=False,
        input_names=["images"],
        dynamic_axes={"images": {0: "batch"}},
    )
    forms["ONNX Runtime float"] = onnx_form(folder / "float.onnx")
    default = nncf.quantize(
        converted, nncf.Dataset([images.numpy()]), model_type=nncf.ModelType.TRANSFORMER
    )
    for hint in hints:
        forms[f"OpenVINO float, {hint}"] = openvino_form(converted, hint)
        forms[f"OpenVINO NNCF default int8, {hint}"] = openvino_form(default, hint)
    for name, twin in PLANS.items():
        quantized = ptq.quantize(model, [images], {**FAST_CALIBRATION, "twin": twin})
        # Random weights make noise of the logits; what is timed does not depend on it.
        loose = {"example_input": images, "min_sqnr": -100.0}
        ptq.export(quantized, folder / name, "openvino", allow_float=True, **loose)
        for hint in hints:
            forms[f"OpenVINO {name}, {hint}"] = openvino_form(folder / f"{name}.xml", hint)
        ptq.export(quantized, folder / name, "onnx", **loose)
        forms[f"ONNX Runtime {name}"] = onnx_form(folder / f"{name}.onnx")
        ptq.export(quantized, folder / name, "integer", **loose)
        forms[f"PyTorch integer {name}"] = ptq.load(folder / f"{name}.safetensors")
    return forms


@torch.inference_mode()
def medians(forms: dict[str, Form], images: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of one call of each form; the forms take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 2):
        for name, form in forms.items():
            start = time.perf_counter()
            form(images)
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    images = torch.randn(max(arguments.batches), *model.pretrained_cfg["input_size"])
    print(f"{arguments.model}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, OpenVINO {openvino.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        forms = forms_of(model, images[:1], Path(folder))
        columns = [medians(forms, images[:b], arguments.repeats) for b in arguments.batches]
    print(
        "\n| form | " + " | ".join(f"batch {b}, ms | over float" for b in arguments.batches) + " |"
    )
    print("|---" * (1 + 2 * len(columns)) + "|")
    for name in forms:
        cells = [f"{c[name]:.1f} | {c[name] / c['PyTorch float']:.2f}" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
