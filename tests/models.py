"""Small models and images that several test files use."""

import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}


def small_vit(depth: int = 1, seed: int = 0, **args) -> nn.Module:
    """A `timm` ViT with random weights, large enough that its logits differ between images."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGS, "depth": depth, **args}).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


def images(batches: int = 2, batch_size: int = 4, seed: int = 1, size: int = 32) -> list[Tensor]:
    """Batches of normally distributed images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 3, size, size, generator=generator) for _ in range(batches)]


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, the signal being the variance of the reference."""
    return float(
        10
        * torch.log10(
            reference.detach().var(correction=0) / (reference - output).detach().square().mean()
        )
    )


def in_a_new_process(checkpoint: Path, x: Tensor) -> Tensor:
    """What a checkpoint's model computes of `x`, loaded by a process of its own."""
    script = (
        "import sys, torch, ptq4vit_plugin as ptq\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = ptq.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    save_file({'y': model(load_file(sys.argv[2])['x'])}, sys.argv[3])\n"
    )
    files = [checkpoint.with_name(name) for name in ("x.tensors", "y.tensors")]
    save_file({"x": x}, files[0])
    command = [sys.executable, "-c", script, checkpoint, *files]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return load_file(files[1])["y"]
