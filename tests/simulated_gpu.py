"""A device that is not the CPU, where there is none: its tensors refuse to meet those of the CPU.

A tensor of this device holds one of the CPU and computes with it, so that results are the CPU's to
the last bit. What a GPU would refuse is refused: an operation on tensors of both devices (but for
scalars, and for indices, which a GPU reads from the CPU), and what needs the CPU's memory, such as
``numpy()``. Kernels of a GPU, its rounding and its memory are not simulated.

The device is torch's `lazy`, a kind that needs no driver and has no kernels of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import nncf.tensor.functions.torch_numeric as nncf_numeric
import nncf.torch.quantization.quantize_functions as nncf_quantize
import pytest
import torch
from nncf.tensor import TensorDeviceType
from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
from nncf.torch.quantization.layers import SQMultiply
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
CPU, DEVICE = torch.device("cpu"), torch.device("lazy", 0)
#: What takes tensors of the CPU as well: indices, and copies from one device to another.
MIXED = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._to_copy.default,
)


class OnDevice(Tensor):
    """A tensor of the simulated device, and the CPU's that it holds."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner.detach()

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    @property
    def data(self) -> OnDevice:
        return OnDevice(self.inner)

    @data.setter
    def data(self, value: OnDevice) -> None:
        assert (self.shape, self.dtype) == (value.shape, value.dtype)
        self.inner = value.inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Makes new tensors where they are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    here = any(isinstance(x, OnDevice) for x in tensors)
    wanted = kwargs.get("device")
    if wanted is None and not here:
        return func(*args, **kwargs)
    if func is aten.copy_.default:
        target, source = _held(args[:2])
        target.copy_(source)
        return args[0]
    if here and func not in MIXED:
        strange = [tuple(x.shape) for x in tensors if x.dim() and not isinstance(x, OnDevice)]
        if strange:
            raise RuntimeError(f"{func}: tensors of two devices; on the CPU: {strange}")
    if wanted is not None:
        kwargs["device"] = CPU
        here_after = torch.device(wanted).type == DEVICE.type
    else:
        here_after = here
    inner_args, inner_kwargs = _held((args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if not here_after:
        return found
    found = tree_map_only(Tensor, lambda x: x if isinstance(x, OnDevice) else OnDevice(x), found)
    return return_and_correct_aliasing(func, args, kwargs, found) if here else found


def _held(values: Any) -> Any:
    return tree_map_only(OnDevice, lambda x: x.inner, values)


def on_device(model: nn.Module) -> nn.Module:
    """A copy of a model, on the simulated device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                value = nn.Parameter(OnDevice(value.detach()), value.requires_grad)
                module._parameters[name] = value
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = OnDevice(value)
    return model


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """A device that this machine does not have, as long as the context lasts."""
    tolist, generator, autocast = Tensor.tolist, torch.Generator, torch.autocast

    def kernel(name: str) -> Any:
        its = QuantizedFunctionsCPU.get(name)

        def call(*args: Any) -> Any:
            tensors = [x for x in args if isinstance(x, Tensor)]
            assert len({x.device for x in tensors}) == 1, f"{name}: tensors of two devices"
            if tensors[0].device == CPU:
                return its(*args)
            dense = tree_map_only(OnDevice, lambda x: x.inner.contiguous(), args)
            return tree_map_only(Tensor, OnDevice, its(*dense))

        return call

    def set_scale(module: SQMultiply, value: Tensor) -> None:
        module._scale_value = nn.Parameter(value.detach())

    with pytest.MonkeyPatch.context() as patch:
        # What torch has in C++ for tensors of its own only.
        patch.setattr(Tensor, "tolist", lambda x: tolist(_held(x)))
        patch.setattr(torch, "Generator", lambda device=None: generator())
        patch.setattr(
            torch, "autocast", lambda _, *args, **kwargs: autocast(CPU.type, *args, **kwargs)
        )
        # Inference mode does without the version counters that these tensors have.
        patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))
        # What NNCF knows of the CPU and CUDA only.
        patch.setattr(nncf_quantize, "QuantizedFunctionsCPU", SimpleNamespace(get=kernel))
        patch.setitem(nncf_numeric.DEVICE_MAP, TensorDeviceType.GPU, DEVICE.type)
        patch.setitem(nncf_numeric.DEVICE_MAP_REV, DEVICE.type, TensorDeviceType.GPU)
        # Torch lets data of a GPU take the place of the CPU's, but not of a subclass.
        patch.setattr(SQMultiply, "scale", property(lambda x: x._scale_value, set_scale))
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor`: made on the CPU, then moved
        try:
            with _Factories():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
