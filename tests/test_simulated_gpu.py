"""Nothing meets a tensor of another device, checked where there is no GPU (`simulated_gpu.py`)."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from simulated_gpu import DEVICE, OnDevice, on_device, simulated_gpu
from timm.models.vision_transformer import VisionTransformer

import ptq4vit_plugin as ptq
from ptq4vit_plugin.integrations.integer.model import codes

FEW = {"search_range": {"n": 8}, "rounds": 1}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=5
    ).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 16, 16) for _ in range(2)]


@pytest.mark.parametrize(
    "compression",
    [
        {"algorithm": "ptq4vit", **FEW},
        {"algorithm": "ptq4vit", **FEW, "search": "exhaustive", "granularity": "paper"},
        {"algorithm": "ptq4vit", **FEW, "metric": "mse", "memory_budget": 1e-4},
        {"algorithm": "base_ptq", **FEW},
        {"algorithm": "ptq4vit_plus", **FEW, "weights": {"bits": 4}, "activations": {"bits": 4}},
        [{"algorithm": "smooth_quant"}, {"algorithm": "ptq4vit", **FEW}],
        [
            {"algorithm": "ptq4vit", **FEW},
            {"algorithm": "reconstruct", "iterations": 2, "finish": 2},
        ],
    ],
    ids=["fast", "paper", "mse", "base", "plus", "smooth", "learned"],
)
def test_every_algorithm_stays_on_the_models_device(model, images, compression):
    here = ptq.quantize(model, images, compression)
    expected = here(images[0]).detach()
    with simulated_gpu():
        there = ptq.quantize(on_device(model), images, compression)
        found = there(OnDevice(images[0])).detach()
    assert found.device == DEVICE
    assert {x.device for x in (*there.parameters(), *there.buffers())} == {DEVICE}
    # The device computes as the CPU does; only what is contiguous in memory may differ.
    torch.testing.assert_close(found.inner, expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def quantized(model, images):
    """The same model, quantized on the CPU and on the device."""
    here = ptq.quantize(model, images, {"algorithm": "ptq4vit", **FEW})
    with simulated_gpu():
        yield here, ptq.quantize(on_device(model), images, {"algorithm": "ptq4vit", **FEW})


def test_it_is_saved_and_loaded_as_on_the_cpu(quantized, images, model, tmp_path):
    files = [tmp_path / "here.safetensors", tmp_path / "there.safetensors"]
    for part, file in zip(quantized, files, strict=True):
        ptq.save(part, file)
    here, there = map(load_file, files)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    again = ptq.load(files[0], on_device(model))
    assert torch.equal(again(OnDevice(images[0])).inner, quantized[1](OnDevice(images[0])).inner)


def test_an_interrupted_search_goes_on_there(quantized, images, model, tmp_path):
    compression = {"algorithm": "ptq4vit", **FEW}
    ptq.quantize(on_device(model), images, compression, resume=tmp_path)
    assert any(tmp_path.rglob("*.safetensors"))
    again = ptq.quantize(on_device(model), images, compression, resume=tmp_path)
    x = OnDevice(images[0])
    assert torch.equal(again(x).inner, quantized[1](x).inner)


def test_it_is_evaluated_as_on_the_cpu(quantized, images, model):
    data = [(x, torch.arange(8) % 5) for x in images]
    here, there = quantized
    expected = ptq.evaluate(here, data, model)
    found = ptq.evaluate(there, data, on_device(model))
    assert (found.top1, found.agreement) == (expected.top1, expected.agreement)
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-3)


def test_its_integer_file_is_that_of_the_cpu(quantized, images, model, tmp_path):
    files = [tmp_path / "here.safetensors", tmp_path / "there.safetensors"]
    for part, file in zip(quantized, files, strict=True):
        report = ptq.export(part, file, "integer", example_input=images[:1], per_op=True)
        assert max(report.op_differences.values()) < 1e-5
    assert files[0].read_bytes() == files[1].read_bytes()
    here = ptq.load(files[0], copy.deepcopy(model))
    there = ptq.load(files[1], on_device(model))
    y, expected = there(OnDevice(images[0])), here(images[0])
    torch.testing.assert_close(y.inner, expected, rtol=0, atol=1e-6)
    for op, ports in codes(there, OnDevice(images[0])).items():
        for port, found in ports.items():
            assert torch.equal(found.inner, codes(here, images[0])[op][port]), (op, port)


def test_tensors_of_two_devices_are_refused():
    with simulated_gpu():
        x = torch.ones(3, device=DEVICE)
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a scalar may come from the CPU
        assert x[torch.tensor([0, 2])].tolist() == [1, 1]  # an index as well
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        assert x.cpu().numpy().tolist() == [1, 1, 1]
