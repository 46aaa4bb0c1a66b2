"""Benchmarks write where they are told to, and skip what there is no data for."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Import one by its name; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tracked():
    """What the repository's own results are."""
    files = [ROOT / "benchmarks" / f"{name}.json" for name in ("calibration", "coverage")]
    files += [ROOT / "docs" / "coverage.md", ROOT / "docs" / "calibration-growth.svg"]
    before = {file: file.read_bytes() for file in files}
    yield before
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize(("options", "file"), [([], "calibration.json"), (None, "mine.json")])
def test_calibration_writes_where_it_is_told(benchmark, tracked, tmp_path, options, file, capsys):
    calibration = benchmark("calibration")
    calibration.calibrate = lambda *_, **__: (SimpleNamespace(passes=1, peak_memory=2**30), 1.0)
    options = ["--results", file] if options is None else options
    calibration.main(["memory", "vit_tiny_patch16_224", "--images", "1", *options])
    (kept,) = json.loads((tmp_path / file).read_text())["memory"]
    assert (kept["model"], kept["peak_gib"]) == ("vit_tiny_patch16_224", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    with pytest.raises(SystemExit):
        calibration.main(["memory", "--help"])
    assert "default: calibration.json in the working directory" in " ".join(
        capsys.readouterr().out.split()
    )


def test_calibration_draws_what_it_is_given(benchmark, tracked, tmp_path):
    calibration = benchmark("calibration")
    with pytest.raises(SystemExit, match="calibration.json has no points of `grow`"):
        calibration.main(["plot"])
    calibration.main(["plot", "--results", str(ROOT / "benchmarks" / "calibration.json")])
    assert (tmp_path / "calibration-growth.svg").read_text().startswith("<?xml")


def test_coverage_writes_where_it_is_told(benchmark, tracked, tmp_path, capsys):
    coverage = benchmark("coverage")
    with pytest.raises(SystemExit) as ended:
        coverage.main(["write"])
    assert ended.value.code == 2 and "coverage.json has no families" in capsys.readouterr().err
    coverage.main(["write", "--results", str(ROOT / "benchmarks" / "coverage.json")])
    assert (tmp_path / "coverage.md").read_text().startswith("# Coverage of timm's attention")
    coverage.survey = lambda path, results, deadline: coverage.store(path, {"families": {}})
    coverage.main(["survey", "--results", "mine.json"])
    assert json.loads((tmp_path / "mine.json").read_text()) == {"families": {}}


@pytest.mark.parametrize("options", [[], ["--trained", "nothing"]])
@pytest.mark.parametrize("part", ["whole", "quantizers"])
def test_deployment_without_trained_models_skips(benchmark, capsys, part, options):
    deployment = benchmark("deployment")
    deployment.main([part, *options])
    said = capsys.readouterr().out
    assert said == f"{part}: skipped, no folder with a trained model (--trained FOLDER)\n"
