"""More images from few: mirror images and mixtures.

The float model says what the right output for any image is, so a variation needs no label and need
not keep one; it only has to look like what the model sees in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Share of the second image in a mixture, at most.
SHARE = 0.5


def varied(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` images: the mirror images, then mixtures of two images each.

    Parameters
    ----------
    images
        ``[B, C, H, W]``.
    generator
        Draws pairs and shares, on the CPU.

    Returns
    -------
    Tensor
        ``[count, C, H, W]``: ``(1 - s) a + s b`` with s uniform between 0 and `SHARE`, a and b any
        of the images and their mirror images.
    """
    both = torch.cat([images, images.flip(-1)])
    missing = max(0, count - len(images))
    first, second = (torch.randint(len(both), (missing,), generator=generator) for _ in range(2))
    share = SHARE * torch.rand(missing, 1, 1, 1, generator=generator)
    share = share.to(device=images.device, dtype=images.dtype)
    index = torch.cat([first, second]).to(images.device)
    mixtures = torch.lerp(both[index[:missing]], both[index[missing:]], share)
    return torch.cat([both[len(images) :], mixtures])[:count]
