"""Fixtures that several test files use."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent

import pytest
import torch

# OpenVINO sends Google statistics of its use, each from a fork of the whole process, which took
# more than half of the time of an export here. It sends none from a build server, and so does NNCF;
# of the variables that both take for one, pytest and hypothesis do not look at Jenkins's.
os.environ.setdefault("JENKINS_URL", "none")


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install a real distribution, with modules and metadata, for the length of one test.

    `distribution(name, entry_points={group: {name: value}}, modules={module: source})` returns its
    folder, which is on `sys.path`.
    """
    installed = []

    def install(
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str],
        version: str = "1.0",
    ) -> Path:
        folder = tmp_path / "site" / name
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, points in entry_points.items():
            lines += [f"[ptq4vit_plugin.{group}]", *(f"{n} = {v}" for n, v in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(dedent(source))
        installed.extend(modules)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without drawings, which take longer than quantizing a small model."""
    monkeypatch.setattr("ptq4vit_plugin.reporting.figures.draw", lambda record: [])


@pytest.fixture(scope="session")
def digits():
    """The committed digits model, its calibration images and all held-out images."""
    from ptq4vit_plugin import commands
    from ptq4vit_plugin.config import read
    from ptq4vit_plugin.data import open_dataset

    root = Path(__file__).parents[1]
    config = read(root / "examples" / "digits" / "ptq4vit.yaml")
    checkpoint = root / config.model.checkpoint
    model_section = config.model.model_copy(update={"checkpoint": checkpoint})
    config = config.model_copy(update={"model": model_section})
    model = commands.float_model(config)
    held_out = open_dataset(config.data, "val", model)
    images = torch.stack([held_out[index][0] for index in range(len(held_out))])
    return model, commands.calibration(config, model), images
