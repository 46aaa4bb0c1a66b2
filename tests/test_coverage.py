"""A few of timm's families, one per kind of attention; `benchmarks/coverage.py` takes them all."""

import copy
from collections import Counter

import pytest
import timm
import torch
from calls import PRODUCTS, Calls
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ptq4vit_plugin
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.batch_norm import fold_batch_norms
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.pipeline import plan
from ptq4vit_plugin.record import record_of

SMALL = {
    "talking heads, class attention": ("cait_xxs24_224", 32, dict(img_size=32, depth=2)),
    "rotary embedding, gated MLP": ("eva02_tiny_patch14_224", 28, dict(img_size=28, depth=2)),
    "registers, QK-norm, layer scale, gated MLP, attention pooling": (
        "vit_tiny_patch16_224",
        32,
        dict(
            img_size=32,
            patch_size=8,
            depth=1,
            embed_dim=24,
            reg_tokens=2,
            qk_norm=True,
            init_values=1.0,
            global_pool="map",
            mlp_layer=timm.layers.SwiGLU,
        ),
    ),
    "cross-covariance attention": ("xcit_nano_12_p16_224", 32, dict(img_size=32, depth=1)),
    "windows, cosine attention, computed bias": (
        "swinv2_tiny_window8_256",
        64,
        dict(img_size=64, depths=(1, 2), num_heads=(2, 4), embed_dim=16, window_size=4),
    ),
    "convolutions, batch norms, relative position": ("test_coatnet", 64, dict(img_size=64)),
    "linear attention without softmax": ("efficientvit_b0", 32, dict(depths=(1, 1, 1, 1))),
    "modules called past their parents": (
        "twins_svt_small",
        64,
        dict(img_size=64, depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4)),
    ),
    "parameters joined in a tuple": ("beit_base_patch16_224", 32, dict(img_size=32, depth=1)),
}
QUANTIZED = (
    "modules called past their parents",
    "convolutions, batch norms, relative position",
    "linear attention without softmax",
    "windows, cosine attention, computed bias",
)
SHORT = {"algorithm": "ptq4vit", "search_range": {"alpha": 0.5, "n": 3}, "rounds": 1}


def build(kind):
    name, size, args = SMALL[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **args).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("kind", SMALL)
def test_everything_is_in_the_plan(kind):
    model, images = build(kind)
    model.requires_grad_(False)
    with torch.no_grad():
        reference = model(images)
    # The fused kernel for CPU is the one that PyTorch does not count.
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        model(images)
    batch = Batch((images,), {})
    chosen = plan(model, images)
    prepare(model, batch)
    fold_batch_norms(model, hooks.trace(model, images))
    with Calls() as calls, torch.no_grad():
        output = model(images)
    assert (output - reference).abs().max() <= 1e-5 * reference.abs().max()
    ops = (*chosen.ops, *chosen.left_out)
    kinds = Counter(op.kind for op in ops)
    assert kinds["linear"] == calls.count["linear"]
    assert kinds["conv2d"] == calls.count["conv2d"]
    assert kinds["matmul"] == sum(calls.count[name] for name in PRODUCTS)
    roles = Counter(op.role for op in chosen.ops)
    assert roles["qk"] == len(calls.before_softmax)
    assert roles["attention_v"] == len(calls.after_softmax)
    twins = [o for op in chosen.ops for o in op.operands if o.quantizer == "twin_softmax"]
    assert len(twins) == calls.count["softmax"]
    # PyTorch counts the multiply-accumulates of the original model below Python.
    assert sum(op.macs for op in ops) == flops.get_total_flops() / 2 / len(images)
    assert chosen.macs_quantized > 0.9
    assert {op.reason for op in chosen.left_out} <= {
        "depends on no image; it is a constant that exporters fold"
    }


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_saved_and_loaded(kind, tmp_path):
    model, images = build(kind)
    result = ptq4vit_plugin.quantize(model, [images], SHORT)
    path = ptq4vit_plugin.save(result, tmp_path / "model.safetensors")
    again = ptq4vit_plugin.load(path, copy.deepcopy(model))
    with torch.no_grad():
        logits = result(images)
        assert torch.equal(again(images), logits)
        # 8 bits: noise well below the logits' own spread.
        assert (logits - model(images)).square().mean() < 0.01 * logits.var()
    called = set()
    for hook in hooks.hooks(result):
        hook.module.register_forward_pre_hook(lambda module, _: called.add(module))
    with torch.no_grad():
        result(images)
    assert called == {hook.module for hook in hooks.hooks(result)}
    operands = [o for op in record_of(result).plan.ops for o in op.operands]
    assert all(o.quantizer for o in operands)
