"""Make a float model's products visible to NNCF, without changing what it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.decompose import (
    decompose,
    is_decomposed,
    needs_decomposing,
)
from ptq4vit_plugin.integrations.nncf.hooks import ReplacedOps, is_wrapped
from ptq4vit_plugin.integrations.nncf.passes import run
from ptq4vit_plugin.integrations.timm.attention import unfuse_attention


def prepare(model: nn.Module, batch: Batch) -> list[str]:
    """Turn off timm's fused attention and gradient checkpointing, and take apart the calls that
    hide products.

    A model for which this was done before stays as it is.

    Parameters
    ----------
    model
        In evaluation mode; changed in place.
    batch
        Its first image is run once, to see what the model calls.

    Returns
    -------
    list of str
        Names of the attention modules whose ``fused_attn`` switch was turned off.

    Raises
    ------
    DataError
        The model cannot take the images.
    """
    switched = unfuse_attention(model)
    for module in model.modules():
        # Checkpointing runs blocks again in the backward pass, where no hook runs.
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
    image = batch.of(torch.tensor([0]))
    if not is_decomposed(model) and needs_decomposing(model, lambda: run(model, image)):
        decompose(model)
    return switched


def bare(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s or a data-parallel wrapper, or the model itself.

    Raises
    ------
    ModelError
        It is a scripted or traced model, whose calls Python does not see, or a child of it is, or
        is compiled by itself; or a child has hooks of its own, which those of a model around it
        undo.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {type(model).__name__} is not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model: {type(model).__name__} is a TorchScript model, in which ops cannot be hooked; "
            "give the torch.nn.Module it was made from"
        )
    if isinstance(model, OptimizedModule):
        return bare(model._orig_mod)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return bare(model.module)
    for name, child in model.named_modules():
        if isinstance(child, (torch.jit.ScriptModule, OptimizedModule)):
            raise ModelError(
                f"model: '{name}' is a scripted or compiled module, in which ops cannot be hooked; "
                "give the model with the torch.nn.Module it was made from"
            )
        if isinstance(child, ReplacedOps) or (name and is_wrapped(child)):
            raise ModelError(
                f"model: '{name or type(child).__name__}' is quantized already; allowed: a model "
                "of float modules only"
            )
    return model
