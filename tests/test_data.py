"""Data sources, subsets, batches, and every way in which images can be bad."""

import io
import json
import re
import struct
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.data import create_dataset
from torch import nn
from torch.utils.data import IterableDataset

from ptq4vit_plugin.data import (
    UnreadableImage,
    calibration_images,
    check_images,
    loader,
    open_dataset,
    selection,
)
from ptq4vit_plugin.data.sources.arrays import npz
from ptq4vit_plugin.data.sources.folder import folder
from ptq4vit_plugin.errors import DataError, RegistryError
from ptq4vit_plugin.integrations.timm import datasets
from ptq4vit_plugin.integrations.timm.images import image_transform, imagenet_wnids

MINI = Path(__file__).parent / "imagenet_mini"


def small_model(**changes):
    args = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3)
    return timm.create_model("vit_tiny_patch16_224", **{**args, **changes})


def section(source, root=None, **options):
    return SimpleNamespace(source=source, root=root, options=options)


def write_image(path, value, size=(20, 20)):
    """A photograph-like file whose first pixels say which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """3 classes of 4 images each in train, 3 in val, every image of another grey value."""
    value = 0
    for split, count in (("train", 4), ("val", 3)):
        for name in ("bird", "cat", "dog"):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number}.png", value)
                value += 10
    return tmp_path


def ready(value):
    """What vit_tiny's transform (mean and standard deviation 0.5) makes of a grey value."""
    return (value / 255 - 0.5) / 0.5


# --- the transform -------------------------------------------------------------------------------


def test_the_transform_is_timms_with_the_models_own_size():
    model = small_model()
    noise = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    config = {
        **timm.data.resolve_model_data_config(model),
        "input_size": (3, 16, 16),
    }
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(image_transform(model)(image), expected)
    assert expected.shape == (3, 16, 16)


def test_grey_models_get_one_channel_and_rgb_models_three():
    grey = Image.fromarray(np.full((9, 9), 51, np.uint8))
    for channels in (1, 3):
        out = image_transform(small_model(in_chans=channels))(grey)
        assert out.shape == (channels, 16, 16)
        assert torch.allclose(out, torch.full_like(out, ready(51)), atol=1e-6)


def test_a_model_of_five_channels_refuses_images():
    with pytest.raises(DataError, match="5 channels"):
        image_transform(small_model(in_chans=5))(Image.new("RGB", (16, 16)))


# --- digits --------------------------------------------------------------------------------------


def test_digits_split_is_80_20_without_overlap():
    model = small_model(in_chans=1, num_classes=10)
    train = open_dataset(section("digits"), "train", model)
    val = open_dataset(section("digits"), "val", model)
    assert (len(train), len(val)) == (1438, 359)
    assert not set(train.names) & set(val.names)
    assert {label for _, label in val} == set(range(10))
    image, label = val[0]
    assert image.shape == (1, 16, 16) and image.dtype == torch.float32 and isinstance(label, int)
    # the committed model was trained on the rest, so these indices must never change
    assert val.names[:3] == ["digits[0004]", "digits[0005]", "digits[0006]"]
    assert sum(int(name[7:11]) for name in val.names) == 310_077


def test_digits_unknown_split():
    with pytest.raises(
        DataError, match="'vall' of digits; allowed: train, val; did you mean 'val'"
    ):
        open_dataset(section("digits"), "vall", small_model())


# --- folders -------------------------------------------------------------------------------------


def test_folder_labels_and_pixels(photos):
    dataset = open_dataset(section("folder", photos), "val", small_model())
    assert dataset.names == [f"{c}/{n}.png" for c in ("bird", "cat", "dog") for n in range(3)]
    images, labels = next(iter(loader(dataset)))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = torch.tensor([ready(120 + 10 * i) for i in range(9)])
    assert torch.allclose(images.mean((1, 2, 3)), expected, atol=1e-5)


def test_folder_split_synonyms_and_root_itself(photos):
    model = small_model()
    assert len(open_dataset(section("folder", photos), "validation", model)) == 9
    assert len(open_dataset(section("folder", photos / "val"), ".", model)) == 9
    with pytest.raises(DataError, match=r"'test'.*allowed: train, val, or '\.'"):
        open_dataset(section("folder", photos), "test", model)


def test_a_subset_of_imagenet_is_labelled_by_wnid(tmp_path):
    # the first, second and last class of ImageNet-1k and one in the middle, by the published order
    expected = {"n01440764": 0, "n01443537": 1, "n02123045": 281, "n15075141": 999}
    for value, wnid in enumerate(expected):
        write_image(tmp_path / "val" / wnid / "a.png", value)
    model = small_model(num_classes=1000)
    _, labels = next(iter(loader(open_dataset(section("folder", tmp_path), "val", model))))
    assert labels.tolist() == list(expected.values())


def test_photographs_of_imagenet_have_their_published_classes():
    model = small_model(num_classes=1000)
    val = open_dataset(section("folder", MINI), "val", model)
    found = {name.split("/")[0]: label for name, (_, label) in zip(val.names, val, strict=True)}
    assert found == {
        "n01629819": 25,  # European fire salamander
        "n02097658": 201,  # silky terrier
        "n02276258": 321,  # admiral
        "n03196217": 530,  # digital clock
        "n03891251": 703,  # park bench
        "n04366367": 839,  # suspension bridge
    }
    # The other split has other classes; calibration takes it with the same test transform.
    train = open_dataset(section("folder", MINI), "train", model)
    assert not {name.split("/")[0] for name in train.names} & found.keys()
    chosen = np.random.RandomState(3).permutation(6)[:4]
    files = sorted((MINI / "train").rglob("*.JPEG"))
    transform = timm.data.create_transform(
        **{**timm.data.resolve_model_data_config(model), "input_size": (3, 16, 16)}
    )
    expected = torch.stack([transform(Image.open(files[i]).convert("RGB")) for i in chosen])
    (batch,) = calibration_images(train, 4, seed=3).get_inference_data()
    assert torch.equal(batch, expected)


def test_wnids_stay_plain_folders_for_a_model_of_as_many_classes(tmp_path):
    for wnid in ("n01440764", "n02123045", "n15075141"):
        write_image(tmp_path / "val" / wnid / "a.png", 0)
    dataset = open_dataset(section("folder", tmp_path), "val", small_model(num_classes=3))
    assert [label for _, label in dataset] == [0, 1, 2]


def test_a_wnid_that_is_no_class_of_the_model(tmp_path):
    write_image(tmp_path / "val" / "n99999999" / "a.png", 0)
    dataset = open_dataset(section("folder", tmp_path), "val", small_model(num_classes=1000))
    with pytest.raises(DataError, match="n99999999"):
        loader(dataset)


def test_labels_that_do_not_fit_are_an_error_for_evaluation_only(photos):
    dataset = open_dataset(section("folder", photos), "train", small_model(num_classes=7))
    with pytest.raises(DataError, match="3 classes.*model has 7.*class_map"):
        loader(dataset)
    assert calibration_images(dataset, 4).get_length() == 1


def test_class_map_gives_the_models_order(photos):
    (photos / "classes.txt").write_text("dog\nfish\nbird\ncat\n")
    config = section("folder", photos, class_map="classes.txt")
    dataset = open_dataset(config, "val", small_model(num_classes=4))
    assert [label for _, label in dataset] == [2, 2, 2, 3, 3, 3, 0, 0, 0]
    (photos / "classes.txt").write_text("dog\nbirds\ncat\n")
    with pytest.raises(DataError, match="does not list class 'bird'; did you mean 'birds'"):
        open_dataset(config, "val", small_model(num_classes=3))


@pytest.mark.parametrize("source", ["folder", "torch/folder"])
def test_a_class_map_lists_all_classes_of_the_model(photos, source):
    (photos / "classes.txt").write_text("dog\nfish\nbird\ncat\n")
    config = section(source, photos, class_map="classes.txt")
    dataset = open_dataset(config, "val", small_model(num_classes=10))
    with pytest.raises(DataError, match="class_map lists 4 classes and the model has 10"):
        loader(dataset)
    assert calibration_images(dataset, 4).get_length() == 1


def test_a_class_map_of_wnids_wins_over_imagenets_order(tmp_path):
    wnids = imagenet_wnids(1000)[::-1]
    for wnid in wnids[:2]:
        write_image(tmp_path / "val" / wnid / "a.png", 0)
    (tmp_path / "classes.txt").write_text("\n".join(wnids))
    config = section("folder", tmp_path, class_map="classes.txt")
    dataset = open_dataset(config, "val", small_model(num_classes=1000))
    found = {
        name.split("/")[0]: label for name, (_, label) in zip(dataset.names, dataset, strict=True)
    }
    assert found == {wnids[0]: 0, wnids[1]: 1}


def test_flat_folder_with_a_label_file(tmp_path):
    for number in range(3):
        write_image(tmp_path / "val" / f"{number}.png", number)
    config = section("folder", tmp_path, labels="labels.txt")
    (tmp_path / "labels.txt").write_text("0.png 2\n1.png 0\n2.png 2\n")
    assert [label for _, label in open_dataset(config, "val", small_model())] == [2, 0, 2]
    (tmp_path / "labels.txt").write_text("0.png n01443537\n1.png n01440764\n2.png n01443537\n")
    imagenet = small_model(num_classes=1000)
    assert [label for _, label in open_dataset(config, "val", imagenet)] == [1, 0, 1]
    (tmp_path / "labels.txt").write_text("0.png 2\n")
    with pytest.raises(DataError, match=r"no line for image 1\.png"):
        open_dataset(config, "val", small_model())
    flat = open_dataset(section("folder", tmp_path), "val", small_model())
    with pytest.raises(DataError, match="no class folders"):
        loader(flat)


def test_class_names_of_a_label_file_have_the_order_of_class_folders(tmp_path):
    names = ["class1", "class01", "class2", "class10"]  # timm has no order for the first two
    for name in names:
        write_image(tmp_path / "folders" / name / "a.png", 0)
        write_image(tmp_path / "flat" / f"{name}.png", 0)
    (tmp_path / "labels.txt").write_text("".join(f"{name}.png {name}\n" for name in names))
    for split, options in (("folders", {}), ("flat", {"labels": "labels.txt"})):
        config = section("folder", tmp_path, **options)
        dataset = open_dataset(config, split, small_model(num_classes=4))
        labels = {
            re.search(r"\d+", n)[0]: y for n, (_, y) in zip(dataset.names, dataset, strict=True)
        }
        assert labels == {"01": 0, "1": 1, "2": 2, "10": 3}


def test_missing_root_and_empty_folder(tmp_path):
    model = small_model()
    with pytest.raises(DataError, match="data.root is missing"):
        open_dataset(section("folder"), "val", model)
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_dataset(section("folder", tmp_path / "nowhere"), "val", model)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="0 images.*val"):
        open_dataset(section("folder", tmp_path), "val", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        open_dataset(section("folder", tmp_path / "file"), "val", model)


# --- whatever timm opens -------------------------------------------------------------------------


def test_a_tar_file_is_labelled_by_wnid(tmp_path):
    for value, wnid in enumerate(("n01440764", "n15075141", "n02123045")):
        write_image(tmp_path / "files" / wnid / f"{value}.png", 20 * value)
    with tarfile.open(tmp_path / "validation.tar", "w") as tar:
        tar.add(tmp_path / "files", arcname=".")
    model = small_model(num_classes=1000)
    expected = {0: ready(0), 999: ready(20), 281: ready(40)}  # by wnid, not by position
    for root, split in ((tmp_path, "val"), (tmp_path / "validation.tar", "any")):
        images, labels = next(iter(loader(open_dataset(section("tar", root), split, model))))
        means = images.mean((1, 2, 3)).tolist()
        assert dict(zip(labels.tolist(), means, strict=True)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match=r"no \.tar file of that name.*allowed: validation\.tar$"):
        open_dataset(section("tar", tmp_path), "train", model)


def test_torchvisions_folder_and_a_class_map(photos):
    (photos / "classes.txt").write_text("dog\nfish\nbird\ncat\n")
    config = section("torch/folder", photos, class_map="classes.txt")
    dataset = open_dataset(config, "val", small_model(num_classes=4))
    images, labels = next(iter(loader(dataset)))
    assert labels.tolist() == [2, 2, 2, 3, 3, 3, 0, 0, 0]
    expected = torch.tensor([ready(120 + 10 * i) for i in range(9)])
    assert torch.allclose(images.mean((1, 2, 3)), expected, atol=1e-5)
    assert dataset.names[:2] == ["torch/folder[0]", "torch/folder[1]"]


def test_torchvisions_mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = bytes(value for image in range(count) for value in [10 * image] * 28 * 28)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = struct.pack(">2i", 2049, count) + bytes(range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    model = small_model(num_classes=10, in_chans=1)
    assert len(open_dataset(section("torch/mnist", tmp_path), "train", model)) == 5
    dataset = open_dataset(section("torch/mnist", tmp_path), "val", model)
    images, labels = next(iter(loader(dataset)))
    assert labels.tolist() == [0, 1, 2]
    means = torch.tensor([ready(0), ready(10), ready(20)])
    assert torch.allclose(images.mean((1, 2, 3)), means, atol=1e-5)


def test_torchvisions_imagenet_has_several_names_for_a_class(tmp_path):
    wnids = imagenet_wnids(1000)
    names = {wnid: (f"name {index}", f"synonym {index}") for index, wnid in enumerate(wnids)}
    torch.save((names, []), tmp_path / "meta.bin")
    for wnid in wnids:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "a.png").symlink_to(tmp_path / "a.png")
    write_image(tmp_path / "a.png", 9)
    dataset = open_dataset(
        section("torch/imagenet", tmp_path), "val", small_model(num_classes=1000)
    )
    assert [dataset[index][1] for index in (0, 281, 999)] == [0, 281, 999]
    loader(dataset)  # no complaint about 2,000 classes


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("hfds/a/b", "datasets"),
        ("hfids/a", "datasets"),
        ("tfds/mnist", "tensorflow_datasets"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, source, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"'{source}' needs the package {package}: pip install"):
        open_dataset(section(source), "train", small_model())


def test_a_hugging_face_data_set_of_local_files(photos, tmp_path_factory):
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    source, cache = f"hfds/{photos}", tmp_path_factory.mktemp("cache")
    (photos / "val" / "cat" / "1.png").write_bytes(b"no image")
    dataset = open_dataset(section(source, cache), "validation", small_model())
    batches = loader(dataset, skip_unreadable=1)
    images, labels = next(iter(batches))
    assert labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    expected = torch.tensor([ready(120 + 10 * i) for i in range(9) if i != 4])
    assert torch.allclose(images.mean((1, 2, 3)), expected, atol=1e-5)
    assert batches.unreadable == [f"{source}[4]"]
    stream = open_dataset(section(f"hfids/{photos}", cache), "train", small_model())
    assert (
        len(stream) == 12 and next(iter(loader(stream)))[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )


def test_what_timm_cannot_open(tmp_path):
    with pytest.raises(DataError, match="cannot open data set 'torch/nothing'"):
        open_dataset(section("torch/nothing", tmp_path), "val", small_model())
    with pytest.raises(RegistryError, match="unknown dataset 'hdfs'.*did you mean 'hfds'"):
        open_dataset(section("hdfs/a", tmp_path), "val", small_model())


class Stream(IterableDataset):
    """Twelve images as a stream of timm's; counts how often it is started and what it decodes."""

    def __init__(self, length=12):
        self.reader = SimpleNamespace(class_to_idx={"a": 0, "b": 1, "c": 2}, dist_num_replicas=2)
        self.length, self.starts, self.decoded = length, 0, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        self.starts += 1
        for number in range(12):
            self.decoded += 1
            yield Image.new("L", (16, 16), 20 * number), number % 3


@pytest.mark.parametrize("length", [12, 0])  # 0: the stream does not say
def test_a_stream_is_gone_through_in_its_order(monkeypatch, length):
    stream = Stream(length)
    monkeypatch.setattr(datasets, "create_dataset", lambda *args, **options: stream)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    dataset = open_dataset(section("tfds/x"), "train", small_model(in_chans=1))
    assert len(dataset) == 12 and stream.reader.dist_num_replicas == 1
    stream.starts = stream.decoded = 0
    labels = [number for _, some in loader(dataset, 5) for number in some.tolist()]
    assert labels == [number % 3 for number in range(12)]
    assert (stream.starts, stream.decoded) == (1, 12)
    # A seeded subset, in its own order, of one pass.
    chosen = np.random.RandomState(5).permutation(12)[:7]
    batch = next(iter(calibration_images(dataset, 7, seed=5).get_inference_data()))
    means = torch.tensor([ready(20 * number) for number in chosen])
    assert torch.allclose(batch.mean((1, 2, 3)), means.float(), atol=1e-5)
    assert (stream.starts, stream.decoded) == (2, 12 + max(chosen) + 1)
    with pytest.raises(DataError, match=r"allowed: data\.evaluation\.workers 0$"):
        next(iter(loader(dataset, workers=1)))


def test_a_stream_that_breaks(monkeypatch):
    monkeypatch.setattr(datasets, "create_dataset", lambda *args, **options: Stream(13))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    dataset = open_dataset(section("tfds/x"), "train", small_model(in_chans=1))
    with pytest.raises(DataError, match="the stream breaks at image 12 of 13: it ends"):
        list(loader(dataset, skip_unreadable=9))


# --- WebDataset shards ---------------------------------------------------------------------------


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def encoded(value):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (value,) * 3).save(out, "png")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Three shards of four samples, image and label and json, every image of another grey value."""
    for shard in range(3):
        with tarfile.open(tmp_path / f"tiny-train-{shard:02d}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                add(tar, f"s/{number:02d}.cls", str(number % 3).encode())
                add(tar, f"s/{number:02d}.PNG", encoded(20 * number))
                add(tar, f"s/{number:02d}.json", json.dumps({"other": 2 - number % 3}).encode())
    return tmp_path


def grey_values(dataset):
    images, labels = next(iter(loader(dataset)))
    values = 255 * (images.mean((1, 2, 3)) * 0.5 + 0.5)
    return [round(value) for value in values.tolist()], labels.tolist()


def test_shards_are_read_like_files(shards):
    dataset = open_dataset(section("wds/tiny", shards), "train", small_model())
    assert dataset.names[5] == "tiny-train-01.tar:s/05" and len(dataset) == 12
    numbers = list(range(12))
    assert grey_values(dataset) == ([20 * n for n in numbers], [n % 3 for n in numbers])
    other = section("wds/tiny", shards, target_key="other")
    _, labels = grey_values(open_dataset(other, "train", small_model()))
    assert labels == [2 - n % 3 for n in numbers]


@pytest.mark.parametrize(
    ("split", "values"),
    [
        ("tiny-train-{01..02}.tar", range(80, 240, 20)),
        ("tiny-train-01.tar::tiny-train-00.tar", [*range(80, 160, 20), *range(0, 80, 20)]),
        ("few", range(160, 240, 20)),
    ],
)
def test_splits_of_shards(shards, split, values):
    info = {"splits": {"few": {"filenames": ["tiny-train-02.tar"], "alt_label": "other"}}}
    (shards / "_info.json").write_text(json.dumps(info))
    found, labels = grey_values(open_dataset(section("wds/", shards), split, small_model()))
    assert found == list(values)
    sign = (lambda n: 2 - n % 3) if split == "few" else (lambda n: n % 3)
    assert labels == [sign(value // 20) for value in found]


def test_what_is_wrong_with_shards(shards):
    model = small_model()
    with pytest.raises(DataError, match="'test': no shards of that name.*tiny-train-00.tar"):
        open_dataset(section("wds/", shards), "test", model)
    with pytest.raises(DataError, match="no shard tiny-train-03.tar in"):
        open_dataset(section("wds/", shards), "tiny-train-{02..03}.tar", model)
    with pytest.raises(DataError, match="needs a folder of shards"):
        open_dataset(section("wds/", shards / "tiny-train-00.tar"), "train", model)
    whole = (shards / "tiny-train-01.tar").read_bytes()
    (shards / "tiny-train-01.tar").write_bytes(whole[:2500])
    with pytest.raises(DataError, match=r"tiny-train-01\.tar is not a whole \.tar file"):
        open_dataset(section("wds/", shards), "train", model)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"files": ["a.tar"]}}, r"splits\.train\.filenames: Field required"),
        (["train"], r"splits: .*there is \['train'\]"),
        (
            {"train": {"filenames": "a.tar"}},
            r"splits\.train\.filenames: .*there is 'a\.tar'; .*a list",
        ),
    ],
)
def test_what_is_wrong_with_a_description_of_shards(shards, splits, message):
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=rf"_info\.json: {message}"):
        open_dataset(section("wds/", shards), "train", small_model())


def test_shards_without_labels_calibrate(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", encoded(20 * number))
    for options, member in (({}, "cls"), ({"target_key": "label"}, "json")):
        dataset = open_dataset(section("wds/", tmp_path, **options), "train", small_model())
        ((images, labels),) = calibration_images(dataset, 4).get_data()
        assert len(images) == 4 and labels.tolist() == [-1] * 4
        with pytest.raises(DataError, match=rf"train\.tar:0 has no \.{member} member"):
            loader(dataset)


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("cls", b"cat", r"0\.cls is b'cat'; allowed: a class index$"),
        ("json", b'{"labl": 1}', r"0\.json is .*labl.*; allowed: a class index as 'label'"),
        ("json", b"{", r"0\.json is b'\{'; allowed"),
        ("json", b"[1]", r"0\.json is b'\[1\]'; allowed"),
    ],
)
def test_a_label_that_is_none_is_no_unreadable_image(tmp_path, member, data, message):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "0.png", encoded(0))
        add(tar, f"0.{member}", data)
    options = {"target_key": "label"} if member == "json" else {}
    dataset = open_dataset(section("wds/", tmp_path, **options), "train", small_model())
    with pytest.raises(DataError, match=message):
        list(loader(dataset, skip_unreadable=1))


def test_corrupt_images_of_a_shard_are_named_and_the_subset_does_not_depend_on_order(tmp_path):
    numbers = list(range(10))
    for name, order in (("a", numbers), ("b", numbers[::-1])):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "val.tar", "w") as tar:
            for number in order:
                image = b"no image" if number in (2, 7) else encoded(20 * number)
                add(tar, f"{number}.png", image)
                add(tar, f"{number}.cls", b"1")
    a, b = (
        open_dataset(section("wds/", tmp_path / name), "val", small_model()) for name in ("a", "b")
    )
    with pytest.raises(DataError, match=r"2 unreadable.*val\.tar:2 .*val\.tar:7"):
        list(loader(a))
    batches = loader(a, 4, skip_unreadable=2, workers=1)
    assert sum(len(labels) for _, labels in batches) == 8
    assert batches.unreadable == ["val.tar:2", "val.tar:7"]
    one, two = (calibration_images(x, 6, skip_unreadable=2).get_inference_data() for x in (a, b))
    assert torch.equal(torch.cat(list(one)), torch.cat(list(two)))


def test_shards_are_what_timm_reads_from_them(shards):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    stream = create_dataset(
        "wds/tiny", root=str(shards), split="tiny-train-{00..02}.tar", is_training=False
    )
    expected = [(np.asarray(image).mean(), label) for image, label in stream]
    found = open_dataset(section("wds/tiny", shards), "train", small_model())
    assert list(zip(*grey_values(found), strict=True)) == expected


# --- unreadable images ---------------------------------------------------------------------------


@pytest.fixture
def corrupt(photos):
    """The photos, three of whose validation files are cut off, empty and no image at all."""
    names = ["bird/1.png", "cat/0.png", "dog/2.png"]
    whole = (photos / "val" / names[0]).read_bytes()
    (photos / "val" / names[0]).write_bytes(whole[: len(whole) // 2])
    (photos / "val" / names[1]).write_bytes(b"")
    (photos / "val" / names[2]).write_bytes(b"<html>404</html>" * 20)
    return open_dataset(section("folder", photos), "val", small_model()), names


def test_an_unreadable_image_is_named(corrupt):
    dataset, names = corrupt
    for name in names:
        with pytest.raises(UnreadableImage, match=name):
            dataset[dataset.names.index(name)]


def test_all_corrupt_files_are_named_and_nothing_else(corrupt):
    dataset, names = corrupt
    with pytest.raises(DataError, match="3 unreadable images") as error:
        list(loader(dataset))
    assert [name for name in dataset.names if name in str(error.value)] == names
    with pytest.raises(DataError, match="3 unreadable images"):
        calibration_images(dataset, 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_files_are_skipped_up_to_a_limit(corrupt, workers):
    dataset, names = corrupt
    batches = loader(dataset, 4, skip_unreadable=3, workers=workers)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert batches.unreadable == names
    with pytest.raises(DataError, match=r"allowed: 2"):
        list(loader(dataset, 4, skip_unreadable=2, workers=workers))


def test_calibration_replaces_what_it_skips(corrupt):
    dataset, names = corrupt
    batches = list(calibration_images(dataset, 6, skip_unreadable=3).get_inference_data())
    assert sum(len(batch) for batch in batches) == 6
    with pytest.raises(DataError, match="7 samples asked for and 6 of 9"):
        calibration_images(dataset, 7, skip_unreadable=3)


# --- arrays --------------------------------------------------------------------------------------


def test_arrays_of_bytes_get_the_transform_and_floats_do_not(tmp_path):
    pixels = np.arange(4 * 16 * 16 * 3, dtype=np.uint8).reshape(4, 16, 16, 3)
    floats = np.random.RandomState(0).randn(4, 3, 16, 16)
    labels = np.array([2, 0, 1, 1])
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=labels)
    save_file({"images": floats, "labels": labels}, tmp_path / "floats.safetensors")
    model = small_model()
    images, targets = next(
        iter(loader(open_dataset(section("npz", tmp_path / "bytes.npz"), "val", model)))
    )
    expected = torch.stack([image_transform(model)(Image.fromarray(array)) for array in pixels])
    assert torch.equal(images, expected) and targets.tolist() == labels.tolist()
    dataset = open_dataset(section("npz", tmp_path / "floats.safetensors"), "val", model)
    assert torch.equal(next(iter(loader(dataset)))[0], torch.tensor(floats, dtype=torch.float32))


def test_array_names_follow_the_split(tmp_path):
    path = tmp_path / "all.npz"
    grey = {
        f"{split}_images": np.full((2, 8, 8), v, np.uint8) for split, v in (("a", 0), ("b", 255))
    }
    np.savez(path, **grey, other=np.zeros((2, 8, 8), np.uint8), y_b=np.array([1, 2]))
    model = small_model()
    for split, value in (("a", -1), ("b", 1)):
        image, label = open_dataset(section("npz", path), split, model)[0]
        assert torch.allclose(image, torch.full_like(image, value)) and label == -1
    named = open_dataset(section("npz", path, images="other", labels="y_{split}"), "b", model)
    assert [label for _, label in named] == [1, 2] and named[0][0].max() == -1
    with pytest.raises(DataError, match="no array 'othr'; allowed: .*; did you mean 'other'"):
        open_dataset(section("npz", path, images="othr"), "b", model)
    with pytest.raises(DataError, match="no labels"):
        loader(open_dataset(section("npz", path), "a", model))


def test_a_folder_of_arrays_is_read_by_split(tmp_path):
    np.savez(tmp_path / "val.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.zeros(2, int))
    assert len(npz(section("npz", tmp_path), "val", None)) == 2
    with pytest.raises(DataError, match=r"neither train\.npz nor train\.safetensors"):
        npz(section("npz", tmp_path), "train", None)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, int), r"8 channels.*allowed: 1, 3 or 4"),
        (np.zeros((2, 8), np.uint8), np.zeros(2, int), r"uint8 \[2, 8\]; allowed"),
        (np.zeros((2, 8, 8, 3), np.int64), np.zeros(2, int), r"int64 .*allowed"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, int), r"\[3\]; allowed: integers \[2\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2), "float64"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int), "no images"),
        (np.zeros((2, 0, 8, 3), np.uint8), np.zeros(2, int), r"\[2, 0, 8, 3\]; allowed: .*pixel"),
        (np.zeros((2, 0, 0), np.uint8), np.zeros(2, int), r"\[2, 0, 0\]; allowed: .*pixel"),
    ],
)
def test_arrays_of_wrong_shape_or_type(tmp_path, images, labels, message):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=message):
        open_dataset(section("npz", tmp_path / "a.npz"), "val", small_model())


def test_unreadable_array_files(tmp_path):
    np.savez(tmp_path / "cut.npz", images=np.zeros((9, 9, 9, 3), np.uint8))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:100])
    (tmp_path / "text.safetensors").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickle.npz", images=np.array([{"a": 1}], dtype=object))
    for name in ("cut.npz", "text.safetensors", "array.npy", "pickle.npz"):
        with pytest.raises(DataError, match=name):
            npz(section("npz", tmp_path / name), "val", None)


@pytest.mark.parametrize("damage", ["data", "method"])
def test_damaged_compression(tmp_path, damage):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((9, 9, 9, 3), np.uint8))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    if damage == "data":  # zlib.error: a block of the third type, which there is not
        name, extra = struct.unpack("<2H", whole[26:30])
        whole[30 + name + extra] = 0xFF
    else:  # NotImplementedError: a compression method that zipfile does not know
        whole[whole.rindex(b"PK\x01\x02") + 10] = 99
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.npz is not a readable \.npz .*compress"):
        npz(section("npz", tmp_path / "a.npz"), "val", None)


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_an_image_that_is_not_finite_is_named(tmp_path, bad, word):
    images = np.zeros((12, 3, 16, 16), np.float32)
    images[7, 1, 2, 3] = bad
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(12, int))
    dataset = open_dataset(section("npz", tmp_path / "a.npz"), "train", small_model())
    with pytest.raises(DataError, match=rf"a\.npz:images\[07\] has {word}"):
        list(loader(dataset, 5))
    with pytest.raises(DataError, match=rf"images\[07\] has {word}"):
        calibration_images(dataset, 12)


# --- subsets -------------------------------------------------------------------------------------


class Listed:
    """Ten images whose names are listed in some order; the image says which it is."""

    def __init__(self, order):
        self.order = order
        self.names = [f"image{number}" for number in order]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number = self.order[index]
        return torch.full((1, 2, 2), float(number)), number


def test_the_calibration_subset_does_not_depend_on_the_order_of_files():
    forward, backward = Listed(list(range(10))), Listed([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    one = list(calibration_images(forward, 7, seed=5, batch_size=3).get_data())
    two = list(calibration_images(backward, 7, seed=5, batch_size=3).get_data())
    assert [len(images) for images, _ in one] == [3, 3, 1]
    for (images, labels), (other_images, other_labels) in zip(one, two, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    expected = np.random.RandomState(5).permutation(10)[:7]
    assert torch.cat([labels for _, labels in one]).tolist() == expected.tolist()


def test_seeds_choose_different_images_and_labels_are_left_out_for_the_model():
    dataset = Listed(list(range(10)))
    assert selection(dataset, 5, 0) == selection(dataset, 5, 0) != selection(dataset, 5, 1)
    for batch in calibration_images(dataset, 4).get_inference_data():
        assert isinstance(batch, torch.Tensor) and batch.shape == (4, 1, 2, 2)


@pytest.mark.parametrize("samples", [0, 11])
def test_more_samples_than_images(samples):
    with pytest.raises(DataError, match=f"{samples} samples asked for; allowed: 1 to 10"):
        calibration_images(Listed(list(range(10))), samples)


def test_evaluation_subset_and_batch_size():
    batches = loader(Listed(list(range(10))), 4, samples=6, seed=1)
    assert batches.images == 6 and [len(labels) for _, labels in batches] == [4, 2]
    with pytest.raises(DataError, match="batch_size 0"):
        loader(Listed([0]), 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(seed):
    with pytest.raises(DataError, match=f"seed {seed}; allowed: 0 to 4294967295"):
        calibration_images(Listed([0]), 1, seed)
    assert selection(Listed([0]), 1, 2**32 - 1) == [0]


def test_images_of_different_shape_are_named():
    class Ragged(Listed):
        def __getitem__(self, index):
            return torch.zeros(1, 2, 2 + index), 0

    with pytest.raises(DataError, match=r"image1 is \[1, 2, 3\] and image0 is \[1, 2, 2\]"):
        list(loader(Ragged([0, 1])))


# --- images against the model --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 16, 16), (3, 16, 16)])
def test_images_the_model_does_not_take(shape):
    with pytest.raises(DataError, match="images are"):
        check_images(torch.zeros(shape), small_model())


def test_images_of_any_model():
    check_images(torch.zeros(2, 3, 16, 16), small_model())
    check_images(torch.zeros(2, 3, 24, 24), small_model(dynamic_img_size=True))
    check_images(torch.zeros(2, 5, 7, 7), nn.Identity())
    with pytest.raises(DataError, match="int64"):
        check_images(torch.zeros(2, 3, 16, 16, dtype=torch.long))


def test_sources_take_no_unknown_options(photos):
    with pytest.raises(TypeError, match="claas_map"):
        folder(section("folder", photos), "val", None, claas_map="x")
