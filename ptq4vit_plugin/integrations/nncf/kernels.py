"""NNCF's fake-quantize kernels, which are compiled when they are first used on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from nncf.torch.quantization.extensions import QuantizedFunctionsCPU, QuantizedFunctionsCPULoader


def are_compiled() -> bool:
    """Whether this machine has them already."""
    return any(Path(QuantizedFunctionsCPULoader.get_build_dir()).glob("*.so"))


@contextmanager
def compiled_meanwhile() -> Iterator[None]:
    """Compile NNCF's CPU kernels beside the work in this context, which does not need them.

    That takes most of a minute once per machine; afterwards they are loaded in no time. A failure
    is left to the first use, which reports it.
    """
    thread = Thread(target=_load)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _load() -> None:
    try:
        QuantizedFunctionsCPU.get("Quantize_forward")
    except Exception:  # whatever a compiler can do wrong
        return
