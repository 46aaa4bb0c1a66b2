"""What the command line does: one function per command, made of the public verbs."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from ptq4vit_plugin import artefacts
from ptq4vit_plugin import checkpoint as checkpoints
from ptq4vit_plugin import sweep as sweeps
from ptq4vit_plugin.algorithms.finished import remove
from ptq4vit_plugin.config import Config, parse
from ptq4vit_plugin.data import calibration_images, loader, open_dataset
from ptq4vit_plugin.errors import ConfigError, PTQ4ViTError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.evaluation import evaluate as measure
from ptq4vit_plugin.exporting import export as export_model
from ptq4vit_plugin.exporting import exporter_of
from ptq4vit_plugin.files import output_folder, written_whole
from ptq4vit_plugin.integrations.device import local_device
from ptq4vit_plugin.integrations.distributed import process_group, rank, ranks, wait_for_all
from ptq4vit_plugin.integrations.nncf.kernels import compiled_meanwhile
from ptq4vit_plugin.integrations.timm.images import open_image
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.pipeline import plan as make_plan
from ptq4vit_plugin.pipeline import quantize as quantize_model
from ptq4vit_plugin.record import describe as describe_model
from ptq4vit_plugin.record import record_of
from ptq4vit_plugin.reporting import report as reports
from ptq4vit_plugin.reporting import results as result_tables
from ptq4vit_plugin.reporting.events import event, json_lines
from ptq4vit_plugin.reporting.tables import (
    cost_line,
    export_table,
    metrics_table,
    plan_table,
    record_table,
)

RESULTS = "results.json"
CONFIG = "config.yaml"
FINISHED = "finished-ops"  # folder


@dataclass
class Run:
    """A config that was run: its models, and what is worth writing down."""

    quantized: nn.Module
    reference: nn.Module
    metrics: Metrics
    results: dict[str, Any]


def quantize(config: Config, output: Path | None, quiet: bool, log_json: bool = False) -> None:
    """Calibrate, evaluate and save; writes checkpoint, results, resolved config and report.

    Finished ops are kept in the output folder until then, so that the same command continues a run
    that was killed. Under torchrun all processes calibrate, and the first does the rest.
    """
    with ExitStack() as stack:
        stack.enter_context(process_group())
        if log_json and rank() == 0:
            stack.enter_context(json_lines(sys.stdout))
        folder = output_folder(output or config.output)
        silent = quiet or log_json
        done = run_config(config, not silent, resume=folder / FINISHED)
        if done is None:
            return
        extra = {"config": config.dump()}
        path = artefacts.save(done.quantized, folder, extra=extra, metrics=done.metrics)
        done.results["checkpoint"] = {"file": path.name, "bytes": path.stat().st_size}
        write_run(folder, config, done.results)
        remove(folder / FINISHED)
        event("written", folder=str(folder), files=[path.name, artefacts.CARD, RESULTS, CONFIG])
        if not silent:
            console = Console()
            console.print(metrics_table(done.metrics))
            record = record_of(done.quantized)
            if record is not None:
                console.print(cost_line(record))
            console.print(f"written: {folder}/{path.name}, {artefacts.CARD}, {RESULTS}, {CONFIG}")
            if absent := reports.missing():
                needed = " and ".join(absent)
                console.print(f"no report: it needs {needed} (ptq4vit-plugin\\[report])")


def run_config(config: Config, progress: bool, resume: Path | None = None) -> Run | None:
    """Calibrate and evaluate what a config says, on this process's device.

    Returns
    -------
    Run or None
        None in all processes but the first of those that calibrate together.
    """
    started = time.perf_counter()
    model = float_model(config)
    promised = any(step.get("accuracy") for step in config.compression)
    # Only the first of several processes evaluates, and needs the kernels.
    with compiled_meanwhile() if rank() == 0 else nullcontext():
        quantized = quantize_model(
            model,
            calibration(config, model),
            config,
            validation_dataset=evaluation(config, model) if promised else None,
            resume=resume,
        )
    calibrated = time.perf_counter()
    if rank() != 0:
        return None
    metrics = evaluate_with(config, quantized, model, progress)
    event("evaluated", **json.loads(metrics.model_dump_json()))
    record = record_of(quantized)
    results = {
        "metrics": metrics.model_dump(mode="json"),
        "seconds": {
            "calibration": calibrated - started,
            "evaluation": time.perf_counter() - calibrated,
        },
        "environment": environment(),
        "calibration": None if record is None else record.model_dump(mode="json"),
    }
    return Run(quantized, model, metrics, results)


def write_run(folder: Path, config: Config, results: dict[str, Any]) -> None:
    """Write a run's measurements and its resolved config, and the report if it can be drawn."""
    write_text(folder / CONFIG, yaml.safe_dump(config.dump(), sort_keys=False))
    write_text(folder / RESULTS, json.dumps(results))
    if not reports.missing():
        reports.write_report(folder)


def report(folder: Path) -> None:
    """Write ``report.html`` of a run folder."""
    Console().print(f"written: {reports.write_report(folder)}")


def environment() -> dict[str, str]:
    """Versions and hardware that measurements depend on."""
    names = ("ptq4vit-plugin", "torch", "timm", "nncf")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(local_device()),
        "threads": str(torch.get_num_threads()),
    }


def sweep(
    file: Path, only: Sequence[str], overrides: Sequence[str], output: Path | None, quiet: bool
) -> None:
    """Run the cells of a grid that have no result yet; under torchrun this process's share.

    A cell that fails is reported and has no result, so that the next call tries it again.
    """
    described = sweeps.read(file)
    if output is not None:
        described = described.model_copy(update={"output": output})
    cells = sweeps.cells(described, only, overrides, str(file))
    folder = output_folder(described.output)
    path = folder / sweeps.RESULTS
    known = {row["key"] for row in sweeps.results(path)} if path.exists() else set()
    number, processes = sweeps.torchrun()
    mine = sweeps.share(cells, number, processes)
    todo = [cell for cell in mine if cell.key not in known]
    console = Console(stderr=True, quiet=quiet)
    who = f"rank {number}: " if processes > 1 else ""
    console.print(f"{who}{len(mine)} cells, {len(mine) - len(todo)} of them done before")
    failed = []
    for place, cell in enumerate(todo, start=1):
        console.print(f"{who}{place}/{len(todo)} {cell.title}")
        try:
            done = run_config(cell.config, progress=not quiet)
        except (PTQ4ViTError, RuntimeError) as error:  # the latter: torch's, out of memory too
            failed.append(cell)
            print(f"{who}failed: {cell.title}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        write_run(output_folder(cell.config.output), cell.config, done.results)
        sweeps.append(path, result_tables.line(cell, done.results))
    if processes == 1 and path.exists():
        keys = {cell.key for cell in cells}
        rows = [row for row in sweeps.results(path) if row["key"] in keys]
        published = result_tables.read_published(described.published)
        print(result_tables.markdown(result_tables.compare(rows, published)), end="")
    wait_for_all()  # torchrun ends all processes when one has failed
    if failed:
        raise PTQ4ViTError(
            f"{who}{len(failed)} of {len(todo)} cells failed; run it again to retry them"
        )


def table(file: Path, form: str, published: Path | None) -> None:
    """Print the results of a sweep, published numbers beside them."""
    rows = result_tables.compare(sweeps.results(file), result_tables.read_published(published))
    print(result_tables.FORMATS[form](rows), end="")


def evaluate(checkpoint: Path, config: Config | None) -> None:
    """Measure a saved model against its float original; torchrun's processes share the images."""
    with process_group():
        file = artefacts.locate(checkpoint)
        quantized = checkpoints.load(file).to(local_device())
        if config is None:
            saved = checkpoints.read_metadata(file).extra.get("config")
            if saved is None:
                raise ConfigError(
                    f"'{checkpoint}' does not say on which data to evaluate; give --config"
                )
            config = parse(saved, str(checkpoint))
        metrics = evaluate_with(
            config, quantized, float_model(config), progress=rank() == 0, share=(rank(), ranks())
        )
        if rank() == 0:
            Console().print(metrics_table(metrics))


def describe(checkpoint: Path) -> None:
    """Print a record per op."""
    Console().print(record_table(describe_model(artefacts.load(checkpoint))))


def export(
    checkpoint: Path,
    format: str,
    output: Path | None,
    config: Config | None,
    min_sqnr: float,
    per_op: bool,
    options: list[str],
) -> None:
    """Write a saved model for a runtime; the comparison goes into ``results.json`` beside it."""
    checkpoint = artefacts.locate(checkpoint)
    model = checkpoints.load(checkpoint)
    given = dict(option.partition("=")[::2] for option in options)
    if config is None and (saved := checkpoints.read_metadata(checkpoint).extra.get("config")):
        config = parse(saved, str(checkpoint))
    images = None if config is None else calibration(config, model)
    path = output or checkpoint.with_name(f"{checkpoint.stem}-{format}")
    results = path.parent / RESULTS
    known = _known(results)
    report = export_model(
        model,
        path,
        format,
        images,
        min_sqnr,
        per_op,
        **{key: yaml.safe_load(value) for key, value in given.items()},
    )
    exports = {**known.get("exports", {}), format: report.model_dump(mode="json")}
    write_text(results, json.dumps({**known, "exports": exports}, indent=2))
    console = Console()
    console.print(export_table(report))
    console.print(f"written: {', '.join(str(path.parent / name) for name in report.files)}")


def _known(results: Path) -> dict[str, Any]:
    """What a ``results.json`` says, to be written again with more; empty if there is none."""
    if not results.exists():
        return {}
    try:
        known = json.loads(results.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not isinstance(known.get("exports", {}), dict):
            raise ValueError("not what a run or an export wrote")
    except (OSError, ValueError) as error:
        raise PTQ4ViTError(
            f"'{results}' is damaged: {error}; mend or remove it, an export adds to it"
        ) from error
    return known


def run(model: Path, images: list[Path]) -> None:
    """Print the five most probable classes of image files."""
    exporter = exporter_of(model)
    preprocessing = exporter.preprocessing(model)
    transform, classify = preprocessing.transform(), exporter.read(model)
    for path in images:
        with torch.inference_mode():
            logits = classify(transform(open_image(path))[None])[0]
        found = logits.float().softmax(0).topk(min(5, len(logits)))
        names = preprocessing.labels or [f"class {index}" for index in range(len(logits))]
        print(path)
        for probability, index in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            print(f"  {100 * probability:5.1f} %  {names[index]}")


def plan(config: Config) -> None:
    """Print what would be quantized."""
    model = float_model(config)
    images = next(iter(calibration(config, model, samples=1).get_inference_data()))
    Console().print(plan_table(make_plan(model, images, config)))


def float_model(config: Config) -> nn.Module:
    """The model that a config names, on this process's device.

    Weights that are neither pretrained nor in a checkpoint are random, and the same every time.
    """
    recipe = Recipe(name=config.model.name, args=config.model.args)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create(recipe, config.model.pretrained, config.model.checkpoint)
    return model.to(local_device())


def calibration(config: Config, model: nn.Module, samples: int | None = None) -> Any:
    """The calibration images that a config names, as an ``nncf.Dataset`` of batches."""
    wanted = config.data.calibration
    dataset = open_dataset(config.data, wanted.split, model)
    return calibration_images(
        dataset,
        samples or wanted.samples,
        wanted.seed,
        wanted.batch_size,
        skip_unreadable=wanted.skip_unreadable,
    )


def evaluate_with(
    config: Config,
    model: nn.Module,
    reference: nn.Module,
    progress: bool,
    share: tuple[int, int] = (0, 1),
) -> Metrics:
    """Measure a model on the evaluation images that a config names, or on one process's share."""
    precision = config.data.evaluation.precision
    return measure(model, evaluation(config, model, share), reference, progress, precision)


def evaluation(config: Config, model: nn.Module, share: tuple[int, int] = (0, 1)) -> Any:
    """Labelled batches of the evaluation images that a config names, or one process's share."""
    wanted = config.data.evaluation
    dataset = open_dataset(config.data, wanted.split, model)
    return loader(
        dataset,
        wanted.batch_size,
        samples=wanted.samples,
        workers=wanted.workers,
        skip_unreadable=wanted.skip_unreadable,
        share=share,
    )


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
