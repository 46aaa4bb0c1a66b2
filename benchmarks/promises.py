"""Whether `accuracy.max_drop` is held: 20 runs over seeds, bits and promises on the digits model.

    python benchmarks/promises.py --out promises.json

Every run takes other calibration images. The model that `quantize` returns is measured here once
more, on the validation images. Runs that are in the JSON file already are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

import ptq4vit_plugin as ptq
from ptq4vit_plugin.config import read
from ptq4vit_plugin.data import calibration_images, loader, open_dataset
from ptq4vit_plugin.record import record_of

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
#: Bits at the start, and points of agreement with the float model that may be lost.
PROMISES = ((3, 2.0), (3, 0.5), (4, 0.5), (4, 0.0))
COARSE = {"rounds": 1, "search_range": {"alpha": 0.05, "beta": 1.1, "n": 10}}


@torch.no_grad()
def classes(model: torch.nn.Module, batches: list) -> torch.Tensor:
    return torch.cat([model(images).argmax(1) for images, _ in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("promises.json"))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    runs = json.loads(args.out.read_text()) if args.out.exists() else {}
    config = read(DIGITS / "ptq4vit.yaml")
    model = timm.create_model(config.model.name, **config.model.args)
    model.load_state_dict(load_file(DIGITS / "digits_vit.safetensors"))
    model.eval()
    train = open_dataset(config.data, "train", model)
    validation = [(x, y) for x, y, *_ in loader(open_dataset(config.data, "val", model))]
    expected = classes(model, validation)
    for seed in range(args.seeds):
        calibration = calibration_images(train, samples=8, seed=seed, batch_size=8)
        for bits, promise in PROMISES:
            key = json.dumps([seed, bits, promise])
            if key in runs:
                continue
            fields = {"weights": {"bits": bits}, "activations": {"bits": bits}, **COARSE}
            fields["accuracy"] = {"max_drop": promise, "metric": "agreement"}
            fields["gradient"] = {"seed": seed}
            fields["algorithm"] = "ptq4vit_plus"
            quantized = ptq.quantize(model, calibration, fields, validation)
            drop = 100 * float((classes(quantized, validation) != expected).double().mean())
            record = record_of(quantized)
            ops = [] if record is None else record.plan.ops
            widths = [o.bits for op in ops for o in op.operands if o.bits and o.source != "image"]
            runs[key] = {
                "drop": drop,
                "held": drop <= promise,
                "trials": [] if record is None else [[t.moves, t.drop] for t in record.trials],
                "mean_bits": sum(widths) / max(1, len(widths)),
                "float_ops": 0 if record is None else len(record.plan.left_out),
            }
            args.out.write_text(json.dumps(runs, indent=1))
    print(f"{sum(run['held'] for run in runs.values())} of {len(runs)} promises held")
    for key, run in runs.items():
        print(key, run)


if __name__ == "__main__":
    main()
