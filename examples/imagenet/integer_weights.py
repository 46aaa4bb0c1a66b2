"""The integers of a quantized model: its weights' codes and scales, and its activations' codes.

    ptq4vit quantize config.yaml --output runs/w8a8
    python examples/imagenet/integer_weights.py runs/w8a8/model.safetensors integers.safetensors

The file that is written has, for every quantized weight, `<parameter>` (int8) and
`<parameter>.scale` (float32, shaped to multiply the codes). Activations depend on the image, so
their codes are counted and not written: by default on random images, with --images on photographs
of a folder.
"""

import argparse
from types import SimpleNamespace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ptq4vit_plugin import load
from ptq4vit_plugin.data import calibration_images, open_dataset
from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.integrations.nncf.hooks import hooks
from ptq4vit_plugin.integrations.timm.images import image_transform


def integer_codes(quantizer, x, quantized):
    """Codes of `x`, and the scale to multiply them with (None for twin quantizers).

    `quantized` is what the quantizer makes of `x`: a value half-way between two codes is rounded as
    it was there.
    """
    if hasattr(quantizer, "to_codes"):  # a twin: int8 for GELU, uint8 with a range bit for softmax
        return quantizer.to_codes(x), None
    # NNCF's SymmetricQuantizer: its scale is the value of the highest level
    scale = (quantizer.scale / quantizer.level_high).detach()
    codes = (quantized / scale).round()
    return codes.to(torch.int8 if quantizer.level_low < 0 else torch.uint8), scale


def integer_weights(model):
    """Every quantized parameter as int8 codes and scale, checked against the model's own values."""
    tensors = {}
    parameters = dict(model.named_parameters())
    for hook in hooks(model):
        if hook.op in parameters:
            weight = parameters[hook.op].detach()
            quantized = hook.module(weight).detach()
            codes, scale = integer_codes(hook.module, weight, quantized)
            torch.testing.assert_close(codes * scale, quantized)
            tensors[hook.op] = codes.contiguous()
            tensors[f"{hook.op}.scale"] = scale.contiguous()
    return tensors


@torch.no_grad()
def activation_codes(model, images):
    """Codes of every quantized activation, by (op, input port)."""
    found, handles = {}, []
    for hook in hooks(model):
        if hook.when == "pre":

            def see(module, inputs, output, place=(hook.op, hook.port)):
                found[place] = integer_codes(module, inputs[0], output)[0]

            handles.append(hook.module.register_forward_hook(see))
    model(images)
    for handle in handles:
        handle.remove()
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--images", metavar="FOLDER", help="photographs, in sub-folders or not")
    arguments = parser.parse_args()

    model = load(arguments.checkpoint)
    weights = integer_weights(model)
    save_file(weights, arguments.output)

    if arguments.images:
        folder = SimpleNamespace(source="folder", root=arguments.images, options={})
        drawn = calibration_images(open_dataset(folder, ".", model), samples=8)
        images = next(iter(drawn.get_inference_data()))
    else:
        own = image_transform(model)
        images = torch.randn(2, own.channels, *own.size)

    table = Table("op", "input", "codes", "lowest", "highest", "zeros", box=box.SIMPLE_HEAD)
    for (op, port), codes in activation_codes(model, images).items():
        kind = str(codes.dtype).removeprefix("torch.")
        zeros = f"{(codes == 0).float().mean().item():.1%}"
        table.add_row(op, str(port), kind, str(codes.min().item()), str(codes.max().item()), zeros)
    console = Console()
    console.print(table)
    parameters = [codes for name, codes in weights.items() if not name.endswith(".scale")]
    total = sum(codes.numel() for codes in parameters)
    console.print(f"{arguments.output}: {len(parameters)} weights, {total:,} codes of one byte")


if __name__ == "__main__":
    try:
        main()
    except PTQ4ViTError as error:
        raise SystemExit(f"error: {error}") from error
