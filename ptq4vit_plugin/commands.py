"""What the command line does: one function per command, made of the public verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from ptq4vit_plugin import checkpoint as checkpoints
from ptq4vit_plugin.config import Config, parse
from ptq4vit_plugin.data import calibration_images, loader, open_dataset
from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.evaluation import evaluate as measure
from ptq4vit_plugin.exporting import export as export_model
from ptq4vit_plugin.exporting import exporter_of
from ptq4vit_plugin.files import output_folder, written_whole
from ptq4vit_plugin.integrations.timm.images import open_image
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.pipeline import plan as make_plan
from ptq4vit_plugin.pipeline import quantize as quantize_model
from ptq4vit_plugin.record import describe as describe_model
from ptq4vit_plugin.record import record_of
from ptq4vit_plugin.reporting.tables import export_table, metrics_table, plan_table, record_table

CHECKPOINT = "model.safetensors"


def quantize(config: Config, output: Path | None, quiet: bool) -> None:
    """Calibrate, evaluate and save; writes checkpoint, ``results.json`` and ``config.yaml``."""
    folder = output_folder(output or config.output)
    model = float_model(config)
    promised = any(step.get("accuracy") for step in config.compression)
    quantized = quantize_model(
        model,
        calibration(config, model),
        config,
        evaluation(config, model) if promised else None,
    )
    metrics = evaluate_with(config, quantized, model, progress=not quiet)
    path = checkpoints.save(quantized, folder / CHECKPOINT, extra={"config": config.dump()})
    write_text(folder / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False))
    write_text(folder / "results.json", json.dumps(_results(quantized, metrics, path), indent=2))
    if not quiet:
        console = Console()
        console.print(metrics_table(metrics))
        console.print(f"written: {folder}/{CHECKPOINT}, results.json, config.yaml")


def evaluate(checkpoint: Path, config: Config | None) -> None:
    """Measure a saved model against its float original."""
    quantized = checkpoints.load(checkpoint)
    if config is None:
        saved = checkpoints.read_metadata(checkpoint).extra.get("config")
        if saved is None:
            raise ConfigError(
                f"'{checkpoint}' does not say on which data to evaluate; give --config"
            )
        config = parse(saved, str(checkpoint))
    Console().print(
        metrics_table(evaluate_with(config, quantized, float_model(config), progress=True))
    )


def describe(checkpoint: Path) -> None:
    """Print a record per op."""
    Console().print(record_table(describe_model(checkpoints.load(checkpoint))))


def export(
    checkpoint: Path,
    format: str,
    output: Path | None,
    config: Config | None,
    min_sqnr: float,
    options: list[str],
) -> None:
    """Write a saved model for a runtime; the comparison goes into ``results.json`` beside it."""
    model = checkpoints.load(checkpoint)
    given = dict(option.partition("=")[::2] for option in options)
    if config is None and (saved := checkpoints.read_metadata(checkpoint).extra.get("config")):
        config = parse(saved, str(checkpoint))
    images = None if config is None else calibration(config, model)
    path = output or checkpoint.with_name(f"{checkpoint.stem}-{format}")
    report = export_model(
        model,
        path,
        format,
        images,
        min_sqnr,
        **{key: yaml.safe_load(value) for key, value in given.items()},
    )
    results = path.parent / "results.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    exports = {**known.get("exports", {}), format: report.model_dump(mode="json")}
    write_text(results, json.dumps({**known, "exports": exports}, indent=2))
    console = Console()
    console.print(export_table(report))
    console.print(f"written: {', '.join(str(path.parent / name) for name in report.files)}")


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
    """The model that a config names."""
    recipe = Recipe(name=config.model.name, args=config.model.args)
    return create(recipe, config.model.pretrained, config.model.checkpoint)


def calibration(config: Config, model: nn.Module, samples: int | None = None) -> Any:
    """The calibration images that a config names, as an ``nncf.Dataset`` of batches."""
    wanted = config.data.calibration
    dataset = open_dataset(config.data, wanted.split, model)
    return calibration_images(dataset, samples or wanted.samples, wanted.seed, wanted.batch_size)


def evaluate_with(
    config: Config, model: nn.Module, reference: nn.Module, progress: bool
) -> Metrics:
    """Measure a model on the evaluation images that a config names."""
    return measure(model, evaluation(config, model), reference, progress)


def evaluation(config: Config, model: nn.Module) -> Any:
    """Labelled batches of the evaluation images that a config names."""
    wanted = config.data.evaluation
    dataset = open_dataset(config.data, wanted.split, model)
    return loader(dataset, wanted.batch_size, samples=wanted.samples)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _results(model: nn.Module, metrics: Metrics, path: Path) -> dict[str, Any]:
    record = record_of(model)
    return {
        "metrics": metrics.model_dump(mode="json"),
        "checkpoint": {"file": path.name, "bytes": path.stat().st_size},
        "calibration": None if record is None else record.model_dump(mode="json"),
    }
