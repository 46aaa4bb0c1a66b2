"""The examples run, and the third-party package of the examples works as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import images, small_vit

import ptq4vit_plugin as ptq
from ptq4vit_plugin.integrations.nncf.hooks import hooks

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def python(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shifts(tmp_path_factory):
    """The example package with its metadata, as an installation would leave it."""
    folder = tmp_path_factory.mktemp("shifts") / "package"
    shutil.copytree(EXAMPLES / "custom_quantizer", folder)
    python("-c", "import setuptools; setuptools.setup()", "-q", "egg_info", cwd=folder)
    return folder


def test_the_third_party_packages_own_tests(shifts):
    path = os.pathsep.join(filter(None, [str(shifts), os.environ.get("PYTHONPATH")]))
    passed = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        shifts / "tests",
        cwd=shifts,
        PYTHONPATH=path,
    )
    assert "3 passed" in passed


def test_the_third_party_package_is_used_from_its_config(shifts, tmp_path):
    path = os.pathsep.join(filter(None, [str(shifts), os.environ.get("PYTHONPATH")]))
    config = tmp_path / "config.yaml"
    text = (shifts / "shift_only.yaml").read_text()
    text = text.replace(
        "algorithm: shift_only", "algorithm: shift_only\n  rounds: 1\n  search_range: {n: 10}"
    ).replace("source: digits", "source: digits\n  evaluation: {samples: 60}")
    config.write_text(text)
    python(
        "-m", "ptq4vit_plugin", "quantize", config, "-q", "-o", tmp_path / "run", PYTHONPATH=path
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    used = {o["quantizer"] for op in results["calibration"]["ops"] for o in op["operands"]}
    assert used == {"power_of_two", "twin_softmax", "twin_gelu"}
    assert results["metrics"]["agreement"] > 90


def test_a_model_of_ones_own():
    said = python(EXAMPLES / "custom_model.py", COLUMNS="80")
    assert "the same logits, bit for bit" in said
    # In a pipe no name is cut or broken.
    rows = [line.split() for line in said.splitlines() if "/" in line]
    assert ["blocks/1/matmul/1", "twin_softmax", "6", "bit,"] in [row[:4] for row in rows]


def test_the_quickstart_and_a_model_that_timm_does_not_have():
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "vit_tiny_patch16_242"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    *others, line = done.stderr.splitlines()
    assert line.startswith("error: model.name: 'vit_tiny_patch16_242' is not a timm model")
    assert line.endswith("did you mean 'vit_tiny_patch16_224'?")
    # torch warns, where there is a compiler for a GPU and no GPU.
    assert all("torch/utils/cpp_extension" in other for other in others)


def test_integer_weights_are_the_models_own_values(tmp_path):
    sys.path.insert(0, str(EXAMPLES / "imagenet"))
    try:
        import integer_weights
    finally:
        sys.path.pop(0)
    model = small_vit(1)
    compression = {"algorithm": "ptq4vit", "rounds": 1, "weights": {"bits": 5}}
    quantized = ptq.quantize(model, images(1), compression)
    tensors = integer_weights.integer_weights(quantized)
    assert sum(name.endswith(".scale") for name in tensors) == 6  # 5 linears and the patches
    weight = dict(model.named_parameters())["blocks.0.mlp.fc1.weight"].detach()
    codes, scale = tensors["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc1.weight.scale"]
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert codes.min() >= -16 and codes.max() <= 15
    inside = (codes > -16) & (codes < 15)
    assert ((codes * scale - weight).abs() <= scale * 0.501)[inside].all()
    # A weight just below half-way between two codes has the code that the model gives it.
    hook = next(h for h in hooks(quantized) if h.op == "blocks.0.mlp.fc1.weight")
    weight = dict(quantized.named_parameters())["blocks.0.mlp.fc1.weight"]
    with torch.no_grad():
        step = 2.0**-6
        hook.module.scale.fill_(step * hook.module.level_high)
        halves = (torch.arange(weight.numel()) % 30 - 14.5) * step
        weight.copy_(torch.nextafter(halves, torch.zeros(())).reshape(weight.shape))
        own = hook.module(weight)
    assert not torch.equal((weight / step).round() * step, own)
    codes = integer_weights.integer_weights(quantized)["blocks.0.mlp.fc1.weight"]
    assert torch.equal(codes * step, own)
    found = integer_weights.activation_codes(quantized, images(1)[0])
    softmax = found["blocks/0/attn/matmul/1", 0]
    assert softmax.dtype == torch.uint8 and softmax.shape == (4, 3, 17, 17)
    assert found["blocks/0/mlp/fc2/linear/0", 0].dtype == torch.int8
