"""Metrics against plain loops and published numbers."""

import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ptq4vit_plugin.data import UnreadableImage, loader, open_dataset
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.evaluation import evaluate, logit_sqnr, wilson_interval


class Table(nn.Module):
    """A classifier whose logits are the pixels."""

    def __init__(self, classes, noise=0.0):
        super().__init__()
        self.classes = classes
        self.bias = nn.Parameter(noise * torch.randn(classes))

    def forward(self, images):
        return images.flatten(1)[:, : self.classes] + self.bias


def batches(images, labels, size=64):
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def test_evaluation_equals_a_plain_loop_over_500_images():
    torch.manual_seed(0)
    args = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=9)
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    reference = timm.create_model("vit_tiny_patch16_224", **args).eval()
    reference.load_state_dict(
        {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}
    )
    images, labels = torch.randn(500, 3, 16, 16), torch.randint(0, 9, (500,))

    correct = correct5 = agree = 0
    losses, all_logits, all_expected = [], [], []
    with torch.no_grad():
        for start in range(0, 500, 64):
            logits = model(images[start : start + 64])
            expected = reference(images[start : start + 64])
            for row, expected_row, label in zip(logits, expected, labels[start:], strict=False):
                correct += int(row.argmax() == label)
                correct5 += int(label) in row.sort(descending=True).indices[:5].tolist()
                agree += int(row.argmax() == expected_row.argmax())
                losses.append(-float(row.double().log_softmax(0)[label]))
            all_logits.append(logits.double())
            all_expected.append(expected.double())
    out, ref = torch.cat(all_logits), torch.cat(all_expected)
    sqnr = 10 * torch.log10(ref.var(correction=0) / (out - ref).square().mean())

    found = evaluate(model, batches(images, labels), reference)
    assert (found.images, found.top1, found.top5) == (500, correct / 5, correct5 / 5)
    assert found.agreement == agree / 5 and 0 < agree < 500
    assert found.loss == pytest.approx(sum(losses) / 500, rel=1e-12)
    assert found.sqnr_db == pytest.approx(float(sqnr), abs=1e-9)
    assert found.images_per_second > 0 and found.unreadable == ()
    assert found.top1_interval[0] < found.top1 < found.top1_interval[1]


def test_500_files_three_of_them_corrupt(tmp_path):
    rng = np.random.RandomState(0)
    corrupt = {"b/0007.png": b"", "b/0250.png": b"<html>404</html>", "c/0497.png": None}
    pixels, labels = [], []
    for number in range(500):
        name = f"{'abc'[number % 3]}/{number:04d}.png"
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = rng.randint(0, 256, (4, 4)).astype(np.uint8)
        Image.fromarray(grey).save(path)
        if name in corrupt:
            path.write_bytes(path.read_bytes()[:50] if corrupt[name] is None else corrupt[name])
        else:
            pixels.append(grey)
            labels.append(number % 3)
    args = dict(img_size=4, patch_size=2, embed_dim=8, depth=1, num_heads=1, num_classes=3)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, **args).eval()
    with torch.no_grad():
        logits = model((torch.tensor(np.stack(pixels))[:, None] / 255 - 0.5) / 0.5)
    correct = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    data = open_dataset(SimpleNamespace(source="folder", root=tmp_path, options={}), "val", model)
    found = evaluate(model, loader(data, 64, skip_unreadable=3))
    assert found.images == 497 and found.top1 == 100 * correct / 497
    assert sorted(found.unreadable) == sorted(corrupt)
    with pytest.raises(DataError, match=r"3 unreadable images \(allowed: 2\)") as error:
        evaluate(model, loader(data, 500, skip_unreadable=2))
    assert [name for name in data.names if name in str(error.value)] == sorted(corrupt)


def test_no_reference_and_few_classes():
    images = torch.eye(4).view(4, 1, 2, 2)
    found = evaluate(Table(4), batches(images, torch.tensor([0, 1, 2, 0])))
    assert found.top1 == 75 and found.top5 is None
    assert found.agreement is None and found.sqnr_db is None


def test_a_model_equal_to_its_reference():
    images = torch.randn(5, 1, 2, 2)
    found = evaluate(Table(4), batches(images, torch.zeros(5, dtype=torch.long)), Table(4))
    assert found.agreement == 100 and found.sqnr_db == math.inf
    strict = json.loads(found.model_dump_json(), parse_constant=pytest.fail)
    assert strict["sqnr_db"] == "Infinity" and strict["images"] == 5


def test_signal_is_the_variance_of_the_logits_and_not_their_power():
    images = 100 + torch.randn(50, 1, 2, 2, dtype=torch.float64).float()
    model = Table(4)
    model.bias.data.fill_(0.1)
    found = evaluate(model, batches(images, torch.zeros(50, dtype=torch.long)), Table(4))
    expected = 10 * math.log10(float(images.double().var(correction=0)) / 0.01)
    assert found.sqnr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [(50,), (50, 4), (8, 17, 6), (3, 5, 7, 9), (2, 1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sqnr_is_over_every_number_whatever_the_shape(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    reference = (3 + torch.randn(shape, generator=generator)).to(dtype)
    output = reference + (torch.randn(shape, generator=generator) / 7).to(dtype)
    signal, found = ([float(v) for v in x.flatten()] for x in (reference, output))
    noise = sum((a - b) ** 2 for a, b in zip(signal, found, strict=True)) / len(signal)
    expected = 10 * math.log10(statistics.pvariance(signal) / noise)
    assert logit_sqnr(reference, output) == pytest.approx(expected, abs=1e-6)
    assert logit_sqnr(reference, reference) == math.inf


def test_sqnr_of_outputs_of_different_shapes():
    message = r"^the output has the shape \[2, 3\]; allowed: that of the reference, \[2, 3, 1\]$"
    with pytest.raises(ModelError, match=message):
        logit_sqnr(torch.ones(2, 3, 1), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_models_keep_their_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3))
    reference = Table(3).eval()
    images, labels = torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    first = evaluate(model, batches(images, labels), reference)
    second = evaluate(model, batches(images, labels, 4), reference)
    assert model.training and model[1].training and not reference.training
    assert first.sqnr_db == pytest.approx(second.sqnr_db)  # dropout was off


def test_progress_changes_nothing():
    images, labels = torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    quiet = evaluate(Table(3), batches(images, labels))
    shown = evaluate(Table(3), batches(images, labels, 2), progress=True)
    assert (quiet.top1, quiet.images) == (shown.top1, shown.images)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_models_classes(label):
    images = torch.randn(2, 1, 2, 2)
    with pytest.raises(DataError, match=f"label {label} is not a class.*allowed: 0 to 2"):
        evaluate(Table(3), batches(images, torch.tensor([0, label])))


def test_labels_that_are_no_class_indices():
    images = torch.randn(2, 1, 2, 2)
    for labels in (torch.rand(2), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(DataError, match="labels are"):
            evaluate(Table(3), batches(images, labels))


def test_bfloat16_is_close_and_is_not_float32():
    torch.manual_seed(0)
    args = dict(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=9)
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    images, labels = torch.randn(40, 3, 16, 16), torch.zeros(40, dtype=torch.long)
    exact = evaluate(model, batches(images, labels))
    mixed = evaluate(model, batches(images, labels), precision="bfloat16")
    assert mixed.loss == pytest.approx(exact.loss, rel=0.02) and mixed.loss != exact.loss


class Some:
    names = [f"image{i:02d}" for i in range(23)]

    def __len__(self):
        return 23

    def __getitem__(self, index):
        if index in (4, 9):
            raise UnreadableImage(self.names[index], "cut off")
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 2, 3, generator=generator), index % 6


def measured(rank, ranks):
    """What a process measures of its share, and what it complains about."""
    torch.manual_seed(0)
    model, reference = (nn.Sequential(nn.Flatten(), nn.Linear(6, 6)) for _ in "ab")
    data = loader(Some(), 4, skip_unreadable=2, share=(rank, ranks))
    metrics = evaluate(model, data, reference).model_dump_json(exclude={"images_per_second"})
    with pytest.raises(DataError) as error:
        evaluate(model, loader(Some(), 4, skip_unreadable=1, share=(rank, ranks)))
    return json.loads(metrics), str(error.value)


def measured_together(meeting, rank):
    torch.set_num_threads(1)  # the threads of the process that it is a copy of were not copied
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    return measured(rank, 2)


def test_two_processes_measure_what_one_does(tmp_path):
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        started = [pool.submit(measured_together, tmp_path / "meeting", rank) for rank in (0, 1)]
        outputs = [measured(0, 1), *(process.result(timeout=300) for process in started)]
    one, first, second = (metrics for metrics, _ in outputs)
    for _, complaint in outputs:  # in two processes, too, where each has one
        assert complaint.startswith("2 unreadable images (allowed: 1): ")
    assert first == second
    assert one["images"] == 21 and one["reference_top1"] is not None
    assert sorted(first.pop("unreadable")) == one.pop("unreadable") == ["image04", "image09"]
    for key, value in one.items():  # other batches, so float32 logits differ in their last bits
        assert first[key] == pytest.approx(value, rel=1e-6), key


def test_bad_images_and_bad_models():
    labels = torch.zeros(2, dtype=torch.long)
    bad = torch.randn(2, 1, 2, 2)
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="1 of the batch has NaN"):
        evaluate(Table(3), batches(bad, labels))
    with pytest.raises(DataError, match="no images"):
        evaluate(Table(3), [])
    with pytest.raises(ModelError, match="output is"):
        evaluate(nn.Identity(), batches(torch.randn(2, 1, 2, 2), labels))
    with pytest.raises(ModelError, match="reference 2"):
        evaluate(Table(3), batches(torch.randn(2, 1, 2, 2), labels), Table(2))
