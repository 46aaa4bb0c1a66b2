"""Calibrating with several processes: each takes a share of the images, all find the same scales.

Everything is the identity, or the whole, when torch.distributed is not running.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ptq4vit_plugin.errors import DataError, PTQ4ViTError, one_line

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it started several.

    Each collective runs on the backend of its tensor's device: gloo on CPU, nccl on CUDA.
    """
    if not _several() or dist.is_initialized():
        yield
        return
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until all processes that ``torchrun`` started have come here, however long it takes."""
    if _several():
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        with together():
            dist.barrier()
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """What all processes do at the same time, and what is left of it where one of them has ended.

    Raises
    ------
    PTQ4ViTError
        The connection to another process is lost.
    """
    try:
        yield
    except RuntimeError as error:
        raise PTQ4ViTError(
            "another process of this run has failed or was ended, and its own message, if any, "
            f"says why; this one lost the connection to it ({one_line(error)[:200]})"
        ) from error


def rank() -> int:
    """Number of this process; 0 writes and prints."""
    return dist.get_rank() if _running() else 0


def ranks() -> int:
    """How many processes calibrate together."""
    return dist.get_world_size() if _running() else 1


def share(batches: Sequence[T]) -> Sequence[T]:
    """This process's share of the calibration batches.

    Raises
    ------
    DataError
        There are fewer batches than processes.
    """
    if len(batches) < ranks():
        raise DataError(
            f"{len(batches)} calibration batches cannot be divided among {ranks()} processes; "
            "set data.calibration.batch_size so that there is one batch for each at least"
        )
    return batches[rank() :: ranks()]


def total(x: Tensor) -> Tensor:
    """Sum over all processes."""
    return _reduced(x, dist.ReduceOp.SUM)


def smallest(x: Tensor) -> Tensor:
    """Elementwise minimum over all processes."""
    return _reduced(x, dist.ReduceOp.MIN)


def largest(x: Tensor) -> Tensor:
    """Elementwise maximum over all processes."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, how: dist.ReduceOp) -> Tensor:
    if not _running():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    with together():
        dist.all_reduce(x, how)
    return x


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
