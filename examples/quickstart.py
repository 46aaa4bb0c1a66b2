"""PTQ4ViT on a timm vision transformer, from Python.

    python examples/quickstart.py                                  # random weights, random images
    python examples/quickstart.py deit_small_patch16_224 --pretrained --images photos/

A folder of images is read with the model's own transform; sub-folders are looked through, labels
are not needed. Random weights and images show that it runs and how long it takes, not how good it
is.
"""

import argparse
import sys
import time
from types import SimpleNamespace

import nncf
import torch
from rich.console import Console

from ptq4vit_plugin import describe, quantize
from ptq4vit_plugin.data import calibration_images, open_dataset
from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.timm.images import preprocessing
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.reporting.tables import record_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="vit_tiny_patch16_224", help="timm model name")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, not random ones")
    parser.add_argument(
        "--images", metavar="FOLDER", help="photographs to calibrate and compare on"
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration images (default 32)")
    parser.add_argument("--bits", type=int, default=8, help="2 to 8 (default 8)")
    arguments = parser.parse_args()
    # In a pipe or a file there is no window to fit: names stay whole.
    console = Console(width=None if sys.stdout.isatty() else 1000)

    torch.manual_seed(0)
    # As timm.create_model; an unknown name is answered with the nearest that there is.
    model = create(Recipe(name=arguments.model), pretrained=arguments.pretrained)
    if arguments.images:
        folder = SimpleNamespace(source="folder", root=arguments.images, options={})
        photographs = open_dataset(folder, ".", model)
        # One draw, cut in two: what the model is compared on was not calibrated on.
        number = min(2 * arguments.samples, len(photographs))
        drawn = calibration_images(photographs, number, batch_size=1)
        images = torch.cat(list(drawn.get_inference_data()))
    else:
        console.print("no --images: random images, so the numbers below mean little")
        images = torch.randn(2 * arguments.samples, *preprocessing(model).input_size)
    if not arguments.pretrained:
        console.print("no --pretrained: random weights, so the numbers below mean little")
    half = len(images) // 2
    calibration, comparison = images[:half], images[half:]

    start = time.perf_counter()
    quantized = quantize(
        model,
        nncf.Dataset(calibration.split(8)),
        {
            "algorithm": "ptq4vit",
            "weights": {"bits": arguments.bits},
            "activations": {"bits": arguments.bits},
        },
    )
    seconds = time.perf_counter() - start

    with torch.inference_mode():
        reference = torch.cat([model(batch) for batch in comparison.split(8)])
        output = torch.cat([quantized(batch) for batch in comparison.split(8)])
    agreement = (reference.argmax(1) == output.argmax(1)).float().mean().item()
    console.print(record_table(describe(quantized)))
    console.print(
        f"{arguments.model} W{arguments.bits}A{arguments.bits}, calibrated on {half} images in "
        f"{seconds:.0f} s. On {len(comparison)} others: logit SQNR "
        f"{logit_sqnr(reference, output):.1f} dB, same class {agreement:.0%}"
    )


if __name__ == "__main__":
    try:
        main()
    except PTQ4ViTError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
