"""Blocks that are recorded by themselves give what the model's own passes give, bit for bit."""

import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
from models import images, small_vit
from torch import nn

from ptq4vit_plugin.algorithms import recording
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.recording import recorded_in, replays, schedule
from ptq4vit_plugin.integrations.device import available_devices
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.blocks import Block, blocks_around, locate
from ptq4vit_plugin.integrations.nncf.capture import record
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.nncf.replay import replay, replayable_blocks


def prepared(model, data):
    """The model as the search has it before it records, its ops, and the images as batches."""
    data = batches(data)
    prepare(model, data[0])
    hooks.wrap(model)
    return model, find_ops(hooks.trace(model, data[0].example), len(data[0]))[0], data


def timm_model(name, **args):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **args).eval()


SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "depths": (2, 1),
    "embed_dim": 24,
    "num_heads": (2, 4),
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS = {
    "vit": lambda: small_vit(2),
    "swin": lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN),
    # These call their blocks in a loop, so NNCF numbers the ops of all of them together.
    "beit": lambda: timm_model("beit_base_patch16_224", **SMALL),
    "eva02": lambda: timm_model("eva02_tiny_patch14_224", **SMALL),
    "xcit": lambda: timm_model(
        "xcit_nano_12_p16_224", img_size=32, embed_dim=48, depth=2, num_heads=3
    ),
}


def tensors(seen):
    return [*seen.inputs[0], *seen.inputs[1], *seen.fisher]


def same(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("device", available_devices())
@pytest.mark.parametrize(
    "gradient", [None, Gradient(), Gradient(kind="output", probes=3)], ids=["none", "one", "three"]
)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_alone_record_what_the_model_records(name, gradient, device):
    model, ops, data = prepared(MODELS[name]().to(device), images(2, 3))
    expected = record(model, data, ops, gradient)
    blocks = replayable_blocks(model, ops, data[0], gradient)
    assert len(blocks) == (3 if name == "swin" else 4 if name == "xcit" else 2)
    # Room for a third of a block's ops at a time, and for what reaches one block.
    sizes = [1.0] * len(ops)
    passes = schedule(ops, sizes, dict.fromkeys(blocks, 2.0), 2.0)
    assert len(passes) > len(blocks) and replays(passes) > 2 * len(blocks)
    calls = []
    found = recorded_in(passes, model, data, gradient, calls.append, calls.append)
    for op, seen in zip(ops, found, strict=True):
        same(seen, expected[op.name])
    assert [n for n in calls if isinstance(n, int)] == [
        n + 1 for n in range(len(passes)) for _ in data
    ]
    assert sum(isinstance(block, str) for block in calls) == replays(passes)
    assert list(hooks.hooks(model)) == []


def test_ops_are_located_where_their_modules_are_called():
    model, ops, data = prepared(MODELS["beit"](), images(1))
    around = locate(model, data[0])
    # NNCF's own names do not say which block it is.
    assert around["attn/proj/linear/1"] == ("blocks.1", "blocks.1.attn", "blocks.1.attn.proj")
    # An op that does not run for one image is in no block.
    assert blocks_around(model, around, ["attn/proj/linear/8", "attn/proj/linear/9"]) == []
    seen, expected = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: expected.update({name: args[0].clone()})
            )
    watched = {
        (op.name, 0): lambda x, name=around[op.name][-1]: seen.update({name: x.clone()})
        for op in ops
        if op.kind == "linear"
    }
    with hooks.watching(model, watched, {}), torch.no_grad():
        model(data[0].args[0])
    # Of queries, keys and values BEiT uses the weight alone.
    assert len(seen) == 9 and sum(name in expected for name in seen) == 7
    assert all(torch.equal(expected[name], seen[name]) for name in seen if name in expected)


class Layer(nn.Module):
    """Two linears; what becomes of them differs from class to class."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class InPlace(Layer):
    def forward(self, x):
        y = self.second(self.first(x).relu())
        return x.mul_(2).add_(y)


class Leaking(Layer):
    """The loss reaches the inner value by another way than the output."""

    def forward(self, x):
        self.inner = self.first(x)
        return x + self.second(self.inner.relu())


class Pair(Layer):
    def forward(self, x):
        return super().forward(x), None


class Counting(Layer):
    """Not a function of its arguments."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x * self.calls)


class Net(nn.Module):
    def __init__(self, layer, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Layer(), layer(), Layer()])
        self.head = nn.Linear(6, 3)
        self.times = times

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            for _ in range(self.times if layer is self.layers[1] else 1):
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
            x = x + getattr(layer, "inner", 0)
        return self.head(x)


@pytest.mark.parametrize(
    ("layer", "times", "expected"),
    [
        (Layer, 1, [0, 1, 2]),
        (InPlace, 1, [0, 1, 2]),
        (Layer, 2, [0, 2]),
        (Leaking, 1, [0, 2]),
        (Pair, 1, [0, 2]),
        (Counting, 1, [0, 2]),
    ],
)
def test_what_a_block_does_not_do_by_itself_is_recorded_in_the_model(layer, times, expected):
    data = list(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)))
    model, ops, data = prepared(Net(layer, times), data)
    blocks = replayable_blocks(model, ops, data[0], Gradient())
    assert [block.name for block in blocks] == [f"layers.{place}" for place in expected]
    if layer is not Counting:
        whole = record(model, data, ops, Gradient())
        passes = schedule(ops, [1.0] * len(ops), dict.fromkeys(blocks, 1.0), 2 * len(ops))
        assert len(passes) == 1 and replays(passes) == len(expected)
        parts = recorded_in(passes, model, data, Gradient(), lambda _: None, lambda _: None)
        for op, seen in zip(ops, parts, strict=True):
            same(seen, whole[op.name])


def op(name):
    return SimpleNamespace(name=name)


def shape(passes):
    """Per pass: an op's name, or a block's with the ops of each of its runs."""
    return [
        [
            (part.block.name, *(" ".join(op.name for op in group) for group in part.groups))
            if part.block
            else part.groups[0][0].name
            for part in parts
        ]
        for parts in passes
    ]


def test_a_schedule_keeps_the_order_and_the_budget():
    ops = [op(name) for name in "stem a b c d e f head".split()]
    blocks = {Block("one", (), ("a", "b", "c")): 3.0, Block("two", (), ("d", "e", "f")): 4.0}
    sizes = [5.0, 4.0, 4.0, 1.0, 9.0, 20.0, 2.0, 1.0]
    # Passes keep 5 + 3 bytes and 4 + 1, 8 at most; runs 8 and 11 more, but for the op of 20.
    expected = [["stem", ("one", "a b", "c")], [("two", "d", "e", "f"), "head"]]
    assert shape(schedule(ops, sizes, blocks, 16.0)) == expected
    assert shape(schedule(ops, sizes, blocks, 100.0)) == [
        ["stem", ("one", "a b c"), ("two", "d e f"), "head"]
    ]
    assert shape(schedule(ops, sizes, {}, 10.0)) == [
        ["stem", "a"],
        ["b", "c"],
        ["d"],
        ["e"],
        ["f", "head"],
    ]
    assert schedule([], [], blocks, 10.0) == []


def test_a_block_whose_ops_are_apart_is_not_run_by_itself():
    ops = [op(name) for name in "a x b".split()]
    blocks = {Block("one", (), ("a", "b")): 1.0}
    assert shape(schedule(ops, [1.0] * 3, blocks, 10.0)) == [["a", "x", "b"]]


def test_what_was_used_is_let_go(monkeypatch):
    """What reached a block lives until its last op is there, and what an op saw until the next."""
    model, ops, data = prepared(small_vit(3), images(1))
    blocks = replayable_blocks(model, ops, data[0], Gradient())
    passes = schedule(ops, [1.0] * len(ops), dict.fromkeys(blocks, 0.0), 5.0)
    assert len(passes) == 1 and replays(passes) == 6
    reached = {}

    def spy(model, block, calls, group, gradient):
        reached[block.name] = weakref.ref(calls[0].args[0])
        return replay(model, block, calls, group, gradient)

    monkeypatch.setattr(recording, "replay", spy)
    alive, before = [], None
    for seen in recorded_in(passes, model, data, Gradient(), lambda _: None, lambda _: None):
        assert before is None or before() is None
        before = weakref.ref(seen.fisher[0])
        del seen
        alive.append("".join(name[-1] for name, x in reached.items() if x() is not None))
    assert alive == ["", *["0"] * 6, *["1"] * 6, *["2"] * 6, ""]
