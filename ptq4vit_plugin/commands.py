"""What the command line does: one function per command, made of the public verbs."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ptq4vit_plugin import artefacts, registry
from ptq4vit_plugin import checkpoint as checkpoints
from ptq4vit_plugin import sweep as sweeps
from ptq4vit_plugin.algorithms.finished import remove
from ptq4vit_plugin.config import Config, parse, yaml_text
from ptq4vit_plugin.data import calibration_images, loader, open_dataset
from ptq4vit_plugin.errors import ConfigError, PTQ4ViTError, one_line
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.evaluation import evaluate as measure
from ptq4vit_plugin.exporting import check_options, exporter_of
from ptq4vit_plugin.exporting import export as export_model
from ptq4vit_plugin.files import (
    json_text,
    no_other_run,
    output_folder,
    pointed_to,
    written_whole,
)
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
from ptq4vit_plugin.reporting.events import event, json_lines, nncf_messages
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
class Calibrated:
    """A config's model before and after quantization, its evaluation images, and the time taken."""

    quantized: nn.Module
    reference: nn.Module
    validation: Any
    seconds: float


def quantize(config: Config, output: Path | None, quiet: bool, log_json: bool = False) -> None:
    """Calibrate, save and evaluate; writes checkpoint, results, resolved config and report.

    Finished ops are kept in the output folder until then, so that the same command continues a run
    that was killed. Under torchrun all processes calibrate, and the first does the rest.
    """
    if output is not None:
        config = config.model_copy(update={"output": output.expanduser()})
    if config.output.suffix == ".safetensors":
        raise ConfigError(
            f"output: '{config.output}' is the name of a file; allowed: a folder, in which the "
            "checkpoint will be model.safetensors"
        )
    with ExitStack() as stack:
        stack.enter_context(nncf_messages(quiet))
        stack.enter_context(process_group())
        if log_json and rank() == 0:
            stack.enter_context(json_lines(sys.stdout))
        folder = output_folder(config.output)
        if rank() == 0:
            stack.enter_context(no_other_run(folder))
        silent = quiet or log_json
        done = calibrate(config, resume=folder / FINISHED)
        if done is None:
            return
        # Saved first: nothing that evaluation meets can lose what calibration found.
        extra = {"config": config.dump()}
        path = artefacts.save(done.quantized, folder, extra=extra)
        for name in (RESULTS, CONFIG, reports.REPORT):  # of another run, whose checkpoint is gone
            pointed_to(folder / name).unlink(missing_ok=True)
        try:
            metrics, results = measured(config, done, not silent)
            artefacts.write_card(done.quantized, folder, extra=extra, metrics=metrics)
            results["checkpoint"] = {"file": path.name, "bytes": path.stat().st_size}
            write_run(folder, config, results)
        except PTQ4ViTError as error:
            raise type(error)(f"{error} (the quantized model is saved: {path})") from error
        remove(folder / FINISHED)
        files = [path.name, artefacts.CARD, RESULTS, CONFIG]
        if not reports.missing():
            files.append(reports.REPORT)
        event("written", folder=str(folder), files=files)
        if not silent:  # last: standard output may take no more
            if metrics is not None:
                Console().print(metrics_table(metrics))
            record = record_of(done.quantized)
            if record is not None:
                Console().print(cost_line(record))
            print(f"written: {folder}/{', '.join(files)}")
            if absent := reports.missing():
                print(f"no report: it needs {' and '.join(absent)} (ptq4vit-plugin[report])")


def calibrate(config: Config, resume: Path | None = None) -> Calibrated | None:
    """Quantize the model that a config names, on this process's device.

    Returns
    -------
    Calibrated or None
        None in all processes but the first of those that calibrate together.
    """
    started = time.perf_counter()
    model = float_model(config)
    promised = any(step.get("accuracy") for step in config.compression)
    if promised and config.data.evaluation is None:
        raise ConfigError(
            "data.evaluation: null is not allowed where the compression promises an accuracy"
        )
    # Opened before the search, which may take long: labels or a split may be missing.
    validation = None if config.data.evaluation is None else evaluation(config, model)
    # Only the first of several processes evaluates, and needs the kernels.
    with compiled_meanwhile() if rank() == 0 else nullcontext():
        quantized = quantize_model(
            model,
            calibration(config, model),
            config,
            validation_dataset=validation if promised else None,
            resume=resume,
        )
    if rank() != 0:
        return None
    return Calibrated(quantized, model, validation, time.perf_counter() - started)


def measured(
    config: Config, done: Calibrated, progress: bool
) -> tuple[Metrics | None, dict[str, Any]]:
    """What is worth writing down about a calibrated model; no metrics without evaluation images."""
    started, metrics = time.perf_counter(), None
    if done.validation is not None:
        precision = config.data.evaluation.precision
        metrics = measure(done.quantized, done.validation, done.reference, progress, precision)
        event("evaluated", **metrics.model_dump(mode="json"))
    record = record_of(done.quantized)
    return metrics, {
        "metrics": None if metrics is None else metrics.model_dump(mode="json"),
        "seconds": {
            "calibration": done.seconds,
            "evaluation": time.perf_counter() - started,
        },
        "environment": environment(),
        "calibration": None if record is None else record.model_dump(mode="json"),
    }


def write_run(folder: Path, config: Config, results: dict[str, Any]) -> None:
    """Write a run's measurements and its resolved config, and the report if it can be drawn."""
    write_text(folder / CONFIG, yaml_text(config.dump()))
    write_text(folder / RESULTS, json_text(results))
    if not reports.missing():
        reports.write_report(folder)


def report(folder: Path) -> None:
    """Write ``report.html`` of a run folder."""
    print(f"written: {reports.write_report(folder)}")


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
        described = described.model_copy(update={"output": output.expanduser()})
    cells = sweeps.cells(described, only, overrides, str(file))
    for cell in cells:
        if cell.config.data.evaluation is None:
            raise ConfigError(f"{file}: {cell.title}: data.evaluation: null leaves no result")
    published = result_tables.read_published(described.published)
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
    for count, cell in enumerate(todo, start=1):
        console.print(f"{who}{count}/{len(todo)} {cell.title}", markup=False)
        try:
            with nncf_messages(quiet):
                place = output_folder(cell.config.output)
                done = calibrate(cell.config)
                _, found = measured(cell.config, done, progress=not quiet)
            write_run(place, cell.config, found)
        except Exception as error:  # whatever it is, the other cells are worth having
            failed.append(cell)
            reason = one_line(error)
            if not isinstance(error, (PTQ4ViTError, RuntimeError)):  # RuntimeError: torch's
                traceback.print_exc()  # a bug that somebody has to find
                reason = f"{type(error).__name__}: {reason}"
            print(f"{who}failed: {cell.title}: {reason}", file=sys.stderr)
            continue
        sweeps.append(path, result_tables.line(cell, found))
    if processes == 1 and path.exists():
        keys = {cell.key for cell in cells}
        rows = [row for row in sweeps.results(path) if row["key"] in keys]
        print(result_tables.markdown(result_tables.compare(rows, published)), end="")
    wait_for_all()  # torchrun ends all processes when one has failed
    if failed:
        raise PTQ4ViTError(
            f"{who}{len(failed)} of {len(todo)} cells failed; run it again to retry them"
        )


def table(file: Path, form: str, published: Path | None) -> None:
    """Print the results of a sweep, published numbers beside them."""
    results = sweeps.results(file)
    if not results:
        raise ConfigError(f"{file}: has no result of `ptq4vit sweep`; allowed: {sweeps.RESULTS}")
    rows = result_tables.compare(results, result_tables.read_published(published))
    print(result_tables.FORMATS[form](rows), end="")


@nncf_messages()
def evaluate(checkpoint: Path, config: Config | None) -> None:
    """Measure a saved model against its float original; torchrun's processes share the images."""
    with process_group():
        file = artefacts.locate(checkpoint)
        quantized = checkpoints.load(file).to(local_device())
        saved = _saved_config(file)
        if config is None and saved is None:
            raise ConfigError(
                f"'{checkpoint}' does not say on which data to evaluate; give --config"
            )
        # The float original is the checkpoint's, whatever model the other config is about.
        original = saved or config
        config = (config or saved).model_copy(update={"model": original.model})
        if config.data.evaluation is None:
            raise ConfigError(
                "data.evaluation: null says that there is nothing to evaluate on; "
                "give --config with another"
            )
        metrics = measure(
            quantized,
            evaluation(config, quantized, (rank(), ranks())),
            float_model(config),
            progress=rank() == 0,
            precision=config.data.evaluation.precision,
        )
        if rank() == 0:
            Console().print(metrics_table(metrics))


@nncf_messages()
def describe(checkpoint: Path) -> None:
    """Print a record per op."""
    file = artefacts.locate(checkpoint)
    checkpoints.read_metadata(file)  # an exported model has no records, and says what it is
    _console().print(record_table(describe_model(checkpoints.load(file))))


@nncf_messages()
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
    family = registry.load("exporters", format)
    given = dict(sweeps.assignment(option) for option in options)
    check_options(format, given, "--set ")
    if config is None:
        config = _saved_config(checkpoint)
    images = None if config is None else calibration(config, model)
    path = output or checkpoint.with_name(f"{checkpoint.stem}-{format}{family.suffix}")
    folder = path if os.path.isdir(path) else path.parent
    results = folder / RESULTS
    known = _known(results)
    report = export_model(
        model,
        path,
        format,
        images,
        min_sqnr,
        per_op,
        **given,
    )
    exports = {**known.get("exports", {}), format: report.model_dump(mode="json")}
    write_text(results, json_text({**known, "exports": exports}, indent=2))
    Console().print(export_table(report))
    print(f"written: {', '.join(str(folder / name) for name in report.files)}")


def _saved_config(checkpoint: Path) -> Config | None:
    """The config that a checkpoint was made with, if it says so."""
    saved = checkpoints.read_metadata(checkpoint).extra.get("config")
    return None if saved is None else parse(saved, str(checkpoint))


def _console() -> Console:
    """For wide tables: in a pipe there is no window to fit, and names must stay whole."""
    return Console(width=None if sys.stdout.isatty() else 1000)


def _known(results: Path) -> dict[str, Any]:
    """What a ``results.json`` says, to be written again with more; empty if there is none."""
    if not os.path.exists(results):
        return {}
    try:
        known = json.loads(results.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not isinstance(known.get("exports", {}), dict):
            raise ValueError("not what a run or an export wrote")
    except (OSError, ValueError, RecursionError) as error:
        raise PTQ4ViTError(
            f"'{results}' is damaged: {error}; mend or remove it, an export adds to it"
        ) from error
    return known


@nncf_messages()
def run(model: Path, images: list[Path]) -> None:
    """Print the five most probable classes of image files."""
    exporter = exporter_of(model)
    preprocessing = exporter.preprocessing(model)
    transform, classify = preprocessing.transform(), exporter.read(model)
    for path in images:
        image = transform(open_image(path))
        try:
            with torch.inference_mode():
                logits = classify(image[None])[0]
        except Exception as error:  # runtimes' own errors have no common base
            raise PTQ4ViTError(
                f"'{model}' cannot run on an image of {list(image.shape)}: {one_line(error)[:300]}"
            ) from error
        if logits.dim() != 1 or preprocessing.classes == 0:
            raise PTQ4ViTError(f"'{model}' returns features {[*logits.shape]}, not classes")
        found = logits.float().softmax(0).topk(min(5, len(logits)))
        names = preprocessing.labels or [f"class {index}" for index in range(len(logits))]
        print(path)
        for probability, index in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            print(f"  {100 * probability:5.1f} %  {names[index]}")


@nncf_messages()
def plan(config: Config) -> None:
    """Print what would be quantized."""
    model = float_model(config)
    images = next(iter(calibration(config, model, samples=1).get_inference_data()))
    _console().print(plan_table(make_plan(model, images, config)))


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
