"""What the device under a tensor can do. The only place that names a kind of device."""

import torch


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


def needs_padded_int8(device: torch.device) -> bool:
    """Whether `torch._int_mm` accepts only some shapes (CUDA: M > 16, K and N multiples of 8)."""
    return device.type == "cuda"


def available_devices() -> list[str]:
    """Names of the kinds of device that this machine has, for tests and benchmarks."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
