"""Recorded operands are the model's own, and recorded gradients estimate the Fisher information."""

import copy

import pytest
import torch
from models import images, small_vit
from torch import nn

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.evaluation import logit_sqnr
from ptq4vit_plugin.integrations.device import available_devices
from ptq4vit_plugin.integrations.nncf import capture, hooks
from ptq4vit_plugin.integrations.nncf.batch import batches, example_of
from ptq4vit_plugin.integrations.nncf.capture import record
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.timm.attention import unfuse_attention
from ptq4vit_plugin.pipeline import plan
from ptq4vit_plugin.record import record_of


def prepared(device="cpu"):
    model = small_vit().to(device)
    unfuse_attention(model)
    x = images(1)[0].to(device)
    return hooks.wrap(model), find_ops(hooks.trace(model, x), len(x))[0]


@pytest.mark.parametrize("device", available_devices())
def test_inputs_are_what_the_modules_see(device):
    model, ops = prepared(device)
    data = batches(images(2))
    seen = {}
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    recorded = record(model, data, ops, None)
    for name, values in seen.items():
        op = recorded[f"{name.replace('.', '/')}/linear/0"]
        assert all(torch.equal(a, b) for a, b in zip(op.inputs[0], values, strict=True))
        assert op.inputs[1] == [] and op.fisher == []
    scores = recorded["blocks/0/attn/matmul/0"]
    assert [tuple(x.shape) for x in scores.inputs[1]] == [(4, 3, 16, 17)] * 2


def exact_fisher(model, name, x):
    """Fisher diagonal at a module's output: one backward pass per class, softmax-weighted."""
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: outputs.append(y))
    logits = model(x.requires_grad_())
    handle.remove()
    log_probabilities = logits.log_softmax(-1)
    total = torch.zeros_like(outputs[0])
    for c in range(logits.shape[1]):
        (grad,) = torch.autograd.grad(log_probabilities[:, c].sum(), outputs[0], retain_graph=True)
        weight = log_probabilities[:, c].exp().reshape(-1, *[1] * (grad.ndim - 1))
        total += weight * grad.square()
    return total.detach()


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
def test_estimate_approaches_the_exact_fisher_as_one_over_root_probes(kind, digits):
    model = copy.deepcopy(digits[0])
    # The trained model is so sure of most digits that hardly a sampled label differs: the images
    # are blended with others, as uncertain as those near a decision.
    x = (digits[2][:8] + digits[2][8:16]) / 2
    name = "blocks.1.mlp.fc1"
    exact = exact_fisher(model, name, x.clone())
    hooks.wrap(model)
    ops = find_ops(hooks.trace(model, x), len(x))[0]
    op = [op for op in ops if op.name == "blocks/1/mlp/fc1/linear/0"]

    def error(probes):
        estimates = [
            record(model, batches([x]), op, Gradient(kind=kind, probes=probes, seed=seed))[
                op[0].name
            ].fisher[0]
            for seed in range(6)
        ]
        squares = [(e - exact).square().sum() / exact.square().sum() for e in estimates]
        return torch.stack(squares).mean().sqrt().item()

    few, many = error(4), error(64)
    assert many < 0.35
    # Sixteen times the probes: a quarter of the error, within the noise of six draws.
    assert 2.6 < few / many < 6


def test_in_place_activation_after_an_op_does_not_change_its_gradient():
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.act, self.head = nn.Linear(6, 8), nn.ReLU(inplace), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.act(self.first(x)))

    def fisher(inplace):
        model = hooks.wrap(Net(inplace))
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        ops = find_ops(hooks.trace(model, x), 5)[0]
        return record(model, batches([x]), ops, Gradient())["first/linear/0"].fisher[0]

    assert torch.equal(fisher(True), fisher(False))
    assert fisher(True).any()


def test_gradient_does_not_depend_on_what_else_is_recorded():
    """Autograd starts at the first op that is recorded, and an image's label is its own."""
    model, ops = prepared()
    everything = record(model, batches(images(2)), ops, Gradient(probes=2))
    for op in ops:
        alone = record(model, batches(images(2)), [op], Gradient(probes=2))[op.name]
        for one, other in zip(alone.fisher, everything[op.name].fisher, strict=True):
            assert torch.equal(one, other)
            assert one.any()


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton", "output"])
def test_gradient_does_not_depend_on_the_batches(kind):
    model, ops = prepared()
    op = next(op for op in ops if op.name == "blocks/0/mlp/fc1/linear/0")
    x = torch.cat(images(2))
    one, other = (
        torch.cat(record(model, batches(x.split(size)), [op], Gradient(kind=kind))[op.name].fisher)
        for size in (8, 3)
    )
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.mean()))
    shares = batches(x.split(3))[1::2]  # as a second process would have them
    part = torch.cat(record(model, shares, [op], Gradient(kind=kind))[op.name].fisher)
    assert torch.equal(part, other[3:6])


def test_ops_with_the_same_input_share_its_copy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.query, self.key = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            y = self.query(x)
            x.mul_(2)  # in place: the next op sees other numbers
            z = self.key(x)
            return torch.cat([y, z, self.query(x)], 1)

    model = hooks.wrap(Net())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    ops = find_ops(hooks.trace(model, x.clone()), 5)[0]
    seen = record(model, batches([x.clone()]), ops, None)
    first, second, third = (seen[op.name].inputs[0][0] for op in ops)
    assert torch.equal(first, x) and torch.equal(second, 2 * x) and third is second


def test_model_is_left_as_it_was():
    model, ops = prepared()
    model.train()
    trainable = [p.requires_grad for p in model.parameters()]
    record(model, batches(images(1)), ops, Gradient())
    assert model.training and [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters()) and list(hooks.hooks(model)) == []


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton", "labels"])
def test_a_batch_that_is_cut_records_the_same(kind, monkeypatch):
    """Labels, sampled or given, stay those of their images."""
    model, ops = prepared()
    whole = batches([(part, torch.arange(4)) for part in images(2)])
    assert capture.in_parts(whole, ops, 4) == whole
    monkeypatch.setattr(capture, "TOGETHER", 3 / 4 * sum(map(capture.recorded_bytes, ops)))
    parts = capture.in_parts(whole, ops, 4)
    assert list(map(len, parts)) == [3, 1, 3, 1]
    seen, expected = (record(model, data, ops, Gradient(kind=kind)) for data in (parts, whole))
    for name, one in expected.items():
        for port, tensors in one.inputs.items():
            for a, b in zip(tensors, pairs(seen[name].inputs[port]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(one.fisher, pairs(seen[name].fisher), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 * float(a.max()))


def pairs(tensors):
    return [torch.cat(tensors[n : n + 2]) for n in range(0, len(tensors), 2)]


class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


def test_gradients_that_the_model_switches_off():
    x = [torch.randn(5, 6)]
    with pytest.raises(ModelError, match="torch.no_grad"):
        ptq.quantize(FrozenBackbone().eval(), x, "ptq4vit")
    ptq.quantize(FrozenBackbone().eval(), x, {"algorithm": "ptq4vit", "metric": "mse"})


class InPlace(nn.Module):
    """What its forward does behind a linear autograd, or NNCF, does not take."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.change = nn.Linear(6, 6), nn.Linear(6, 3), change
        self.factor = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.change(self, self.first(x), x)


def of_a_view(self, y, x):
    a, b = y.chunk(2, -1)
    return self.head(torch.cat([a.add_(b), b], -1))


def of_a_leaf(self, y, x):
    return self.head(y * x.requires_grad_().mul_(2))


def of_what_backward_needs(self, y, x):
    y = y.sigmoid()
    result = self.head(y)
    y.mul_(2)
    return result


@pytest.mark.parametrize("algorithm", ["ptq4vit", "ptq4vit_plus"])
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (of_a_view, "Output 0 of Split is a view and is being modified inplace"),
        (of_a_leaf, "a leaf Variable that requires grad is being used in an in-place operation"),
        (of_what_backward_needs, "one of the variables needed for gradient computation has been"),
    ],
)
def test_an_error_says_that_gradients_were_taken(change, cause, algorithm):
    x = [torch.randn(5, 6)]
    message = (
        rf"^the model cannot give gradients for calibration images of shape \[\(5, 6\)\]: {cause}"
    )
    with pytest.raises(DataError, match=message + ".*'mse'$"):
        ptq.quantize(InPlace(change).eval(), x, algorithm)
    ptq.quantize(InPlace(change).eval(), x, {"algorithm": "ptq4vit", "metric": "mse"})


@pytest.mark.parametrize("verb", [ptq.quantize, plan])
def test_an_error_says_that_the_model_was_traced(verb):
    """NNCF cannot trace a model that returns a parameter."""
    model = InPlace(lambda self, y, x: (self.head(y), self.factor)).eval()
    message = r"^the model cannot be traced by NNCF with .* \[\(5, 6\)\]: None cannot be a node$"
    with pytest.raises(DataError, match=message):
        verb(model, [torch.randn(5, 6)] if verb is ptq.quantize else torch.randn(5, 6), "ptq4vit")


def test_rows_that_the_image_chooses_are_an_input():
    """A table of embeddings is no weight of the linear behind it."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Parameter(torch.randn(20, 16)), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.table[x])

    model, x = Table().eval(), torch.randint(0, 20, (4, 5))
    result = ptq.quantize(model, [x], "ptq4vit")
    operand = record_of(result).ops[0].operands[0]
    assert (operand.source, operand.parameter, operand.bits) == ("activation", None, 8)
    assert 30 < logit_sqnr(model(x), result(x)) < 60


class MergedHeads(nn.Module):
    """`nn.MultiheadAttention` with its weights, which has one dimension for images and heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=True)[0].mean(1))


@pytest.mark.parametrize("algorithm", ["ptq4vit", "ptq4vit_plus"])
def test_calibrated_with_single_images_a_model_takes_any_number(algorithm):
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(1))
    model = MergedHeads().eval()
    together = ptq.quantize(model, [x[:2], x[2:4], x[4:]], algorithm)
    apart = ptq.quantize(model, list(x.split(1)), algorithm)
    with torch.no_grad():
        torch.testing.assert_close(apart(x[:3]), together(x[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [torch.compile, torch.jit.script])
def test_a_child_without_hooks_is_named(wrap):
    model = small_vit(1)
    model.head = wrap(model.head)
    with pytest.raises(ModelError, match="'head' is a scripted or compiled module"):
        ptq.quantize(model, images(1), "ptq4vit")


def test_a_classifiers_angles_are_of_all_images_together():
    """Of one image alone a column of its output is one number: its angle is noise."""
    model, data = small_vit(1), images(1, 8)
    test = torch.cat(images(4, 8, seed=3))
    configs = {"cosine": "base_ptq", "mse": {"algorithm": "base_ptq", "metric": "mse"}}
    with torch.no_grad():
        found = {
            metric: logit_sqnr(model(test), ptq.quantize(model, data, config)(test))
            for metric, config in configs.items()
        }
    assert found["cosine"] > found["mse"] - 3


def test_weights_that_are_not_finite():
    model = small_vit(1)
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="output for the calibration images has NaN"):
        ptq.quantize(model, images(1), "ptq4vit")


def single(*shapes):
    return [torch.full((n, 3, size, size), float(i)) for i, (n, size) in enumerate(shapes)]


@pytest.mark.parametrize(
    ("given", "size"), [([(3, 8), (1, 8)], 3), ([(1, 8), (1, 8)], 2), ([(1, 8), (2, 6)], 2)]
)
def test_a_model_is_traced_with_two_images_at_least(given, size):
    data = batches([(x, torch.arange(len(x))) for x in single(*given)])
    example = example_of(data)
    assert len(example) == len(example.labels) == size and example.args[0].shape[-1] == 8


def test_what_all_images_share_is_not_joined():
    x, mask, factor = torch.randn(2, 1, 3, 8, 8), torch.eye(3), torch.tensor([0.5])
    one, two = batches([(x[0], mask, factor, torch.zeros(1)), (x[1], mask, factor, torch.ones(1))])
    joined = one.joined(two)
    assert torch.equal(joined.args[0], x.flatten(0, 1))
    assert joined.args[1] is mask and joined.args[2] is factor
    assert joined.args[3].tolist() == [0, 1]  # differs, so it is of the image


def test_one_image_is_counted_once():
    result = ptq.quantize(small_vit(1), [images(1)[0][:1]], "ptq4vit")
    assert record_of(result).images == 1
