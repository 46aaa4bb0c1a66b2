"""The command line on the digits model: what is written, printed and refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import ptq4vit_plugin as ptq
from ptq4vit_plugin import commands
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.files import no_other_run, output_folder

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("undrawn")
CONFIG = yaml.safe_load((ROOT / "examples" / "digits" / "ptq4vit.yaml").read_text())


@pytest.fixture
def run(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def config_file(folder, **changes):
    """The example's config, shortened, with some sections changed."""
    content = {
        **CONFIG,
        "data": {**CONFIG["data"], "evaluation": {"split": "val", "samples": 40}},
        "compression": {"algorithm": "ptq4vit", "rounds": 1},
        "output": str(folder / "run"),
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Output folder of a run and the lines that it printed with ``--log-json``."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = CliRunner().invoke(app, ["quantize", str(config_file(folder)), "--log-json"])
    assert result.exit_code == 0, result.output
    return folder / "run", result.stdout.splitlines()


@pytest.fixture(scope="module")
def finished(logged):
    return logged[0]


def test_log_json_is_one_object_per_event(logged):
    folder, lines = logged
    events = [json.loads(line) for line in lines]
    results = json.loads((folder / "results.json").read_text())
    names = [event["event"] for event in events]
    passes = results["calibration"]["passes"]
    assert names == [
        "calibration",
        *["forward_backward"] * 4 * passes,
        *["op"] * 26,
        "evaluated",
        "written",
    ]
    ops = [event for event in events if event["event"] == "op"]
    for done, (event, op) in enumerate(zip(ops, results["calibration"]["ops"], strict=True), 1):
        assert (event["done"], event["ops"]) == (done, 26)
        assert event["name"] == op["name"] and event["objective_after"] == op["objective_after"]
    assert events[-2]["sqnr_db"] == results["metrics"]["sqnr_db"]
    assert results["calibration"]["peak_memory"] > 2**27


def test_quantize_writes_checkpoint_results_and_resolved_config(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"model.safetensors", "results.json", "config.yaml"} <= names
    results = json.loads((finished / "results.json").read_text())
    assert results["metrics"]["images"] == 40
    assert results["metrics"]["sqnr_db"] > 20
    assert len(results["calibration"]["ops"]) == 26
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["compression"][0]["weights"]["granularity"] == "channel"


def test_the_resolved_config_is_a_config(finished, run):
    assert run("config", finished / "config.yaml").exit_code == 0


def test_evaluate_repeats_the_measurement(finished, run):
    result = run("evaluate", finished / "model.safetensors")
    assert result.exit_code == 0, result.output
    metrics = json.loads((finished / "results.json").read_text())["metrics"]
    assert re.search(rf"logit SQNR\s+{metrics['sqnr_db']:.2f} dB", result.output)


def test_evaluate_on_the_images_of_another_config_keeps_the_float_original(finished, run, tmp_path):
    other = {"name": "vit_tiny_patch16_224", "args": {"img_size": 16, "patch_size": 8, "depth": 1}}
    result = run("evaluate", finished, "--config", config_file(tmp_path, model=other))
    assert result.exit_code == 0, result.output
    metrics = json.loads((finished / "results.json").read_text())["metrics"]
    assert re.search(rf"logit SQNR\s+{metrics['sqnr_db']:.2f} dB", result.output)


def test_describe_lists_every_op(finished, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # of no window: names stay whole in a pipe
    result = run("describe", finished / "model.safetensors")
    assert result.exit_code == 0
    for record in ptq.describe(ptq.load(finished / "model.safetensors")):
        assert record.name in result.output


def test_plan_calibrates_nothing_and_shows_reasons(tmp_path, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    compression = {"algorithm": "ptq4vit", "ignored_scopes": ["head/linear/0"]}
    result = run("plan", config_file(tmp_path, compression=compression))
    assert result.exit_code == 0
    assert "blocks/3/attn/matmul/1" in result.output and "twin_softmax" in result.output
    assert re.search(r"head/linear/0.*left out: listed in ignored_scopes", result.output)
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(tmp_path, run):
    (tmp_path / "run").write_text("a file")
    assert_refused(run("quantize", config_file(tmp_path)), "cannot write", "run")


def never(*_, **__):
    raise AssertionError("calibrated in vain")


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"split": "tset"}, ["tset"]),
        ({"samples": 100_000}, ["100000"]),
    ],
)
def test_what_evaluation_lacks_is_said_before_calibration(
    tmp_path, run, monkeypatch, evaluation, words
):
    monkeypatch.setattr(commands, "quantize_model", never)
    data = {**CONFIG["data"], "evaluation": evaluation}
    assert_refused(run("quantize", config_file(tmp_path, data=data)), *words)


def unlabelled(folder):
    """A data section for a flat folder of four images."""
    (folder / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (20, 20), (40 * index, 9, 9)).save(folder / "images" / f"{index}.png")
    return {
        "source": "folder",
        "root": str(folder / "images"),
        "calibration": {"split": ".", "samples": 4},
        "evaluation": {"split": "."},
    }


def test_without_labels_a_model_is_quantized_and_not_evaluated(tmp_path, run, monkeypatch):
    data = unlabelled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "quantize_model", never)
        assert_refused(run("quantize", config_file(tmp_path, data=data)), "evaluation: null")
    result = run("quantize", config_file(tmp_path, data={**data, "evaluation": None}))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"] is None
    assert (tmp_path / "run" / "report.html").exists()
    assert ptq.describe(ptq.load(tmp_path / "run"))
    assert_refused(run("evaluate", tmp_path / "run"), "data.evaluation: null")
    promise = {"algorithm": "ptq4vit", "accuracy": {"max_drop": 1}}
    path = config_file(tmp_path, data={**data, "evaluation": None}, compression=promise)
    assert_refused(run("quantize", path), "data.evaluation: null")


def test_an_evaluation_that_fails_loses_nothing(tmp_path, run, monkeypatch):
    def fail(*_):
        raise DataError("image 7 is not finite")

    monkeypatch.setattr(commands, "measure", fail)
    file = tmp_path / "moved" / "model.safetensors"
    result = run("quantize", config_file(tmp_path), "--output", file.parent)
    assert_refused(result, "image 7 is not finite", f"the quantized model is saved: {file}")
    assert ptq.describe(ptq.load(file))
    saved = ptq.checkpoint.read_metadata(file).extra["config"]
    assert saved["output"] == str(file.parent)  # where it is, and not where the file said


def test_a_run_that_fails_in_evaluation_goes_on_and_leaves_no_older_results(
    tmp_path, run, monkeypatch
):
    def fail(*_):
        raise DataError("image 7 is not finite")

    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("results.json", "config.yaml", "report.html"):
        (folder / name).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(commands, "measure", fail)
        assert run("quantize", config_file(tmp_path)).exit_code == 2
    assert not any((folder / name).exists() for name in ("results.json", "config.yaml"))
    result = run("quantize", config_file(tmp_path), "--log-json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["finished"] == events[0]["ops"] > 0
    assert json.loads((folder / "results.json").read_text())["metrics"]
    assert not (folder / "finished-ops").exists()


def test_links_in_the_run_folder_stay(tmp_path, run):
    folder, kept = tmp_path / "run", tmp_path / "kept"
    names = ["model.safetensors", "README.md", "results.json", "config.yaml", "report.html"]
    folder.mkdir()
    kept.mkdir()
    for name in names:
        (kept / name).write_text("earlier")
        (folder / name).symlink_to(f"../kept/{name}")
    result = run("quantize", config_file(tmp_path))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in kept.iterdir()) == sorted(names)
    for name in names:
        assert (folder / name).is_symlink() and (kept / name).read_bytes() != b"earlier"
    assert result.stdout.splitlines()[-1] == f"written: {folder}/{', '.join(names)}"


def test_two_runs_in_one_folder(tmp_path, run):
    with no_other_run(output_folder(tmp_path / "run")):
        assert_refused(run("quantize", config_file(tmp_path)), "another run", "--output")
    with no_other_run(tmp_path / "run"):
        pass  # free again


def test_output_that_names_a_file(tmp_path, run, monkeypatch):
    monkeypatch.setattr(commands, "calibrate", never)
    path = tmp_path / "vit.safetensors"
    result = run("quantize", config_file(tmp_path), "--output", path)
    assert_refused(result, "vit.safetensors", "allowed: a folder")
    assert not path.exists()


def test_unreadable_image_in_a_folder(tmp_path, run):
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (20, 20), (40 * index, 9, 9)).save(folder / f"{index}.png")
    (tmp_path / "data" / "train" / "a" / "1.png").write_bytes(b"not an image")
    data = {
        "source": "folder",
        "root": str(tmp_path / "data"),
        "calibration": {"split": "train", "samples": 4},
    }
    model = {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 16, "patch_size": 8, "depth": 1, "num_classes": 2},
    }
    path = config_file(tmp_path, data=data, model=model)
    assert_refused(run("quantize", path), "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"name": "vit_tiny_patch16"}}, ["'vit_tiny_patch16' is not a timm model"]),
        ({"model": {**CONFIG["model"], "checkpoint": "missing.safetensors"}}, ["missing"]),
        ({"model": {**CONFIG["model"], "checkpoint": "model.pth"}}, ["not a .safetensors file"]),
        ({"model": {"name": "vit_tiny_patch16_224", "args": {"no_such": 1}}}, ["no_such"]),
        ({"compresion": {}}, ["compresion", "did you mean 'compression'"]),
        ({"data": {"source": "digit"}}, ["data.source", "did you mean 'digits'"]),
        (
            {"data": {**CONFIG["data"], "calibration": {"samples": 5000}}},
            ["5000"],
        ),
    ],
)
def test_bad_config(tmp_path, run, change, words):
    assert_refused(run("quantize", config_file(tmp_path, **change)), *words)


def test_weights_of_another_model(tmp_path, run):
    model = {**CONFIG["model"], "args": {**CONFIG["model"]["args"], "depth": 2}}
    assert_refused(run("plan", config_file(tmp_path, model=model)), "does not fit the model")


def test_checkpoint_that_is_none(tmp_path, run):
    (tmp_path / "m.safetensors").write_bytes(b"12345678901234567890")
    assert_refused(run("describe", tmp_path / "m.safetensors"), "m.safetensors")
    assert_refused(run("evaluate", tmp_path / "m.safetensors"), "m.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
@pytest.mark.parametrize("options", [["--log-json"], []])
def test_a_full_disk_behind_standard_output_loses_no_results(tmp_path, options):
    command = [sys.executable, "-m", "ptq4vit_plugin", "quantize", str(config_file(tmp_path))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, *options], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["images"] == 40
    assert not (tmp_path / "run" / "finished-ops").exists()


@pytest.mark.parametrize("command", ["describe", "evaluate", "export"])
def test_a_path_that_no_file_can_have(run, command):
    name = 300 * "x"
    assert_refused(run(command, name), name)


def test_an_output_that_no_file_can_have(finished, run):
    name = 300 * "x"
    assert_refused(run("export", finished, "--output", finished / name), "File name too long")


@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
def test_a_run_whose_files_are_too_deep_to_be_read(finished, run, tmp_path, name):
    for file in ("results.json", "config.yaml"):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    (tmp_path / name).write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)
    assert_refused(run("report", tmp_path), str(tmp_path), "damaged")
    if name == "results.json":
        (tmp_path / "m.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
        assert_refused(run("export", tmp_path / "m.safetensors"), str(tmp_path / name), "damaged")
