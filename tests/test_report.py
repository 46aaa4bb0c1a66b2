"""The report of a run folder, and what the record keeps for it."""

import io
import json
import logging
import math
import os
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from models import images, small_vit
from typer.testing import CliRunner

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.diagnosis import histogram, output_sqnr, thinned
from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.files import json_text
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.uniform import Uniform
from ptq4vit_plugin.record import record_of
from ptq4vit_plugin.reporting import report
from ptq4vit_plugin.reporting.events import event, json_lines, nncf_messages

WHOLE = Grouping((1, 1, 1, 1))


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def quantized():
    compression = {
        "algorithm": "ptq4vit",
        "rounds": 1,
        "search_range": {"n": 10},
        "ignored_scopes": ["head/linear/0"],
        "granularity": "paper",
    }
    return ptq.quantize(small_vit(2), images(1), compression)


@pytest.fixture
def run(quantized, tmp_path):
    metrics = Metrics(
        top1=71.25,
        top5=91.5,
        top1_interval=(70.0, 72.5),
        loss=1.25,
        reference_top1=72.5,
        agreement=97.5,
        sqnr_db=21.5,
        images=400,
        images_per_second=12.0,
        unreadable=("a<b>.png",),
    )
    results = {
        "metrics": metrics.model_dump(mode="json"),
        "seconds": {"calibration": 12.25, "evaluation": 3.5},
        "environment": {"torch": "9.9"},
        "calibration": {
            **record_of(quantized).model_dump(mode="json"),
            "peak_memory": 3 * 2**30,
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    config = {"model": {"name": "my_<model>"}, "data": {"source": "digits"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


class Text(HTMLParser):
    """Visible text, and every attribute that makes a browser load something."""

    def __init__(self):
        super().__init__()
        self.text, self.loads = [], []

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attributes):
        self.loads += [
            (tag, key, value)
            for key, value in attributes
            if key in ("src", "href", "xlink:href", "data") and not value.startswith("#")
        ]


def test_the_page_says_what_was_measured_and_loads_nothing(run):
    done = call("report", run)
    assert done.exit_code == 0, done.output
    html = (run / "report.html").read_text()
    page = Text()
    page.feed(html)
    text = " ".join("".join(page.text).split())
    assert page.loads == [] and not re.search(r"url\(\s*['\"]?(?!#)|@import|<script", html)
    for words in (
        "71.25 %",
        "72.50 %",
        "97.50 %",
        "21.50 dB",
        "12.2 s",
        "3.00 GiB",
        "my_<model>",
        "a<b>.png",
        "listed in ignored_scopes",
        "the paper leaves the patch embedding's input in float",
        "Search curves",
        "weights 8 bit, activations 8 bit",
    ):
        assert words in text, words
    # Three drawings' worth of panels: every block's softmax and GELU appear under their name.
    assert text.count("blocks/0") >= 2 and text.count("blocks/1") >= 2
    assert html.count("<svg") == 4
    assert len(html) < 3e6 / 6  # two blocks of twelve


def test_a_record_is_small(quantized):
    assert len(record_of(quantized).model_dump_json()) / 2 < 200_000 / 12


def test_no_report_without_its_packages(run, monkeypatch):
    monkeypatch.setattr(report, "NEEDED", ("matplotlib", "no_such_package"))
    done = call("report", run)
    assert done.exit_code == 2
    assert done.stderr == (
        "error: a report needs no_such_package: pip install 'ptq4vit-plugin[report]'\n"
    )


def test_folders_that_are_no_run(run, tmp_path):
    done = call("report", tmp_path / "none")
    assert done.exit_code == 2 and "is no run folder" in done.stderr
    (run / "results.json").write_text('{"metrics": {}}')
    done = call("report", run)
    assert done.exit_code == 2 and "damaged" in done.stderr and done.stderr.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("seconds", [1]), ("environment", None), ("checkpoint", {}), ("metrics", {"top1": 1.0})],
)
def test_results_that_are_damaged(run, key, value):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, key: value}))
    done = call("report", run)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "damaged" in done.stderr and key in done.stderr


def test_a_run_without_evaluation_has_a_report(run):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "metrics": None}))
    done = call("report", run)
    assert done.exit_code == 0, done.output
    html = (run / "report.html").read_text()
    assert html.count("<svg") == 4 and "Accuracy" not in html and "images/s" not in html


def test_noise_that_is_none_or_everything(run):
    """An op's SQNR is infinite then; JSON has no such number."""
    results = json.loads((run / "results.json").read_text())
    for op, value in zip(results["calibration"]["ops"], (math.inf, -math.inf), strict=False):
        op["sqnr_db"] = value
    results["metrics"]["sqnr_db"] = math.inf
    text = json_text(results)
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["sqnr_db"] == "Infinity"
    (run / "results.json").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_report(run)
    html = (run / "report.html").read_text()
    assert "<td>logit SQNR</td>" in html and "inf dB" in html


def test_events_are_json_whatever_they_say():
    stream = io.StringIO()
    values = [math.inf, -math.inf, math.nan, 1e300, 3]
    with json_lines(stream):
        event("op", sqnr_db=math.inf, more={"values": tuple(values), "none": None})
    found = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert float(found["sqnr_db"]) == math.inf and found["more"]["none"] is None
    assert [float(value) for value in found["more"]["values"]] == pytest.approx(values, nan_ok=True)


def test_output_sqnr_is_that_of_the_product():
    torch.manual_seed(0)
    gemm = Gemm(torch.randn(2, 1, 5, 4), torch.randn(1, 1, 4, 3), None, None)
    a, b = (Uniform(4, WHOLE, SearchRange(n=7)) for _ in range(2))
    a.observe(gemm.a)
    b.observe(gemm.b)
    result = search(gemm, a, b, metric="mse", rounds=1)
    exact, noisy = [], []
    for image in range(2):
        left = a.fake_quantize(gemm.a, result.a_index)[image, 0].double()
        exact.append(gemm.a[image, 0].double() @ gemm.b[0, 0].double())
        noisy.append(left @ b.fake_quantize(gemm.b, result.b_index)[0, 0].double())
    exact, noisy = torch.stack(exact), torch.stack(noisy)
    expected = 10 * torch.log10(exact.square().sum() / (exact - noisy).square().sum())
    assert output_sqnr(gemm, a, b, result) == pytest.approx(float(expected), abs=2e-3)


def test_the_curve_is_the_objective_of_every_candidate():
    torch.manual_seed(0)
    gemm = Gemm(torch.randn(1, 1, 20, 4), torch.randn(1, 1, 4, 3), None, None)
    a = Uniform(4, WHOLE, SearchRange(n=7))
    a.observe(gemm.a)
    curve = search(gemm, a, None, metric="mse", rounds=1).curves["a"]
    losses = [
        float((gemm.a @ gemm.b - a.fake_quantize(gemm.a, i) @ gemm.b).square().sum())
        for i in range(7)
    ]
    ratio = np.array(curve) / np.array(losses)
    assert np.allclose(ratio, ratio[0], rtol=1e-4)


def test_thinned_keeps_the_ends():
    assert thinned([1.0, 2.0]) == (1.0, 2.0)
    found = thinned([float(i) for i in range(100)])
    assert len(found) == 33 and (found[0], found[-1]) == (0.0, 99.0)
    assert list(found) == sorted(found)


@pytest.mark.parametrize("source", ["softmax", "gelu"])
def test_histograms_count_like_numpy(source):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 40)
    x = x.softmax(-1) if source == "softmax" else torch.nn.functional.gelu(x)
    found = histogram(x, source)
    assert sum(found.counts) == x.numel()
    # Edges are kept with four digits, so a value near one may change its bin.
    expected, _ = np.histogram(x.numpy(), np.array(found.edges))
    assert np.abs(expected - found.counts).sum() <= 0.01 * x.numel()
    assert histogram(x, "activation") is None


def test_nncf_logs_to_standard_error_while_a_command_runs(capsys):
    log = logging.getLogger("nncf")
    streams = [getattr(handler, "stream", None) for handler in log.handlers]
    with nncf_messages():
        log.warning("one")
    with nncf_messages(quiet=True):
        log.warning("two")
        log.error("three")
    said = capsys.readouterr()
    assert said.out == "" and "one" in said.err and "three" in said.err and "two" not in said.err
    assert [getattr(handler, "stream", None) for handler in log.handlers] == streams


@pytest.mark.parametrize("compiled", [True, False])
def test_nncf_tells_of_its_kernels_only_where_they_are_compiled(capsys, monkeypatch, compiled):
    monkeypatch.setattr("ptq4vit_plugin.integrations.nncf.kernels.are_compiled", lambda: compiled)
    log = logging.getLogger("nncf")
    level = log.level
    with nncf_messages():
        log.info("compiling")
        log.warning("one")
    said = capsys.readouterr().err
    assert ("compiling" in said) != compiled and "one" in said and log.level == level


def test_kernels_are_compiled_once_they_were_used():
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU

    from ptq4vit_plugin.integrations.nncf.kernels import are_compiled

    QuantizedFunctionsCPU.get("Quantize_forward")
    assert are_compiled()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that Linux has")
def test_events_that_cannot_be_written_end_no_run(capfd):
    done = []
    with open("/dev/full", "w") as full:
        with pytest.raises(PTQ4ViTError, match="^events: cannot be written: No space left on devi"):
            with json_lines(full):
                for number in range(3):
                    event("op", number=number)
                    done.append(number)
    assert done == [0, 1, 2] and capfd.readouterr() == ("", "")


def test_a_reader_that_closes_the_pipe_ends_no_run(capfd):
    read, written = os.pipe()
    os.close(read)
    with open(written, "w") as pipe, json_lines(pipe):
        event("op")
        event("op")
    assert capfd.readouterr() == ("", "")


def test_an_event_that_is_no_json_is_a_bug_that_is_seen():
    with pytest.raises(TypeError), json_lines(io.StringIO()):
        event("op", value=object())
