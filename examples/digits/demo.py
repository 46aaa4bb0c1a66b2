"""Quantizes the digits model with BasePTQ and PTQ4ViT at 8, 6 and 4 bits and prints one table.

Writes runs/digits: results.json, and for each row a folder with model.safetensors (for
`ptq4vit_plugin.load`) and config.yaml (for `ptq4vit quantize`).
"""

import json
import os
import time
from pathlib import Path

import timm
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from ptq4vit_plugin import describe, evaluate, quantize, save
from ptq4vit_plugin.config import parse, read
from ptq4vit_plugin.data import calibration_images, loader, open_dataset
from ptq4vit_plugin.integrations.nncf.kernels import compiled_meanwhile

HERE = Path(__file__).resolve().parent
RUN = Path("runs/digits")


def packed_kib(model, records) -> float:
    """Size with every quantized weight stored in its k bits, and the rest in float32."""
    bits = {o.parameter: o.bits for r in records for o in r.operands if o.parameter and o.quantizer}
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    return sum(n * bits.get(name, 32) for name, n in sizes.items()) / 8 / 1024


def main() -> None:
    torch.set_num_threads(1)  # the model's operations are too small to be divided
    os.chdir(HERE.parents[1])  # paths in the configs start at the repository's root
    RUN.mkdir(parents=True, exist_ok=True)
    configs = {name: read(HERE / f"{name}.yaml") for name in ("base_ptq", "ptq4vit")}

    config = configs["ptq4vit"]
    model = timm.create_model(config.model.name, **config.model.args)
    model.load_state_dict(load_file(config.model.checkpoint))
    images = open_dataset(config.data, "train", model)
    calibration = calibration_images(images, samples=32, seed=3, batch_size=8)
    held_out = loader(open_dataset(config.data, "val", model))

    floating = evaluate(model, held_out)
    file_kib = config.model.checkpoint.stat().st_size / 1024
    table = Table("algorithm", "bits", box=box.SIMPLE_HEAD)
    for name in ("top-1 %", "agree %", "SQNR dB", "packed", "file", "s"):
        table.add_column(name, justify="right")
    table.add_row(
        "float", "32", f"{floating.top1:.2f}", "", "", f"{file_kib:.0f}", f"{file_kib:.0f}"
    )
    rows = [{"algorithm": "float", "bits": 32, "metrics": floating.model_dump(mode="json")}]

    console = Console()
    cells = []
    # NNCF compiles its kernels once per machine. Searching does without them, evaluating does not.
    with compiled_meanwhile():
        for bits in (8, 6, 4):
            for name, config in configs.items():
                settings = config.dump()
                settings["output"] = str(RUN / f"{name}-w{bits}a{bits}")
                settings["compression"][0]["weights"]["bits"] = bits
                settings["compression"][0]["activations"]["bits"] = bits
                config = parse(settings, name)
                with console.status(f"{name} W{bits}A{bits}"):
                    start = time.perf_counter()
                    quantized = quantize(model, calibration, config)
                    cells.append((name, bits, config, quantized, time.perf_counter() - start))

    for name, bits, config, quantized, seconds in cells:
        metrics = evaluate(quantized, held_out, reference=model)
        folder = config.output
        recipe = {"name": config.model.name, "args": config.model.args}
        checkpoint = save(
            quantized, folder / "model.safetensors", recipe, extra={"config": config.dump()}
        )
        text = yaml.safe_dump(config.dump(), sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        packed = packed_kib(model, describe(quantized))
        file_kib = checkpoint.stat().st_size / 1024
        rows.append(
            {
                "algorithm": name,
                "bits": bits,
                "metrics": metrics.model_dump(mode="json"),
                "packed_kib": packed,
                "file_kib": file_kib,
                "seconds": seconds,
                "checkpoint": str(checkpoint),
            }
        )
        table.add_row(
            name,
            f"W{bits}A{bits}",
            f"{metrics.top1:.2f}",
            f"{metrics.agreement:.2f}",
            f"{metrics.sqnr_db:.2f}",
            f"{packed:.0f}",
            f"{file_kib:.0f}",
            f"{seconds:.1f}",
        )

    (RUN / "results.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    console.print(f"Digits ViT, {floating.images} held-out images")
    console.print(table)
    console.print(
        "agree   same class as the float model\n"
        "packed  KiB with the weights in their bits, computed\n"
        "file    KiB of the checkpoint, which keeps float weights beside their scales\n"
        "s       of calibration; longer where NNCF compiles its kernels beside it, the first time\n"
        f"written {RUN}/results.json and a checkpoint and config.yaml per row",
        highlight=False,
    )


if __name__ == "__main__":
    main()
