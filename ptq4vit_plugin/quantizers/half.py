"""NNCF's quantizers for models in half precision.

NNCF computes in the input's type and rounds the scale to it. In bfloat16, with its 8 significant
bits, ``x / scale`` then misses the nearest code as often as not. These compute in float32, as twin
quantizers do, and round only their result.
"""

from __future__ import annotations

from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SymmetricQuantizer
from torch import Tensor, nn


class _InFloat32(BaseQuantizer):
    def quantize(self, x: Tensor, execute_traced_op_as_identity: bool = False) -> Tensor:
        return super().quantize(x.float(), execute_traced_op_as_identity).to(x.dtype)


class SymmetricInFloat32(_InFloat32, SymmetricQuantizer):
    """NNCF's symmetric quantizer, computed in float32; returns the input's type."""


class AsymmetricInFloat32(_InFloat32, AsymmetricQuantizer):
    """NNCF's asymmetric quantizer, computed in float32; returns the input's type."""


FAMILIES = {SymmetricQuantizer: SymmetricInFloat32, AsymmetricQuantizer: AsymmetricInFloat32}


def in_float32(quantizer: nn.Module) -> nn.Module:
    """One of NNCF's quantizers with the same levels, computed in float32; others as they are."""
    family = FAMILIES.get(type(quantizer))
    if family is None:
        return quantizer
    made = family.from_config(quantizer.get_config())
    made.load_state_dict(quantizer.state_dict())
    return made.to(next(quantizer.parameters()).device)
