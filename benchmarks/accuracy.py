"""Accuracy of `ptq4vit_plus` against `ptq4vit`: agreement with the float model and logit SQNR.

    python benchmarks/accuracy.py --bench FOLDER --out accuracy.json
    python benchmarks/accuracy.py --bench FOLDER --out accuracy.json --rows ablation --bits 8 4
    python benchmarks/accuracy.py --bench FOLDER --out accuracy.json --rows recon --bits 4 3

FOLDER has ``data.npz`` (``test_images``, ``calib_images``: uint8 RGB, 32 x 32) and the weights
``model.safetensors`` and ``model_outliers.safetensors`` of a DeiT-Tiny of depth 6 with 10 classes
on patches of 4 x 4. ``model_hidden`` is made from the first: rows of every MLP's first layer grow
by factors of ``exp(N(0, 1))``, where above 1, and the columns behind them shrink, so that GELU's
outputs differ in size from channel to channel as they do in large models. Without the folder the
script says so and stops. Cells that are in the JSON file already are not measured again. Times are
CPU seconds of `quantize`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

import ptq4vit_plugin as ptq

MODELS = ("model", "model_outliers", "model_hidden")
SEARCH = {
    "coarse": {"rounds": 2, "search_range": {"alpha": 0.05, "beta": 1.1, "n": 40}},
    "full": {},
}
PLUS = {"algorithm": "ptq4vit_plus"}
RECON = {"algorithm": "ptq4vit_recon"}
ROWS = {
    "main": {"ptq4vit": {"algorithm": "ptq4vit"}, "ptq4vit_plus": PLUS},
    "recon": {"ptq4vit_plus": PLUS, "ptq4vit_recon": RECON},
    "ablation": {
        "without norm folds": {**PLUS, "fold": {"norms": False}},
        "without attention folds": {**PLUS, "fold": {"attention": False}},
        "without factors": {**PLUS, "fold": {"smooth": False}},
        "without ranges": {**PLUS, "compensate": {"ranges": False}},
        "with ridge": {**PLUS, "compensate": {"weights": True}},
        "without rounding": {**PLUS, "compensate": {"rounding": False}},
        "without bias": {**PLUS, "compensate": {"bias": False}},
        "twin GELU": {**PLUS, "twin": {"gelu": True}},
        "twin softmax": {**PLUS, "twin": {"softmax": True}},
        "symmetric activations": {**PLUS, "activations": {"quantizer": "uniform"}},
        "Fisher gradient": {**PLUS, "gradient": {"kind": "fisher"}},
    },
}


def data_in(folder: Path | None) -> np.lib.npyio.NpzFile:
    """The images of a bench folder; without it the script says so and stops, as a success."""
    if folder is None or not (folder / "data.npz").exists():
        print("skipped: --bench names no folder with data.npz")
        raise SystemExit(0)
    return np.load(folder / "data.npz")


def images(pixels: np.ndarray) -> torch.Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def float_model(folder: Path, name: str) -> torch.nn.Module:
    size = {"img_size": 32, "patch_size": 4, "depth": 6, "num_classes": 10}
    model = timm.create_model("deit_tiny_patch16_224", **size)
    hidden = name == "model_hidden"
    model.load_state_dict(load_file(folder / f"{'model' if hidden else name}.safetensors"))
    return (with_uneven_hidden_channels(model) if hidden else model).eval()


@torch.no_grad()
def with_uneven_hidden_channels(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        first, second = block.mlp.fc1, block.mlp.fc2
        factor = torch.randn(first.out_features, generator=generator).exp().clamp_min(1)
        first.weight.mul_(factor[:, None])
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in x.split(100)])


def measure(
    model: torch.nn.Module,
    calibration: torch.Tensor,
    test: torch.Tensor,
    expected: torch.Tensor,
    fields: dict,
) -> dict[str, float]:
    start = time.process_time()
    quantized = ptq.quantize(model, list(calibration.split(8)), fields)
    seconds = time.process_time() - start
    found = logits(quantized, test)
    noise = (found - expected).square().mean()
    return {
        "agree": 100 * float((found.argmax(1) == expected.argmax(1)).double().mean()),
        "sqnr": float(10 * torch.log10((expected - expected.mean()).square().mean() / noise)),
        "cpu_seconds": seconds,
    }


def table(cells: dict[str, dict[str, float]]) -> str:
    """Means over seeds, one line per method, bits, model and number of images."""
    lines = [
        "| | model | images | agree % | SQNR dB | CPU s | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict[str, float]]] = {}
    for key, cell in cells.items():
        method, bits, model, count, _ = json.loads(key)
        groups.setdefault((bits, model, count, method), []).append(cell)
    for (bits, model, count, method), found in groups.items():
        mean = {name: sum(c[name] for c in found) / len(found) for name in found[0]}
        lines.append(
            f"| {method} W{bits}A{bits} | {model} | {count} | {mean['agree']:.2f} | "
            f"{mean['sqnr']:.2f} | {mean['cpu_seconds']:.0f} | {len(found)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, help="folder with the models and images")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--rows", choices=ROWS, default="main")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, nargs="+", default=[32])
    parser.add_argument("--search", choices=SEARCH, default="full")
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args()
    data = data_in(args.bench)
    test = images(data["test_images"][: args.test_images])
    cells = json.loads(args.out.read_text()) if args.out.exists() else {}
    nets = {name: float_model(args.bench, name) for name in args.models}
    expected = {name: logits(net, test) for name, net in nets.items()}
    for count in args.images:
        for seed in args.seeds:
            # Another seed takes other images, too.
            first = seed * count % len(data["calib_images"])
            calibration = images(data["calib_images"][first : first + count])
            for bits in args.bits:
                for name, net in nets.items():
                    for method, row in ROWS[args.rows].items():
                        key = json.dumps([method, bits, name, count, seed])
                        if key in cells:
                            continue
                        fields = {**SEARCH[args.search], "weights": {"bits": bits}, **row}
                        fields["activations"] = {**row.get("activations", {}), "bits": bits}
                        fields["gradient"] = {**row.get("gradient", {}), "seed": seed}
                        cells[key] = measure(net, calibration, test, expected[name], fields)
                        args.out.write_text(json.dumps(cells, indent=1))
    print(table(cells))


if __name__ == "__main__":
    main()
