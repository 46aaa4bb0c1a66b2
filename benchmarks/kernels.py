"""Which products of fake-quantized operands OpenVINO and ONNX Runtime compute as integers.

    python benchmarks/kernels.py [matmul] [linear] ["linear of two dimensions"] [conv2d]

One small model per product; OpenVINO's answer is read from its compiled graph, ONNX Runtime's from
its optimized one. ``ptq4vit_plugin/algorithms/target.py`` follows this table.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from pathlib import Path

import onnx
import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4vit_plugin.integrations.onnx import FLOAT, INTEGER
from ptq4vit_plugin.integrations.onnx_functions import OPSET
from ptq4vit_plugin.integrations.openvino.ir import EXACT, PRODUCTS, core

HEADS, CHANNELS = 3, 32
SIGNED, UNSIGNED = (-128, 127), (0, 255)
#: Range of the codes, zero point, whether scales vary.
LEFT = {
    "signed": (SIGNED, 0, False),
    "signed, per head": (SIGNED, 0, True),
    "unsigned": (UNSIGNED, 0, False),
    "unsigned, per head": (UNSIGNED, 0, True),
    "unsigned, zero point 100": (UNSIGNED, 100, False),
}
RIGHT = {
    "signed": (SIGNED, 0, False),
    "signed, per head": (SIGNED, 0, True),
    "unsigned": (UNSIGNED, 0, False),
    "unsigned, zero point 128": (UNSIGNED, 128, False),
    "unsigned, zero point 100": (UNSIGNED, 100, False),
}
WEIGHT = {"signed": (SIGNED, 0, False), "signed, per channel": (SIGNED, 0, True)}
SHAPES = {
    "matmul": ((2, HEADS, 17, 16), (2, HEADS, 16, 16)),
    "linear": ((2, 17, 64), (CHANNELS, 64)),
    "linear of two dimensions": ((4, 64), (CHANNELS, 64)),
    "conv2d": ((2, 3, 16, 16), (CHANNELS, 3, 4, 4)),
}


class Product(nn.Module):
    """One product of two fake-quantized operands; the right one is a weight unless in a matmul."""

    def __init__(self, kind: str, left: tuple, right: tuple) -> None:
        super().__init__()
        self.kind, self.left, self.right = kind, left, right
        self.weight = nn.Parameter(torch.randn(SHAPES[kind][1]))
        self.bias = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The product, and the second input, which a weight leaves unused."""
        x = quantized(x, self.left, HEADS, 1)
        if self.kind == "matmul":
            return x @ quantized(y, self.right, HEADS, 1), y
        weight = quantized(self.weight, self.right, CHANNELS, 0)
        if self.kind == "conv2d":
            return F.conv2d(x, weight, self.bias, stride=4), y
        return F.linear(x, weight, self.bias), y


def quantized(x: Tensor, how: tuple, groups: int, axis: int) -> Tensor:
    """torch's fake quantization, with one scale or one per group along an axis."""
    limits, zero, varies = how
    if not varies:
        return torch.fake_quantize_per_tensor_affine(x, 0.02, zero, *limits)
    scales = torch.linspace(0.01, 0.03, groups)
    zeros = torch.full((groups,), zero, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scales, zeros, axis, *limits)


def in_openvino(model: nn.Module, example: tuple[Tensor, Tensor]) -> str:
    """What OpenVINO's CPU plugin makes of it."""
    made = openvino.convert_model(model, example_input=example)
    made.reshape({i: list(x.shape) for i, x in zip(made.inputs, example, strict=True)})
    compiled = core().compile_model(made, "CPU", EXACT)
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in PRODUCTS:
            kernel = info["primitiveType"].astype(str).lower()
            return "integer" if kernel.endswith("8") else "float"
    return "not found"


def in_onnx_runtime(model: nn.Module, example: tuple[Tensor, Tensor]) -> str:
    """What ONNX Runtime's optimizer makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        written, optimized = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        torch.onnx.export(
            model,
            example,
            written,
            dynamo=False,
            opset_version=OPSET,
            input_names=["x", "y"],
            # As in our files; with a fixed one the optimizer makes a Gemm of every linear.
            dynamic_axes={"x": {0: "batch"}},
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(written, options, providers=providers)
        kinds = {node.op_type for node in onnx.load(optimized).graph.node}
        try:
            feeds = zip(session.get_inputs(), example, strict=True)
            session.run(None, {value.name: x.numpy() for value, x in feeds})
        except Exception:  # its own exceptions have no common base
            return "integer, and fails to run"
    return "integer" if kinds & set(INTEGER) else "float" if kinds & set(FLOAT) else "not found"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    kinds = parser.parse_args().kinds or list(SHAPES)
    if strange := [kind for kind in kinds if kind not in SHAPES]:
        parser.error(f"{strange[0]!r} is no product; allowed: {', '.join(SHAPES)}")
    warnings.simplefilter("ignore")
    print(f"OpenVINO {openvino.__version__}, ONNX Runtime {onnxruntime.__version__}, ", end="")
    print(torch.backends.cpu.get_cpu_capability())
    print("\n| product | left | right | OpenVINO | ONNX Runtime |\n|---|---|---|---|---|")
    for kind in kinds:
        left_shape, right_shape = SHAPES[kind]
        rights = RIGHT if kind == "matmul" else WEIGHT
        lefts = {n: how for n, how in LEFT.items() if kind == "matmul" or not how[2]}
        example = torch.randn(left_shape), torch.randn(right_shape)
        for (left, how), (right, other) in itertools.product(lefts.items(), rights.items()):
            model = Product(kind, how, other)
            cells = in_openvino(model, example), in_onnx_runtime(model, example)
            print(f"| {kind} | {left} | {right} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
