"""Data source ``digits``: handwritten digits that scikit-learn brings, for trying things out."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ptq4vit_plugin.data.images import Images, Transform
from ptq4vit_plugin.data.sources.root import data_name
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.timm.images import SPLITS, check_split

TEST_SHARE = 0.2


def digits(config: Any, split: str, transform: Transform) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: ``train`` (80 %) or ``val`` (20 %).

    The split is the same everywhere and for ever: numpy keeps the stream of ``RandomState``.
    """
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    data_name(config, wanted=False)
    if config.root is not None:
        raise DataError(f"data.root {config.root}: source 'digits' reads no files; allowed: null")
    check_split(split, "digits", ("train", "val"))
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    held_out = round(TEST_SHARE * len(order))
    chosen = np.sort(order[held_out:] if split in SPLITS[0] else order[:held_out])
    grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return Images(
        read=partial(_read, grey, bunch.target[chosen]),
        names=[f"digits[{index:04d}]" for index in chosen],
        transform=transform,
    )


def _read(grey: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(grey[index]), int(labels[index])
