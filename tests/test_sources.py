"""What data sources and timm models are made from: names, options, pixels, arguments, weights."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import ARGS
from PIL import Image
from safetensors.torch import save_file

from ptq4vit_plugin.data import loader, open_dataset
from ptq4vit_plugin.data.options import checked_options
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.timm.images import eight_bits, open_image
from ptq4vit_plugin.integrations.timm.models import Recipe, create

NAME = "vit_tiny_patch16_224"


def model(**args):
    return create(Recipe(name=NAME, args={**ARGS, "depth": 1, **args}))


def section(source, root=None, **options):
    return SimpleNamespace(source=source, root=root, options=options)


# --- names and options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits/foo", "allowed: digits$"),
        ("folder/foo", "allowed: folder$"),
        ("npz/foo", "allowed: npz$"),
        ("tar/foo", "allowed: tar$"),
        ("torch", "allowed: torch/<name>$"),
        ("torch/", "allowed: torch/<name>$"),
        ("hfds", "allowed: hfds/<name>$"),
        ("tfds", "allowed: tfds/<name>$"),
    ],
)
def test_a_name_after_the_source_is_wanted_or_not_taken(tmp_path, source, message):
    with pytest.raises(DataError, match=f"data.source: '{source}' is not allowed; {message}"):
        open_dataset(section(source, tmp_path), "train", model())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("folder", {"class_map": ["a", "b"]}, r"class_map: \['a', 'b'\] .*allowed: str \| None"),
        ("folder", {"labels": 5}, "labels: 5 is"),
        ("npz", {"images": 5}, "images: 5 is"),
        ("wds/x", {"input_key": ["png"]}, r"input_key: \['png'\] is not allowed; allowed: str$"),
        ("torch/mnist", {"download": "maybe"}, "download: 'maybe' is not allowed; allowed: bool$"),
    ],
)
def test_options_of_another_type(tmp_path, source, options, message):
    with pytest.raises(DataError, match=rf"^data\.options\.{message}"):
        open_dataset(section(source, tmp_path, **options), "train", model())


def test_options_are_what_the_annotations_say():
    def source(config, split, transform, path: Path | None = None, free=None, **others):
        """As of another distribution."""

    options = {"path": "a/b", "free": [1], "strange": 2}
    assert checked_options(source, options) == {**options, "path": Path("a/b")}

    def typed(config, split, transform, table: Unimportable = None):  # noqa: F821
        """Its annotation is there for type checkers only."""

    assert checked_options(typed, {"table": 3}) == {"table": 3}


def test_digits_are_in_no_folder(tmp_path):
    with pytest.raises(DataError, match=f"data.root {tmp_path}: source 'digits' reads no files"):
        open_dataset(section("digits", tmp_path), "train", model())


def test_a_tar_source_reads_tar_files(tmp_path):
    (tmp_path / "some.yaml").write_text("a: 1")
    with pytest.raises(DataError, match=r"data\.root .*some\.yaml is not a \.tar file"):
        open_dataset(section("tar", tmp_path / "some.yaml"), "train", model())


# --- splits --------------------------------------------------------------------------------------


@pytest.fixture
def mnist(tmp_path):
    """Twenty black images to train with and ten white ones to test with."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count, value in (("train", 20, 0), ("t10k", 10, 255)):
        header = struct.pack(">4i", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes([value]) * count * 784)
        labels = struct.pack(">2i", 2049, count) + bytes(range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


@pytest.mark.parametrize(
    ("split", "count"), [("train", 20), ("training", 20), ("val", 10), ("eval", 10), ("test", 10)]
)
def test_splits_of_torchvisions_sets(mnist, split, count):
    assert len(open_dataset(section("torch/mnist", mnist), split, model())) == count


@pytest.mark.parametrize("name", ["mnist", "MNIST", "x/mnist"])  # timm takes them all
def test_a_mistyped_split_does_not_take_the_test_set(mnist, name):
    with pytest.raises(
        DataError, match=f"'trian' of torch/{name}; allowed: train, val, test; did you mean 'train'"
    ):
        open_dataset(section(f"torch/{name}", mnist), "trian", model())


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_become_8(mode):
    every = np.arange(65536).reshape(256, 256)
    order = {"B": ">u2", "N": "=u2"}.get(mode[-1], "<u2")
    image = Image.frombytes(mode, every.shape, every.astype(order).tobytes())
    expected = np.floor(every * (255 / 65535) + 0.5)
    assert np.array_equal(np.asarray(eight_bits(image)), expected)


@pytest.mark.parametrize("source", ["folder", "torch/folder"])
def test_an_image_file_of_16_bits_is_seen_as_of_8(tmp_path, source):
    grey = np.random.RandomState(0).randint(0, 256, (32, 32)).astype(np.uint8)
    for name, pixels in (("8", grey), ("16", grey.astype(np.uint16) * 257)):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "a" / "0.png")
    eight, sixteen = (
        open_dataset(section(source, tmp_path), name, model(num_classes=1))[0][0]
        for name in ("8", "16")
    )
    assert torch.equal(eight, sixteen) and len(eight.unique()) > 100


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 300]], np.int32), "from 0 to 300 in mode I"),
        (np.array([[-1, 2]], np.float32), "from -1 to 2 in mode F"),
        (np.array([[0, np.nan]], np.float32), "in mode F"),
        (np.array([[0, 0.9]], np.float32), "from 0 to 0.9 in mode F; allowed: .*not floats of 0"),
    ],
)
def test_pixels_whose_white_is_not_known(tmp_path, values, words):
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "val" / "a" / "0.png", "tiff")
    dataset = open_dataset(section("folder", tmp_path), "val", model(num_classes=1))
    with pytest.raises(DataError, match=rf"1 unreadable image .*a/0\.png \(values .*{words}"):
        list(loader(dataset))
    with pytest.raises(DataError, match=rf"0\.png' cannot be read as an image: .*{words}"):
        open_image(tmp_path / "val" / "a" / "0.png")


def test_numbers_of_8_bits_in_a_wider_mode_stay():
    for kind in (np.int32, np.float32):
        values = np.array([[0, 7, 255]], kind)
        assert np.array_equal(np.asarray(eight_bits(Image.fromarray(values))), values)


def test_a_huge_image_is_not_opened(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(8)
    file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)))
    (tmp_path / "huge.png").write_bytes(file.getvalue() + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"huge\.png' cannot be read as an image: Image size"):
        open_image(tmp_path / "huge.png")


@pytest.mark.parametrize("label", ["cat", [1, 2]])
def test_a_label_of_another_type(monkeypatch, label):
    class Source(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Image.new("L", (8, 8)), label

    monkeypatch.setattr(
        "ptq4vit_plugin.integrations.timm.datasets.create_dataset", lambda *a, **b: Source()
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(DataError, match=r"label of image hfds/x\[0\] is .*allowed: an integer"):
        open_dataset(section("hfds/x"), "train", model())[0]


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"patch_size": 0}, "ZeroDivisionError"),
        ({"num_heads": 0}, "ZeroDivisionError"),
        ({"embed_dim": 0}, "ZeroDivisionError"),
        ({"act_layer": "foo"}, "KeyError: 'foo'"),
        ({"norm_layer": "foo"}, "KeyError: 'foo'"),
        ({"img_size": [16]}, "IndexError"),
        ({"depth": "two"}, "TypeError"),
        ({"depth": -1}, "RuntimeError"),
        ({"num_heads": 5}, "AssertionError"),
        ({"pretrained_cfg": 5}, "AttributeError"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arguments_no_model_can_be_built_with(args, reason):
    (item,) = args.items()
    key, value = map(repr, item)
    with pytest.raises(ModelError, match="^model: timm cannot build") as error:
        model(**args)
    line = str(error.value)
    assert NAME in line and f"{key}: {value}" in line and f"}}: {reason}" in line
    assert "\n" not in line


def test_weights_come_from_a_checkpoint_that_is_no_pickle(capfd):
    with pytest.raises(ModelError, match=r"^model\.args\.checkpoint_path: .*model\.checkpoint"):
        model(checkpoint_path="/x")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    recipe = Recipe(name=NAME, args={**ARGS, "depth": 1})
    state = create(recipe).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    loaded = create(recipe, checkpoint=tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    state["blocks.0.mlp.fc1.weight"][1, 2] = bad
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors': tensor 'blocks\.0\.mlp\.fc1\.weight'"):
        create(recipe, checkpoint=tmp_path / "a.safetensors")
