"""Functions that the ONNX exporter cannot write: the same by way of others."""

import pytest
import torch
import torch.nn.functional as F

from ptq4vit_plugin.integrations.onnx_functions import TRANSLATIONS, Translatable

x = torch.randn(2, 6, 12, 8)
columns = torch.randn(2, 5 * 3 * 2, 5 * 6)
CALLS = {
    "rms_norm": lambda: F.rms_norm(x, (12, 8), torch.linspace(1, 2, 96).view(12, 8), 1e-5),
    "rms_norm of its own eps": lambda: torch.rms_norm(x, (8,)),
    "repeat_interleave": lambda: x.repeat_interleave(3, -1),
    "tile": lambda: x.tile((2, 3)),
    "tile of numbers": lambda: x.tile(1, 2, 1, 3),
    "unfold": lambda: x.unfold(2, 5, 3).unfold(-2, 4, 2),
    "fold": lambda: F.fold(
        columns, (9, 13), (3, 2), padding=(1, 0), stride=(2, 2), dilation=(1, 2)
    ),
    "fold of square windows": lambda: F.fold(torch.randn(1, 18, 16), 9, 3, stride=2),
    "adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(x, (3, None)),
    "adaptive_avg_pool2d of other windows": lambda: F.adaptive_avg_pool2d(x, (5, 11)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_translation_computes_the_same(name):
    torch.manual_seed(0)
    expected = CALLS[name]()
    torch.manual_seed(0)
    with Translatable():
        found = CALLS[name]()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: x.repeat_interleave(torch.tensor([1, 2]), 0),
        lambda: x.repeat_interleave(2),
        lambda: x.tile(2, 1, 1, 1, 3),
        lambda: F.adaptive_avg_pool2d(x, 1),
    ],
)
def test_what_has_no_translation_stays(call):
    expected = call()
    with Translatable():
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)


def test_every_translation_is_tried():
    assert {function.__name__ for function in TRANSLATIONS} == {n.split()[0] for n in CALLS}


class Windows(torch.nn.Module):
    def forward(self, x):
        patches = F.unfold(x + 1, 3, padding=1, stride=2)
        folded = F.fold(patches, (12, 8), 3, padding=1, stride=2)
        tiled = x.tile((x.shape[-2] // 4, 3))
        return x.unfold(2, 4, 4).mean(-1), folded, F.adaptive_avg_pool2d(x * 2, 4), tiled


def test_what_is_written_runs_in_onnx_runtime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "windows.onnx"
    with Translatable(), torch.no_grad():
        torch.onnx.export(
            Windows().eval(), (x,), path, dynamo=False, opset_version=18, input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.randn(3, *x.shape[1:])
    for found, expected in zip(
        session.run(None, {"x": more.numpy()}), Windows()(more), strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
