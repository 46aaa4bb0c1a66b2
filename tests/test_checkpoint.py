"""Saving and loading: bit-identical logits, and one clear line for every file that is not right."""

import copy
import json
import math
import resource

import nncf
import pytest
import timm
import torch
from models import ARGS, images, in_a_new_process, small_vit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ptq4vit_plugin as ptq
from ptq4vit_plugin.checkpoint import FORMAT_VERSION
from ptq4vit_plugin.errors import CheckpointError, PTQ4ViTError
from ptq4vit_plugin.integrations.timm.models import Recipe, create
from ptq4vit_plugin.record import TwinTrial, attach, record_of

RECIPE = {"name": "vit_tiny_patch16_224", "args": {**ARGS, "depth": 1}}
ALLOWED = ("nncf.*", "ptq4vit_plugin.*")


@pytest.fixture(scope="module")
def quantized():
    return ptq.quantize(small_vit(), images(), {"algorithm": "ptq4vit", "rounds": 1})


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return ptq.save(quantized, path, recipe=RECIPE)


def edited(saved, target, change):
    """A copy of a checkpoint with its metadata changed."""
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        content = json.loads(file.metadata()["ptq4vit"])
    change(content)
    save_file(tensors, target, {"ptq4vit": json.dumps(content)})
    return target


def test_a_new_process_computes_the_same_logits_bit_for_bit(quantized, saved):
    x = images(1)[0]
    assert torch.equal(in_a_new_process(saved, x), quantized(x))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 28, "depths": (1, 1), "embed_dim": 24}),
    ],
)
def test_other_families(name, args, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).eval()
    x = torch.randn(2, 3, args["img_size"], args["img_size"])
    result = ptq.quantize(model, [x], {"algorithm": "ptq4vit", "rounds": 1})
    path = ptq.save(
        result, tmp_path / "m.safetensors", {"name": name, "args": {**args, "num_classes": 5}}
    )
    assert torch.equal(ptq.load(path)(x), result(x))
    fresh = timm.create_model(name, num_classes=5, **args)
    for module in fresh.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    config = json.loads(json.dumps(nncf.torch.get_config(result)))
    fresh = nncf.torch.load_from_config(fresh, config, allowed_modules=ALLOWED)
    fresh.load_state_dict(result.state_dict())
    assert torch.equal(fresh.eval()(x), result(x))


class _Shifted(nn.Module):
    """Adds what it keeps in a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.register_buffer("shift", torch.arange(8) / 3, persistent=False)

    def forward(self, x):
        x = self.norm(self.linear(x.flatten(2)) + self.shift).mean(1)
        return self.head(x.to(self.head.bias.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["simulated", "integer"])
def test_types_are_those_of_the_model_that_was_saved(dtype, kind, tmp_path):
    def saved(model, x):
        result = ptq.quantize(model, [x], {"algorithm": "ptq4vit", "rounds": 1})
        path = tmp_path / "model.safetensors"
        if kind == "simulated":
            return result, ptq.save(result, path)
        ptq.export(result, path, "integer", example_input=[x])
        return result, path

    (x,) = images(1)
    x = x.to(dtype)
    built = create(Recipe(**RECIPE)).to(dtype)
    result, path = saved(built, x)
    again = ptq.load(path)
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} >= {dtype}
    # Into a model that has the types already, nothing but values is loaded.
    reference = result if kind == "simulated" else ptq.load(path, small_vit().to(dtype))
    assert torch.equal(again(x), reference(x)) and again(x).dtype == dtype

    x = torch.randn(5, 3, 4, 4).to(dtype)
    model = _Shifted().to(dtype)
    model.head.float()
    result, path = saved(model, x)
    again = ptq.load(path, _Shifted())
    reference = result if kind == "simulated" else ptq.load(path, copy.deepcopy(model))
    assert torch.equal(again(x), reference(x))


def test_the_description_is_saved_with_the_model(quantized, saved):
    assert ptq.describe(ptq.load(saved)) == ptq.describe(quantized)


def test_nncfs_own_way_of_saving(quantized):
    config = json.loads(json.dumps(nncf.torch.get_config(quantized)))
    fresh = small_vit(seed=9)
    for module in fresh.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    loaded = nncf.torch.load_from_config(fresh, config, allowed_modules=ALLOWED)
    loaded.load_state_dict(quantized.state_dict())
    x = images(1)[0]
    assert torch.equal(loaded.eval()(x), quantized(x))


def test_without_a_recipe_a_model_is_needed(quantized, tmp_path):
    path = ptq.save(quantized, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not say how its model is built"):
        ptq.load(path)
    x = images(1)[0]
    assert torch.equal(ptq.load(path, small_vit(seed=3))(x), quantized(x))


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="has no quantizers"):
        ptq.save(small_vit(), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.safetensors"):
        ptq.load(tmp_path / "nothing.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a .safetensors file"):
        ptq.load(text)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="was not written by ptq4vit"):
        ptq.load(foreign)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_truncated(saved, tmp_path, kept):
    content = saved.read_bytes()
    short = tmp_path / "short.safetensors"
    short.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="short.safetensors"):
        ptq.load(short)


def test_of_another_model(saved):
    with pytest.raises(CheckpointError, match="is of another model"):
        ptq.load(saved, small_vit(depth=2))
    with pytest.raises(CheckpointError, match="is of another model"):
        ptq.load(saved, small_vit(embed_dim=24))


def test_newer_format(saved, tmp_path):
    path = edited(saved, tmp_path / "m.safetensors", lambda c: c.update(format_version=99))
    with pytest.raises(CheckpointError, match=f"format version 99.*version {FORMAT_VERSION}"):
        ptq.load(path)


def test_module_outside_the_allow_list(saved, tmp_path):
    def change(content):
        content["nncf"]["compression_state"][0].update(module_path="os", module_cls_name="system")

    path = edited(saved, tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError, match="untrusted path 'os'"):
        ptq.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["nncf"]["compression_state"][0].update(module_config={}),
        lambda c: c["nncf"].clear(),
        lambda c: c.update(unknown=1),
        lambda c: c["recipe"].update(name="no_such_model"),
    ],
)
def test_damaged_metadata(saved, tmp_path, change):
    path = edited(saved, tmp_path / "m.safetensors", change)
    with pytest.raises(PTQ4ViTError):
        ptq.load(path)


@pytest.mark.parametrize("shape", [[10**6, 10**6], [10**30], ["x"]])
def test_a_scale_of_an_impossible_shape_is_one_line(saved, tmp_path, shape):
    def change(content):
        content["nncf"]["compression_state"][0]["module_config"]["scale_shape"] = shape

    path = edited(saved, tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError, match=f"^'{path}': its quantizers cannot be") as caught:
        ptq.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_metadata_too_deep_to_be_read(saved, tmp_path):
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, {"ptq4vit": '{"a": ' * 100_000 + "1" + "}" * 100_000})
    with pytest.raises(CheckpointError, match=f"^'{path}' has damaged metadata: [^\n]*$"):
        ptq.load(path)


def test_unwritable_place_and_nothing_half_written(quantized, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("here")
    with pytest.raises(PTQ4ViTError, match="cannot write"):
        ptq.save(quantized, blocked / "m.safetensors")

    from ptq4vit_plugin import checkpoint

    def fail(state, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = tmp_path / "m.safetensors"
    before.write_text("earlier")
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        ptq.save(quantized, before)
    assert before.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.safetensors"]


def test_a_disk_that_gets_full(quantized, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("earlier")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(PTQ4ViTError) as caught:
            ptq.save(quantized, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert message.startswith(f"output: cannot write '{path}': ") and "File too large" in message
    assert "\n" not in message
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "earlier")]


def test_numbers_that_json_lacks(quantized, tmp_path):
    record = record_of(quantized)
    first, *others = record.ops
    trial = TwinTrial(twin=math.inf, uniform=-math.inf, kept=False)
    left = first.operands[0].model_copy(update={"twin": trial})
    first = first.model_copy(
        update={"operands": (left, first.operands[1]), "sqnr_db": math.inf, "seconds": -math.inf}
    )
    changed = record.model_copy(update={"ops": (first, *others)})
    attach(quantized, changed)
    try:
        path = ptq.save(quantized, tmp_path / "m.safetensors", RECIPE)
    finally:
        attach(quantized, record)
    with safe_open(path, "pt") as file:
        json.loads(file.metadata()["ptq4vit"], parse_constant=pytest.fail)
    assert record_of(ptq.load(path)) == changed


class _KeepsBias(nn.Module):
    """Keeps what it computes of its weights until it is trained again, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.kept = None

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x):
        if self.kept is None:
            self.kept = self.bias.detach() * 2
        return self.linear(x) + self.kept


def test_what_a_model_kept_of_its_old_weights_is_forgotten(tmp_path):
    x = torch.randn(3, 4)
    result = ptq.quantize(_KeepsBias().eval(), [x], {"algorithm": "base_ptq"})
    path = ptq.save(result, tmp_path / "model.safetensors")
    other = _KeepsBias().eval()
    other(x)
    assert torch.equal(ptq.load(path, other)(x), result(x))
