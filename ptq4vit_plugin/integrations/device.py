"""What the device under a tensor can do. The only place that names a kind of device."""

import os
import sys

import psutil
import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """What type a model's first floating-point parameter has; float32 if it has none."""
    types = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(types, torch.float32)


def has_int8_dot(device: torch.device) -> bool:
    """Whether `torch._int_mm` runs on int8 dot-product hardware on this device.

    True for CUDA from compute capability 7.5 and for CPUs with AVX-512 VNNI. Elsewhere (for
    example AVX2-only CPUs) `torch._int_mm` is a reference loop, many times slower than a float32
    GEMM. The answer depends on the hardware alone, so that the same machine takes the same path
    each time.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
    return False


def multiplies_bytes(device: torch.device) -> bool:
    """Whether it is an x86 CPU that multiplies 8-bit integers faster than float32: from AVX2."""
    avx2 = getattr(torch.cpu, "_is_avx2_supported", lambda: False)
    return device.type == "cpu" and bool(avx2())


def adds_int8_pairs(device: torch.device) -> bool:
    """Whether it is an x86 CPU whose 8-bit products are added in pairs, in 16 bits that saturate.

    That is AVX2 or AVX-512 without VNNI.
    """
    return multiplies_bytes(device) and not has_int8_dot(device)


def needs_padded_int8(device: torch.device) -> bool:
    """Whether `torch._int_mm` accepts only some shapes (CUDA: M > 16, K and N multiples of 8)."""
    return device.type == "cuda"


def local_device() -> torch.device:
    """The device this process works on: the GPU of its local rank under torchrun, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", rank % torch.cuda.device_count())


def available_devices() -> list[str]:
    """Names of the kinds of device that this machine has, for tests and benchmarks."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def accelerators() -> list[tuple[torch.device, str]]:
    """Every CUDA device and its name."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [(torch.device("cuda", n), torch.cuda.get_device_name(n)) for n in range(count)]


def wait_for(device: torch.device) -> None:
    """Return when everything that was started on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that nobody has taken where the tensors of a device are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on a GPU, the tensors; else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
