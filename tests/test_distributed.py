"""Two processes find the scales that one finds, and only the first writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations import distributed

ROOT = Path(__file__).parents[1]


def run(folder, name, ranks, **compression):
    content = yaml.safe_load((ROOT / "examples" / "digits" / "ptq4vit.yaml").read_text())
    content["compression"] = {"algorithm": "ptq4vit", "rounds": 1, **compression}
    content["data"]["calibration"] = {"split": "train", "samples": 12, "batch_size": 4}
    content["data"]["evaluation"] = {"split": "val", "samples": 8}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = ["-m", "ptq4vit_plugin", "quantize", str(folder / f"{name}.yaml"), "--log-json"]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *command, "--output", folder / name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [e["event"] for e in events].count("written") == 1
    return load_file(folder / name / "model.safetensors"), events


def test_two_processes_find_the_scales_of_one(tmp_path):
    one, events = run(tmp_path, "one", 1, search="exhaustive")
    two, events2 = run(tmp_path, "two", 2, search="exhaustive")
    assert one.keys() == two.keys()
    same = total = 0
    for name, value in one.items():
        if name.startswith("__nncf") and value.is_floating_point():
            same += int(torch.isclose(value, two[name], rtol=1e-6).sum())
            total += value.numel()
    assert total > 1000 and same / total >= 0.995
    # Where a choice differs the two are a tie within rounding.
    objectives, objectives2 = (
        {e["name"]: e["objective_after"] for e in found if e["event"] == "op"}
        for found in (events, events2)
    )
    assert objectives.keys() == objectives2.keys()
    for name, value in objectives.items():
        assert objectives2[name] == pytest.approx(value, rel=1e-5)


def test_fast_search_in_two_processes(tmp_path):
    _, one = run(tmp_path, "one", 1)
    _, two = run(tmp_path, "two", 2)
    for a, b in zip(one, two, strict=False):
        if a["event"] == "op":
            assert b["name"] == a["name"]
            assert b["objective_after"] <= 1.01 * a["objective_after"]


def test_alone_everything_is_the_identity():
    x = torch.randn(3)
    assert distributed.total(x) is x and distributed.smallest(x) is x
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    assert distributed.share([1, 2, 3]) == [1, 2, 3]


def test_every_process_needs_a_batch(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    with pytest.raises(DataError, match="3 calibration batches cannot be divided among 4"):
        distributed.share([1, 2, 3])
