"""What an export must not lose or change: codes, types, sizes, modes; and what it refuses."""

import copy
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import images, small_vit, sqnr
from safetensors.torch import save_file

import ptq4vit_plugin as ptq
from ptq4vit_plugin.errors import ConfigError, DataError, ModelError, PTQ4ViTError
from ptq4vit_plugin.exporting import exporter_of
from ptq4vit_plugin.integrations.timm.images import image_transform
from ptq4vit_plugin.integrations.timm.models import Recipe, create

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from ptq4vit_plugin.integrations.openvino.ir import ONE_BY_ONE  # noqa: E402

SHORT = {"rounds": 1, "search_range": {"n": 10}}
SUFFIX = {"integer": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_weights_with_a_zero_point_are_kept_or_refused(tmp_path, bits):
    model = small_vit(1)
    with torch.no_grad():  # nearly all below zero: codes reach far below those of so many bits
        model.blocks[0].mlp.fc1.weight.clamp_(max=0.012)
    weights = {"quantizer": "asymmetric", "bits": bits, "granularity": "tensor"}
    overrides = {"blocks/0/mlp/fc1/linear/0": {"weights": weights}}
    data = images(1)
    quantized = ptq.quantize(
        model, data, {"algorithm": "base_ptq", "scope_overrides": overrides, **SHORT}
    )
    path = tmp_path / "a.safetensors"
    if bits == 8:
        with pytest.raises(ModelError, match="fc1/linear/0: a weight needs one grid of signed"):
            ptq.export(quantized, path, "integer", data)
        assert not path.exists()
    else:
        assert ptq.export(quantized, path, "integer", data).sqnr_db > 60


def test_weights_with_a_zero_point_per_channel_are_refused_by_name(tmp_path):
    settings = {"algorithm": "base_ptq", "weights": {"quantizer": "asymmetric"}, **SHORT}
    quantized = ptq.quantize(small_vit(1), images(1), settings)
    with pytest.raises(ModelError, match="conv2d/0, operand 1: AsymmetricQuantizer has no integer"):
        ptq.export(quantized, tmp_path / "a.safetensors", "integer", images(1))


@pytest.mark.parametrize("format", SUFFIX)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_exported(tmp_path, format, dtype):
    model, data = small_vit(1, dynamic_img_size=True), images(1)
    quantized = ptq.quantize(
        model.to(dtype), [x.to(dtype) for x in data], {"algorithm": "ptq4vit_plus", **SHORT}
    )
    path = tmp_path / f"a{SUFFIX[format]}"
    report = ptq.export(quantized, path, format, data)
    assert report.sqnr_db > 20 and quantized.head.weight.dtype == dtype
    assert report.image_size == "free" and ONE_BY_ONE not in report.facts.get("note", "")
    if format != "integer":  # which needs the model's own code
        run = exporter_of(path).read(path)
        for some in (data[0][:3], images(1, 3, size=48)[0]):
            logits = run(some)
            assert logits.dtype == torch.float32
            with torch.no_grad():
                assert sqnr(quantized(some.to(dtype)).float(), logits) > 20


@pytest.mark.parametrize("format", SUFFIX)
def test_the_files_own_image_size_is_the_one_it_was_compared_on(tmp_path, format, quantized):
    model = copy.deepcopy(quantized("vit", 8))
    size = tuple(images(1)[0].shape[1:])
    model.patch_embed.img_size = None  # as in a model that does not say what it takes
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 224, 224)}
    path = tmp_path / f"a{SUFFIX[format]}"
    ptq.export(model, path, format, images(1))
    assert exporter_of(path).preprocessing(path).input_size == size


@pytest.mark.parametrize("format", SUFFIX)
def test_the_callers_state_stays_as_it_is(tmp_path, format, quantized):
    model = copy.deepcopy(quantized("vit", 8))
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    log = logging.getLogger("openvino")
    log.setLevel(logging.INFO)
    report = ptq.export(model, tmp_path / f"a{SUFFIX[format]}", format, images(1), per_op=True)
    assert [module.training for module in model.modules()] == modes
    assert log.level == logging.INFO
    mask = os.umask(0)
    os.umask(mask)
    for name in report.files:
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


INTERRUPTED = """
import signal
import sys

import ptq4vit_plugin as ptq
from models import images, small_vit

data = images(1)
some = {"algorithm": "ptq4vit", "rounds": 1, "search_range": {"n": 3}}
model = ptq.quantize(small_vit(1), data, some)
for name in ("a.xml", "b.xml"):
    ptq.export(model, f"{sys.argv[1]}/{name}", "openvino", data)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_process_can_be_interrupted_after_an_export(tmp_path):
    """Every `openvino.Core` that compiled gives the process a stack for signal handlers, and takes
    it away when it goes: with several, Ctrl-C then ran on memory that was freed."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "interrupted"


def test_differences_per_op_of_a_model_that_only_its_code_can_build(tmp_path):
    data = images(1)
    quantized = ptq.quantize(small_vit(1), data, {"algorithm": "ptq4vit_plus", **SHORT})
    report = ptq.export(quantized, tmp_path / "a.safetensors", "integer", data, per_op=True)
    assert "head/linear/0" in report.op_differences


@pytest.mark.parametrize(
    ("format", "output", "taken"),
    [
        ("integer", "v.safetensors", "v.safetensors"),
        ("openvino", "v.xml", "v.bin"),
    ],
)
def test_files_of_others_are_not_replaced(tmp_path, format, output, taken, quantized):
    other = tmp_path / taken
    save_file({"weight": torch.ones(3)}, other)
    if format == "openvino":
        (tmp_path / output).write_text("<net/>")
    before = other.read_bytes()
    with pytest.raises(ConfigError, match=f"'{other}' was not written by ptq4vit's export; move"):
        ptq.export(quantized("vit", 8), tmp_path / output, format, images(1))
    assert other.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {output, taken}


@pytest.mark.parametrize("format", SUFFIX)
def test_an_export_is_replaced_by_another_one(tmp_path, format, quantized):
    path = tmp_path / f"v{SUFFIX[format]}"
    ptq.export(quantized("vit", 8), path, format, images(1))
    before = path.read_bytes()
    ptq.export(quantized("vit", 4), path, format, images(1))
    with torch.no_grad():
        expected = quantized("vit", 4)(images(1)[0])
    assert path.read_bytes() != before
    assert sqnr(expected, exporter_of(path).read(path)(images(1)[0])) > 20


@pytest.mark.parametrize(
    ("format", "output", "folder"),
    [
        ("onnx", ".", "model-onnx.onnx"),
        ("integer", ".", "model-integer.safetensors"),
        ("openvino", ".", "model-openvino.xml"),
        ("openvino", "w.xml", "w.bin"),
    ],
)
def test_nothing_is_written_into_a_folder_that_has_the_files_name(
    tmp_path, format, output, folder, quantized
):
    (tmp_path / folder).mkdir()
    with pytest.raises(ConfigError, match=f"{folder}.*; move it, or give another file"):
        ptq.export(quantized("vit", 8), tmp_path / output, format, images(1))
    assert list(tmp_path.rglob("*")) == [tmp_path / folder]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3, 64, 64), r"example_input of \[1, 3, 64, 64\]: Input height \(64\)"),
        ([torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 64, 64)], r"of \[1, 3, 64, 64\]: Input"),
        (torch.zeros(2, 1, 32, 32), r"example_input of \[1, 1, 32, 32\]: .*channels"),
        (torch.zeros(3, 32, 32), r"example_input of \[1, 32, 32\]: not enough values"),
        (np.zeros((2, 3, 32, 32)), "export: example_input: batch 0 has no images; allowed: a tens"),
        ("photo.png", "export: example_input: batch 0 has no images; allowed: a tensor of images"),
        ([], "export: example_input: the set is empty"),
        (5, "export: example_input: .* not iterable; allowed: a tensor of images"),
    ],
)
def test_images_that_the_model_cannot_take_are_refused_by_name(tmp_path, quantized, given, message):
    with pytest.raises((DataError, ModelError), match=message) as caught:
        ptq.export(quantized("vit", 8), tmp_path / "a.onnx", "onnx", given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("integer", {"min_sqnr": float("nan")}, "min_sqnr: nan is not allowed; allowed: a number"),
        ("integer", {"min_sqnr": "5"}, "min_sqnr: '5' is not allowed; allowed: a number of dB"),
        ("onnx", {"unsigned": "no"}, "unsigned: 'no' is not allowed; allowed: true or false"),
        ("integer", {"pack": True}, "pack: not an option of 'integer'; .*did you mean 'packed'"),
    ],
)
def test_options_are_checked_before_any_work(tmp_path, monkeypatch, format, options, message):
    monkeypatch.setattr("ptq4vit_plugin.exporting.Artefact", pytest.fail)
    with pytest.raises(ConfigError, match=f"export: {message}"):
        ptq.export(small_vit(1), tmp_path / "a", format, images(1), **options)


def test_noise_has_the_size_that_a_model_was_created_for(tmp_path):
    """LeViT's class does not say it, and timm's config keeps the pretrained one."""
    model = create(Recipe(name="levit_128s", args={"img_size": 64, "num_classes": 10}))
    assert image_transform(model).size == (64, 64)
    config = {"algorithm": "base_ptq", "metric": "mse", "rounds": 1, "search_range": {"n": 2}}
    quantized = ptq.quantize(model, images(1, 2, size=64), config)
    path = tmp_path / "a.safetensors"
    assert ptq.export(quantized, path, "integer").random
    assert exporter_of(path).preprocessing(path).input_size == (3, 64, 64)


def test_an_integer_model_is_not_exported_again(tmp_path, quantized):
    path = tmp_path / "a.safetensors"
    ptq.export(quantized("vit", 8), path, "integer", images(1))
    with pytest.raises(ModelError, match="export: this is an integer model already"):
        ptq.export(ptq.load(path), tmp_path / "a.onnx", "onnx", images(1))


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = small_vit(1)

    def forward(self, x):
        features = self.vit.forward_features(x)
        return self.vit.forward_head(features), features


@pytest.mark.parametrize("format", SUFFIX)
def test_several_outputs_are_refused_by_name(tmp_path, format):
    quantized = ptq.quantize(Pair().eval(), images(1), {"algorithm": "ptq4vit", **SHORT})
    with pytest.raises(PTQ4ViTError, match="returns tuple; only models that return one tensor"):
        ptq.export(quantized, tmp_path / f"a{SUFFIX[format]}", format, images(1))
