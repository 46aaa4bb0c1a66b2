"""`ptq4vit export` and `ptq4vit run`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ptq4vit_plugin as ptq
from ptq4vit_plugin import commands, registry
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import RegistryError
from ptq4vit_plugin.integrations.integer.checkpoint import IntegerExporter
from ptq4vit_plugin.integrations.timm.models import Recipe, create


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
        (["--set", "per_op=true"], "--set per_op: not an option of 'integer'; allowed: packed"),
        (["--set", "packed=nein"], "--set packed: 'nein' is not allowed; allowed: true or false"),
        (["--set", "packed=["], "--set packed=[: not valid YAML"),
        (["--set", "packed"], "allowed: key=value"),
        (["--min-sqnr", "900"], "below min_sqnr 900 dB"),
        (["--output", "model.bin"], ".safetensors"),
    ],
)
def test_export_fails_in_one_line(checkpoint, arguments, message):
    before = sorted(checkpoint.parent.iterdir())
    done = run("export", checkpoint, *arguments)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(checkpoint.parent.iterdir()) == before


def test_an_export_follows_a_link(checkpoint):
    other = checkpoint.parent / "elsewhere"
    other.mkdir()
    link = checkpoint.parent / "model-integer.safetensors"
    link.symlink_to("elsewhere/v1.safetensors")
    for option in ("packed=true", "packed=false"):  # nothing is there, then an export
        done = run("export", checkpoint, "--set", option)
        assert done.exit_code == 0, done.output
    assert link.is_symlink() and [file.name for file in other.iterdir()] == ["v1.safetensors"]
    assert IntegerExporter().read(link)(torch.zeros(1, 3, 32, 32)).shape[0] == 1


def test_a_checkpoint_is_never_overwritten(checkpoint):
    before = checkpoint.read_bytes()
    done = run("export", checkpoint, "--output", checkpoint)
    assert done.exit_code == 2 and "is a checkpoint, not an export" in done.stderr
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("output", [None, "."])
def test_names_with_dots_and_folders(checkpoint, monkeypatch, output):
    monkeypatch.chdir(checkpoint.parent)
    checkpoint = checkpoint.rename(checkpoint.with_name("deit.fb_in1k.safetensors"))
    done = run("export", checkpoint, *(["--output", output] if output else []))
    assert done.exit_code == 0, done.output
    name = "model-integer" if output else "deit.fb_in1k-integer"
    assert (checkpoint.parent / f"{name}.safetensors").exists()
    assert (checkpoint.parent / "results.json").exists()


def test_each_kind_of_file_names_the_command_for_it(checkpoint, image):
    exported = _exported(checkpoint)
    for command in ("describe", "evaluate", "export"):
        done = run(command, exported)
        assert done.exit_code == 2 and "ptq4vit run" in done.stderr, done.output
    assert "ptq4vit export" in run("run", checkpoint, image).stderr


def test_a_runtime_that_is_not_installed_hinders_no_other(checkpoint, image, monkeypatch):
    exported, load = _exported(checkpoint), registry.load

    def without_others(group, name):
        if name != "integer":
            raise RegistryError(f"exporter '{name}' does not load")
        return load(group, name)

    monkeypatch.setattr(registry, "load", without_others)
    assert run("run", exported, image).exit_code == 0
    refused = run("run", "model.pt", image).stderr
    assert "(integer)" in refused and "'onnx' does not load" in refused


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


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        ({"num_classes": 0}, [64]),
        ({"num_classes": 0, "global_pool": ""}, [17, 64]),
        ({"num_classes": 5, "global_pool": ""}, [17, 5]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_run_names_what_a_model_without_classes_returns(args, shape, suffix, image, tmp_path):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 1}
    model = create(Recipe(name="vit_tiny_patch16_224", args={**size, **args}))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = {"algorithm": "base_ptq", "metric": "mse", "search_range": {"n": 4}, "rounds": 1}
    path = tmp_path / f"features{suffix}"
    quantized = ptq.quantize(model, [x], config)
    ptq.export(quantized, path, suffix[1:].replace("safetensors", "integer"), x)
    done = run("run", path, image)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert f"returns features {shape}, not classes" in done.stderr


def test_run_refuses_what_is_no_model_or_no_image(checkpoint, image):
    assert "cannot be read as an image" in run("run", _exported(checkpoint), checkpoint).stderr
    assert "allowed: " in run("run", "model.pt", image).stderr
    assert run("run", checkpoint, image).exit_code == 2  # a simulation checkpoint


def _exported(checkpoint):
    run("export", checkpoint)
    return checkpoint.parent / "model-integer.safetensors"


def test_an_image_that_the_runtime_refuses_is_one_line(checkpoint, image, monkeypatch):
    class Refuses:
        def preprocessing(self, path):
            return IntegerExporter().preprocessing(path)

        def read(self, path):
            def run(images):
                raise RuntimeError("Got: 224\nExpected: 32")

            return run

    exported = _exported(checkpoint)
    monkeypatch.setattr(commands, "exporter_of", lambda path: Refuses())
    done = run("run", exported, image)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "cannot run on an image of [3, 32, 32]: Got: 224 Expected: 32" in done.stderr
