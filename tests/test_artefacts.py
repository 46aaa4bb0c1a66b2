"""Folders with a model card, and the hub with its requests intercepted."""

import pytest
import torch
import yaml
from models import ARGS, images, small_vit

import ptq4vit_plugin as ptq
from ptq4vit_plugin import artefacts
from ptq4vit_plugin.errors import CheckpointError
from ptq4vit_plugin.evaluation import Metrics
from ptq4vit_plugin.integrations.timm.models import Recipe

RECIPE = {"name": "vit_tiny_patch16_224", "args": {**ARGS, "depth": 1}}
METRICS = Metrics(
    top1=70.5,
    top5=None,
    top1_interval=(68.0, 73.0),
    loss=1.0,
    reference_top1=71.5,
    agreement=95.25,
    sqnr_db=20.0,
    images=1234,
    images_per_second=5.0,
)
CONFIG = {
    "model": {"name": "vit_tiny_patch16_224", "pretrained": True},
    "data": {"source": "folder", "root": "/a", "calibration": {"split": "train", "seed": 3}},
    "compression": [{"algorithm": "ptq4vit", "weights": {"bits": 5}}],
    "output": "/home/me/runs",
}


@pytest.fixture(scope="module")
def quantized():
    compression = {"algorithm": "ptq4vit", "rounds": 1, "weights": {"bits": 5}}
    return ptq.quantize(small_vit(), images(1), compression)


@pytest.fixture
def folder(quantized, tmp_path):
    ptq.save(quantized, tmp_path / "run", RECIPE, {"config": CONFIG}, METRICS)
    return tmp_path / "run"


def test_a_folder_loads_bit_for_bit(quantized, folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md"}
    x = images(1, seed=7)[0]
    assert torch.equal(ptq.load(folder)(x), quantized(x))
    assert torch.equal(ptq.load(folder / "model.safetensors")(x), quantized(x))
    assert torch.equal(ptq.load(f"local-dir:{folder}")(x), quantized(x))


def test_the_card_says_accuracy_provenance_and_licence(folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    for words in (
        "| top-1 | 71.50 % | 70.50 % (68.00 ... 73.00) |",
        "95.25 %",
        "On 1234 images of `folder`",
        "PTQ4ViT",
        "6 uniform 5 bit",
        "seed 3",
        "calibrated on 4 images",
    ):
        assert words in body, words
    config = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert config["compression"] == CONFIG["compression"] and config["model"] == CONFIG["model"]
    assert config["data"] == {key: CONFIG["data"][key] for key in ("source", "calibration")}
    assert "/home/me" not in text  # folders of one's own are nobody's business


def test_the_card_has_no_folders_of_the_machine():
    config = {
        "model": {
            "name": "local-dir:/home/me/net",
            "checkpoint": "me/weights.safetensors",
            "args": {"pretrained_cfg": {"file": "../me/cfg.bin"}, "act_layer": "gelu"},
        },
        "data": {
            "source": "hfds//home/me/flowers",
            "root": "me",
            "calibration": CONFIG["data"]["calibration"],
            "options": {"class_map": "~/me/names.txt", "labels": r"C:\me\labels.csv"},
        },
        "compression": [{"algorithm": "other", "ignored_scopes": ["head/linear/0", "{re}.*/qkv"]}],
        "output": "me/runs",
    }
    text = artefacts.card(Recipe(name=config["model"]["name"]), None, config, METRICS, {})
    assert "me/" not in text.replace("name/", "") and "me\\" not in text and "root" not in text
    assert "# local-dir:net, quantized" in text and "of `hfds/flowers`" in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["model"]["checkpoint"] == "weights.safetensors"
    assert shown["model"]["args"] == {"pretrained_cfg": {"file": "cfg.bin"}, "act_layer": "gelu"}
    assert shown["data"]["options"] == {"class_map": "names.txt", "labels": "labels.csv"}
    assert shown["compression"] == config["compression"]


def test_no_licence_is_claimed_for_other_weights(quantized, tmp_path):
    ptq.save(quantized, tmp_path / "run", RECIPE)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "license" not in text.split("---\n")[1] and "Not known to the tool" in text


@pytest.mark.parametrize("name", ["hf-hub:me/vit-w5", "hf_hub:me/vit-w5", "hf-hub:me/vit-w5@v2"])
def test_the_hub_is_asked_for_the_right_file(quantized, folder, monkeypatch, name):
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    x = images(1)[0]
    assert torch.equal(ptq.load(name)(x), quantized(x))
    assert asked == [("me/vit-w5", "model.safetensors", "v2" if "@" in name else None)]


def test_a_hub_that_refuses(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match="'hf-hub:me/x' cannot be had from the hub: no netw"):
        ptq.load("hf-hub:me/x")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(CheckpointError, match="the hub refuses the upload"):
        ptq.upload(folder, "me/x")


def test_upload_sends_checkpoint_and_card_only(folder, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, name, private, exist_ok: sent.append((name, private)),
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **options: sent.append(options) or "address",
    )
    assert ptq.upload(folder, "me/x", private=True) == "address"
    assert sent[0] == ("me/x", True)
    assert sent[1]["allow_patterns"] == ["model.safetensors", "README.md"]
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"has no README\.md"):
        ptq.upload(folder, "me/x")


def test_a_card_without_anything_known():
    text = artefacts.card(Recipe(name="vit"), None, None, None, {})
    assert text.startswith("---\n") and "# vit, quantized" in text
