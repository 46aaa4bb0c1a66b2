"""ONNX: standard QuantizeLinear and DequantizeLinear, 8-bit weights, no custom op."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import CheckpointError, ExportError
from ptq4vit_plugin.exporter import Exporter
from ptq4vit_plugin.integrations.device import has_int8_dot
from ptq4vit_plugin.integrations.lowering import QuantizedOp
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps
from ptq4vit_plugin.integrations.onnx_functions import OPSET, Translatable
from ptq4vit_plugin.integrations.qdq import qdq_model
from ptq4vit_plugin.integrations.timm.images import Preprocessing, preprocessing
from ptq4vit_plugin.sealing import BLANK, check_seal, seal

try:
    import onnx
    import onnxruntime
    from onnx import numpy_helper
except ImportError as missing:
    raise ExportError(
        f"format 'onnx' needs {missing.name}: pip install 'ptq4vit-plugin[onnx]'"
    ) from missing

DIMENSIONS = {0: "batch", 2: "height", 3: "width"}
# Products in ONNX Runtime's optimized graph.
INTEGER = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QLinearConv", "QGemm")
FLOAT = ("MatMul", "FusedMatMul", "Gemm", "Conv", "FusedConv")
KEYS = ("ptq4vit_seal", "ptq4vit_preprocessing")


class ONNXExporter(Exporter):
    """One ``.onnx`` file of opset 18; each twin is two QDQ branches.

    Parameters
    ----------
    unsigned
        Write weights and right factors as unsigned codes with zero point 128, whose products are
        exact on every CPU. With signed ones ONNX Runtime is faster, twice as fast where there are
        int8 dot products, and wrong on CPUs without: pairs of products are added in 16 bits there,
        which saturate.
    """

    suffix = ".onnx"

    def __init__(self, unsigned: bool = True) -> None:
        self.unsigned = unsigned

    def write(
        self, model: nn.Module, path: Path, example: Tensor, dynamic: Sequence[int]
    ) -> dict[str, Any]:
        """Write and check the file; returns the opset and which products run as integers."""
        lowered, found = qdq_model(model, per_tensor=True, unsigned_right=self.unsigned)
        with warnings.catch_warnings(), torch.no_grad(), Translatable():
            # The tracer's remarks on Python numbers; what it took for constants wrongly shows when
            # the file is compared at other sizes.
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(
                    lowered,
                    (example.cpu(),),
                    path,
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_axes={
                        "images": {d: DIMENSIONS[d] for d in dynamic},
                        "logits": {0: DIMENSIONS[0]},
                    },
                )
            except torch.onnx.errors.OnnxExporterError as error:
                detail = " ".join(str(error).split())[:300]
                raise ExportError(
                    f"export: torch cannot write this model as ONNX: {detail}"
                ) from error
        made = onnx.load(path)
        _keep_weights_as_codes(made.graph)
        for key, value in zip(
            KEYS, (BLANK, preprocessing(model, self.input_size).model_dump_json()), strict=True
        ):
            made.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(made, full_check=True)
        onnx.save(made, path)
        seal(path)
        facts = {"opset": OPSET, **_precisions(path, found)}
        if self.unsigned and has_int8_dot(torch.device("cpu")):
            facts["faster_with"] = "unsigned: false, for CPUs like this one (VNNI)"
        if facts["float_products"]:
            facts["note"] = "ONNX Runtime computes float_products in float; fits: target: onnx"
        return facts

    def read(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Run the file in ONNX Runtime on the CPU."""
        return _runner(path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)

    def read_in_float(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Run every node by itself, so that no product is fused with its quantizers."""
        return _runner(path, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)

    def op_outputs(self, path: Path, ops: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """The output of the last node whose name has an op's, in float arithmetic."""
        made, keys = onnx.load(path), {ReplacedOps.key(op): op for op in ops}
        last = {
            keys[part]: node.output[0]
            for node in made.graph.node
            for part in node.name.split("/")
            if part in keys
        }
        made.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, last.values()))
        session = _session(
            made.SerializeToString(), onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        )

        def run(images: Tensor) -> dict[str, Tensor]:
            outputs = session.run(list(last.values()), {"images": images.numpy()})
            return {op: torch.from_numpy(y) for op, y in zip(last, outputs, strict=True)}

        return run

    def preprocessing(self, path: Path) -> Preprocessing:
        """From the file's metadata."""
        check_seal(path)
        properties = {p.key: p.value for p in onnx.load(path).metadata_props}
        return Preprocessing.model_validate_json(properties[KEYS[1]])


def _precisions(path: Path, ops: Sequence[QuantizedOp]) -> dict[str, Any]:
    """What ONNX Runtime really computes in integers, from its own optimized graph.

    A product that it does not fuse with its quantizers keeps its node, whose name has the op's.
    """
    planned = {ReplacedOps.key(op.name): op.name for op in ops if op.integer}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / path.name
        options.optimized_model_filepath = str(optimized)
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized).graph.node
    floating = [node.name for node in nodes if node.op_type in FLOAT]
    return {
        "integer_products": sum(node.op_type in INTEGER for node in nodes),
        "planned_products": sum(len(op.grids[0]) * len(op.grids[1]) for op in ops if op.integer),
        "float_products": sorted(
            {op for key, op in planned.items() for name in floating if f"/{key}/" in name}
        ),
    }


def _runner(path: Path, level: onnxruntime.GraphOptimizationLevel) -> Callable[[Tensor], Tensor]:
    check_seal(path)
    try:
        session = _session(path, level)
    except Exception as error:  # its own exceptions have no common base
        raise CheckpointError(f"'{path}': ONNX Runtime cannot read it: {error}") from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _session(
    model: Path | bytes, level: onnxruntime.GraphOptimizationLevel
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _keep_weights_as_codes(graph: onnx.GraphProto) -> None:
    """Replace each float constant that is quantized by its codes.

    The exporter writes ``constant -> QuantizeLinear -> DequantizeLinear``.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.output[0]: node for node in graph.node}

    def value(name: str) -> np.ndarray | None:
        if name in constants:
            return numpy_helper.to_array(constants[name])
        node = nodes.get(name)
        if node is not None and node.op_type == "Constant":
            return numpy_helper.to_array(node.attribute[0].t)
        return None

    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        weight, scale, zero = (value(name) for name in node.input)
        if weight is None or scale is None or zero is None:
            continue
        zero = zero.flatten()[0]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.size > 1:
            scale = scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        codes = np.rint(weight / scale) + zero
        limits = np.iinfo(zero.dtype)
        codes = np.clip(codes, limits.min, limits.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
