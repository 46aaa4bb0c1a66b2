"""Sweeps: which cells there are, resuming after a kill, ranks, tables beside published numbers."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import timm
import yaml
from models import images
from typer.testing import CliRunner

from ptq4vit_plugin import commands
from ptq4vit_plugin import sweep as sweeps
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import ConfigError, PTQ4ViTError
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.pipeline import plan
from ptq4vit_plugin.reporting import results as tables

ROOT = Path(__file__).parents[1]
IMAGENET = ROOT / "examples" / "imagenet"
BITS = {
    f"W{k}A{k}": {"compression.weights.bits": k, "compression.activations.bits": k} for k in (8, 6)
}
KEYS = [(50.0, "a"), (51.0, "c"), (52.0, "a")]
pytestmark = pytest.mark.usefixtures("undrawn")
ARGS = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}


def tiny(folder, **changes) -> dict:
    """Two models, two algorithms and two bit settings on digits, a fraction of a second each."""
    return {
        "base": {
            "model": {"args": {**ARGS, "num_classes": 10}},
            "data": {
                "source": "digits",
                "calibration": {"samples": 4},
                "evaluation": {"samples": 20},
            },
            "compression": {"rounds": 1, "search_range": {"n": 4}},
        },
        "grid": {
            "model.name": ["vit_tiny_patch16_224", "deit_tiny_patch16_224"],
            "compression.algorithm": ["base_ptq", "ptq4vit"],
            "bits": BITS,
        },
        "output": str(folder / "out"),
        **changes,
    }


def write(folder, content) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(folder) -> list[dict]:
    """Every line of the results, duplicates included, without what a clock measured."""
    found = []
    for line in (folder / "out" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["seconds"], row["metrics"]["images_per_second"]
        found.append(row)
    return found


# --- cells ---------------------------------------------------------------------------------------


def test_cells_are_all_combinations_in_order(tmp_path):
    cells = sweeps.cells(sweeps.read(write(tmp_path, tiny(tmp_path))))
    expected = list(
        itertools.product(
            ["vit_tiny_patch16_224", "deit_tiny_patch16_224"],
            ["base_ptq", "ptq4vit"],
            ["W8A8", "W6A6"],
        )
    )
    assert [tuple(cell.labels.values()) for cell in cells] == expected
    for cell, (model, algorithm, bits) in zip(cells, expected, strict=True):
        (step,) = cell.config.compression
        assert (cell.config.model.name, step["algorithm"]) == (model, algorithm)
        assert f"W{step['weights']['bits']}A{step['activations']['bits']}" == bits
    assert len({cell.key for cell in cells}) == len({cell.config.output for cell in cells}) == 8


def test_only_and_set(tmp_path):
    sweep = sweeps.read(write(tmp_path, tiny(tmp_path)))
    cells = sweeps.cells(
        sweep,
        only=["model.name=vit*,swin*", "bits=W6A6"],
        overrides=["compression.algorithm=ptq4vit", "data.evaluation.samples=3"],
    )
    (cell,) = cells
    assert cell.config.compression[0]["algorithm"] == "ptq4vit"
    assert cell.config.data.evaluation.samples == 3
    assert cell.labels["compression.algorithm"] == "ptq4vit"


@pytest.mark.parametrize(
    ("only", "overrides", "message"),
    [
        (["modle.name=x"], [], "no axis 'modle.name'.*did you mean 'model.name'"),
        (["bits=W9*"], [], "no cell matches"),
        (["bits"], [], "--only bits: allowed: key=value"),
        ([], ["compression.weigths.bits=8"], r"W8A8.*weigths: unknown key.*did you mean 'weights'"),
        ([], ["model.name.x=1"], "'name' is 'vit_tiny_patch16_224' and has no keys"),
        ([], ["data.root"], "--set data.root: allowed: key=value"),
        ([], ["data.root=["], r"^--set data.root=\[: not valid YAML: [^\n]+$"),
        ([], ["data.root=2024-02-31"], "--set data.root=2024-02-31: not valid YAML: day"),
        ([], ["model.name=2024-02-28"], "grid.model.name: 2024-02-28; .* needs quotes"),
    ],
)
def test_bad_restrictions(tmp_path, only, overrides, message):
    sweep = sweeps.read(write(tmp_path, tiny(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        sweeps.cells(sweep, only, overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": {}, "gird": {}}, "gird: unknown key.*did you mean 'grid'"),
        ({"base": {}, "grid": {"a": 3}}, "grid.a: .*an axis is a list of values"),
        ({"base": {}, "grid": {}}, "grid: "),
        ({"base": {}, "grid": {"bits": BITS, "a": []}}, r"grid.a: \[\]; .* at least one value"),
        ({"base": {}, "grid": {"a": {}}}, r"grid.a: \{\}; .* at least one value"),
        ([1], "allowed: a mapping with base, grid"),
    ],
)
def test_bad_sweep_files(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.read(write(tmp_path, content))


# --- results -------------------------------------------------------------------------------------


def _append_many(arguments):
    path, number = arguments
    for index in range(50):
        sweeps.append(path, {"key": f"{number}-{index}", "padding": "x" * 5000})


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        list(pool.map(_append_many, [(path, number) for number in range(3)]))
    lines = path.read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines if line} == {
        f"{number}-{index}" for number in range(3) for index in range(50)
    }


def test_a_line_that_was_cut_off_is_skipped_and_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second, third = ({**result("m", "ptq4vit", 8, top1), "key": key} for top1, key in KEYS)
    sweeps.append(path, first)
    with open(path, "a") as file:
        file.write('{"key": "b", "val')
    assert [row["key"] for row in sweeps.results(path)] == ["a"]
    sweeps.append(path, second)
    sweeps.append(path, third)
    assert sweeps.results(path) == [third, second]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# PTQ4ViT\n\nA plugin.\n", "line 1: not JSON"),
        ('{\n  "metrics": {}\n}\n', "line 2: not JSON"),
        ('{"metrics": {}, "seconds": {}}', "line 1: key: Field required"),
        ('\n{"key": "a"}\n', "line 2: cell: Field required"),
        ("[1]\n", "line 1: Input should be"),
    ],
)
def test_files_of_something_else_are_told(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_text(content)
    done = call("table", path)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {path}, {message}") and "results.jsonl" in done.stderr


@pytest.mark.parametrize("content", ["", '{"key": "a", "mod'])
def test_files_without_a_result_are_told(tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content)
    done = call("table", path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: has no result") and done.stderr.count("\n") == 1


def test_a_full_disk_is_told():
    with pytest.raises(PTQ4ViTError, match="^output: cannot write '/dev/full': No space left on d"):
        sweeps.append(Path("/dev/full"), {"key": "a"})


def test_killed_and_restarted_no_cell_is_lost_or_repeated(tmp_path):
    file, path = write(tmp_path, tiny(tmp_path)), tmp_path / "out" / "results.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "ptq4vit_plugin", "sweep", str(file), "--quiet"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 3:
            running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert running.wait() == -signal.SIGKILL
    before = rows(tmp_path)
    assert 3 <= len(before) < 8
    assert call("sweep", file, "--quiet").exit_code == 0
    after = rows(tmp_path)
    assert after[: len(before)] == before
    assert [row["key"] for row in after] == [c.key for c in sweeps.cells(sweeps.read(file))]
    assert call("sweep", file, "--quiet").exit_code == 0
    assert rows(tmp_path) == after


def test_two_ranks_give_the_rows_of_one(tmp_path):
    """Under torchrun, and a cell that fails in one process does not end the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    grid = {
        "model.name": ["vit_tiny_patch16_224"],
        "data.calibration.samples": [5000, 4, 3],
        "compression.algorithm": ["ptq4vit"],
    }
    for folder in (one, two):
        folder.mkdir()
        write(folder, tiny(folder, grid=grid))
    assert call("sweep", one / "sweep.yaml").exit_code == 2
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["ptq4vit_plugin", "sweep", two / "sweep.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert "error: rank 0: 1 of 2 cells failed" in done.stderr
    assert "rank 1: 1 cells" in done.stderr

    def sorted_rows(folder):
        found = rows(folder)
        for row in found:
            del row["config"]["output"], row["environment"]["threads"]
        return sorted(found, key=lambda row: row["key"])

    assert len(rows(one)) == 2 and sorted_rows(one) == sorted_rows(two)


def test_a_cell_that_fails_is_told_and_tried_again(tmp_path):
    content = tiny(tmp_path)
    content["grid"] = {
        "data.calibration.samples": [4, 5000],
        "model.name": ["vit_tiny_patch16_224"],
        "compression.algorithm": ["base_ptq"],
    }
    file = write(tmp_path, content)
    for _ in range(2):
        done = call("sweep", file)
        assert done.exit_code == 2
        assert "5000 samples asked for" in done.stderr and "1 of" in done.stderr
        assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("label", ["x" * 150 + "é" * 150, "{re}mlp[/]fc1"])
def test_labels_of_any_kind(tmp_path, label):
    content = tiny(tmp_path)
    content["grid"] = {
        "model.name": ["vit_tiny_patch16_224"],
        "compression.algorithm": ["base_ptq"],
        "what": {label: {"compression.rounds": 1}},
    }
    done = call("sweep", write(tmp_path, content))
    assert done.exit_code == 0, done.output
    assert [row["cell"]["what"] for row in rows(tmp_path)] == [label]


def test_a_bug_in_one_cell_leaves_the_others(tmp_path, monkeypatch):
    original = commands.float_model

    def fail(config):
        if config.model.name.startswith("deit"):
            return {}["missing"]
        return original(config)

    monkeypatch.setattr(commands, "float_model", fail)
    content = tiny(tmp_path)
    content["grid"] = {
        "model.name": ["deit_tiny_patch16_224", "vit_tiny_patch16_224"],
        "compression.algorithm": ["base_ptq"],
    }
    done = call("sweep", write(tmp_path, content))
    assert done.exit_code == 2 and "1 of 2 cells failed" in done.stderr
    assert "failed: deit_tiny_patch16_224 base_ptq: KeyError: 'missing'" in done.stderr
    assert 'return {}["missing"]' in done.stderr  # where it happened
    assert [row["model"] for row in rows(tmp_path)] == ["vit_tiny_patch16_224"]


def test_published_numbers_are_read_before_the_cells_run(tmp_path):
    done = call("sweep", write(tmp_path, tiny(tmp_path, published="none.csv")))
    assert done.exit_code == 2 and "published: 'none.csv' cannot be read" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_folder_can_be_run_again(tmp_path):
    content = tiny(tmp_path)
    content["grid"] = {
        "model.name": ["vit_tiny_patch16_224"],
        "compression.algorithm": ["ptq4vit"],
    }
    assert call("sweep", write(tmp_path, content)).exit_code == 0
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert call("quantize", folder / "config.yaml", "--quiet").exit_code == 0
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["sqnr_db"] == rows(tmp_path)[0]["metrics"]["sqnr_db"]


# --- tables --------------------------------------------------------------------------------------


def result(model, algorithm, bits, top1, parts=None, **labels):
    whole = algorithm == "ptq4vit"
    return {
        "key": f"{model}{algorithm}{bits}{parts}{labels}",
        "cell": {"model.name": model, "compression.algorithm": algorithm, **labels},
        "model": model,
        "algorithm": algorithm,
        "parts": dict(zip(tables.PARTS, parts or (whole,) * 3, strict=True)),
        "weight_bits": bits,
        "activation_bits": bits,
        "samples": 32,
        "metrics": {
            "top1": top1,
            "top5": None,
            "loss": 1.0,
            "top1_interval": [top1 - 1, top1 + 1],
            "reference_top1": 81.0,
            "agreement": 99.0,
            "sqnr_db": "Infinity",
            "images": 100,
            "images_per_second": 5.0,
        },
        "seconds": {"calibration": 60.0, "evaluation": 2.0},
    }


@pytest.fixture(scope="module")
def published():
    return tables.read_published(IMAGENET / "published.csv")


def test_markdown_in_the_papers_layout(published):
    model = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    rows = [
        result(model, "base_ptq", 8, 80.0),
        result(model, "base_ptq", 6, 70.0),
        result(model, "ptq4vit", 8, 81.1),
        result("my_own", "ptq4vit", 8, 50.0),
    ]
    assert tables.markdown(tables.compare(rows, published)).splitlines() == [
        "| model | float | base_ptq W8A8 | base_ptq W6A6 | ptq4vit W8A8 |",
        "| --- | --- | --- | --- | --- |",
        f"| {model} | 81.00 (81.39, -0.39) | 80.00 (80.47, -0.47) | 70.00 (70.24, -0.24) "
        "| 81.10 (81.00, +0.10) |",
        "| my_own | 81.00 |  |  | 50.00 |",
    ]


def test_ablation_rows_and_numbers(published):
    model = "vit_base_patch16_384.augreg_in21k_ft_in1k"
    rows = [
        result(model, "base_ptq", 6, 46.0, (False, False, False)),
        result(model, "ptq4vit", 6, 82.0, (True, True, False)),
        result(model, "ptq4vit", 6, 83.0, (True, True, True)),
    ]
    lines = tables.markdown(tables.compare(rows, published)).splitlines()
    assert lines[0] == "| model | hessian | softmax twin | gelu twin | float | W6A6 |"
    # The ablation's figures, which are not those of the main table (83.348) for the same setting.
    assert [line.split("|")[-2].strip() for line in lines[2:]] == [
        "46.00 (46.89, -0.89)",
        "82.00 (82.01, -0.01)",
        "83.00 (83.19, -0.19)",
    ]


def test_an_axis_of_ones_own_is_a_column():
    rows = [result("m", "ptq4vit", 8, 50.0 + seed, seed=str(seed)) for seed in (0, 1)]
    lines = tables.markdown(tables.compare(rows, [])).splitlines()
    assert lines[0] == "| model | seed | float | ptq4vit W8A8 |"
    assert lines[3] == "| m | 1 | 81.00 | 51.00 |"


def test_results_of_a_sweep_that_got_another_axis():
    rows = [result("m", "ptq4vit", 8, 50.0), result("m", "ptq4vit", 8, 51.0, seed="7")]
    lines = tables.markdown(tables.compare(rows, [])).splitlines()
    assert lines[0] == "| model | seed | float | ptq4vit W8A8 |"
    assert lines[2:] == ["| m |  | 81.00 | 50.00 |", "| m | 7 | 81.00 | 51.00 |"]


def test_csv_and_latex(published):
    model = "deit_base_patch16_224.fb_in1k"
    compared = tables.compare([result(model, "ptq4vit", 6, 80.0, seed="a&b_c")], published)
    (row,) = csv.DictReader(io.StringIO(tables.as_csv(compared)))
    assert (row["model"], row["top1"], row["published_top1"]) == (model, "80.0", "80.25")
    assert float(row["difference"]) == -0.25 and row["sqnr_db"] == "inf"
    text = tables.latex(compared)
    assert r"deit\_base\_patch16\_224.fb\_in1k & 81.00 (81.80, -0.80) & 80.00" in text
    assert text.startswith(r"\begin{tabular}{lrr}") and text.endswith("\\end{tabular}\n")


COLUMNS = (
    "timm_name,float_top1,algorithm,hessian,softmax_twin,gelu_twin,weight_bits,activation_bits"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("model,top1\nx,1\n", "has no column activation_bits"),
        (f"{COLUMNS},top1\nm,,a,,,,8,8,1\n\nm,,a,,,,6,6,n/a\n", "line 4: top1: 'n/a'; allowed: a"),
        (f"{COLUMNS},top1\nm,nan,a,,,,8,8,\n", "line 2: float_top1: 'nan'; allowed: a number, or"),
    ],
)
def test_published_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"published: '{path}',? {message}"):
        tables.read_published(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("metrics.top1", "81.0", 'metrics: top1: "81.0": Input should be a valid number'),
        ("metrics.reference_top1", "81", 'metrics: reference_top1: "81": Input should be a valid'),
        ("metrics.top1_interval", [1.0], "metrics: top1_interval: 1: Field required"),
        ("metrics.images", True, "metrics: images: true: Input should be a valid integer"),
        ("seconds", {"evaluation": 2.0}, "seconds: calibration: Field required"),
        ("seconds.calibration", "60", 'seconds: calibration: "60": Input should be a valid number'),
        ("weight_bits", "8", 'weight_bits: "8": Input should be a valid integer'),
        ("parts.hessian", "yes", 'parts: hessian: "yes": Input should be a valid boolean'),
        ("cell", {"seed": 1}, "cell: seed: 1: Input should be a valid string"),
    ],
)
@pytest.mark.parametrize("form", ["markdown", "csv", "latex"])
def test_results_edited_by_hand_are_told(tmp_path, place, value, message, form):
    path = tmp_path / "results.jsonl"
    sweeps.append(path, result("m", "ptq4vit", 8, 50.0))
    edited = result("n", "ptq4vit", 8, 50.0)
    *parents, last = place.split(".")
    node = edited
    for parent in parents:
        node = node[parent]
    node[last] = value
    sweeps.append(path, edited)
    done = call("table", path, "--format", form)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {path}, line 2: {message}")


def test_a_line_too_deep_to_be_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)
    done = call("table", path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {path}, line 1: lists or objects too deep")


def test_keys_may_stand_in_another_order_and_numbers_be_infinite(tmp_path):
    whole = result("m", "ptq4vit", 8, 50.0, (True, True, False))
    turned = dict(reversed(whole.items())) | {"parts": dict(reversed(whole["parts"].items()))}
    (row,) = tables.compare([turned], [])
    assert row == tables.compare([whole], [])[0] and row.parts == (True, True, False)
    assert row.sqnr_db == float("inf")


def test_labels_do_not_break_a_table():
    rows = tables.compare([result("m", "ptq4vit", 8, 50.0, s=s) for s in ("a|b", "c&d{#}$")], [])
    assert tables.markdown(rows).splitlines()[2].startswith(r"| m | a\|b | 81.00 |")
    assert r"c\&d\{\#\}\$ & 81.00 &" in tables.latex(rows)


# --- the paper's grids ---------------------------------------------------------------------------


def test_the_papers_grid_is_complete_and_has_its_published_numbers(published, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweeps.read(IMAGENET / "test_all.yaml")
    assert {axis: len(values) for axis, values in sweep.grid.items()} == {
        "model.name": 11,
        "compression.algorithm": 2,
        "bits": 2,
        "data.calibration.samples": 2,
    }
    cells = sweeps.cells(sweep, only=["data.calibration.samples=32"])
    assert len(cells) == 11 * 2 * 2
    fake = {"metrics": result("", "", 8, 1.0)["metrics"], "environment": {}}
    fake["seconds"] = {"calibration": 1.0}
    rows = tables.compare([tables.line(cell, fake) for cell in cells], published)
    in_file = {float(row["top1"]) for row in published if row["table"] == "results"}
    assert len(in_file) == 44 and {row.published for row in rows} == in_file
    # Names and tags are timm's, and the tag is not left to timm's default of the day.
    for name in {cell.config.model.name for cell in cells}:
        assert name in timm.list_pretrained()


def test_the_papers_sweep_runs_from_a_clone_to_its_table(tmp_path, monkeypatch):
    """As the file's own comment says, with the models' sizes cut down, and without reports."""
    monkeypatch.setattr("ptq4vit_plugin.reporting.report.NEEDED", ("no_such_package",))
    shutil.copytree(IMAGENET, tmp_path / "examples" / "imagenet")
    monkeypatch.chdir(tmp_path)
    size = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}
    done = call(
        *("sweep", "examples/imagenet/test_all.yaml", "--output", "runs/try", "--quiet"),
        *("--only", "model.name=vit_small_patch32*,deit_small*", "--only", "bits=W6A6"),
        *("--set", "model.pretrained=false", "--set", f"model.args={json.dumps(size)}"),
        *("--set", f"data.root={ROOT / 'tests' / 'imagenet_mini'}"),
        *("--set", "data.calibration.samples=4", "--set", "data.evaluation.samples=5"),
        *("--set", "compression.rounds=1", "--set", "compression.search_range.n=4"),
    )
    assert done.exit_code == 0, done.output
    results = tmp_path / "runs" / "try" / "results.jsonl"
    assert len(sweeps.results(results)) == 4
    table = call("table", results, "--published", "examples/imagenet/published.csv")
    assert table.stdout == done.stdout
    header, _, *body = table.stdout.splitlines()
    assert header == "| model | float | base_ptq W6A6 | ptq4vit W6A6 |"
    assert len(body) == 2
    assert re.search(r"\(75\.99, [+-]\d+\.\d\d\)", body[0])  # the published float ViT-S/32


def test_every_ablation_row_switches_exactly_what_it_names(published, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweeps.read(IMAGENET / "ablation.yaml")
    cells = sweeps.cells(sweep)
    assert len(cells) == 3 * 6 * 2
    fake = {"metrics": result("", "", 8, 1.0)["metrics"], "environment": {}}
    fake["seconds"] = {"calibration": 1.0}
    rows = tables.compare([tables.line(cell, fake) for cell in cells], published)
    assert len([row for row in rows if row.published is not None]) == 36
    model = create(Recipe(name="vit_tiny_patch16_224", args={**ARGS, "patch_size": 8}))
    seen = set()
    for cell in cells[:12]:
        named = cell.labels["parts"].split("+")
        bits = int(cell.labels["bits"][1])
        (step,) = cell.config.compression
        assert step["metric"] == ("hessian" if "hessian" in named else "cosine")
        for op in plan(model, images(1, 2, size=16)[0], cell.config).ops:
            for operand in op.operands:
                twin = {"softmax": "softmax", "gelu": "gelu"}.get(operand.source)
                if operand.source == "image":  # the paper leaves it in float
                    assert operand.quantizer is None
                    continue
                expected = f"twin_{twin}" if twin in named else "uniform"
                assert (operand.quantizer, operand.bits) == (expected, bits)
        seen.add((cell.labels["parts"], bits))
    assert len(seen) == 12


def test_pretrained_reaches_the_right_hub_repository(monkeypatch):
    from ptq4vit_plugin.errors import ModelError

    asked = []

    def intercept(repo_id, filename, **options):
        asked.append((repo_id, filename))
        raise OSError("no network in this test")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", intercept)
    monkeypatch.chdir(ROOT)
    vit = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    swin = {"embed_dim": 24, "depths": [1], "num_heads": [2]}
    names = sweeps.read(IMAGENET / "test_all.yaml").grid["model.name"]
    for name in names:
        recipe = Recipe(name=name, args=swin if name.startswith("swin") else vit)
        with pytest.raises(ModelError, match="pretrained weights .* cannot be had"):
            create(recipe, pretrained=True)
        assert {repository for repository, _ in asked} == {f"timm/{name}"}
        asked.clear()
