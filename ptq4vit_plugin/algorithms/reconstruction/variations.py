"""More images from few: random crops, mirror images and images pasted into each other.

The float model says what the right output for any image is, so a variation needs no label and need
not keep one; it only has to look like what the model sees in use. Drawn anew for every step, they
keep a model from learning a few dozen images by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

#: Least share of an image's area that a crop keeps.
AREA = 0.5
#: Least and largest ratio of a crop's sides, before it is resized to the image's.
RATIO = (0.8, 1.25)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image cropped and perhaps mirrored, then a rectangle of the next one in it (CutMix).

    Parameters
    ----------
    images
        ``[B, C, H, W]``, as the model takes them.
    generator
        Draws crops and rectangles, on the CPU.

    Returns
    -------
    Tensor
        ``[B, C, H, W]``.
    """
    crop = v2.RandomResizedCrop(images.shape[-2:], scale=(AREA, 1.0), ratio=RATIO)
    mirror, paste = v2.RandomHorizontalFlip(), v2.CutMix(num_classes=1)
    # torchvision draws from the global generator only.
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.stack([mirror(crop(image)) for image in images])
        return paste(images, torch.zeros(len(images), dtype=torch.long))[0]
