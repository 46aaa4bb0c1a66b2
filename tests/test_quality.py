"""PTQ4ViT is closer to the float model than BasePTQ, at 8, 6 and 4 bits."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from models import sqnr
from safetensors.torch import load_file

import ptq4vit_plugin as ptq

BENCH = Path(__file__).parents[2] / "shared" / "bench" / "vit_c10"


def compare(model, calibration, x, bits):
    def measure(algorithm):
        compression = {
            "algorithm": algorithm,
            "weights": {"bits": bits},
            "activations": {"bits": bits},
        }
        return sqnr(reference, ptq.quantize(model, calibration, compression)(x))

    with torch.no_grad():
        reference = model(x)
        return measure("ptq4vit"), measure("base_ptq")


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_on_digits(bits, digits):
    model, calibration, x = digits
    ours, base = compare(model, calibration, x, bits)
    assert ours > base


@pytest.mark.skipif(not BENCH.exists(), reason="the trained bench model is not on this machine")
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_on_the_trained_bench_model(bits):
    args = {"img_size": 32, "patch_size": 4, "num_classes": 10, "depth": 6}
    model = timm.create_model("deit_tiny_patch16_224", **args).eval()
    model.load_state_dict(load_file(BENCH / "model.safetensors"))
    data = np.load(BENCH / "data.npz")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def normalised(images):
        return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std

    calibration = list(normalised(data["calib_images"][:8]).split(8))
    ours, base = compare(model, calibration, normalised(data["test_images"][:64]), bits)
    assert ours > base
