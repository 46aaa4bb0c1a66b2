"""OpenVINO IR: every branch a FakeQuantize of 256 levels, int8 weights, precisions read back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import CheckpointError, ExportError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.exporter import Exporter
from ptq4vit_plugin.integrations.device import adds_int8_pairs, device_of, dtype_of
from ptq4vit_plugin.integrations.lowering import QuantizedOp
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps
from ptq4vit_plugin.integrations.openvino.convolutions import (
    rewrite_convolutions,
    wrong_convolutions,
)
from ptq4vit_plugin.integrations.openvino.heads import keep_apart
from ptq4vit_plugin.integrations.openvino.placement import place_quantizers
from ptq4vit_plugin.integrations.openvino.zero_points import fold_zero_points
from ptq4vit_plugin.integrations.qdq import qdq_model
from ptq4vit_plugin.integrations.timm.images import Preprocessing, preprocessing
from ptq4vit_plugin.sealing import BLANK, check_seal, is_sealed, seal

try:
    import openvino
    from openvino.passes import ConstantFolding, Manager
except ImportError as missing:
    raise ExportError(
        f"format 'openvino' needs {missing.name}: pip install 'ptq4vit-plugin[openvino]'"
    ) from missing

# In float32 and without dynamic quantization, which would make float products look like int8 ones.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
IN_FLOAT = {**EXACT, "LP_TRANSFORMS_MODE": "NO"}
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
#: A kernel of several nodes, such as attention's, whose products are known by their names only.
FUSED = "Subgraph"
SECTION = "ptq4vit"
#: Dimensions that are dynamic where only the number of images is.
BATCH = (0,)
#: What a file whose dimensions are dynamic must reach over the simulation, in dB, or else what it
#: may lack against one of fixed dimensions: a code that rounds the other way costs no more.
CLOSE, LESS = 20.0, 6.0
ONE_BY_ONE = "takes one image at a time: OpenVINO cannot run it, or not rightly, with any number"


class OpenVINOExporter(Exporter):
    """An ``.xml`` and a ``.bin`` file.

    Parameters
    ----------
    allow_float
        Write the model even if the runtime computes a product in float whose operands are
        quantized.
    """

    suffix = ".xml"

    def __init__(self, allow_float: bool = False) -> None:
        self.allow_float = allow_float

    def write(
        self, model: nn.Module, path: Path, example: Tensor, dynamic: Sequence[int]
    ) -> dict[str, Any]:
        """Write both files; returns how many products run as integers, and which do not.

        A file whose batch may be of any size takes one image at a time instead if OpenVINO can
        run it in no other way, or right in no other way; ``note`` says so then.

        Raises
        ------
        ExportError
            A product whose operands are quantized runs in float, or a convolution that runs in
            integers computes something else.
        """
        example = example.cpu()
        with torch.inference_mode():
            few = example[:8]
            reference = model(few.to(device_of(model), dtype_of(model))).float().cpu()
        try:
            made, facts = self._any_granularity(model, example, dynamic)
            if not _right_for_any_size(made, few, reference):
                raise RuntimeError("OpenVINO computes something else for images of any size")
        except RuntimeError:
            if tuple(dynamic) != BATCH:
                raise
            made, facts = self._any_granularity(model, example[:1], ())
            notes = (ONE_BY_ONE, facts.get("note"))
            facts["note"] = "; ".join(note for note in notes if note)
        made.inputs[0].get_tensor().set_names({"images"})
        made.outputs[0].get_tensor().set_names({"logits"})
        made.set_rt_info(BLANK, [SECTION, "seal"])
        said = preprocessing(model, self.input_size).model_dump_json()
        made.set_rt_info(said, [SECTION, "preprocessing"])
        if facts["float_products"] and not self.allow_float:
            raise ExportError(
                f"export: OpenVINO runs {', '.join(facts['float_products'])} in float; quantize "
                "with target: openvino, leave the op out with ignored_scopes, or set allow_float: "
                "true to write the model all the same"
            )
        exact = not adds_int8_pairs(torch.device("cpu"))
        if exact and (wrong := wrong_convolutions(made, _both_ways)):
            names = ", ".join(_op_of(name) for name in wrong)
            raise ExportError(
                f"export: OpenVINO's int8 kernels of this CPU compute {names} wrongly; leave the "
                "op out with ignored_scopes"
            )
        openvino.save_model(made, path, compress_to_fp16=False)
        seal(path, [path.with_suffix(".bin")])
        return facts

    def _any_granularity(
        self, model: nn.Module, example: Tensor, dynamic: Sequence[int]
    ) -> tuple[openvino.Model, dict[str, Any]]:
        """`_converted`, with scales per head outside the quantizers where OpenVINO needs that.

        Its quantizer has no scales per head where it moves a transpose in front of it, and LeViT's
        products of such values run in float. The scales are multiplied outside then: the same
        numbers.
        """
        try:
            inside = self._converted(model, example, dynamic, per_tensor=False)
        except RuntimeError:
            inside = None
        if inside is not None and not inside[1]["float_products"]:
            return inside
        try:
            made, facts = self._converted(model, example, dynamic, per_tensor=True)
        except RuntimeError:
            if inside is None:
                raise
            return inside
        if inside is not None and len(inside[1]["float_products"]) <= len(facts["float_products"]):
            return inside
        facts["note"] = "scales per head are multiplied outside; fits: target: openvino"
        return made, facts

    def _converted(
        self, model: nn.Module, example: Tensor, dynamic: Sequence[int], per_tensor: bool
    ) -> tuple[openvino.Model, dict[str, Any]]:
        """The model with dynamic dimensions, and what runs as integers."""
        lowered, found = qdq_model(model, per_tensor, selected=True)
        with warnings.catch_warnings(), torch.no_grad():
            # The tracer's remarks on Python numbers; what it took for constants wrongly shows when
            # the file is compared at other sizes.
            warnings.simplefilter("ignore")
            log = logging.getLogger("openvino")
            level = log.level
            log.setLevel(logging.ERROR)
            try:
                made = openvino.convert_model(lowered, example_input=example)
            finally:
                log.setLevel(level)
        made.reshape([-1 if d in dynamic else n for d, n in enumerate(example.shape)])
        fold_zero_points(made)
        keep_apart(made)
        rewrite_convolutions(made)
        placed = made.clone()
        place_quantizers(placed)
        try:
            facts = _precisions(placed, found)
        except RuntimeError:
            # Not every kernel takes a quantizer behind it, such as one of a product that is
            # multiplied by a factor per head.
            facts = None
        if facts is None or facts["float_products"]:
            # CoaT's products of keys and values run in float only behind quantizers that moved.
            traced = _precisions(made, found)
            if facts is None or len(traced["float_products"]) < len(facts["float_products"]):
                return made, traced
        return placed, facts

    def in_the_way(self, path: Path) -> Path | None:
        """A ``.bin`` that is a folder or belongs to no ``.xml`` of ours."""
        weights = path.with_suffix(".bin")
        foreign = weights.is_dir() or not is_sealed(path)
        return weights if weights.exists() and foreign else None

    def read(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Run the files in OpenVINO on the CPU, what is not quantized in float32."""
        return _runner(_read(path), EXACT)

    def read_in_float(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Run the files without OpenVINO's low-precision transformations."""
        run = in_float(_read(path))
        return lambda images: torch.from_numpy(run(images)[0])

    def op_outputs(self, path: Path, ops: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """The output of the last node whose name begins with an op's, in float arithmetic."""
        model = _read(path)
        keys = {f"__module.ops.{ReplacedOps.key(op)}": op for op in ops}
        last = {
            keys[head]: node
            for node in model.get_ordered_ops()
            if (head := node.get_friendly_name().partition("/")[0]) in keys
        }
        model.add_outputs([node.output(0) for node in last.values()])
        # An op whose output was one of the model's already is not added again.
        sources = [result.get_node().input_value(0).get_node() for result in model.outputs]
        places = {source.get_friendly_name(): n for n, source in enumerate(sources)}
        compute = in_float(model)

        def run(images: Tensor) -> dict[str, Tensor]:
            outputs = compute(images)
            return {
                op: torch.from_numpy(outputs[places[node.get_friendly_name()]])
                for op, node in last.items()
            }

        return run

    def preprocessing(self, path: Path) -> Preprocessing:
        """From the rt_info of the IR."""
        info = _read(path).get_rt_info([SECTION, "preprocessing"])
        return Preprocessing.model_validate_json(info.astype(str))


def in_float(model: openvino.Model) -> Callable[[Tensor], list[np.ndarray]]:
    """Run a model in float arithmetic, compiled anew for every shape of images.

    In this mode OpenVINO 2026.4 computes a sum with a convolution wrongly where dimensions are
    dynamic, and fails to turn 1x1 convolutions of int8 weights into products in HaloNet. So shapes
    are fixed and weights made float first.

    Returns
    -------
    callable
        Images to all outputs of the model.
    """
    compiled: dict[torch.Size, openvino.CompiledModel] = {}

    def run(images: Tensor) -> list[np.ndarray]:
        if images.shape not in compiled:
            fixed = model.clone()
            fixed.reshape(list(images.shape))
            folding = Manager()
            folding.register_pass(ConstantFolding())
            folding.run_passes(fixed)
            compiled[images.shape] = _compiled(fixed, IN_FLOAT)
        return list(compiled[images.shape](images.numpy()).values())

    return _in_its_batches(model, run)


def _in_its_batches(
    model: openvino.Model, run: Callable[[Tensor], list[np.ndarray]]
) -> Callable[[Tensor], list[np.ndarray]]:
    """Give a model of so many images its images in batches of that size; outputs are copies."""
    batch = model.inputs[0].get_partial_shape()[0]

    def together(images: Tensor) -> list[np.ndarray]:
        size = batch.get_length() if batch.is_static else len(images)
        parts = [run(part) for part in images.split(size)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    return together


@cache
def core() -> openvino.Core:
    """The process's one core, for good.

    In version 2026.4 a core that compiles gives the process a stack for signal handlers, and puts
    back the one from before when it goes. Of two cores, the last to go puts back what the other one
    has freed, and the next signal (Ctrl-C, the end of a child process) ends in a segmentation
    fault.
    """
    return openvino.Core()


def _read(path: Path) -> openvino.Model:
    check_seal(path, [path.with_suffix(".bin")])
    try:
        return core().read_model(path)
    except RuntimeError as error:
        raise CheckpointError(f"'{path}': OpenVINO cannot read it: {error}") from error


def _compiled(model: openvino.Model, settings: dict[str, str]) -> openvino.CompiledModel:
    threads = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    return core().compile_model(model, "CPU", {**settings, **threads})


def _runner(model: openvino.Model, settings: dict[str, str]) -> Callable[[Tensor], Tensor]:
    compiled = _compiled(model, settings)
    run = _in_its_batches(model, lambda images: list(compiled(images.numpy()).values()))
    return lambda images: torch.from_numpy(run(images)[0])


def _both_ways(model: openvino.Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output of a model in integers and in float arithmetic."""
    integer, floating = (_compiled(model, how)(x)[0].copy() for how in (EXACT, IN_FLOAT))
    return integer, floating


def _op_of(node: str) -> str:
    """The op that a node's name is made of, or the name itself."""
    head = node.partition("/")[0]
    return head.removeprefix("__module.ops.").replace(":", "/") if ":" in head else node


def _right_for_any_size(made: openvino.Model, images: Tensor, reference: Tensor) -> bool:
    """Whether OpenVINO computes a model with dynamic dimensions as closely as with the images' own.

    The reference are the logits that the simulated model gives for the images.

    OpenVINO has other kernels for shapes that it knows, and some sums with convolutions come out
    right only there.
    """
    fixed = made.clone()
    fixed.reshape(list(images.shape))
    free, own = (logit_sqnr(reference, _runner(m, EXACT)(images)) for m in (made, fixed))
    return free > CLOSE or free > own - LESS


def _precisions(model: openvino.Model, ops: Sequence[QuantizedOp]) -> dict[str, Any]:
    """What the runtime really computes in integers, from its own compiled graph.

    Its nodes carry the names of the model's nodes, and these the names of the ops' modules, except
    where it fused a product into one without a name.
    """
    planned = {ReplacedOps.key(op.name): op.name for op in ops if op.integer}
    compiled = core().compile_model(model, "CPU", EXACT)
    integer, floating = 0, []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, names = (info[key].astype(str) for key in ("layerType", "originalLayersNames"))
        if kind == FUSED:
            nodes = [n for n in names.split(",") if n.rpartition("/")[2].startswith(PRODUCTS)]
            products = [op for op in map(_op_of, nodes) if op in planned.values()]
        elif kind in PRODUCTS:
            matching = [name for key, name in planned.items() if f".{key}/" in names]
            products = matching[:1] or [names]
        else:
            continue
        # A float product of int8 weights calls itself i8 as well; its kernel's name does not.
        kernel = info["primitiveType"].astype(str).lower()
        if info["runtimePrecision"].astype(str) in ("i8", "u8") and kernel.endswith("8"):
            integer += len(products)
        else:
            floating += [name for name in products if "__module.model." not in name]
    return {
        "integer_products": integer,
        "planned_products": sum(len(op.grids[0]) * len(op.grids[1]) for op in ops if op.integer),
        "float_products": floating,
    }
