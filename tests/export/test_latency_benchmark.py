"""`benchmarks/latency.py` runs from nothing to its table, and again without building anything."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import latency

    yield latency
    del sys.modules["latency"]


def test_every_form_is_built_once_and_timed_in_turns(latency, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "PLANS", {"auto": latency.PLANS["auto"]})  # time
    results = tmp_path / "latency.json"
    arguments = ["time", "--smoke", "--repeats", "2", "--batches", "1", "2"]
    arguments += ["--forms", str(tmp_path / "forms"), "--results", str(results)]
    latency.main(arguments)
    table = capsys.readouterr().out
    kept = json.loads(results.read_text())["models"]["smoke"]
    titles = {form.title for form in latency.forms()}
    assert {"PyTorch integer auto", "ONNX Runtime auto", "OpenVINO auto, f32"} < titles
    for batch in ("batch 1", "batch 2"):
        assert set(kept[batch]) == titles
        assert all(len(turns) == 2 and min(turns) > 0 for turns in kept[batch].values())
    for title in titles:
        assert table.count(f"\n| {title} |") == 2
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "forms").rglob("*")}
    latency.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "forms").rglob("*")} == files


def test_ratios_are_medians_over_turns(latency):
    times = {
        "PyTorch float": [10.0, 20.0, 30.0],
        "OpenVINO float, f32": [5.0, 40.0, 10.0],
        "OpenVINO NNCF default int8, f32": [2.0, 2.0, 2.0],
        "ONNX Runtime uniform": [5.0, 20.0, 60.0],
    }
    # Ratios of the turns: 0.5, 1, 2; 1, 0.5, 6; 2.5, 10, 30.
    judged = {"agreement": 99.0, "sqnr_db": 31.25}
    row = latency.row("ONNX Runtime uniform", times, judged)
    assert row == "| ONNX Runtime uniform | 20.0 | 1.00 | 1.00 | 10.00 | 99.0 | 31.2 |  |"
    bf16 = {f"{title[:-3]}bf16": [1.0, 2.0, 4.0] for title in times if title.endswith("f32")}
    row = latency.row("OpenVINO float, bf16", times | bf16, {})
    assert row == "| OpenVINO float, bf16 | 2.0 | 0.10 | 1.00 | 1.00 |  |  |  |"
