"""A small trained model with images of its own, on which benchmarks judge quality.

A folder has checkpoints of one architecture (``<name>.safetensors``) and ``data.npz`` with uint8
images ``calib_images`` and ``test_images`` ``[N, H, W, 3]``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq4vit_plugin.integrations.timm.models import Recipe, create

RECIPE = Recipe(
    name="deit_tiny_patch16_224", args=dict(img_size=32, patch_size=4, num_classes=10, depth=6)
)


class Trained:
    """The models and images of a folder.

    Attributes
    ----------
    calibration
        Batches of 8 of the first 32 calibration images.
    images
        Test images ``[N, 3, H, W]``.
    """

    def __init__(self, folder: Path, number: int = 500) -> None:
        if not (folder / "data.npz").exists():
            raise SystemExit(f"--trained {folder}: there is no data.npz in it")
        self.folder = folder
        data = np.load(folder / "data.npz")
        self.images = normalized(data["test_images"][:number])
        self.calibration = list(normalized(data["calib_images"][:32]).split(8))

    def model(self, name: str) -> nn.Module:
        """The float model of a checkpoint."""
        return create(RECIPE, checkpoint=self.folder / f"{name}.safetensors")


def normalized(pixels: np.ndarray) -> Tensor:
    """uint8 RGB images to float ones, with ImageNet's mean and deviation."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / deviation[:, None, None]
