"""The command line: exit codes, one-line errors, and what the commands pass on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import ptq4vit_plugin
from ptq4vit_plugin.cli import app
from ptq4vit_plugin.errors import CheckpointError

COMMANDS = [
    "quantize",
    "evaluate",
    "describe",
    "plan",
    "sweep",
    "table",
    "report",
    "list",
    "config",
]
TINY = """
from pydantic import BaseModel, ConfigDict

class Tiny(BaseModel):
    model_config = ConfigDict(extra="forbid")
    step: int = 1
"""


@pytest.fixture
def tiny(distribution) -> Path:
    points = {
        "algorithms": {"tiny": "tiny_module:Tiny", "broken": "broken_module:Broken"},
        "exporters": {"constant": "tiny_module:__name__"},
    }
    return distribution("tiny-algorithm", points, {"tiny_module": TINY, "broken_module": "1 / 0"})


@pytest.fixture
def file(tiny, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("{model: {name: vit}, data: {source: digits}, compression: tiny}")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the module that does the work and records what it is asked to do."""
    calls = []

    def record(name):
        return lambda *arguments: calls.append((name, *arguments))

    fake = SimpleNamespace(**{name: record(name) for name in COMMANDS})
    monkeypatch.setattr(ptq4vit_plugin, "commands", fake, raising=False)
    return calls


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from ptq4vit_plugin.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "heavy = {'torch', 'nncf', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout
    assert "compression: {algorithm: ptq4vit" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Example" in done.output and f"ptq4vit {command}" in done.output


SCRIPT = str(Path(sys.executable).parent / "ptq4vit")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "ptq4vit_plugin"], [SCRIPT]])
def test_both_ways_to_start_it(command):
    done = subprocess.run([*command, "config", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: none.yaml: cannot be read: No such file or directory\n"


def test_an_error_is_one_line_after_everything_was_imported_too(tmp_path):
    path = tmp_path / "config.yaml"
    compression = "{algorithm: ptq4vit, round: 1}"
    path.write_text(
        f"{{model: {{name: vit}}, data: {{source: digits}}, compression: {compression}}}"
    )
    done = subprocess.run([SCRIPT, "config", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: compression.round: unknown key; allowed: ")
    assert done.stderr.endswith("; did you mean 'rounds'?\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantise"],
        ["quantize"],
        ["plan", "--bits", "8"],
        ["config"],
        ["config", "x", "--schema"],
    ],
)
def test_wrong_usage_exits_2(arguments):
    assert run(*arguments).exit_code == 2


def test_list_shows_everything_and_the_broken_as_broken(tiny):
    done = run("list")
    assert done.exit_code == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in ("ptq4vit", "base_ptq", "smooth_quant", "uniform", "twin_gelu", "digits", "npz"):
        assert "ptq4vit-plugin 0.1.0" in rows[name] and "broken" not in rows[name]
    for group in ("algorithms", "quantizers", "exporters", "datasets"):
        assert group in rows
    assert "tiny-algorithm 1.0" in rows["tiny"] and "step=1" in rows["tiny"]
    assert "broken: ZeroDivisionError: division by zero" in rows["broken"]
    assert "broken: TypeError: 'tiny_module' is not a callable" in rows["constant"]


def test_config_prints_the_resolved_config(file):
    done = run("config", file)
    assert done.exit_code == 0
    resolved = yaml.safe_load(done.stdout)
    assert resolved["compression"] == [{"algorithm": "tiny", "step": 1}]
    assert resolved["data"]["calibration"]["samples"] == 32
    file.write_text(done.stdout)
    assert run("config", file).stdout == done.stdout


def test_schema_on_stdout_and_notes_on_stderr(tiny):
    done = run("config", "--schema")
    assert done.exit_code == 0
    schema = json.loads(done.stdout)
    assert "step" in schema["$defs"]["algorithm.tiny"]["properties"]
    assert "left out: algorithm 'broken' of tiny-algorithm 1.0 " in done.stderr


def test_commands_are_passed_what_was_asked(file, calls):
    from ptq4vit_plugin.config import read

    config = read(file)
    model = Path("model.safetensors")
    for arguments in (
        ["quantize", file],
        ["quantize", file, "--output", "here", "--quiet"],
        ["plan", file],
        ["evaluate", model],
        ["evaluate", model, "--config", file],
        ["describe", model],
        ["sweep", "s.yaml"],
        ["sweep", "s.yaml", "--only", "a=b", "--only", "c=d", "--set", "e=1", "-q"],
        ["report", "run"],
        ["table", "results.jsonl", "--format", "csv", "--published", "p.csv"],
    ):
        assert run(*arguments).exit_code == 0
    assert calls == [
        ("quantize", config, None, False, False),
        ("quantize", config, Path("here"), True, False),
        ("plan", config),
        ("evaluate", model, None),
        ("evaluate", model, config),
        ("describe", model),
        ("sweep", Path("s.yaml"), (), (), None, False),
        ("sweep", Path("s.yaml"), ["a=b", "c=d"], ["e=1"], None, True),
        ("report", Path("run")),
        ("table", Path("results.jsonl"), "csv", Path("p.csv")),
    ]


def test_what_a_user_causes_is_one_line_and_exit_2(monkeypatch):
    def fail(checkpoint):
        raise CheckpointError(f"{checkpoint}: truncated")

    monkeypatch.setattr(ptq4vit_plugin, "commands", SimpleNamespace(describe=fail), raising=False)
    done = run("describe", "model.safetensors")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: model.safetensors: truncated\n"


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(checkpoint):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ptq4vit_plugin, "commands", SimpleNamespace(describe=fail), raising=False)
    assert isinstance(run("describe", "model.safetensors").exception, RuntimeError)


def test_a_place_that_the_machine_does_not_give_is_one_line(monkeypatch):
    def fail(checkpoint):
        raise PermissionError(13, "Permission denied", "/root/model.safetensors")

    monkeypatch.setattr(ptq4vit_plugin, "commands", SimpleNamespace(describe=fail), raising=False)
    done = run("describe", "model.safetensors")
    assert done.exit_code == 2
    assert done.stderr == "error: '/root/model.safetensors': Permission denied\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that Linux has")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_behind_an_output_exits_2(stream):
    arguments = ["config", "--schema" if stream == "stdout" else "none.yaml"]
    other = "stderr" if stream == "stdout" else "stdout"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [SCRIPT, *arguments], text=True, **{stream: full, other: subprocess.PIPE}
        )
    assert done.returncode == 2
    if stream == "stdout":
        assert done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process on Windows")
@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_ends_a_command_in_order(distribution, tmp_path, sent, code, said):
    """In the middle of a command, here while an algorithm is being imported."""
    folder = distribution(
        "slow",
        {"algorithms": {"slow": "slow_module:Slow"}},
        {
            "slow_module": "import pathlib, tempfile, time\n"
            "with tempfile.TemporaryDirectory(dir='.', prefix='half'):\n"
            "    pathlib.Path('started').touch()\n"
            "    time.sleep(600)"
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text("{model: {name: vit}, data: {source: digits}, compression: slow}")
    running = subprocess.Popen(
        [sys.executable, "-m", "ptq4vit_plugin", "config", str(path)],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(sent)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (code, "", said)
    assert not list(tmp_path.glob("half*"))
