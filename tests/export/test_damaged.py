"""A foreign, cut or edited artefact: one clear error, and nothing of it is run."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import ptq4vit_plugin as ptq
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import CheckpointError
from ptq4vit_plugin.exporting import exporter_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

SUFFIXES = {"integer": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture(scope="module")
def artefacts(quantized, batch, tmp_path_factory):
    """By format: its files' contents, by name."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for format, suffix in SUFFIXES.items():
        report = ptq.export(quantized("vit", 4), folder / f"m{suffix}", format, batch("vit", 2))
        found[format] = {name: (folder / name).read_bytes() for name in report.files}
    return found


@pytest.fixture
def nothing_runs(monkeypatch):
    """Whatever would build or run a model fails the test."""

    def ran(*arguments, **named):
        pytest.fail("a damaged file reached a runtime")

    monkeypatch.setattr(openvino.Core, "read_model", ran)
    monkeypatch.setattr(openvino.Core, "compile_model", ran)
    monkeypatch.setattr(onnxruntime, "InferenceSession", ran)
    monkeypatch.setattr("ptq4vit_plugin.integrations.onnx.onnx.load", ran)
    monkeypatch.setattr("ptq4vit_plugin.loading.create", ran)


def refused(path, calls=("read", "preprocessing")):
    exporter = exporter_of(path)
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            getattr(exporter, call)(path)
        message = str(caught.value)
        assert message.startswith(f"'{path.with_suffix('')}") and "\n" not in message


def spoiled(content):
    """Contents that are not what was written, by what was done to them."""
    flipped = {
        f"byte {at:.2f}": content[: int(at * len(content))]
        + bytes([content[int(at * len(content))] ^ 4])
        + content[int(at * len(content)) + 1 :]
        for at in (0.0, 0.1, 0.5, 0.9)
    }
    last = content[:-1] + bytes([content[-1] ^ 1])
    return {**flipped, "last byte": last, "cut": content[:-7], "longer": content + b"\n", "no": b""}


@pytest.mark.parametrize("format", SUFFIXES)
def test_changed_files_are_refused_before_anything_runs(format, artefacts, tmp_path, nothing_runs):
    files = artefacts[format]
    for name, content in files.items():
        for change in spoiled(content).values():
            assert change != content
            for other, whole in files.items():
                (tmp_path / other).write_bytes(whole)
            (tmp_path / name).write_bytes(change)
            # Of a safetensors file whose tensors are changed the metadata can be read all the same.
            refused(tmp_path / f"m{SUFFIXES[format]}", ("read",))


def test_an_edited_number_in_the_xml_is_noticed(artefacts, tmp_path, nothing_runs):
    for name, content in artefacts["openvino"].items():
        (tmp_path / name).write_bytes(content)
    text = (tmp_path / "m.xml").read_text()
    assert 'levels="256"' in text
    (tmp_path / "m.xml").write_text(text.replace('levels="256"', 'levels="255"', 1))
    refused(tmp_path / "m.xml")


def test_weights_of_another_model_are_noticed(artefacts, quantized, batch, tmp_path, nothing_runs):
    for name, content in artefacts["openvino"].items():
        (tmp_path / name).write_bytes(content)
    weights = bytearray(artefacts["openvino"]["m.bin"])
    weights[: len(weights) // 2] = bytes(len(weights) // 2)
    (tmp_path / "m.bin").write_bytes(weights)
    refused(tmp_path / "m.xml")
    (tmp_path / "m.bin").unlink()
    refused(tmp_path / "m.xml")


def test_a_missing_file_is_named(tmp_path):
    for suffix in SUFFIXES.values():
        refused(tmp_path / f"absent{suffix}")


def test_foreign_files_of_the_same_formats_are_refused(tmp_path):
    foreign = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    x = torch.randn(1, 3, 2, 2)
    torch.onnx.export(foreign, (x,), tmp_path / "foreign.onnx", dynamo=False)
    openvino.save_model(openvino.convert_model(foreign, example_input=x), tmp_path / "foreign.xml")
    save_file(foreign.state_dict(), tmp_path / "foreign.safetensors")
    for suffix in SUFFIXES.values():
        refused(tmp_path / f"foreign{suffix}")


@pytest.mark.parametrize("format", SUFFIXES)
def test_run_says_so_in_one_line(format, artefacts, tmp_path):
    for name, content in artefacts[format].items():
        (tmp_path / name).write_bytes(content[:-7])
    image = tmp_path / "photo.png"
    done = CliRunner().invoke(app, ["run", str(tmp_path / f"m{SUFFIXES[format]}"), str(image)])
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "m." in done.stderr


@pytest.mark.parametrize("content", ["", "{", '["exports"]', '{"exports": 3}', "\udcff"])
def test_damaged_results_stop_an_export_before_it_begins(content, quantized, tmp_path):
    checkpoint = ptq.save(quantized("vit", 4), tmp_path / "model.safetensors")
    results = tmp_path / "results.json"
    results.write_bytes(content.encode("utf-8", "surrogateescape"))
    done = CliRunner().invoke(app, ["export", str(checkpoint)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert str(results) in done.stderr and "damaged" in done.stderr
    assert sorted(tmp_path.iterdir()) == [checkpoint, results]


def test_results_keep_what_was_there(quantized, tmp_path):
    checkpoint = ptq.save(quantized("vit", 4), tmp_path / "model.safetensors")
    known = {"metrics": {"top1": 50}, "exports": {"onnx": {"ratio": 1}}}
    (tmp_path / "results.json").write_text(json.dumps(known))
    assert CliRunner().invoke(app, ["export", str(checkpoint)]).exit_code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["metrics"] == known["metrics"] and found["exports"]["onnx"] == {"ratio": 1}
    assert found["exports"]["integer"]["format"] == "integer"
