"""Whether exported models compute what the simulation computes, and how much of it in integers.

    python benchmarks/deployment.py ops --trained FOLDER       # op by op, against the simulation
    python benchmarks/deployment.py whole --trained FOLDER     # whole models, every format
    python benchmarks/deployment.py quantizers --trained FOLDER
    python benchmarks/deployment.py table

Nothing here depends on time. Each part puts its numbers into ``benchmarks/deployment.json`` as soon
as it has them, and does not compute again what is there. --only takes some. FOLDER is described in
`trained.py`; `ops` also takes ViT-S and Swin-T, with random weights.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trained import Trained

import ptq4vit_plugin as ptq
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.exporting import exporter_of
from ptq4vit_plugin.integrations.integer.model import integer_model
from ptq4vit_plugin.integrations.integer.ops import WeightedOp
from ptq4vit_plugin.integrations.integer.product import batched_product
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.timm.models import Recipe, create

RESULTS = Path(__file__).with_name("deployment.json")
TRAINED = ("model", "model_outliers")
RANDOM = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")
BITS = (8, 6, 4)
SUFFIXES = {"integer": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}
#: How far from the middle between two levels, in steps, a number may lie whose code differs.
TIE = 1e-3
#: Rows of a product that are computed in int64 as well: that has no fast kernel.
ROWS = 32
#: Right factors of 7 bits and left ones of 8: no pair of products exceeds 16 bits.
NO_SATURATION = {
    "weights": {"bits": 7},
    "scope_overrides": {"{re}matmul": {"activations": {"bits": 7}}},
}


def given(arguments: argparse.Namespace, what: str) -> Trained | None:
    """The trained models of --trained; without any, it is said what is skipped."""
    if arguments.trained is None or not (arguments.trained / "data.npz").exists():
        print(f"{what}: skipped, no folder with a trained model (--trained FOLDER)")
        return None
    return Trained(arguments.trained)


def settings(bits: int, **more) -> dict:
    """A compression config; its search is coarse."""
    return {
        "algorithm": "ptq4vit",
        "weights": {"bits": bits},
        "activations": {"bits": bits},
        "search_range": {"n": 40},
        "rounds": 1,
        **more,
    }


# Op by op ----------------------------------------------------------------------------------------


@torch.no_grad()
def compare_ops(model: nn.Module, images: Tensor) -> dict:
    """Codes and accumulators of every op on what reaches it in the simulation.

    Codes come from NNCF's quantizers (their outputs over the step) and from the twins' own; the
    accumulators' reference is a product in int64.
    """
    seen, handles = {}, []
    for hook in hooks.hooks(model):
        key = (hook.op, hook.port if hook.when == "pre" else None)

        def see(module: nn.Module, args: tuple, out: Tensor, key: tuple = key) -> None:
            seen[key] = module, args[0], out

        handles.append(hook.module.register_forward_hook(see))
    model(images)
    for handle in handles:
        handle.remove()
    made, found = integer_model(model)
    total = different = off_tie = sums = wrong = 0
    for op in found:
        module = made.named_ops()[op.name]
        left = seen[op.name, 0][1] if (op.name, 0) in seen else None
        right = seen[op.name, 1][1] if op.kind == "matmul" else torch.empty(0)
        for port, ours in module.input_codes(left, right).items():
            quantizer, value, out = seen[op.name, port]
            if hasattr(quantizer, "to_codes"):
                theirs = quantizer.to_codes(value)
                twin = hasattr(quantizer, "grid")
                step = quantizer.grid().codes(value)[2] if twin else None  # of every number
            else:
                step = quantizer.scale / quantizer.level_high
                theirs = (out / step).round()
            unequal = ours != theirs
            total, different = total + ours.numel(), different + int(unequal.sum())
            if unequal.any() and step is not None:
                position = (value.double() / step.double())[unequal]
                off_tie += int(((position - position.floor() - 0.5).abs() > TIE).sum())
            elif unequal.any():
                off_tie += int(unequal.sum())
        for ours, exact in accumulators(op, module, left, right):
            sums, wrong = sums + ours.numel(), wrong + int((ours.long() != exact).sum())
    return {
        "ops": len(found),
        "codes": total,
        "different": different,
        "different_and_no_tie": off_tie,
        "accumulators": sums,
        "wrong_accumulators": wrong,
    }


def accumulators(
    op, module: nn.Module, left: Tensor, right: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some integer sums of an op, by its own product and in int64."""
    if op.kind == "conv2d":
        return
    for branch in module.left.branches:
        codes = branch.codes(left)
        if isinstance(module, WeightedOp):
            rows = codes.reshape(-1, codes.shape[-1])[:ROWS]
            yield module.accumulators(rows, branch.lowest), rows.long() @ module.codes.long().t()
            continue
        for other in module.right.branches:
            factor = other.codes(right)[:1]
            largest = module.left.largest * module.right.largest
            ours = batched_product(codes[:1, ..., :ROWS, :], factor, largest)
            yield ours, codes[:1, ..., :ROWS, :].long() @ factor.long()


def ops(arguments: argparse.Namespace) -> None:
    """Compare codes and accumulators op by op."""
    trained = given(arguments, "trained models")
    if trained is not None:
        for name in TRAINED:
            for bits in BITS:
                title = f"{name} W{bits}A{bits}"
                keep(arguments, "ops", title, trained_ops, trained, name, settings(bits))
    for name in RANDOM:
        for bits in BITS:
            config = settings(bits, metric="mse", search_range={"n": 4})
            keep(arguments, "ops", f"{name} W{bits}A{bits}", random_ops, name, config)


def trained_ops(trained: Trained, name: str, config: dict) -> dict:
    """Compare the ops of a trained model."""
    quantized = ptq.quantize(trained.model(name), trained.calibration, config)
    return compare_ops(quantized, trained.images[:4])


def random_ops(name: str, config: dict) -> dict:
    """Compare the ops of a model with random weights, on noise."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)
    quantized = ptq.quantize(create(Recipe(name=name)), [images[:2]], config)
    return compare_ops(quantized, images)


# Whole models ------------------------------------------------------------------------------------


def whole(arguments: argparse.Namespace) -> None:
    """Compare whole models with the float model and with the simulation, in every format."""
    if (trained := given(arguments, "whole")) is None:
        return
    plans = {f"W{bits}A{bits}": settings(bits) for bits in BITS}
    plans["W7A8, products of attention 7"] = settings(8, **NO_SATURATION)
    for name in TRAINED:
        for title, config in plans.items():
            keep(arguments, "whole", f"{name} {title}", compare_formats, trained, name, config)


@torch.no_grad()
def compare_formats(trained: Trained, name: str, config: dict) -> dict:
    """SQNR in dB over the float model and over the simulation, sizes, and integer products."""
    model, images = trained.model(name), trained.images
    with torch.enable_grad():
        quantized = ptq.quantize(model, trained.calibration, config)
    reference, simulated = model(images), quantized(images)
    found = {
        "images": len(images),
        "simulated": {
            "over_float": logit_sqnr(reference, simulated),
            "agreement": agreement(reference, simulated),
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        for format, suffix in SUFFIXES.items():
            path = Path(folder) / f"model{suffix}"
            report = ptq.export(quantized, path, format, trained.calibration[0], min_sqnr=0)
            exporter = exporter_of(path)
            ways = {format: exporter.read(path)}
            if format == "openvino":
                ways["openvino in float arithmetic"] = exporter.read_in_float(path)
            for way, run in ways.items():
                logits = torch.cat([run(batch) for batch in images.split(100)])
                found[way] = {
                    "over_float": logit_sqnr(reference, logits),
                    "over_simulated": logit_sqnr(simulated, logits),
                    "agreement": agreement(reference, logits),
                    "ratio": report.ratio,
                    "facts": report.facts,
                }
        float_ir(model, images[:1], Path(folder) / "float.xml")
        sizes = [
            sum((Path(folder) / f"{stem}{end}").stat().st_size for end in (".xml", ".bin"))
            for stem in ("model", "float")
        ]
        found["openvino"]["over_float_ir"] = sizes[0] / sizes[1]
    return found


def float_ir(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write the float model as float32 IR."""
    import openvino

    openvino.save_model(
        openvino.convert_model(model, example_input=example), path, compress_to_fp16=False
    )


def agreement(first: Tensor, second: Tensor) -> float:
    """Images in percent with the same best class."""
    return 100 * (first.argmax(1) == second.argmax(1)).double().mean().item()


# Quantizers of softmax, and of GELU --------------------------------------------------------------


def quantizers(arguments: argparse.Namespace) -> None:
    """Compare what can quantize the output of softmax, and of GELU."""
    if (trained := given(arguments, "quantizers")) is None:
        return
    choices = {
        "softmax twin": {},
        "softmax uniform": {"twin": {"softmax": False}},
        "softmax numerator": {"twin": {"softmax": "numerator"}},
        "both auto": {"twin": {"softmax": "auto", "gelu": "auto"}},
        "both uniform": {"twin": {"softmax": False, "gelu": False}},
        "target openvino": {"target": "openvino"},
    }
    for name in TRAINED:
        for bits in BITS:
            for what, fields in choices.items():
                config, title = settings(bits, **fields), f"{name} W{bits}A{bits} {what}"
                keep(arguments, "quantizers", title, compare_quantizers, trained, name, config)


def compare_quantizers(trained: Trained, name: str, config: dict) -> dict:
    """SQNR and agreement of the simulation, and what `auto` compared."""
    model = trained.model(name)
    quantized = ptq.quantize(model, trained.calibration, config)
    with torch.no_grad():
        reference, logits = model(trained.images), quantized(trained.images)
    operands = [operand for op in ptq.describe(quantized) for operand in op.operands]
    return {
        "over_float": logit_sqnr(reference, logits),
        "agreement": agreement(reference, logits),
        "twins": sum(str(operand.quantizer).startswith("twin") for operand in operands),
        "trials": [o.twin.uniform / o.twin.twin for o in operands if o.twin],
    }


# Results -----------------------------------------------------------------------------------------


def keep(
    arguments: argparse.Namespace, part: str, title: str, measure: Callable[..., dict], *given: Any
) -> None:
    """Measure unless it is in the results, print, and put it there."""
    if not re.search(arguments.only, title):
        return
    path = arguments.results
    known = json.loads(path.read_text()) if path.exists() else {}
    if title not in known.get(part, {}):
        result = measure(*given)
        known = json.loads(path.read_text()) if path.exists() else {}
        known.setdefault(part, {})[title] = result
        path.write_text(json.dumps(known, indent=1) + "\n")
    print(part, title, json.dumps(known[part][title]), flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    known = json.loads(arguments.results.read_text())
    print("| model | codes | different | of these no ties | accumulators | wrong |")
    print("|---" * 6 + "|")
    for title, r in known.get("ops", {}).items():
        share = 100 * r["different"] / r["codes"]
        print(
            f"| {title} | {r['codes']:,} | {r['different']} ({share:.5f} %) "
            f"| {r['different_and_no_tie']} | {r['accumulators']:,} | {r['wrong_accumulators']} |"
        )
    ways = ("integer", "onnx", "openvino", "openvino in float arithmetic")
    print(f"\n| model | simulated over float | {' | '.join(ways)} |")
    print("|---" * (2 + len(ways)) + "|")
    for title, r in known.get("whole", {}).items():
        cells = [f"{r[way]['over_float']:.1f} / {r[way]['over_simulated']:.1f}" for way in ways]
        print(f"| {title} | {r['simulated']['over_float']:.1f} | {' | '.join(cells)} |")
    print("\n| model | integer | ONNX | IR | IR over float IR | ONNX products | IR products |")
    print("|---" * 7 + "|")
    for title, r in known.get("whole", {}).items():
        sizes = " | ".join(f"{r[way]['ratio']:.3f}" for way in ways[:3])
        products = " | ".join(
            f"{r[way]['facts']['integer_products']} of {r[way]['facts']['planned_products']}"
            for way in ways[1:3]
        )
        print(f"| {title} | {sizes} | {r['openvino']['over_float_ir']:.3f} | {products} |")
    print("\n| model | quantizers | SQNR dB | agreement % | twins |\n|---|---|---|---|---|")
    for title, r in known.get("quantizers", {}).items():
        name, bits, what = title.split(" ", 2)
        print(
            f"| {name} {bits} | {what} | {r['over_float']:.1f} | {r['agreement']:.1f} "
            f"| {r['twins']} |"
        )


def main(argv: list[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    for run in (ops, whole, quantizers, table):
        part = parts.add_parser(run.__name__, help=run.__doc__)
        part.add_argument("--trained", type=Path, metavar="FOLDER")
        part.add_argument("--results", type=Path, default=RESULTS)
        part.add_argument("--only", default="", metavar="PATTERN", help="of titles in the results")
        part.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
