"""A model of one's own, not timm's: quantize it, save it, load it into a new instance.

    python examples/custom_model.py

Ops are found on the graph of the forward pass, whatever the modules are called: the two products
of attention below are plain `@`, the feed-forward's activation is a function.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from ptq4vit_plugin import describe, load, quantize, save
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.reporting.tables import record_table


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (
            layer(self.before(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.mix(attended)
        return x + self.narrow(F.gelu(self.widen(self.between(x))))


class Classifier(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.classify = nn.Linear(width, classes)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.classify(self.blocks(tokens).mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    images = torch.randn(24, 3, 32, 32)
    calibration, others = images[:16], images[16:]

    compression = {"algorithm": "ptq4vit", "weights": {"bits": 6}, "activations": {"bits": 6}}
    quantized = quantize(model, calibration.split(8), compression)

    # In a pipe or a file there is no window to fit: names stay whole.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(record_table(describe(quantized)))
    with torch.no_grad():
        sqnr = logit_sqnr(model(others), quantized(others))
    console.print(f"W6A6, logit SQNR on other images: {sqnr:.1f} dB")

    with tempfile.TemporaryDirectory() as folder:
        path = save(quantized, Path(folder) / "model.safetensors")
        again = load(path, Classifier())  # only timm's models can be rebuilt without the class
        assert torch.equal(again(others), quantized(others))
        console.print("saved, loaded into a new instance: the same logits, bit for bit")


if __name__ == "__main__":
    main()
