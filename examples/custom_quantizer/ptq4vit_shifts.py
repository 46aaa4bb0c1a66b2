"""Power-of-two scales: a device that can only shift can rescale everything.

A quantizer and an algorithm for ptq4vit-plugin, registered by the entry points in `pyproject.toml`.
"""

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.ptq4vit import PTQ4ViT
from ptq4vit_plugin.algorithms.settings import Activations, Weights
from ptq4vit_plugin.quantizers.uniform import Uniform


class PowerOfTwo(Uniform):
    """Uniform quantizer whose candidate scales are powers of two."""

    def candidates(self) -> Tensor:
        """Uniform's candidates, each rounded to the nearest power of two by its logarithm."""
        return torch.exp2(torch.round(torch.log2(super().candidates())))


class ShiftOnly(PTQ4ViT):
    """PTQ4ViT with power-of-two scales everywhere, GELU's two steps included.

    An algorithm is a pydantic model: its fields are what a config can set, and these are only other
    defaults for fields that PTQ4ViT has.
    """

    weights: Weights = Weights(quantizer="power_of_two")
    activations: Activations = Activations(quantizer="power_of_two")
    scale_ratio: str = "power_of_two"
