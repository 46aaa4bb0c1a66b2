"""A run that is killed goes on where it was; a changed one starts afresh."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import images, small_vit
from safetensors.torch import load_file

import ptq4vit_plugin as ptq
from ptq4vit_plugin import commands, pipeline
from ptq4vit_plugin.algorithms import op_search
from ptq4vit_plugin.config import read

SHORT = {"algorithm": "ptq4vit", "rounds": 1}
pytestmark = pytest.mark.usefixtures("undrawn")


def scales(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith("__nncf")}


class Stop(BaseException):
    """What a killed process looks like to the code: nothing is cleaned up by it."""


@pytest.fixture
def searched(monkeypatch):
    """Names of the ops that were searched, and a way to stop after some of them."""
    names, limit = [], [None]
    original = op_search.OpSearch.search

    def spy(self, op, *rest):
        if limit[0] is not None and len(names) >= limit[0]:
            raise Stop
        names.append(op.name)
        return original(self, op, *rest)

    monkeypatch.setattr(op_search.OpSearch, "search", spy)

    def until(count):
        names.clear()
        limit[0] = count
        return names

    return until


def interrupted(searched, folder, compression=SHORT):
    names = searched(3)
    with pytest.raises(Stop):
        pipeline.quantize(small_vit(), images(), compression, resume=folder)
    assert len(names) == 3
    return list(names)


def test_goes_on_with_the_same_scales(searched, tmp_path):
    names = searched(None)
    whole = pipeline.quantize(small_vit(), images(), SHORT)
    everything = list(names)
    first = interrupted(searched, tmp_path)
    names = searched(None)
    again = pipeline.quantize(small_vit(), images(), SHORT, resume=tmp_path)
    assert first + names == everything and names
    assert scales(again).keys() == scales(whole).keys()
    assert all(torch.equal(value, scales(whole)[name]) for name, value in scales(again).items())
    assert [r.name for r in ptq.describe(again)] == everything
    assert [r.objective_after for r in ptq.describe(again)] == [
        r.objective_after for r in ptq.describe(whole)
    ]


def test_the_first_search_under_a_promise_goes_on_too(searched, tmp_path):
    labelled = [(x, small_vit()(x).argmax(1)) for x in images()]
    promise = {**SHORT, "accuracy": {"max_drop": 100, "metric": "agreement"}}
    arguments = (small_vit(), images(), promise, labelled)
    names = searched(3)
    with pytest.raises(Stop):
        pipeline.quantize(*arguments, resume=tmp_path)
    first, names = list(names), searched(None)
    again = pipeline.quantize(*arguments, resume=tmp_path)
    assert first + names == [record.name for record in ptq.describe(again)] and names


@pytest.mark.parametrize(
    "change",
    [
        {"compression": {**SHORT, "weights": {"bits": 7}}},
        {"model": small_vit(seed=1)},
        {"model": small_vit(num_heads=4)},
        {"data": images(seed=2)},
    ],
    ids=["config", "weights", "heads", "images"],
)
def test_another_run_starts_afresh(searched, tmp_path, change):
    interrupted(searched, tmp_path)
    names = searched(None)
    pipeline.quantize(
        change.get("model", small_vit()),
        change.get("data", images()),
        change.get("compression", SHORT),
        resume=tmp_path,
    )
    assert names[0] == "patch_embed/proj/conv2d/0"


def test_the_memory_budget_is_not_another_run(searched, tmp_path):
    first = interrupted(searched, tmp_path)
    names = searched(None)
    tight = {**SHORT, "memory_budget": 1e-9}
    pipeline.quantize(small_vit(), images(), tight, resume=tmp_path)
    assert not set(first) & set(names)


def test_damaged_files_are_searched_again(searched, tmp_path):
    first = interrupted(searched, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])
    names = searched(None)
    pipeline.quantize(small_vit(), images(), SHORT, resume=tmp_path)
    assert names[0] == first[1]


def test_only_allowed_classes_are_imported(searched, tmp_path):
    """A file in the run folder is as little trusted as a checkpoint."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    first = interrupted(searched, tmp_path)
    path = next(tmp_path.rglob(f"{first[0].replace('/', '.')}.safetensors"))
    with safe_open(path, "pt") as file:
        text = file.metadata()["ptq4vit"]
        state = {name: file.get_tensor(name) for name in file.keys()}
    assert "nncf.torch.quantization.layers" in text
    text = text.replace("nncf.torch.quantization.layers", "torch.nn.modules.linear")
    save_file(state, path, {"ptq4vit": text})
    names = searched(None)
    pipeline.quantize(small_vit(), images(), SHORT, resume=tmp_path)
    assert names[0] == first[0]


def test_kill_minus_nine_on_the_command(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    content = yaml.safe_load((root / "examples" / "digits" / "ptq4vit.yaml").read_text())
    content["compression"] |= {"rounds": 1, "ignored_scopes": ["{re}blocks/[23]"]}
    content["data"]["calibration"]["samples"] = 8
    content["data"]["evaluation"] = {"split": "val", "samples": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-m", "ptq4vit_plugin", "quantize", str(tmp_path / "config.yaml")]
            + ["--output", str(tmp_path / folder), "--log-json"],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    killed = start("killed")
    for line in killed.stdout:
        if json.loads(line)["event"] == "op" and json.loads(line)["done"] == 5:
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    kept = list((tmp_path / "killed" / "finished-ops").rglob("*.safetensors"))
    assert len(kept) >= 5 and not (tmp_path / "killed" / "model.safetensors").exists()

    resumed = start("killed")
    events = [json.loads(line) for line in resumed.communicate()[0].splitlines()]
    assert resumed.returncode == 0
    assert events[0]["event"] == "calibration" and events[0]["finished"] == len(kept)
    monkeypatch.chdir(root)
    commands.quantize(read(tmp_path / "config.yaml"), tmp_path / "whole", quiet=True)
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("killed", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "killed" / "finished-ops").exists()
