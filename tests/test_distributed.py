"""Two processes find the scales that one finds, and only the first writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import images, small_vit
from safetensors.torch import load_file

import ptq4vit_plugin
from ptq4vit_plugin import commands
from ptq4vit_plugin.config import read
from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations import distributed

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("undrawn")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Scales and objectives by op, of the command in one process or in several."""
    monkeypatch.chdir(ROOT)

    def run(ranks, folder=None, ops=14, **compression):
        content = yaml.safe_load((ROOT / "examples" / "digits" / "ptq4vit.yaml").read_text())
        some = {"rounds": 1, "ignored_scopes": ["{re}blocks/[23]"], **compression}
        content["compression"] = {"algorithm": "ptq4vit", **some}
        content["data"]["calibration"] = {"split": "train", "samples": 12, "batch_size": 4}
        content["data"]["evaluation"] = {"split": "val", "samples": 8}
        file, folder = tmp_path / "config.yaml", tmp_path / (folder or str(ranks))
        file.write_text(yaml.safe_dump(content))
        if ranks == 1:
            commands.quantize(read(file), folder, quiet=True)
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = ["-m", "ptq4vit_plugin", "quantize", file, "--output", folder, "--log-json"]
            done = subprocess.run(
                [sys.executable, *launcher, *command],
                capture_output=True,
                text=True,
                env=ENVIRONMENT,
            )
            assert done.returncode == 0, done.stderr
            events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
            assert events.count("written") == 1 and events.count("op") == ops
        tensors = load_file(folder / "model.safetensors")
        ops = json.loads((folder / "results.json").read_text())["calibration"]["ops"]
        scales = {name: value for name, value in tensors.items() if name.startswith("__nncf")}
        return scales, {op["name"]: op["objective_after"] for op in ops}

    return run


def test_two_processes_find_the_scales_of_one(run):
    one, objectives = run(1, search="exhaustive", search_range={"n": 25})
    two, objectives2 = run(2, search="exhaustive", search_range={"n": 25})
    assert one.keys() == two.keys() and objectives.keys() == objectives2.keys()
    same = total = 0
    for name, value in one.items():
        if value.is_floating_point():
            same += int(torch.isclose(value, two[name], rtol=1e-6).sum())
            total += value.numel()
    assert total > 500 and same / total >= 0.995
    # Where a choice differs, the candidates tie within rounding.
    for name, value in objectives.items():
        assert objectives2[name] == pytest.approx(value, rel=1e-5)


FAILING = """
from ptq4vit_plugin.algorithms.op_search import OpSearch
from ptq4vit_plugin.cli import main
from ptq4vit_plugin.errors import DataError

search = OpSearch.search

def fail(self, op, *args):
    if op.name == "blocks/0/mlp/fc1/linear/0":
        raise DataError("no images here")
    return search(self, op, *args)

OpSearch.search = fail
main()
"""


def test_fast_search_in_two_processes(run, tmp_path):
    """Each process samples its own share; survivors are compared on everything.

    Where one process fails the other says so in one line, and the same command then goes on. These
    two are not the launcher's, which would end the other one.
    """
    _, one = run(1)
    scales, two = run(2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] <= 1.01 * value

    (tmp_path / "failing.py").write_text(FAILING)
    command = ["quantize", tmp_path / "config.yaml", "--output", tmp_path / "again", "--quiet"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *command],
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **address, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, program in enumerate([["-m", "ptq4vit_plugin"], [tmp_path / "failing.py"]])
    ]
    lost, failed = (process.communicate()[1].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert failed[-1] == "error: no images here"
    assert lost[-1].startswith("error: another process of this run has failed or was ended, and it")
    assert not any(line.startswith(("Traceback", "  File")) for line in [*lost, *failed])

    resumed, three = run(2, folder="again", ops=14 - 5)
    assert three == two and scales.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in scales.items())


def test_a_share_without_gradient_is_no_error_where_another_has_some(monkeypatch):
    model = small_vit()
    with torch.no_grad():
        model.head.bias[0] = 1e4  # saturated: no image of this process has a gradient
    monkeypatch.setattr(distributed, "largest", lambda x: x.clamp(min=1))
    ptq4vit_plugin.quantize(model, images(1), {"algorithm": "ptq4vit", "rounds": 1})


def test_alone_everything_is_the_identity():
    x = torch.randn(3)
    assert distributed.total(x) is x and distributed.smallest(x) is x
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    assert distributed.share([1, 2, 3]) == [1, 2, 3]


def test_every_process_needs_a_batch(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    with pytest.raises(DataError, match="3 calibration batches cannot be divided among 4"):
        distributed.share([1, 2, 3])
