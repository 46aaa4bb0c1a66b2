"""Several processes that torchrun started: which one is this, and what do they know together."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among those of torchrun; 0 without it."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))
