"""Latency of a model in every form that it can run in, in one table of one run.

    python benchmarks/latency.py quality --trained FOLDER
    python benchmarks/latency.py build --models vit_small_patch16_224
    python benchmarks/latency.py time --models vit_small_patch16_224
    python benchmarks/latency.py profile --models vit_small_patch16_224
    python benchmarks/latency.py table

`build` writes every form of a model into --forms, each once: a form that is there already is not
built again. `time` builds what is missing, then runs all forms in turns, so that a machine that
gets slower does so for all of them, and puts the times of every turn into
``benchmarks/latency.json``. Ratios are medians over turns. Weights are random and calibration is
short, neither of which changes a time; only which twins ``auto`` keeps depends on them, and is
printed. Plans have ``target: openvino``. `quality` measures the same forms on a small trained model
(see `trained.py`), calibrated properly; `profile` prints where OpenVINO itself spends the time. All
parts take --smoke, a tiny model that only shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nncf
import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from trained import Trained

import ptq4vit_plugin as ptq
from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.openvino.ir import core, in_float
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.record import record_of

RESULTS = Path(__file__).with_name("latency.json")
MODELS = ("vit_small_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
SMOKE = Recipe(
    name="vit_tiny_patch16_224",
    args=dict(img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=64, num_heads=2),
)
SHORT = {"metric": "mse", "search_range": {"n": 2}, "rounds": 1}
PROPER = {"search_range": {"n": 40}, "rounds": 1}
UNIFORM = {"softmax": False, "gelu": False}
PLANS = {
    "uniform": {"algorithm": "ptq4vit", "twin": UNIFORM},
    "uniform W7": {"algorithm": "ptq4vit", "twin": UNIFORM, "weights": {"bits": 7}},
    "auto": {"algorithm": "ptq4vit", "twin": {"softmax": "auto", "gelu": "auto"}},
    "full twin": {"algorithm": "ptq4vit"},
    "ptq4vit_plus": {"algorithm": "ptq4vit_plus"},
}
#: How a plan's file ends, its format, and the options of that.
FORMATS = {
    ".xml": ("openvino", {}),
    ".onnx": ("onnx", {}),
    " signed.onnx": ("onnx", {"unsigned": False}),
    ".safetensors": ("integer", {}),
}
REFERENCES = ("PyTorch float", "OpenVINO float, {hint}", "OpenVINO NNCF default int8, {hint}")
WARM_UP = 2

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A file of a model and how it is run; the hint is OpenVINO's precision of what is float."""

    title: str
    file: str
    hint: str = "f32"


def forms() -> list[Form]:
    """All forms on this machine."""
    hints = ["f32"]
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hints.append("bf16")
    made = [Form("PyTorch float", "float.pt"), Form("ONNX Runtime float", "float.onnx")]
    made += [Form(f"PyTorch integer {plan}", f"{plan}.safetensors") for plan in PLANS]
    made += [Form(f"ONNX Runtime {plan}", f"{plan}.onnx") for plan in PLANS]
    made += [Form(f"ONNX Runtime {plan}, signed", f"{plan} signed.onnx") for plan in PLANS]
    for hint in hints:
        made.append(Form(f"OpenVINO float, {hint}", "float.xml", hint))
        made.append(Form(f"OpenVINO NNCF default int8, {hint}", "nncf.xml", hint))
        made += [Form(f"OpenVINO {plan}, {hint}", f"{plan}.xml", hint) for plan in PLANS]
    return made


def build(
    model: nn.Module, images: list[Tensor], settings: dict, folder: Path
) -> dict[str, str | dict]:
    """Write the files that are missing.

    Returns
    -------
    dict
        What the exporters say by file; for one that cannot be written, why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts_file = folder / "facts.json"
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    example = images[0]
    if not (folder / "float.onnx").exists():
        with torch.no_grad():
            torch.onnx.export(
                model,
                (example,),
                folder / "float.onnx",
                dynamo=False,
                input_names=["images"],
                dynamic_axes={"images": {0: "batch"}},
            )
    if not (folder / "nncf.xml").exists():
        with torch.no_grad():
            made = openvino.convert_model(model, example_input=example)
        made.reshape([-1, *example.shape[1:]])
        openvino.save_model(made, folder / "float.xml", compress_to_fp16=False)
        data = nncf.Dataset(torch.cat(images).split(1), lambda image: image.numpy())
        made = nncf.quantize(made, data, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(made, folder / "nncf.xml", compress_to_fp16=False)
    for plan, fields in PLANS.items():
        simulated = folder / f"simulated {plan}.safetensors"
        try:
            if not simulated.exists():
                print(f"  calibrating {plan}", flush=True)
                config = {**fields, **settings, "target": "openvino"}
                ptq.save(ptq.quantize(model, images, config), simulated)
            quantized = None
            for suffix, (format, options) in FORMATS.items():
                path = folder / f"{plan}{suffix}"
                if not path.exists():
                    quantized = quantized or ptq.load(simulated)
                    print(f"  writing {path.name}", flush=True)
                    # Random weights make noise of the logits; quality is measured elsewhere.
                    report = ptq.export(quantized, path, format, example, min_sqnr=-1000, **options)
                    facts[path.name] = {**report.facts, "twins": twins(quantized)}
                    facts_file.write_text(json.dumps(facts, indent=1))
        except (PTQ4ViTError, RuntimeError) as error:
            print(f"  {plan}: {error}")
            facts[plan] = str(error)
    return facts


def twins(model: nn.Module) -> dict[str, str]:
    """How many operands that could have a twin quantizer have one."""
    kinds = {"softmax": ("softmax",), "gelu": ("gelu", "gelu_tanh", "quick_gelu", "silu")}
    operands = [operand for op in record_of(model).plan.ops for operand in op.operands]
    counts = {}
    for kind, sources in kinds.items():
        mine = [operand.quantizer for operand in operands if operand.source in sources]
        counts[kind] = f"{sum(str(name).startswith('twin') for name in mine)}/{len(mine)}"
    return counts


def runner(form: Form, folder: Path, model: nn.Module) -> Run:
    """A form, ready to run on as many threads as torch has."""
    path, threads = folder / form.file, torch.get_num_threads()
    if path.suffix == ".pt":
        return model
    if path.suffix == ".safetensors":
        return ptq.load(path)
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Else its threads go on spinning after a call, on the cores that the next form runs on.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    properties = {
        "INFERENCE_PRECISION_HINT": form.hint,
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core().compile_model(path, "CPU", properties)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


@torch.inference_mode()
def turns(runs: dict[str, Run], images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call of every form; the forms take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + WARM_UP):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if turn >= WARM_UP:
                times[name].append(round(1000 * (time.perf_counter() - start), 3))
    return times


def recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """The models that are asked for, by name."""
    if arguments.smoke:
        return {"smoke": SMOKE}
    return {name: Recipe(name=name) for name in arguments.models}


def model_of(recipe: Recipe) -> nn.Module:
    """A model with random weights, also where timm begins with 0 and 1.

    Runtimes leave out a bias of zeros and a norm's factors of ones; no trained model has them.
    """
    torch.manual_seed(0)
    model = create(recipe)
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.dim() == 1):
            vector.add_(0.1 * torch.randn_like(vector))
    return model


def images_of(model: nn.Module, number: int) -> Tensor:
    """Noise of a model's input size."""
    size = model.patch_embed.img_size
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))


def build_all(arguments: argparse.Namespace) -> None:
    """Write every form of every model."""
    for name, recipe in recipes(arguments).items():
        model = model_of(recipe)
        print(name, flush=True)
        build(model, [images_of(model, 2)], SHORT, arguments.forms / name)


def time_all(arguments: argparse.Namespace) -> None:
    """Time every form of every model."""
    results = read(arguments.results)
    results["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "openvino_capabilities": core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "threads": torch.get_num_threads(),
        "openvino": openvino.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }
    for name, recipe in recipes(arguments).items():
        model = model_of(recipe)
        folder = arguments.forms / name
        facts = build(model, [images_of(model, 2)], SHORT, folder)
        runs = {
            form.title: runner(form, folder, model)
            for form in forms()
            if form.file == "float.pt" or (folder / form.file).exists()
        }
        kept = results.setdefault("models", {}).setdefault(name, {})
        kept["facts"] = facts
        for batch in arguments.batches:
            print(f"{name}, batch {batch}", flush=True)
            kept[f"batch {batch}"] = turns(runs, images_of(model, batch), arguments.repeats)
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    table(arguments)


def quality(arguments: argparse.Namespace) -> None:
    """Measure agreement with the float model and logit SQNR of every form, on a trained model."""
    if arguments.trained is None or not (arguments.trained / "data.npz").exists():
        print("quality: skipped, no folder with a trained model (--trained FOLDER)")
        return
    trained = Trained(arguments.trained, 16 if arguments.smoke else 500)
    model = trained.model("model")
    folder = arguments.forms / "trained"
    build(model, trained.calibration, SHORT if arguments.smoke else PROPER, folder)
    with torch.inference_mode():
        reference = model(trained.images)
    results = read(arguments.results)
    found = {}
    for form in forms():
        if form.file != "float.pt" and not (folder / form.file).exists():
            continue
        ways = {"": runner(form, folder, model)}
        if form.hint == "f32" and form.file.endswith(".xml") and form.file != "float.xml":
            exact = in_float(core().read_model(folder / form.file))
            ways["exact_"] = lambda images, run=exact: torch.from_numpy(run(images)[0])
        found[form.title] = {}
        for way, run in ways.items():
            with torch.inference_mode():
                logits = run(trained.images)
            same = (logits.argmax(1) == reference.argmax(1)).double().mean().item()
            sqnr = min(logit_sqnr(reference, logits), 999.0)
            found[form.title] |= {f"{way}agreement": 100 * same, f"{way}sqnr_db": sqnr}
    results["quality"] = {"images": len(trained.images), "forms": found}
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    table(arguments)


def profile(arguments: argparse.Namespace) -> None:
    """Print OpenVINO's own times by kind of node and kernel, largest first."""
    for name, recipe in recipes(arguments).items():
        images = images_of(create(recipe), arguments.batches[0]).numpy()
        for form in (form for form in forms() if form.file.endswith(".xml")):
            path = arguments.forms / name / form.file
            if not path.exists():
                print(f"{name}, {form.title}: not built")
                continue
            properties = {"INFERENCE_PRECISION_HINT": form.hint, "PERF_COUNT": "YES"}
            properties["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
            request = core().compile_model(path, "CPU", properties).create_infer_request()
            kinds: dict[str, list[float]] = {}
            for turn in range(arguments.repeats + WARM_UP):
                request.infer([images])
                if turn < WARM_UP:
                    continue
                times: dict[str, float] = {}
                for node in request.profiling_info:
                    kind = f"{node.node_type} {node.exec_type}"
                    spent = 1000 * node.real_time.total_seconds()
                    times[kind] = times.get(kind, 0.0) + spent
                for kind, spent in times.items():
                    kinds.setdefault(kind, []).append(spent)
            medians = {kind: statistics.median(values) for kind, values in kinds.items()}
            largest = sorted(medians, key=medians.get, reverse=True)[:6]
            shares = ", ".join(f"{kind} {medians[kind]:.1f}" for kind in largest)
            print(f"{name}, {form.title}: {sum(medians.values()):.1f} ms: {shares}", flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Print what is in the results as Markdown."""
    results = read(arguments.results)
    judged = results.get("quality", {}).get("forms", {})
    print(f"\n{results.get('machine', 'nothing timed yet')}")
    for name, kept in results.get("models", {}).items():
        for batch in [key for key in kept if key.startswith("batch")]:
            times = kept[batch]
            print(f"\n{name}, {batch}, {len(next(iter(times.values())))} turns\n")
            print(
                "| form | ms | over PyTorch float | over OpenVINO float | over NNCF int8 "
                "| agreement % | SQNR dB | SQNR dB, float arithmetic |"
            )
            print("|---" * 8 + "|")
            for title in times:
                print(row(title, times, judged.get(title, {})))
        counts = {file: f["twins"] for file, f in kept["facts"].items() if "twins" in f}
        print(f"\ntwins kept by auto: {counts.get('auto.xml')}")
        for plan in PLANS:
            if isinstance(kept["facts"].get(plan), str):
                print(f"{plan} was not built: {kept['facts'][plan]}")
    if judged:
        print(f"\nquality of the trained model on {results['quality']['images']} images\n")
        print("| form | agreement % | SQNR dB | SQNR dB, float arithmetic |\n|---|---|---|---|")
        for title, value in judged.items():
            print(f"| {title} | {' | '.join(quality_cells(value))} |")


def row(title: str, times: dict[str, list[float]], judged: dict[str, float]) -> str:
    """One form's line of the table; ratios are of the same hint, medians over turns."""
    hint = "bf16" if title.endswith(", bf16") else "f32"
    cells = [title, f"{statistics.median(times[title]):.1f}"]
    for reference in REFERENCES:
        others = times[reference.format(hint=hint)]
        ratios = [mine / other for mine, other in zip(times[title], others, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f}")
    return f"| {' | '.join([*cells, *quality_cells(judged)])} |"


def quality_cells(judged: dict[str, float]) -> list[str]:
    """Agreement, SQNR as the form runs here, SQNR in float arithmetic."""
    names = ("agreement", "sqnr_db", "exact_sqnr_db")
    return [f"{judged[name]:.1f}" if name in judged else "" for name in names]


def read(path: Path) -> dict:
    """What earlier runs measured."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(given: list[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    for name, run in (
        ("build", build_all),
        ("time", time_all),
        ("quality", quality),
        ("profile", profile),
        ("table", table),
    ):
        part = parts.add_parser(name, help=run.__doc__)
        part.add_argument("--models", nargs="+", default=MODELS)
        part.add_argument("--forms", type=Path, default=Path("latency-forms"), metavar="FOLDER")
        part.add_argument("--results", type=Path, default=RESULTS)
        part.add_argument("--smoke", action="store_true")
        part.add_argument("--batches", type=int, nargs="+", default=[1, 8])
        part.add_argument("--repeats", type=int, default=15)
        part.add_argument("--trained", type=Path, metavar="FOLDER")
        part.set_defaults(run=run)
    arguments = parser.parse_args(given)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
