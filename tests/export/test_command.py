"""`ptq4vit export` and `ptq4vit run`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ptq4vit_plugin as ptq
from ptq4vit_plugin.cli import app


@pytest.fixture
def checkpoint(quantized, tmp_path):
    return ptq.save(quantized("vit", 4), tmp_path / "model.safetensors")


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_writes_beside_the_checkpoint_and_into_results(checkpoint):
    results = checkpoint.parent / "results.json"
    results.write_text('{"metrics": {"top1": 50}}')
    done = run("export", checkpoint, "--set", "packed=false", "--per-op")
    assert done.exit_code == 0, done.output
    written = checkpoint.parent / "model-integer.safetensors"
    content = json.loads(results.read_text())
    report = content["exports"]["integer"]
    assert content["metrics"] == {"top1": 50}
    assert report["files"] == {written.name: written.stat().st_size} and report["random"]
    assert "head/linear/0" in report["op_differences"] and "largest difference" in done.output
    assert report["agreement"] == 100 and str(written) in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], "did you mean 'onnx'"),
        (["--set", "pack=1"], "packed"),
        (["--min-sqnr", "900"], "below min_sqnr 900 dB"),
        (["--output", "model.bin"], ".safetensors"),
    ],
)
def test_export_fails_in_one_line(checkpoint, arguments, message):
    before = sorted(checkpoint.parent.iterdir())
    done = run("export", checkpoint, *arguments)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(checkpoint.parent.iterdir()) == before


def test_run_prints_the_classes_of_the_model(checkpoint, image, quantized):
    assert run("export", checkpoint).exit_code == 0
    done = run("run", checkpoint.parent / "model-integer.safetensors", image)
    assert done.exit_code == 0, done.output
    from ptq4vit_plugin.integrations.timm.images import image_transform

    model = quantized("vit", 4)
    with torch.no_grad(), Image.open(image) as opened:
        best = int(model(image_transform(model)(opened)[None]).argmax())
    lines = done.stdout.splitlines()
    assert lines[0] == str(image) and len(lines) == 6 and lines[1].endswith(f"class {best}")


def test_run_refuses_what_is_no_model_or_no_image(checkpoint, image):
    assert "cannot be read as an image" in run("run", _exported(checkpoint), checkpoint).stderr
    assert "allowed: " in run("run", "model.pt", image).stderr
    assert run("run", checkpoint, image).exit_code == 2  # a simulation checkpoint


def _exported(checkpoint):
    run("export", checkpoint)
    return checkpoint.parent / "model-integer.safetensors"
