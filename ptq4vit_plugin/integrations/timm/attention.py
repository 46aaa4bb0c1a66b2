"""Attention as timm writes it: fused into one call, or as two products that can be quantized."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def unfuse_attention(model: nn.Module) -> list[str]:
    """Make a model's attention compute its two products one after the other.

    Only the ``fused_attn`` switches of the model's own modules are turned, never timm's global one.

    Returns
    -------
    list of str
        Names of the modules that were switched; give them to `fuse_attention` to undo it.
    """
    switched = [
        name for name, module in model.named_modules() if getattr(module, "fused_attn", False)
    ]
    _switch(model, switched, False)
    return switched


def fuse_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Undo `unfuse_attention`."""
    _switch(model, names, True)


def fused_attention(model: nn.Module) -> dict[str, bool]:
    """The state of every ``fused_attn`` switch, by module name."""
    return {
        name: bool(m.fused_attn) for name, m in model.named_modules() if hasattr(m, "fused_attn")
    }


def _switch(model: nn.Module, names: Iterable[str], fused: bool) -> None:
    for name in names:
        model.get_submodule(name).fused_attn = fused
