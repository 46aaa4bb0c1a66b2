"""Small calibrated models that the export tests share."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import ptq4vit_plugin as ptq
from ptq4vit_plugin.integrations.timm.models import Recipe, create

SMALL = dict(img_size=32, patch_size=8, num_classes=10, embed_dim=64, num_heads=2)
RECIPES = {
    "vit": Recipe(
        name="vit_tiny_patch16_224",
        args=dict(SMALL, depth=2),
    ),
    # Two that take images of any size: one resamples position embeddings and has another norm, one
    # computes rotary ones.
    "any size": Recipe(
        name="vit_tiny_patch16_224",
        args=dict(SMALL, depth=1, dynamic_img_size=True, norm_layer="rmsnorm"),
    ),
    "rotary": Recipe(
        name="eva02_tiny_patch14_224",
        args=dict(SMALL, depth=1, dynamic_img_size=True),
    ),
    "convit": Recipe(
        name="convit_tiny",
        args=dict(img_size=32, patch_size=8, depth=2, local_up_to_layer=1, num_classes=10),
    ),
    "swin": Recipe(
        name="swin_tiny_patch4_window7_224",
        args=dict(img_size=56, depths=(1, 2), num_heads=(2, 4), embed_dim=16, num_classes=10),
    ),
}


def images(family: str, number: int = 8, seed: int = 0) -> torch.Tensor:
    size = RECIPES[family].args["img_size"]
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


@cache
def calibrated(family: str, bits: int, **extra: object) -> nn.Module:
    torch.manual_seed(0)
    config = {
        "algorithm": "ptq4vit",
        "weights": {"bits": bits},
        "activations": {"bits": bits},
        "search_range": {"n": 10},
        "rounds": 1,
        **extra,
    }
    return ptq.quantize(create(RECIPES[family]), [images(family)], config)


@pytest.fixture(scope="session")
def quantized() -> Callable[..., nn.Module]:
    """`quantized(family, bits)`: a calibrated model; do not change it."""
    return calibrated


@pytest.fixture(scope="session")
def batch() -> Callable[..., torch.Tensor]:
    """`batch(family)`: random images for the family's models."""
    return images


@pytest.fixture(scope="session")
def float_model() -> Callable[[str], nn.Module]:
    """`float_model(family)`: a new model with random weights."""
    return lambda family: create(RECIPES[family])
