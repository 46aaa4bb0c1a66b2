"""Run with `pytest` after `pip install .`: the quantizer, and the algorithm on a small model."""

import timm
import torch

import ptq4vit_plugin as ptq
from ptq4vit_plugin import registry
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange


def test_both_are_registered_by_this_distribution():
    for group, name in (("quantizers", "power_of_two"), ("algorithms", "shift_only")):
        assert registry.find(group, name).distribution == "ptq4vit-shifts"
        assert registry.load(group, name)


def test_every_scale_is_a_power_of_two():
    quantizer = registry.load("quantizers", "power_of_two")(
        8, Grouping((1, 1, 1, 1)), SearchRange()
    )
    quantizer.observe(torch.linspace(-3, 5, 64).reshape(1, 1, 8, 8))
    mantissa, _ = torch.frexp(quantizer.table)
    assert (mantissa == 0.5).all()


def test_the_algorithm_quantizes_with_it():
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments).eval()
    quantized = ptq.quantize(model, [torch.randn(4, 3, 16, 16)], "shift_only")
    operands = [operand for record in ptq.describe(quantized) for operand in record.operands]
    uniform = [operand for operand in operands if operand.quantizer == "power_of_two"]
    assert len(uniform) >= 10
    for operand in uniform:
        for scale in (operand.searched_min, operand.searched_max):
            assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
