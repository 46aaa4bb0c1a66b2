"""PTQ4ViT is closer to the float model than BasePTQ, at 8, 6 and 4 bits."""

import pytest
import torch
from models import sqnr

import ptq4vit_plugin as ptq


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
