"""A check that a user with a GPU runs: ``python -m ptq4vit_plugin.integrations.integer.selfcheck``.

On every accelerator, and without one on nothing: NNCF's fake-quantize kernels build and agree with
the integer codes, integer products equal those of int64, and how long both take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ptq4vit_plugin.integrations import device as devices
from ptq4vit_plugin.integrations.integer.product import batched_product, weight_product
from ptq4vit_plugin.quantizers.base import Grouping
from ptq4vit_plugin.quantizers.branches import branches_of
from ptq4vit_plugin.quantizers.uniform import Uniform

ROWS, INNER, OUTER = 1576, 384, 1536  # fc1 of a ViT-S on 8 images


def check(device: torch.device) -> list[str]:
    """Run everything on one device.

    Returns
    -------
    list of str
        A line per check, ``ok`` or ``FAILED`` first.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, ROWS, INNER, generator=generator).to(device)
    weight = torch.randint(-128, 128, (OUTER, INNER), generator=generator, dtype=torch.int8)
    quantizer = Uniform(8, Grouping((1, 1, 1, 1)))
    quantizer.observe(x)
    module = quantizer.module(quantizer.n, lambda scale: scale).to(device)
    (branch,) = branches_of(module)
    with torch.no_grad():
        codes = branch.codes(x[0, 0])
        simulated = module(x[0, 0])
        different = ((codes * branch.scale - simulated).abs() > branch.scale / 2).sum()
        lines = [_line(int(different) <= 1e-4 * codes.numel(), "simulated = codes * scale")]
        product = weight_product(weight.to(device), [(-128, 127)])
        expected = codes.cpu().long() @ weight.long().t()
        same = torch.equal(product.accumulators(codes, -128).cpu().long(), expected)
        lines.append(_line(same, "linear = int64"))
        heads = codes[: ROWS // 8, :64].expand(2, 6, -1, -1)
        expected = heads.cpu().long() @ heads.cpu().long().mT
        same = torch.equal(batched_product(heads, heads.mT, 128 * 128).cpu().long(), expected)
        lines.append(_line(same, "attention = int64"))
        plain = weight.to(device).t().float()
        times = {
            "fake quantize": _milliseconds(lambda: module(x), device),
            "float32 product": _milliseconds(lambda: x[0, 0] @ plain, device),
            "integer product": _milliseconds(lambda: product.accumulators(codes, -128), device),
        }
    return lines + [f"   {name}: {value:.3f} ms" for name, value in times.items()]


def main() -> int:
    """Check every accelerator; the exit code is 1 if anything failed."""
    found = devices.accelerators()
    if not found:
        print("no CUDA device: nothing to check")
        return 0
    failed = False
    for device, name in found:
        print(f"{device}: {name}")
        lines = check(device)
        print("\n".join(f"  {line}" for line in lines))
        failed = failed or any(line.startswith("FAILED") for line in lines)
    return int(failed)


def _line(good: bool, what: str) -> str:
    return f"{'ok' if good else 'FAILED'} {what}"


def _milliseconds(run: Callable[[], Tensor], device: torch.device, times: int = 20) -> float:
    for _ in range(3):
        run()
    devices.wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    devices.wait_for(device)
    return 1000 * (time.perf_counter() - start) / times


if __name__ == "__main__":
    sys.exit(main())
