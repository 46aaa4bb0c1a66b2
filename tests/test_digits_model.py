"""The committed digits model is what the README says it is."""

from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import load_file

from ptq4vit_plugin.config import read
from ptq4vit_plugin.data import loader, open_dataset
from ptq4vit_plugin.evaluation import evaluate

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CHECKPOINT = DIGITS / "digits_vit.safetensors"


@pytest.mark.parametrize("name", ["ptq4vit", "base_ptq"])
def test_config_names_the_committed_model(name, monkeypatch):
    monkeypatch.chdir(DIGITS.parents[1])
    config = read(DIGITS / f"{name}.yaml")
    assert [step["algorithm"] for step in config.compression] == [name]
    assert config.model.checkpoint.resolve() == CHECKPOINT
    model = timm.create_model(config.model.name, **config.model.args)
    model.load_state_dict(load_file(CHECKPOINT))
    data = open_dataset(config.data, config.data.evaluation.split, model)
    assert len(data) == 359


def test_accuracy_on_the_held_out_fifth():
    assert CHECKPOINT.stat().st_size <= 2_000_000
    model_section = yaml.safe_load((DIGITS / "ptq4vit.yaml").read_text())["model"]
    model = timm.create_model(model_section["name"], **model_section["args"])
    model.load_state_dict(load_file(CHECKPOINT))

    class Section:
        source, root, options = "digits", None, {}

    metrics = evaluate(model, loader(open_dataset(Section, "val", model)))
    assert metrics.images == 359
    assert metrics.top1 >= 97
