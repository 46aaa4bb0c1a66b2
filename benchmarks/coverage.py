"""Quantize the smallest model of every attention family in timm and write a table of them.

    python benchmarks/coverage.py survey     find the families, and the smallest model of each
    python benchmarks/coverage.py measure    plan, count, quantize, save and load them, one by one
    python benchmarks/coverage.py export     run them in OpenVINO
    python benchmarks/coverage.py files      write them in every format, and run the files
    python benchmarks/coverage.py write      write the table

A *family* is one of timm's modules (``timm.models.list_modules()``) with a model that multiplies
two computed tensors with each other, which is what attention does. Variants of a module are tried
from the smallest on (one per pair of leading name parts, such as ``mobilenetv4_hybrid``); whether
one has attention is seen from the functions that it calls. Results are kept in
--results after every model, so all steps go on where they were stopped; `write` makes --page of
them. Both are in the working directory if not given. The repository's own are
``benchmarks/coverage.json`` and ``docs/coverage.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openvino
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import ptq4vit_plugin
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.batch_norm import fold_batch_norms
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.pipeline import plan

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from calls import PRODUCTS, Calls  # noqa: E402

RESULTS = Path("coverage.json")
PAGE = Path("coverage.md")

SIZES = (56, 64, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
IMAGES = 2
CLASSES = 10
#: Arguments that make a model shallow, where timm has them.
SHALLOW = (
    {"depth": 2},
    {"depth": (2, 2, 2)},
    {"depths": (2, 2, 2, 2)},
    {"depths": (2, 2, 2)},
    {"layers": (2, 2, 2, 2)},
    {"stages": (2, 2, 2, 2)},
    {"parallel_depth": 1},
)
SHORT_SEARCH = {"algorithm": "ptq4vit", "search_range": {"alpha": 0.5, "n": 4}, "rounds": 1}
#: OpenVINO rounds in another order, so that now and then a value falls on the next level.
MATCHING_DB = 20
#: Largest relative difference of float logits that counts as none.
UNCHANGED = 1e-5

FORMATS = ("integer", "onnx", "openvino")

#: No other precision than the quantizers'.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
#: And no 8-bit kernels: without VNNI these saturate.
FLOAT_KERNELS = {**EXACT, "LP_TRANSFORMS_MODE": "NO"}


class _NoInitialization(TorchFunctionMode):
    """Skip in-place functions: filling weights that are never used takes most of the time."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


# --- families -------------------------------------------------------------------------------------


def survey(path: Path, results: dict[str, Any], deadline: float) -> None:
    """The smallest model with attention of each of timm's modules."""
    families = results.setdefault("families", {})
    for module in timm.models.list_modules():
        if module in families:
            continue
        if time.monotonic() > deadline:
            return
        sizes = results.setdefault("parameters", {})
        if module not in sizes:
            sizes[module] = {name: _parameters(name) for name in timm.list_models(module=module)}
        families[module] = _smallest_with_attention(sizes[module])
        store(path, results)
        print(module, families[module], flush=True)


def _parameters(name: str) -> int:
    with _NoInitialization(), torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def _smallest_with_attention(sizes: dict[str, int]) -> str | None:
    tried = set()
    for name in sorted(sizes, key=sizes.get):
        prefix = tuple(name.split("_")[:2])
        if prefix not in tried:
            tried.add(prefix)
            if _has_attention(name):
                return name
    return None


def _has_attention(name: str) -> bool:
    """Run the model without numbers, or with them where it looks at some."""
    for device in ("meta", "cpu"):
        try:
            with _NoInitialization() if device == "meta" else nullcontext(), torch.device(device):
                model = timm.create_model(name).eval()
                images = torch.zeros(1, *model.pretrained_cfg["input_size"])
            with Calls() as calls, torch.no_grad():
                model(images)
            return calls.multiplies_activations
        except (RuntimeError, NotImplementedError):
            continue
    raise RuntimeError(f"{name} does not run")


# --- one model ------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, int, dict[str, Any]]:
    """A shallow model with random weights at the smallest image size that it accepts; the size and
    its arguments.

    Sizes and arguments are tried without numbers, and with them for models that look at some.
    """
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        for size in SIZES:
            for args in _arguments(size):
                try:
                    _runs(name, size, args, device)
                    torch.manual_seed(0)
                    model = timm.create_model(name, num_classes=CLASSES, **args).eval()
                    with torch.no_grad():
                        logits = model(torch.randn(2, 3, size, size))
                    if logits.isfinite().all():
                        randomize(model)
                        return model, size, args
                except Exception as error:  # timm's models refuse sizes in many ways
                    failure = error
    raise RuntimeError(f"no image size from {SIZES[0]} to {SIZES[-1]} works: {failure}")


def _arguments(size: int) -> list[dict[str, Any]]:
    return [image | more for image in ({"img_size": size}, {}) for more in (*SHALLOW, {})]


@torch.no_grad()
def _runs(name: str, size: int, args: dict[str, Any], device: str) -> None:
    with _NoInitialization() if device == "meta" else nullcontext(), torch.device(device):
        timm.create_model(name, num_classes=CLASSES, **args).eval()(torch.zeros(2, 3, size, size))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give what starts as a constant (norms, layer scales, biases) a value of its own, so that no
    branch is silent."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            if parameter.flatten()[0] == 0:
                parameter.normal_(0, 0.02)
            else:
                parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.train().eval()  # what was kept of position biases is forgotten in training mode


def measure(name: str) -> dict[str, Any]:
    """All figures of one model; `failure` says what went wrong first. Seconds are CPU time."""
    started = time.process_time()
    result: dict[str, Any] = {"model": name}
    try:
        model, size, args = build(name)
        result |= {"image_size": size, "arguments": args}
        images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
        result |= counted(model, images)
        result |= quantized(model, images)
    except Exception as error:
        result["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result["seconds"] = time.process_time() - started
    return result


def quantized(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Quantize, evaluate, save and load."""
    started = time.process_time()
    figures = {}
    try:
        result = ptq4vit_plugin.quantize(model, [images], SHORT_SEARCH)
    except ModelError as error:  # random logits can saturate the loss's softmax
        figures["remark"] = f"quantized with gradient kind 'output', because {error}"
        probe = {**SHORT_SEARCH, "gradient": {"kind": "output"}}
        result = ptq4vit_plugin.quantize(model, [images], probe)
    seconds = time.process_time() - started
    labels = torch.arange(len(images)) % CLASSES
    metrics = ptq4vit_plugin.evaluate(result, [(images, labels)], model)
    with torch.no_grad():
        logits = result(images)
    silent = hooks_that_do_not_run(result, images)
    with tempfile.TemporaryDirectory() as folder:
        path = ptq4vit_plugin.save(result, Path(folder) / "model.safetensors")
        again = ptq4vit_plugin.load(path, copy.deepcopy(model))
    with torch.no_grad():
        identical = torch.equal(again(images), logits)
    if silent:
        raise RuntimeError(f"{len(silent)} quantizers never run, for example {silent[0]}")
    figures |= {"quantize_seconds": seconds, "sqnr_db": metrics.sqnr_db, "identical": identical}
    return figures


def hooks_that_do_not_run(model: nn.Module, images: Tensor) -> list[str]:
    """Ops and parameters whose quantizer is not called in a forward pass."""
    silent = {hook.module: f"{hook.op} port {hook.port}" for hook in hooks.hooks(model)}
    handles = [
        module.register_forward_pre_hook(lambda module, _: silent.pop(module, None) and None)
        for module in list(silent)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return list(silent.values())


def counted(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The plan beside an independent count of what the model calls and multiplies."""
    with torch.no_grad():
        reference = model(images)
    chosen = plan(model, images, SHORT_SEARCH)
    prepared = copy.deepcopy(model).requires_grad_(False)
    prepare(prepared, Batch((images,), {}))
    with Calls() as calls, torch.no_grad():
        difference = _relative(prepared(images), reference)
    graph = hooks.trace(prepared, images)
    folded = fold_batch_norms(prepared, graph)
    with torch.no_grad():
        folding_difference = _relative(prepared(images), reference)
    # The fused kernel for CPU is the one that PyTorch does not count.
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        copy.deepcopy(model).requires_grad_(False)(images)
    quantizers = Counter(o.quantizer for op in chosen.ops for o in op.operands)
    ops = (*chosen.ops, *chosen.left_out)
    kinds = Counter(op.kind for op in ops)
    nodes = sorted(graph.get_all_nodes(), key=lambda node: node.node_id)  # in the order of calls
    products = [node.node_name for node in nodes if node.node_type in PRODUCTS]
    quantized_products = {op.name for op in chosen.ops} & set(products)
    attention = [products[number - 1] for number in calls.before_softmax | calls.after_softmax]
    figures = {
        "ops": len(chosen.ops),
        "left_out": dict(Counter(op.reason for op in chosen.left_out)),
        "counted": {
            "linear": (kinds["linear"], calls.count["linear"]),
            "conv2d": (kinds["conv2d"], calls.count["conv2d"]),
            "products": (
                sum(kinds[name] for name in PRODUCTS),
                sum(calls.count[name] for name in PRODUCTS),
            ),
            "attention": (len(quantized_products & set(attention)), len(attention)),
            "macs": (sum(op.macs for op in ops), flops.get_total_flops() / 2 / len(images)),
        },
        "softmax_called": calls.count["softmax"],
        "softmax_twins": quantizers["twin_softmax"],
        "gelu_twins": quantizers["twin_gelu"],
        "macs_quantized": chosen.macs_quantized,
        "batch_norms_folded": len(folded),
        "float_difference": difference,
        "folding_difference": folding_difference,
    }
    if max(difference, folding_difference) > UNCHANGED:
        figures["double_difference"] = _difference_in_double(model, images)
    return figures


def _difference_in_double(model: nn.Module, images: Tensor) -> float | None:
    """What preparing changes apart from rounding; None for models that insist on float32."""
    model, images = copy.deepcopy(model).double(), images.double()
    prepared = copy.deepcopy(model)
    try:
        with torch.no_grad():
            reference = model(images)
            prepare(prepared, Batch((images,), {}))
            fold_batch_norms(prepared, hooks.trace(prepared, images))
            return _relative(prepared(images), reference)
    except (DataError, RuntimeError):
        return None


def _relative(output: Tensor, reference: Tensor) -> float:
    return ((output - reference).abs().max() / reference.abs().max()).item()


def exported(name: str) -> dict[str, Any]:
    """What OpenVINO's own tracing makes of a quantized model with a scale per tensor: its CPU
    plugin refuses some scales per head."""
    started = time.process_time()
    figures: dict[str, Any] = {}
    try:
        model, size, _ = build(name)
        images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
        per_tensor = {**SHORT_SEARCH, "activations": {"granularity": "tensor"}, "metric": "mse"}
        result = ptq4vit_plugin.quantize(model, [images], per_tensor)
        with torch.no_grad():
            logits = result(images)
            converted = openvino.convert_model(result, example_input=images)
        # Without 8-bit kernels OpenVINO's sums with convolutions are wrong where the batch is free.
        converted.reshape(list(images.shape))
        figures["openvino_db"] = openvino_db(converted, images, logits, FLOAT_KERNELS)
        if figures["openvino_db"] < MATCHING_DB:
            figures["openvino_int8_db"] = openvino_db(converted, images, logits, EXACT)
    except Exception as error:
        reason = " ".join(str(error).split())[-300:]
        figures["openvino_failure"] = f"{type(error).__name__}: {reason}"
    return figures | {"openvino_seconds": time.process_time() - started}


def written(name: str) -> dict[str, Any]:
    """What `export` says of a model in each format, quantized with ``target: openvino``."""
    started = time.process_time()
    files: dict[str, Any] = {}
    model, size, _ = build(name)
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
    # Without gradients: with random weights they can vanish.
    settings = {**SHORT_SEARCH, "target": "openvino", "metric": "mse"}
    result = ptq4vit_plugin.quantize(model, [images], settings)
    for format in FORMATS:
        try:
            with tempfile.TemporaryDirectory() as folder:
                # Anything is written: the table says how far it is from the model.
                report = ptq4vit_plugin.export(
                    result, Path(folder) / "model", format, images, min_sqnr=-100
                )
            exact = report.sqnr_db if report.exact_sqnr_db is None else report.exact_sqnr_db
            files[format] = {
                "sqnr_db": min(200.0, exact),
                "image_size": report.image_size,
                "integer": report.facts.get("integer_products", report.facts.get("integer_ops")),
                "planned": report.facts.get("planned_products"),
            }
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            files[format] = {"failure": f"{type(error).__name__}: {reason}"}
    return {"files": files, "files_seconds": time.process_time() - started}


def openvino_db(model: openvino.Model, images: Tensor, logits: Tensor, settings: dict) -> float:
    """SQNR of OpenVINO's logits against PyTorch's."""
    compiled = openvino.compile_model(model, "CPU", settings)
    return sqnr(logits, torch.from_numpy(compiled(images.numpy())[0].copy()))


def sqnr(reference: Tensor, other: Tensor) -> float:
    """SQNR in dB, 200 at most."""
    return min(200.0, logit_sqnr(reference, other))


# --- the table ------------------------------------------------------------------------------------


def planning_seconds(name: str = "vit_base_patch16_224") -> float:
    """Seconds to plan a full-size model that is there."""
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, 224, 224)
    started = time.process_time()
    plan(model, images)
    return time.process_time() - started


def write(path: Path, results: dict[str, Any]) -> None:
    """The page with one row per family."""
    models = {m: name for m, name in sorted(results["families"].items()) if name}
    rows = {m: results["models"][m] for m in models if m in results.get("models", {})}
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(page(results, rows)) + "\n", encoding="utf-8")
    print(path)


def page(results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    modules = results["families"]
    families = [m for m, name in modules.items() if name]
    tried = [r for r in rows.values() if "openvino_seconds" in r or "openvino_db" in r]
    attention = [r["counted"]["attention"] for r in rows.values() if "counted" in r]
    shares = [r["macs_quantized"] for r in rows.values() if "macs_quantized" in r]
    differences = [r["float_difference"] for r in rows.values() if "float_difference" in r]
    folding = [r["folding_difference"] for r in rows.values() if "folding_difference" in r]
    return [
        "# Coverage of timm's attention models",
        "",
        "Written by `python benchmarks/coverage.py write --results benchmarks/coverage.json --page "
        "docs/coverage.md`; do not edit. `survey`, `measure`, `export` and `files` of the same "
        "script made the numbers.",
        "",
        "## How families are counted",
        "",
        f"timm {timm.__version__} has {len(modules)} modules of models "
        "(`timm.models.list_modules()`). A module is a *family* here if one of its models, run on "
        "one image, multiplies two tensors neither of which is a parameter (`matmul`, `bmm`, "
        "`einsum`, `scaled_dot_product_attention` and their kin, seen by a `TorchFunctionMode`): "
        "that is what attention does, whatever the class is called. Models of a module are tried "
        "from the smallest on, one per pair of leading name parts. "
        f"**{len(families)} modules** are families. The others: "
        f"{', '.join(m for m in modules if not modules[m])}.",
        "",
        f"Of each family the smallest such model is taken, with {CLASSES} classes, random weights "
        "(norms, layer scales and batch statistics random too), two blocks per stage where timm "
        f"has an argument for that, and the smallest image size of {SIZES[0]} ... {SIZES[-1]} that "
        f"it accepts. Calibration and measurement: the same {IMAGES} random images, W8A8, one "
        f"round of {SHORT_SEARCH['search_range']['n']} candidates. Random models say what works, "
        "not how good a trained model will be.",
        "",
        "## Result",
        "",
        f"- quantized, evaluated, saved and loaded with bit-identical logits: "
        f"**{sum(map(works, rows.values()))} of {len(families)}**",
        f"- OpenVINO runs the quantized model with the same logits (at least {MATCHING_DB} dB): "
        f"**{sum(map(exports, rows.values()))} of {len(tried)}** that were tried",
        "- products before and after a softmax that are quantized, of those an independent count "
        f"of calls found: **{sum(a for a, _ in attention)} of {sum(b for _, b in attention)}**",
        f"- mean share of multiply-accumulates quantized: **{sum(shares) / len(shares):.2%}**, "
        f"least {min(shares):.2%}",
        "- largest relative difference of float logits made by preparing the model: "
        f"**{max(differences):.1e}**; with batch norms folded into convolutions as well: "
        f"{max(folding):.1e}",
        f"- planning a ViT-B/16 at 224: **{results['plan_vit_b_seconds']:.1f} s** of CPU time",
        "",
        "Columns. *ops*: linears, convolutions and products that are quantized. *left out*: those "
        "that are not. *found / called*: linears, convolutions, products, and products before or "
        "after a softmax, in the plan against the independent count. *softmax*: softmax twins of "
        "softmax calls; a softmax that is mixed with something else before its product has a "
        "uniform quantizer. *GELU*: twins of functions with a small negative range. *MACs*: share "
        "of multiply-accumulates with both operands quantized, in parentheses the plan's total "
        "over PyTorch's own FLOP counter. *SQNR*: of the logits, in dB. *again*: the saved and "
        "loaded model gives bit-identical logits. *OpenVINO*: SQNR of OpenVINO's logits against "
        "the quantized model's, in dB, with one scale per tensor, traced by "
        "`openvino.convert_model` and run without 8-bit kernels; ʰ: with a scale per head, which "
        "OpenVINO's CPU plugin refuses for some models; ⁸: with 8-bit kernels. *s*: CPU seconds "
        "for all of this.",
        "",
        "| family | model | image | ops | left out | found / called | softmax | GELU | MACs | SQNR "
        "| again | OpenVINO | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(module, result) for module, result in rows.items()),
        "",
        *files_table(rows),
        "",
        "## What is left out, and failures",
        "",
        *(f"- {module}: not measured yet" for module in families if module not in rows),
        *(line for module, result in rows.items() for line in remarks(module, result)),
    ]


def files_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What `export` writes for each family."""
    known = {m: r["files"] for m, r in rows.items() if "files" in r}
    good = {f: sum(r[f].get("sqnr_db", 0) >= MATCHING_DB for r in known.values()) for f in FORMATS}
    free = {f: sum(r[f].get("image_size") == "free" for r in known.values()) for f in FORMATS}
    return [
        "## Exported files",
        "",
        "`ptq4vit_plugin.export` of the same models, quantized with `target: openvino`, in every "
        f"format (`files` of the script). At least {MATCHING_DB} dB from the simulation: "
        f"{', '.join(f'{f} **{good[f]} of {len(known)}**' for f in FORMATS)}. Image size free: "
        f"{', '.join(f'{f} {free[f]}' for f in FORMATS)}; timm's defaults, most of which fix it.",
        "",
        "Cells. SQNR of the file's logits against the simulation's on the same images, in dB, "
        "where the runtime has such a mode with its quantizers in float arithmetic; products that "
        "run as integers of those planned (integer: ops); *free*: image size.",
        "",
        f"| family | {' | '.join(FORMATS)} | s |",
        "|---" * (len(FORMATS) + 2) + "|",
        *(
            f"| {module} | {' | '.join(file_cell(files[f]) for f in FORMATS)} "
            f"| {rows[module]['files_seconds']:.0f} |"
            for module, files in known.items()
        ),
        "",
        *(
            f"- {module}: {f}: {files[f]['failure']}"
            for module, files in known.items()
            for f in FORMATS
            if "failure" in files[f]
        ),
    ]


def file_cell(found: dict[str, Any]) -> str:
    """One file in the table."""
    if "failure" in found:
        return "fails"
    planned = "" if found["planned"] is None else f" of {found['planned']}"
    free = ", free" * (found["image_size"] == "free")
    return f"{found['sqnr_db']:.0f}, {found['integer']}{planned}{free}"


def remarks(module: str, result: dict[str, Any]) -> list[str]:
    """Reasons, one per line."""
    lines = []
    for reason, count in result.get("left_out", {}).items():
        lines.append(f"- {module}: {count} op{'s' * (count > 1)}: {reason}")
    for key in ("failure", "openvino_failure", "openvino_failure_with_heads", "remark"):
        if key in result:
            lines.append(f"- {module}: {key.replace('_', ' ')}: {result[key]}")
    if "openvino_int8_db" in result:
        lines.append(
            f"- {module}: without 8-bit kernels (`LP_TRANSFORMS_MODE: NO`) OpenVINO's logits are "
            f"{result['openvino_db']:.1f} dB from the model's, with them "
            f"{result['openvino_int8_db']:.1f} dB"
        )
    return lines


def works(result: dict[str, Any]) -> bool:
    """Quantized, evaluated, saved, loaded and the same."""
    return bool(result.get("identical")) and "failure" not in result


def exports(result: dict[str, Any]) -> bool:
    """OpenVINO computes the same logits."""
    return max(result.get(key, 0) for key in ("openvino_db", "openvino_int8_db")) >= MATCHING_DB


def row(module: str, result: dict[str, Any]) -> str:
    """One row of the table; what was not reached stays empty."""
    counted = result.get("counted", {})
    macs = counted.get("macs")
    cells = [
        module,
        f"`{result['model']}`",
        result.get("image_size"),
        result.get("ops"),
        sum(result.get("left_out", {}).values()),
        ", ".join(f"{a} / {b}" for key, (a, b) in counted.items() if key != "macs"),
        f"{result['softmax_twins']} / {result['softmax_called']}" if counted else None,
        result.get("gelu_twins"),
        f"{result['macs_quantized']:.1%} ({macs[0] / macs[1]:.3f})" if macs else None,
        f"{result['sqnr_db']:.1f}" if "sqnr_db" in result else None,
        {True: "yes", False: "NO"}.get(result.get("identical")),
        _openvino(result),
        f"{result['seconds'] + result.get('openvino_seconds', 0):.0f}" if counted else None,
    ]
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _openvino(result: dict[str, Any]) -> str | None:
    if "openvino_int8_db" in result:
        return f"{result['openvino_int8_db']:.0f}⁸"
    if "openvino_db" not in result:
        return None
    heads = result.get("openvino_scales") == "head"
    return f"{result['openvino_db']:.0f}{'ʰ' * heads}"


def store(path: Path, results: dict[str, Any]) -> None:
    """Keep what is known so far."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("survey", "measure", "export", "files", "write"))
    parser.add_argument("families", nargs="*", help="only these; measured again if they were")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    for name, default, what in (
        ("--results", RESULTS, "JSON file of what is known"),
        ("--page", PAGE, "Markdown file that `write` writes"),
    ):
        parser.add_argument(
            name,
            type=Path,
            default=default,
            metavar="FILE",
            help=f"{what} (default: {default} in the working directory)",
        )
    options = parser.parse_args(given)
    path = options.results
    warnings.filterwarnings("ignore")
    deadline = time.monotonic() + options.seconds
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if options.step != "survey" and "families" not in results:
        parser.error(f"{path} has no families; `survey` finds them, or give --results")
    if options.step == "survey":
        survey(path, results, deadline)
    elif options.step == "write":
        write(options.page, results)
    else:
        models = results.setdefault("models", {})
        if "plan_vit_b_seconds" not in results:
            results["plan_vit_b_seconds"] = planning_seconds()
            store(path, results)
        families = {m: name for m, name in results["families"].items() if name}
        if unknown := set(options.families) - set(families):
            parser.error(f"no family: {', '.join(sorted(unknown))}; see `families` in {path}")
        key = {
            "measure": "seconds",
            "export": "openvino_seconds",
            "files": "files_seconds",
        }[options.step]
        waiting = [m for m in families if key not in models.get(m, {})]
        for module in options.families or waiting:
            if time.monotonic() > deadline:
                break
            if options.step == "measure":
                models[module] = measure(families[module])
            elif options.step == "files":
                models[module] = models[module] | written(families[module])
            else:
                kept = models.get(module, {"model": families[module]})
                kept = {k: v for k, v in kept.items() if not k.startswith("openvino")}
                models[module] = kept | exported(families[module])
            store(path, results)
            print(row(module, models[module]), models[module].get("failure", ""), flush=True)


if __name__ == "__main__":
    main()
