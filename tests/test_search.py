"""The scale search against a slow, obviously simple loop over candidates in float64."""

import math
from functools import cache

import pytest
import torch

from ptq4vit_plugin.algorithms.search import (
    elimination,
    gemm,
    halving,
    objective,
    problem,
    sampling,
)
from ptq4vit_plugin.algorithms.search.engine import search
from ptq4vit_plugin.algorithms.search.expansion import Expansion
from ptq4vit_plugin.algorithms.search.gemm import Gemm
from ptq4vit_plugin.algorithms.search.losses import Losses
from ptq4vit_plugin.algorithms.search.quadratic import Curvature, Sampled
from ptq4vit_plugin.algorithms.search.rows import look
from ptq4vit_plugin.quantizers.asymmetric import Asymmetric
from ptq4vit_plugin.quantizers.base import Grouping, SearchRange
from ptq4vit_plugin.quantizers.numerator import Numerator
from ptq4vit_plugin.quantizers.twin_gelu import TwinGELU
from ptq4vit_plugin.quantizers.twin_softmax import TwinSoftmax
from ptq4vit_plugin.quantizers.uniform import Uniform

GELU_MINIMUM = -0.16997124254703522
TENSOR = Grouping((1, 1, 1, 1))
SPAN = SearchRange(alpha=0.05, beta=1.2, n=24)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def random_op(kind, bits=6, granularity="channel", seed=0, span=SPAN):
    """A random op of a kind with heavy-tailed operands: gemm, quantizers, search arguments."""
    g = torch.Generator().manual_seed(seed)
    if kind == "matmul":
        op = Gemm(normal(g, 3, 2, 10, 8), normal(g, 3, 2, 8, 9).abs())
        head = Grouping((1, 2, 1, 1)) if granularity == "head" else TENSOR
        a, b = Uniform(bits, head, span), Uniform(bits, head, span)
    elif kind == "attention":
        op = Gemm((4 * normal(g, 3, 2, 10, 9)).softmax(-1), normal(g, 3, 2, 9, 8))
        head = Grouping((1, 2, 1, 1)) if granularity == "head" else TENSOR
        a, b = TwinSoftmax(bits, head, span), Uniform(bits, head, span)
    elif kind == "conv":  # two groups, float activations
        op = Gemm(normal(g, 1, 2, 36, 6), normal(g, 1, 2, 6, 4), normal(g, 1, 2, 1, 4))
        group = Grouping((1, 2, 1, 4)) if granularity == "channel" else TENSOR
        a, b = None, Uniform(bits, group, span)
    else:
        x, w = normal(g, 1, 1, 36, 10), normal(g, 1, 1, 10, 12)
        x[..., 3] *= 6
        w[..., 5] *= 3
        groups = {
            "channel": Grouping((1, 1, 1, 12)),
            "row_blocks": Grouping((1, 1, 1, 12), blocks=3),
            "tensor": TENSOR,
        }
        a, b = Uniform(bits, TENSOR, span), Uniform(bits, groups[granularity], span)
        if kind == "gelu":
            x = torch.nn.functional.gelu(x)
            a = TwinGELU(bits, TENSOR, span, minimum=GELU_MINIMUM)
        op = Gemm(x, w, normal(g, 12))
    op.fisher = (op.a @ op.b).normal_(generator=g).square()
    for quantizer, x in ((a, op.a), (b, op.b)):
        if quantizer is not None:
            quantizer.observe(x)
    matmul = kind in ("matmul", "attention")
    return op, a, b, {"order": ("a", "b") if matmul else ("b", "a"), "images": 1 if matmul else 3}


def simple_loss(op, a, b, index, metric, operand, images):
    """Loss of every group of `operand` in float64, written out: a dict of group -> number."""
    wide_a, wide_b = op.a.double(), op.b.double()
    true = wide_a @ wide_b
    if a is not None:
        wide_a = a.fake_quantize(op.a, index["a"]).double()
    if b is not None:
        wide_b = b.fake_quantize(op.b, index["b"]).double()
    out = wide_a @ wide_b
    if op.bias is not None:
        true, out = true + op.bias.double(), out + op.bias.double()
    grouping = {"a": a, "b": b}[operand].grouping
    _, heads, _, columns = true.shape
    per_channel = operand == "b" and grouping.shape[3] > 1 and not grouping.blocks
    if metric in ("cosine", "pearson"):

        def angle(u, v):
            if metric == "pearson":
                u, v = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
            return 1 - (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))

        if per_channel:
            true, out = (t.unflatten(2, (images, -1)).transpose(3, 4) for t in (true, out))
            loss = angle(true, out).sum((0, 2))  # [H, O]
        else:
            blocks = max(1, grouping.blocks)
            true, out = (t.unflatten(3, (blocks, -1)) for t in (true, out))
            loss = angle(true, out).sum((0, 2))  # [H, blocks]
            loss = loss.repeat_interleave(columns // blocks, 1)
    else:
        error = {
            "hessian": lambda: op.fisher.double() * (true - out).square(),
            "mse": lambda: (true - out).square(),
            "l1": lambda: (true - out).abs(),
            "linear_weighted_l2": lambda: true.abs() * (true - out).square(),
            "square_weighted_l2": lambda: (true * (true - out)).square(),
        }[metric]()
        loss = error.sum((0, 2))
    groups = {}
    for h in range(heads):
        for o in range(columns):
            where_h = h if grouping.shape[1] > 1 else 0
            where_o = o if grouping.shape[3] > 1 else 0
            if grouping.blocks:
                where_o = o * grouping.blocks // columns
            key = (where_h, where_o)
            groups[key] = groups.get(key, 0.0) + float(loss[h, o])
    return groups


def simple_search(op, a, b, metric, rounds, order, images):
    """Alternate over all candidates; every group takes the first best."""
    quantizers = {"a": a, "b": b}
    index = {
        k: None if q is None else torch.full(q.grouping.shape, q.n) for k, q in quantizers.items()
    }
    for _ in range(rounds):
        for operand in order:
            quantizer = quantizers[operand]
            if quantizer is None:
                continue
            best = {}
            for i in range(quantizer.n):
                trial = {**index, operand: torch.full(quantizer.grouping.shape, i)}
                losses = simple_loss(op, a, b, trial, metric, operand, images)
                for group, loss in losses.items():
                    if group not in best or loss < best[group][0]:
                        best[group] = (loss, i)
            chosen = index[operand].clone()
            shape = quantizer.grouping.shape
            for h in range(shape[1]):
                for o in range(shape[3]):
                    blocks = quantizer.grouping.blocks
                    chosen[0, h, 0, o] = best[(h, o * blocks // shape[3] if blocks else o)][1]
            index[operand] = chosen
    return index


KINDS = [
    ("linear", "channel"),
    ("linear", "row_blocks"),
    ("linear", "tensor"),
    ("gelu", "channel"),
    ("matmul", "head"),
    ("matmul", "tensor"),
    ("attention", "head"),
    ("conv", "channel"),
]


@pytest.mark.parametrize("metric", objective.METRICS)
@pytest.mark.parametrize("kind, granularity", KINDS)
def test_same_choice_as_a_simple_loop(kind, granularity, metric):
    op, a, b, arguments = random_op(kind, granularity=granularity)
    result = search(op, a, b, metric=metric, rounds=2, **arguments)
    expected = simple_search(op, a, b, metric, 2, **arguments)
    for operand, index in (("a", result.a_index), ("b", result.b_index)):
        if expected[operand] is None:
            assert index is None
        else:
            assert torch.equal(index, expected[operand]), operand
    final = {"a": result.a_index, "b": result.b_index}
    whole = simple_loss(op, a, b, final, metric, "b", arguments["images"])
    scale = 1
    if metric in ("cosine", "pearson") and not (b.grouping.shape[3] > 1 and not b.grouping.blocks):
        scale = op.b.shape[3] // max(1, b.grouping.blocks)  # the loop counts a row once per column
    assert result.after == pytest.approx(sum(whole.values()) / scale, rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("kind", ["linear", "matmul", "conv"])
@pytest.mark.parametrize("metric", ["hessian", "cosine", "l1"])
def test_chunk_size_does_not_matter(kind, metric, chunk, monkeypatch):
    op, a, b, arguments = random_op(kind)
    expected = search(op, a, b, metric=metric, **arguments)
    monkeypatch.setattr(problem, "CHUNK", chunk)
    monkeypatch.setattr(problem, "BATCHED_CHUNK", chunk)
    result = search(op, a, b, metric=metric, **arguments)
    assert torch.equal(result.b_index, expected.b_index)
    assert result.after == pytest.approx(expected.after, rel=1e-5)


def test_batched_images_with_one_weight_are_rows():
    op, a, b, arguments = random_op("linear")
    batched = Gemm(
        op.a.view(3, 12, 1, 10).transpose(1, 2),
        op.b,
        op.bias,
        op.fisher.view(3, 12, 1, 12).transpose(1, 2),
    )
    for metric in ("hessian", "cosine"):
        expected = search(op, a, b, metric=metric, **arguments)
        result = search(batched, a, b, metric=metric, order=("b", "a"))
        assert torch.equal(result.b_index, expected.b_index)
        assert torch.equal(result.a_index, expected.a_index)


@pytest.mark.parametrize("strategy", ["exhaustive", "fast"])
@pytest.mark.parametrize("kind", ["linear", "matmul", "attention", "conv"])
def test_without_a_gradient_the_start_stays(kind, strategy):
    op, a, b, arguments = random_op(kind)
    op.fisher.zero_()
    result = search(op, a, b, strategy=strategy, **arguments)
    for quantizer, index in ((a, result.a_index), (b, result.b_index)):
        if quantizer is not None:
            assert (index == quantizer.n).all()
    assert result.before == result.after == 0


@pytest.mark.parametrize("strategy", ["exhaustive", "fast"])
def test_a_group_without_a_gradient_keeps_its_start(strategy):
    op, a, b, arguments = random_op("linear")
    op.fisher[..., 4] = 0
    result = search(op, a, b, strategy=strategy, **arguments)
    moved = result.b_index.flatten() != b.n
    assert moved.tolist() == [o != 4 for o in range(12)]


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_rows_without_a_gradient_change_nothing(kind):
    op, a, b, arguments = random_op(kind)
    op.fisher[:, :, 2::3] = 0
    if kind == "matmul":
        op.fisher[1] = 0
    result = search(op, a, b, **arguments)
    expected = simple_search(op, a, b, "hessian", 3, **arguments)
    assert torch.equal(result.a_index, expected["a"])
    assert torch.equal(result.b_index, expected["b"])


def test_nothing_is_evaluated_twice(monkeypatch):
    op, a, b, arguments = random_op("linear")
    seen = []
    loss, losses = problem.Problem.loss, problem.Problem.losses

    def see(a_index, b_index):
        seen.append((tuple(a_index.flatten().tolist()), tuple(b_index.flatten().tolist())))

    def one(self, a_index, b_index, searched, view):
        see(a_index, b_index)
        return loss(self, a_index, b_index, searched, view)

    def several(self, indices, fixed, searched, view):
        for index in indices:
            see(*((index, fixed) if searched == "a" else (fixed, index)))
        return losses(self, indices, fixed, searched, view)

    monkeypatch.setattr(problem.Problem, "loss", one)
    monkeypatch.setattr(problem.Problem, "losses", several)
    few = search(op, a, b, rounds=3, **arguments)
    assert len(seen) == len(set(seen))
    assert few.evaluations == len(seen)
    many = search(op, a, b, rounds=50, **arguments)
    assert many.evaluations < 20 * SPAN.n  # a fixed point was reached
    more = search(op, a, b, rounds=51, **arguments)
    assert torch.equal(many.a_index, more.a_index) and many.evaluations == more.evaluations


def test_float_operands_are_left_alone():
    op, a, _, arguments = random_op("linear")
    result = search(op, a, None, **arguments)
    assert result.b_index is None
    assert torch.equal(result.a_index, simple_search(op, a, None, "hessian", 1, **arguments)["a"])
    nothing = search(op, None, None, **arguments)
    assert nothing.a_index is None and nothing.before == nothing.after


def codes(generator, *shape):
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("m, k, n", [(32, 64, 16), (5, 7, 3), (17, 9, 8), (1, 1, 1)])
def test_int8_product_is_exact(m, k, n, padded):
    g = torch.Generator().manual_seed(0)
    left, right = codes(g, m, k), codes(g, k, n)
    got = gemm.int_matmul(left, right, padded=padded)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), left.long() @ right.long())


@pytest.mark.parametrize("heads", [1, 3])
def test_integer_product_of_codes_less_a_zero_point_is_exact(heads):
    g = torch.Generator().manual_seed(2)
    zero = torch.tensor([0, 1, 127, 128, 200, 255]).view(-1, 1)  # another one for every row
    left = torch.randint(0, 256, (1, heads, 6, 300), generator=g).sub(zero).to(torch.int16)
    left[..., :2] = torch.cat([-zero, 255 - zero], 1)  # all of a row's range
    right = codes(g, 1, heads, 300, 7)
    got = gemm.product([(left, None)], [(right, None)])
    assert torch.equal(got.long(), left.long() @ right.long())


@pytest.mark.parametrize("heads", [1, 3])
def test_integer_product_of_twins_equals_float(heads):
    g = torch.Generator().manual_seed(1)
    scales = [torch.tensor(0.5).view(1, 1, 1, 1), torch.full((1, 1, 1, 12), 0.25)]
    a = [(codes(g, 1, heads, 20, 8), scales[0]), (codes(g, 1, heads, 20, 8), scales[0] / 4)]
    b = [(codes(g, 1, heads, 8, 12), scales[1])]
    # Powers of two: float32 is exact, so both paths have to agree bit for bit.
    dense = sum(c.float() * s for c, s in a) @ (b[0][0].float() * b[0][1])
    assert torch.equal(gemm.product(a, b), dense)
    as_float = [(c.float(), s) for c, s in a], [(c.float(), s) for c, s in b]
    assert torch.equal(gemm.product(*as_float), dense)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind, granularity", [("linear", "channel"), ("gelu", "tensor")])
@pytest.mark.parametrize("metric", ["hessian", "cosine"])
def test_integer_path_chooses_the_same(kind, granularity, metric, bits, monkeypatch):
    op, a, b, arguments = random_op(kind, bits, granularity)
    results = []
    for hardware in (False, True):
        monkeypatch.setattr(problem, "has_int8_dot", lambda device, yes=hardware: yes)
        results.append(search(op, a, b, metric=metric, **arguments))
    assert torch.equal(results[0].a_index, results[1].a_index)
    assert torch.equal(results[0].b_index, results[1].b_index)
    assert results[0].after == pytest.approx(results[1].after, rel=1e-4)


def structured(kind, bits, seed, n=100):
    """An op with what real ones have: few dominant images and tokens, outlier channels."""
    g = torch.Generator().manual_seed(seed)
    span = SearchRange(0.01, 1.2, n)
    if kind in ("matmul", "attention"):
        op = Gemm(normal(g, 16, 3, 40, 16), normal(g, 16, 3, 16, 40))
        a, b = Uniform(bits, TENSOR, span), Uniform(bits, TENSOR, span)
        if kind == "attention":
            op = Gemm((2 * op.a @ op.b / 4).softmax(-1), normal(g, 16, 3, 40, 16))
            a = TwinSoftmax(bits, TENSOR, span)
        lead = (16, 1, 40)
        order = ("a", "b")
    else:
        tokens, basis = 32 * 197, normal(g, 24, 64)
        x = normal(g, tokens, 24) @ basis + normal(g, tokens, 64)
        x = x * torch.exp(0.7 * normal(g, 64))
        a, b = Uniform(bits, TENSOR, span), Uniform(bits, Grouping((1, 1, 1, 96)), span)
        if kind == "gelu":
            x, a = torch.nn.functional.gelu(x), TwinGELU(bits, TENSOR, span, minimum=GELU_MINIMUM)
        op = Gemm(x[None, None], normal(g, 1, 1, 64, 96), normal(g, 96))
        lead = (1, 1, tokens)
        order = ("b", "a")
    out = op.a @ op.b
    op.fisher = out.normal_(generator=g).square() * torch.exp(2 * normal(g, *lead))[..., None]
    a.observe(op.a)
    b.observe(op.b)
    return op, a, b, order


@cache
def exhausted(kind, bits):
    """What an exhaustive search finds: seconds, and several tests compare with it."""
    op, a, b, order = structured(kind, bits, seed=bits)
    return search(op, a, b, order=order, strategy="exhaustive")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "gelu"])
def test_fast_chooses_what_exhaustive_chooses_where_few_rows_matter(kind, bits):
    op, a, b, order = structured(kind, bits, seed=bits)
    best = exhausted(kind, bits)
    fast = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(fast.a_index, best.a_index) and torch.equal(fast.b_index, best.b_index)
    assert fast.after == pytest.approx(best.after, rel=1e-5)
    assert fast.evaluations < best.evaluations / 4
    assert {name: len(curve) for name, curve in fast.curves.items()} == {"a": a.n, "b": b.n}
    assert all(0 < min(fast.curves[name]) < max(fast.curves[name]) for name in "ab")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "kind, error",
    [("linear", 0.1), ("linear", 0), ("gelu", 0.1), ("gelu", 0), ("matmul", 0), ("attention", 0)],
)
def test_fast_finds_what_exhaustive_finds(kind, error, bits, monkeypatch):
    monkeypatch.setattr(elimination, "AHEAD", 0)  # samples decide
    monkeypatch.setattr(halving, "ERROR", error)  # for weights, a curvature or samples alone
    op, a, b, order = structured(kind, bits, seed=bits)
    best = exhausted(kind, bits)
    fast = search(op, a, b, order=order, strategy="fast")
    # Here every element's gradient is independent, which is harder than real ops.
    assert fast.after <= best.after * 1.001
    # The matmuls are so small that the least sample is a good part of them.
    assert fast.evaluations < best.evaluations / (6 if kind in ("linear", "gelu") else 1)
    again = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(fast.a_index, again.a_index) and torch.equal(fast.b_index, again.b_index)


def test_fast_tries_all_candidates_again_when_the_other_scale_has_moved(monkeypatch):
    monkeypatch.setattr(elimination, "AHEAD", 0)
    # The best activation scale of the last round is not among the eight best of the first.
    op, a, b, order = structured("gelu", 4, seed=23)
    best = search(op, a, b, order=order, strategy="exhaustive")
    fast = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(fast.a_index, best.a_index)
    assert fast.after <= best.after * 1.001


@pytest.mark.parametrize("strategy", ["fast", "exhaustive"])
@pytest.mark.parametrize("metric", ["hessian", "mse"])
def test_as_many_heads_as_columns_are_still_heads(strategy, metric):
    """As in Swin-B's last stage, 32 heads of 32: each ends as it does in a product of its own."""
    heads, g = 8, torch.Generator().manual_seed(0)
    a, b = normal(g, 32, heads, 64, 16), normal(g, 32, heads, 16, heads)
    fisher = normal(g, 32, heads, 64, heads).square()
    fisher *= torch.exp(2 * normal(g, 32, heads, 64, 1))

    def searched(some):
        some = list(some)
        op = Gemm(a[:, some], b[:, some], None, fisher[:, some])
        left, right = (Uniform(8, Grouping((1, len(some), 1, 1)), SearchRange()) for _ in "ab")
        left.observe(op.a)
        right.observe(op.b)
        return search(op, left, right, metric=metric, strategy=strategy)

    together = searched(range(heads))
    for head in range(heads):
        alone = searched([head])
        for found, expected in (
            (together.a_index, alone.a_index),
            (together.b_index, alone.b_index),
        ):
            assert int(found[0, head]) == int(expected)


@pytest.mark.parametrize("quantized, rounds", [(False, 3), (True, 1)])
def test_fast_is_rough_only_with_what_it_searches_again(quantized, rounds, monkeypatch):
    monkeypatch.setattr(elimination, "AHEAD", 0)
    op, a, b, order = structured("linear", 4, seed=4)
    a = a if quantized else None
    best = search(op, a, b, order=order, rounds=rounds, strategy="exhaustive")
    for schedule in ("ROUGH_SCHEDULE", "ROUGH_CURVED_SCHEDULE"):
        monkeypatch.setattr(halving, schedule, None)  # to look at it is an error
    for error in (0.1, 0):
        monkeypatch.setattr(halving, "ERROR", error)
        fast = search(op, a, b, order=order, rounds=rounds, strategy="fast")
        assert fast.after <= best.after * 1.001


def even(bits, uneven=0.0, rows=4096, inputs=256):
    """A linear whose rows matter alike, or less so."""
    g = torch.Generator().manual_seed(8)
    op = Gemm(normal(g, 1, 1, rows, inputs), normal(g, 1, 1, inputs, 16))
    op.fisher = torch.exp(uneven * normal(g, 1, 1, rows, 1)) * normal(g, 1, 1, rows, 16).square()
    a = Uniform(bits, TENSOR, SearchRange())
    b = Uniform(bits, Grouping((1, 1, 1, 16)), SearchRange())
    a.observe(op.a)
    b.observe(op.b)
    return op, a, b


@pytest.mark.parametrize("bits", [4, 8])
def test_where_rows_matter_alike_a_descent_finds_the_least_loss(bits, monkeypatch):
    found = []
    original = halving.Halving._descended

    def spy(self, operand, start, turn):
        before, choice = self.losses.evaluations, original(self, operand, start, turn)
        found.append((int(choice), self.losses.evaluations - before))
        return choice

    monkeypatch.setattr(halving.Halving, "_descended", spy)
    op, a, b = even(bits)
    fast, best = (search(op, a, b, strategy=s) for s in ("fast", "exhaustive"))
    assert torch.equal(fast.a_index, best.a_index) and int(fast.a_index) == found[-1][0]
    assert len(found) > 1 and all(evaluations <= 7 for _, evaluations in found)
    assert fast.after <= best.after * 1.0005
    found.clear()
    # Where few rows or values decide, the loss has several minima.
    search(*even(bits, uneven=2.0), strategy="fast")
    search(*even(bits, rows=1000), strategy="fast")
    search(*even(bits, inputs=24), strategy="fast")
    assert found == []


@pytest.mark.parametrize("off", [-30, -3, 0, 3])
def test_a_descent_goes_as_far_as_it_must(off):
    op, a, b = even(6)
    losses = Losses(problem.problem_of(op, {"a": a, "b": b}, "hessian", 1), lambda x: x)
    every = losses.candidates("a")
    curve = [float(losses.at(losses.problem, "a", index).sum()) for index in every]
    least = curve.index(min(curve))
    start = every[least + off]
    search_ = halving.Halving(losses, look(losses)[1])
    assert int(search_._descended("a", start, 0)) == least
    # The present choice stays where it loses less than the minimum that is found.
    losses._known[losses.key("a", losses.chosen("a"), losses.problem)] = torch.zeros(1, 1, 1, 1)
    assert int(search_._descended("a", start, 1)) == a.n


@pytest.mark.parametrize("metric", ["hessian", "mse", "l1", "linear_weighted_l2"])
@pytest.mark.parametrize("granularity", ["channel", "row_blocks", "tensor"])
@pytest.mark.parametrize("kind", ["linear", "gelu", "zero_point", "heads", "images", "attention"])
@pytest.mark.parametrize("searched", ["a", "b"])
@pytest.mark.parametrize("hardware", [False, True])
def test_choices_evaluated_together_lose_what_each_loses(
    hardware, searched, kind, granularity, metric, monkeypatch
):
    monkeypatch.setattr(problem, "has_int8_dot", lambda device: hardware)
    if kind in ("heads", "images", "attention"):
        shape = "tensor" if granularity == "tensor" else "head"
        op, a, b, _ = random_op("attention" if kind == "attention" else "matmul", 8, shape)
        if kind == "heads":  # of one image
            op = Gemm(op.a[:1], op.b[:1], None, op.fisher[:1])
    else:
        op, a, b, _ = random_op("gelu" if kind == "gelu" else "linear", 8, granularity)
    if kind == "zero_point":
        a = Asymmetric(8, TENSOR, SPAN)
        a.observe(op.a)
    losses = Losses(problem.problem_of(op, {"a": a, "b": b}, metric, 1), lambda x: x)
    largest = max(x.numel() for x in (op.a if searched == "a" else op.b, losses.problem.output))
    batched = len(op.a) > 1
    monkeypatch.setattr(problem, "BATCHED_CHUNK" if batched else "CHUNK", 5 * largest)
    assert losses.problem.together(searched) == 5
    quantizer, fixed = (a, "b") if searched == "a" else (b, "a")
    losses.choice[fixed] = torch.full_like(losses.chosen(fixed), 7)
    shape = quantizer.grouping.shape
    indices = torch.tensor([2, 9, 9, 16, 3, quantizer.n, 11, 12])  # seven of them: five and two
    indices = indices.view(-1, 1, 1, 1, 1).repeat(1, *shape)
    found = losses.at_each(losses.problem, searched, indices)
    assert losses.evaluations == 7
    for index, loss in zip(indices, found, strict=True):
        choice = {searched: index, fixed: losses.choice[fixed]}
        expected = simple_loss(op, a, b, choice, metric, searched, 1)
        sums = quantizer.grouping.sum(loss)
        width = shape[3] // max(1, quantizer.grouping.blocks)
        for (head, column), one in expected.items():
            place = column * width if quantizer.grouping.blocks else column
            assert float(sums[0, head, 0, place]) == pytest.approx(one, rel=1e-4)
    which = torch.zeros(quantizer.n + 1, *shape, dtype=torch.bool)
    which[indices.flatten()] = True
    again = losses.of(losses.problem, searched, which)
    assert torch.allclose(again[indices[:, 0, 0, 0, 0]], found, rtol=1e-6)


@pytest.mark.parametrize("searched", ["a", "b"])
def test_processes_with_different_numbers_of_rows_sum_the_same_tensors(searched, monkeypatch):
    monkeypatch.setattr(problem, "CHUNK", 500)
    op, a, b, _ = random_op("linear")
    together, summed = [], []
    for rows in (36, 9):
        shapes = []

        def reduce(x, shapes=shapes):
            shapes.append(x.shape)
            return x

        share = Gemm(op.a[:, :, :rows], op.b, op.bias, op.fisher[:, :, :rows])
        whole = problem.problem_of(share, {"a": a, "b": b}, "hessian", 1)
        losses = Losses(whole, reduce)
        together.append(whole.together(searched))
        which = torch.zeros(a.n, *losses.chosen(searched).shape, dtype=torch.bool)
        which[::3] = True
        losses.of(whole, searched, which)
        losses.at_each(whole, searched, losses.candidates(searched)[:8])
        losses.at_each(whole, searched, losses.candidates(searched)[5:8])  # known
        summed.append(shapes)
    assert together[0] != together[1]
    assert summed[0] == summed[1] and len(summed[0]) == 2


@pytest.mark.parametrize("metric", ["hessian", "mse", "linear_weighted_l2"])
@pytest.mark.parametrize("kind", ["linear", "gelu", "conv"])
@pytest.mark.parametrize("hardware", [False, True])
def test_an_expansion_knows_the_loss_where_it_has_all_rows(hardware, kind, metric, monkeypatch):
    monkeypatch.setattr(problem, "has_int8_dot", lambda device: hardware)
    op, a, b, _ = random_op(kind)
    everything = problem.problem_of(op, {"a": a, "b": b}, metric, 3)
    a_index = None if a is None else torch.full((1, 1, 1, 1), 17)
    expansion = Expansion(everything, a_index)
    shape = b.grouping.shape
    candidates = torch.stack([torch.full(shape, i) for i in (2, 9, 16, b.n)])
    found = expansion.losses(Sampled(everything, a_index), candidates)
    for index, losses in zip(candidates, found, strict=True):
        expected = simple_loss(op, a, b, {"a": a_index, "b": index}, metric, "b", 3)
        assert losses.shape == shape
        for (head, column), loss in expected.items():
            assert float(losses[0, head, 0, column]) == pytest.approx(loss, rel=1e-4)


def rows_of(everything, choice, groups):
    """What rows lose, and their gradient's energy."""
    return [everything.row_loss(*choice, groups), everything.row_energy(groups)]


@pytest.mark.parametrize("metric", ["hessian", "mse", "l1", "square_weighted_l2"])
@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_what_rows_lose_is_what_their_elements_do(kind, metric):
    op, a, b, _ = structured(kind, 6, seed=2)
    everything = problem.problem_of(op, {"a": a, "b": b}, metric, 1)
    choice = torch.full(a.grouping.shape, a.n // 2), torch.full(b.grouping.shape, b.n // 2)
    groups = everything.output.shape[3] // 8
    loss, energy = rows_of(everything, choice, groups)
    error = a.fake_quantize(op.a, choice[0]) @ b.fake_quantize(op.b, choice[1]) - op.a @ op.b
    output = op.a @ op.b + (0 if op.bias is None else op.bias)
    size = {"hessian": op.fisher, "square_weighted_l2": output.square()}.get(
        metric, torch.ones_like(error)
    )
    element = error.abs() if metric == "l1" else size * error.square()
    for found, expected in ((loss, element), (energy, size)):
        blocks = torch.stack([part.sum(3) for part in expected.double().split(8, 3)], 3)
        torch.testing.assert_close(found, blocks, rtol=1e-4, atol=1e-6 * float(blocks.max()))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_an_expansion_tells_candidates_apart_better_than_a_sample(in_blocks, bits):
    op, a, b, _ = structured("linear", bits, seed=3)
    everything = problem.problem_of(op, {"a": a, "b": b}, "hessian", 1)
    a_index = torch.full((1, 1, 1, 1), a.n)
    rows = rows_of(everything, (a_index, torch.full((1, 1, 1, 96), b.n)), groups=2)
    sample = everything.sample(394, rows, in_blocks)
    candidates = torch.arange(60, 100)[:, None, None, None, None].expand(-1, 1, 1, 1, 96)
    view = objective.View("element")
    whole, plain = (
        torch.stack([part.loss(a_index, index, "b", view) for index in candidates])
        for part in (everything, sample)
    )
    expansion = Expansion(everything, a_index)
    expanded = expansion.losses(Sampled(sample, a_index), candidates)
    curved = expansion.losses(Curvature(everything, a_index), candidates)
    close = whole < 1.3 * whole.amin(0)  # those that are hard to tell apart
    noise = []
    for estimate in (plain, expanded, curved):
        error = (estimate - whole) / whole.amin(0)
        error -= (error * close).sum(0) / close.sum(0)
        noise.append(float(error[close].square().mean().sqrt()))
    assert noise[1] < 0.1 and noise[1] < noise[0] / 1.5
    # 394 rows are sampled; a candidate takes the curvature 64 + 64 rows' work.
    assert noise[2] < noise[1] / 1.5


def of_errors(p, errors, a):
    """The quadratic part, element by element, in float64."""
    weight = torch.ones_like(p.output) if p.weight is None else p.weight
    made = [(a.double() @ error.double() * weight.double()).square() for error in errors]
    return torch.stack([x.sum(2, keepdim=True) for x in made])


@pytest.mark.parametrize("metric", ["hessian", "mse"])
@pytest.mark.parametrize("heads, columns", [(1, 40), (1, 96), (3, 16)])
def test_a_curvature_is_exact_where_columns_weigh_rows_alike(heads, columns, metric):
    g = torch.Generator().manual_seed(5)
    op = Gemm(normal(g, 1, heads, 700, 16), normal(g, 1, heads, 16, columns))
    blocks = torch.arange(columns) // 16  # every block of so many columns has rows of its own
    alike = torch.exp(normal(g, 1, heads, 700, 6))[..., blocks]
    op.fisher = alike * torch.exp(normal(g, 1, heads, 1, columns))
    a = Uniform(5, TENSOR, SPAN)
    a.observe(op.a)
    everything = problem.problem_of(op, {"a": a, "b": None}, metric, 1)
    index = torch.full((1, 1, 1, 1), 20)
    errors = [normal(g, 1, heads, 16, columns) for _ in range(3)]
    expected = of_errors(everything, errors, a.fake_quantize(op.a, index))
    found = Curvature(everything, index)(errors)
    assert found.shape == (3, 1, heads, 1, columns)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    variance, whole = Curvature.uncertainty(everything).tolist()
    assert 0 <= variance < (1e-5 * whole) ** 2


@pytest.mark.parametrize("share, alike", [(1.0, True), (0.3, True), (0.01, False)])
def test_a_curvature_knows_how_exact_it_is(share, alike):
    g = torch.Generator().manual_seed(8)
    op = Gemm(normal(g, 1, 1, 4000, 32), normal(g, 1, 1, 32, 64))
    # Every column has its own share of the rows.
    op.fisher = normal(g, 1, 1, 4000, 64).square() * (torch.rand(4000, 64, generator=g) < share)
    a, b = Uniform(6, TENSOR, SPAN), Uniform(6, Grouping((1, 1, 1, 64)), SPAN)
    a.observe(op.a)
    b.observe(op.b)
    everything = problem.problem_of(op, {"a": None, "b": b}, "hessian", 1)
    errors = [normal(g, 1, 1, 32, 64) for _ in range(40)]
    exact = of_errors(everything, errors, everything.a)
    wrong = (Curvature(everything, None)(errors) - exact).square().mean(0).sqrt().sum()
    told = halving.Halving(Losses(everything, lambda x: x), None)
    assert 0.5 < told._error / float(wrong / exact.mean(0).sum()) < 1.4
    schedule = told._schedule("b", again=False)
    assert schedule == (halving.CURVED_SCHEDULE if alike else halving.EXPANDED_SCHEDULE)


def test_a_curvature_that_costs_too_much_is_not_made():
    g = torch.Generator().manual_seed(9)
    for rows, inner, columns in ((4000, 65, 32), (4000, 1001, 600)):
        op = Gemm(normal(g, 1, 1, rows, inner), normal(g, 1, 1, inner, columns))
        op.fisher = torch.ones(1, 1, rows, columns)
        b = Uniform(6, Grouping((1, 1, 1, columns)), SPAN)
        b.observe(op.b)
        everything = problem.problem_of(op, {"a": None, "b": b}, "hessian", 1)
        told = halving.Halving(Losses(everything, lambda x: x), None)
        assert told._schedule("b", again=False) == halving.EXPANDED_SCHEDULE


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_fast_with_fewer_candidates_than_survive_is_exhaustive(kind, monkeypatch):
    monkeypatch.setattr(elimination, "AHEAD", 0)
    op, a, b, order = structured(kind, 6, seed=2, n=3)
    best = search(op, a, b, order=order, strategy="exhaustive")
    fast = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(fast.a_index, best.a_index) and torch.equal(fast.b_index, best.b_index)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_sampled_losses_estimate_the_whole(in_blocks):
    op, a, b, order = structured("linear", 6, seed=3)
    everything = problem.problem_of(op, {"a": a, "b": b}, "hessian", 1)
    start = torch.full((1, 1, 1, 1), a.n), torch.full((1, 1, 1, 96), b.n)
    sample = everything.sample(788, rows_of(everything, start, groups=3), in_blocks)
    assert sample.cost == pytest.approx(1 / 8, rel=0.01)
    elsewhere = torch.full((1, 1, 1, 1), 60), torch.full((1, 1, 1, 96), 70)
    view = objective.View("element")
    whole = float(everything.loss(*elsewhere, "a", view).sum())
    assert float(sample.loss(*elsewhere, "b", view).sum()) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("columns", [10, 40, 96, 100, 1000])
def test_samples_of_any_number_of_columns(columns):
    g = torch.Generator().manual_seed(6)
    op = Gemm(normal(g, 1, 1, 600, 24), normal(g, 1, 1, 24, columns))
    op.fisher = torch.exp(2 * normal(g, 1, 1, 600, columns))
    a, b = Uniform(6, TENSOR, SPAN), Uniform(6, Grouping((1, 1, 1, columns)), SPAN)
    a.observe(op.a)
    b.observe(op.b)
    results = {s: search(op, a, b, strategy=s) for s in ("fast", "exhaustive")}
    assert results["fast"].after <= 1.02 * results["exhaustive"].after


@pytest.mark.parametrize("columns", [[3], [0, 2, 95], list(range(0, 96, 2))])
def test_some_columns_lose_what_they_lose_in_the_whole(columns):
    op, a, b, _ = structured("linear", 6, seed=3)
    everything = problem.problem_of(op, {"a": a, "b": b}, "hessian", 1)
    chosen = torch.tensor(columns)
    part = everything.of_columns(chosen)
    index_a, index_b = torch.full((1, 1, 1, 1), 60), torch.arange(96).view(1, 1, 1, 96)
    view = objective.View("element")
    whole = everything.loss(index_a, index_b, "a", view)
    found = part.loss(index_a, index_b[..., chosen], "a", view)
    torch.testing.assert_close(found, whole[..., chosen], rtol=1e-5, atol=0)
    assert part.cost == pytest.approx(everything.cost * len(columns) / 96)


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("known", [False, True])
def test_elimination_finds_the_least_sum(spread, known):
    g = torch.Generator().manual_seed(5)
    candidates, rows, groups = 40, 512, 7
    size = torch.exp(spread * normal(g, rows)).sort(descending=True).values
    kind = 1 + torch.linspace(-1, 2, candidates)[:, None, None] ** 2
    losses = (kind * size[:, None] * normal(g, candidates, rows, groups).square()).double()
    parts = elimination.pieces(rows, 64, 7)
    assert sum(len(range(rows)[part]) for part in parts) == rows and parts[0].start == 0
    shape = (candidates, 1, 1, 1, groups)
    evaluated = torch.zeros(shape)

    def evaluate(piece, which):
        evaluated.add_(which * losses[0, parts[piece], 0].numel() / rows)
        found = losses[:, parts[piece]].sum(1).view(shape)
        return torch.where(which, found, 7.0)

    of = torch.arange(groups)  # candidate i of group i is known
    its = torch.zeros(candidates, groups, dtype=torch.bool)
    its[of, of] = True
    on_pieces = torch.stack([losses[:, part].sum(1)[of, of] for part in parts])
    best, bounds, of_best = elimination.best_candidates(
        len(parts),
        evaluate,
        lambda x: x,
        torch.ones(shape, dtype=torch.bool),
        (its.view(shape), on_pieces.view(-1, 1, 1, 1, groups)) if known else None,
    )
    evaluated = evaluated.view(candidates, groups)
    whole = losses.sum(1)
    assert torch.equal(best.flatten(), whole.argmin(0))
    torch.testing.assert_close(of_best.sum(0).flatten(), whole.amin(0))
    assert (bounds.view(candidates, groups) <= whole * (1 + 1e-12)).all()
    assert evaluated.max() <= 1 + 1e-6 and (not known or evaluated[of, of].max() == 0)
    # The first piece of every candidate, and the best one: more only where rows weigh alike.
    assert evaluated.sum(0).mean() < candidates * (0.9 if spread == 0 else 0.35)


@pytest.mark.parametrize("count, first, number", [(8, 1, 4), (9, 1, 4), (2048, 1, 4), (128, 64, 7)])
def test_pieces_are_all_rows_and_none_is_empty(count, first, number):
    parts = elimination.pieces(count, first, number)
    rows = [row for part in parts for row in range(count)[part]]
    assert rows == list(range(count)) and len(parts) == number
    assert all(part.start < part.stop for part in parts)


def few_rows(kind, bits, granularity, seed, images=16):
    """A product of attention of which two rows of every image decide: as a class token's does."""
    op, a, b, order = structured(kind, bits, seed)
    op = Gemm(op.a[:images], op.b[:images], None, op.fisher[:images])
    op.fisher[:, :, 2:] *= 1e-12
    if granularity == "head":
        a, b = (type(q)(bits, Grouping((1, 3, 1, 1)), q.search) for q in (a, b))
        a.observe(op.a)
        b.observe(op.b)
    return op, a, b, order


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", ["matmul", "attention"])
@pytest.mark.parametrize("images", [7, 16])
def test_a_product_of_attention_is_searched_by_images_where_few_rows_decide(
    images, kind, granularity, bits, monkeypatch
):
    op, a, b, order = few_rows(kind, bits, granularity, seed=bits, images=images)
    made = []

    def by_images(*given):
        made.append(elimination.by_images(*given))
        return made[-1]

    monkeypatch.setattr(halving, "by_images", by_images)
    best = search(op, a, b, order=order, strategy="exhaustive")
    fast = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(fast.a_index, best.a_index) and torch.equal(fast.b_index, best.b_index)
    assert fast.after == pytest.approx(best.after, rel=1e-5)
    assert {name: len(curve) for name, curve in fast.curves.items()} == {"a": a.n, "b": b.n}
    # Too few images make no pieces; all candidates are compared on all of them then.
    assert len(made) == 1 and (made[0] is None) == (images < elimination.FEWEST_IMAGES)
    if made[0] is not None:
        monkeypatch.setattr(halving, "by_images", lambda *given: None)
        assert fast.evaluations < 0.8 * search(op, a, b, order=order, strategy="fast").evaluations


@pytest.mark.parametrize("images", [(16, 12), (16, 7)])
def test_processes_with_different_numbers_of_images_sum_the_same_tensors(images):
    op, a, b, _ = few_rows("matmul", 6, "head", seed=1)
    refused = images[1] < elimination.FEWEST_IMAGES
    summed = []
    for count in images:
        shapes = []

        def reduce(x, shapes=shapes):
            shapes.append(x.shape)
            # What the other process says of its images.
            return x + float(refused) if x.dim() == 0 else x

        share = Gemm(op.a[:count], op.b[:count], None, op.fisher[:count])
        losses = Losses(problem.problem_of(share, {"a": a, "b": b}, "hessian", 1), reduce)
        start = torch.full(a.grouping.shape, a.n), torch.full(b.grouping.shape, b.n)
        parts = rows_of(losses.problem, start, groups=5)
        made = elimination.by_images(losses, losses.problem.weighty(parts, 1e-3), parts)
        assert (made is None) == refused
        if made is not None:
            assert len(made._pieces) == elimination.IMAGE_PIECES
            made._on_piece(2, "b", losses.candidates("b") % 3 == 0)
        summed.append(shapes)
    assert summed[0] == summed[1]


def class_token(bits, seed, images=16):
    """A linear of which one row per image carries nearly everything, not all of it."""
    op, a, b, order = structured("gelu", bits, seed)
    rows = torch.arange(op.a.shape[2])
    factor = torch.where(rows % 197 == 0, 1.0, 1e-8)[:, None]
    op = Gemm(op.a, op.b, op.bias, op.fisher * factor)
    part = slice(0, 197 * images)
    return Gemm(op.a[:, :, part], op.b, op.bias, op.fisher[:, :, part]), a, b, order


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", [1, 2])
def test_few_rows_of_a_linear_stand_for_all(seed, bits, monkeypatch):
    op, a, b, order = class_token(bits, seed)
    losses = Losses(problem.problem_of(op, {"a": a, "b": b}, "hessian", 1), lambda x: x)
    made = elimination.by_rows(losses, look(losses)[1])
    assert sum(piece.output.shape[2] for piece in made._pieces) < 0.1 * op.a.shape[2]
    best = search(op, a, b, order=order, strategy="exhaustive")
    fast = search(op, a, b, order=order, strategy="fast")
    assert fast.after == pytest.approx(best.after, rel=1e-5)
    whole = losses.problem.loss(fast.a_index, fast.b_index, "a", objective.View("head"))
    assert fast.after == pytest.approx(float(whole.sum()), rel=1e-6)
    monkeypatch.setattr(problem.Problem, "weighty", lambda *given: None)
    certain = search(op, a, b, order=order, strategy="fast")
    assert torch.equal(certain.a_index, best.a_index) and torch.equal(certain.b_index, best.b_index)
    assert fast.evaluations < certain.evaluations - 1


@pytest.mark.parametrize("has_few", [(True, True), (True, False)])
@pytest.mark.parametrize("images", [(16, 16), (16, 9)])
def test_processes_search_the_rows_of_a_linear_alike(images, has_few, monkeypatch):
    op, a, b, _ = class_token(6, seed=3)
    weighty = problem.Problem.weighty

    def searched(rank, total):
        """What a process makes, says of its rows and sums, where all say `total` (None: it)."""
        told, shapes = [], []

        def reduce(x):
            shapes.append(x.shape)
            if x.shape != (3,):
                return x
            told.append(x)
            return x if total is None else total

        few = has_few[rank]
        monkeypatch.setattr(problem.Problem, "weighty", weighty if few else lambda *given: None)
        part = slice(0, 197 * images[rank])
        share = Gemm(op.a[:, :, part], op.b, op.bias, op.fisher[:, :, part])
        losses = Losses(problem.problem_of(share, {"a": a, "b": b}, "hessian", 1), reduce)
        made = elimination.by_rows(losses, look(losses)[1])
        made.best("b", 0, False)
        losses.objective()
        rows = sum(piece.output.shape[2] for piece in made._pieces)
        return rows, told[0], (len(made._pieces), shapes)

    total = sum(searched(rank, None)[1] for rank in (0, 1))
    found = [searched(rank, total) for rank in (0, 1)]
    assert found[0][2] == found[1][2]
    for count, (rows, _, _) in zip(images, found, strict=True):
        assert rows < 20 * count if all(has_few) else rows == 197 * count


def test_draw_takes_certain_items_once():
    importance = torch.tensor([[0.0, 1e6, 1.0, 1.0, 0.0, 2.0, 1e6, 1.0]])
    index, factor = sampling.draw(importance, 4)
    assert {1, 6} <= set(index.flatten().tolist()) and len(set(index.flatten().tolist())) == 4
    assert factor.min() == 1 and torch.isfinite(factor).all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("error", [0.3, 0.03, 0.003])
def test_no_fewer_rows_are_enough(error, groups):
    g = torch.Generator().manual_seed(2)
    size = torch.exp(2 * normal(g, 4, groups, 3, 50)).double()
    size /= size.sum((2, 3), keepdim=True)

    def variance(certain):
        """Of one item that is drawn of the rest, summed over the samples, of the worst group."""
        worst = 0.0
        for shared in size:  # [G, P, n]
            mean = shared.mean(0)
            rest = mean.argsort(1, descending=True)[:, certain:]
            for group in shared:
                of_samples = (
                    (group[p, i] ** 2 / mean[p, i]).sum() * mean[p, i].sum()
                    for p, i in enumerate(rest)
                )
                worst = max(worst, float(sum(of_samples)))
        return worst

    fewest = min(certain + math.ceil(variance(certain) / error**2) for certain in range(50))
    certain, more = sampling.enough(size, error)
    assert certain + more == fewest
    assert variance(certain) <= more * error**2


def test_a_sample_that_groups_share_is_as_exact_as_it_says():
    g = torch.Generator().manual_seed(3)
    size = torch.exp(2 * normal(g, 1, 4, 1, 400)).double()
    size /= size.sum(3, keepdim=True)
    drawn = size[0, :, 0].mean(0)
    certain, more = sampling.enough(size, 0.05)
    order = drawn.argsort(descending=True)
    sums = size[0, :, 0, order[:certain]].sum(1, keepdim=True)
    rest = order[certain:]
    draws = torch.multinomial(drawn[rest], 4000 * more, replacement=True, generator=g)
    draws = rest[draws].view(4000, more)
    sums = sums + (size[0, :, 0, draws] / drawn[draws]).mean(2) * drawn[rest].sum()
    errors = (sums - 1).square().mean(1).sqrt()
    assert errors.max() <= 0.05 * 1.05 and more > 1


def test_largest_items_are_taken_once_and_count_once():
    size = torch.tensor([[0.1, 5.0, 0.2, 4.0, 0.1, 0.3], [9.0, 0.1, 8.0, 0.1, 0.1, 0.1]])
    index, factor = sampling.largest_and(size.double(), 2, 2)
    assert {1, 3} <= set(index[0].tolist()) and {0, 2} <= set(index[1].tolist())
    assert all(len(set(row)) == 4 for row in index.tolist())
    assert (factor[size.gather(1, index) >= 4] == 1).all()
    assert (factor[size.gather(1, index) < 4] > 1).all()


def test_nothing_is_drawn_where_the_largest_are_everything():
    size = torch.tensor([[1e-14, 1.0, 1e-14, 2.0]]).double()
    assert sampling.enough(size[None, None] / size.sum(), 1e-3) == (2, 0)
    index, factor = sampling.largest_and(size, 2, 0)
    assert index.tolist() == [[3, 1]] and factor.tolist() == [[1, 1]]


def test_rows_that_carry_the_gradient_stand_for_all():
    op, a, b, _ = structured("attention", 6, seed=3)
    g = torch.Generator().manual_seed(4)
    op.fisher *= torch.exp(3 * normal(g, *op.fisher.shape[:3], 1))
    everything = problem.problem_of(op, {"a": a, "b": b}, "hessian", 1)
    start = torch.full(a.grouping.shape, a.n), torch.full(b.grouping.shape, b.n)
    rows = rows_of(everything, start, groups=op.fisher.shape[3] // 8)
    part = everything.weighty(rows, 1e-3)
    assert part.cost < 0.6
    elsewhere = start[0] // 2, start[1] // 2
    view = objective.View("element")
    whole, estimate = (p.loss(*elsewhere, "b", view).sum() for p in (everything, part))
    assert float(estimate) == pytest.approx(float(whole), rel=5e-3)
    op.fisher.fill_(1)  # no row can be spared when all weigh the same
    everything = problem.problem_of(op, {"a": a, "b": b}, "hessian", 1)
    rows = rows_of(everything, start, groups=op.fisher.shape[3] // 8)
    assert everything.weighty(rows, 1e-3) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metric": "hesian"}, "metric is 'hesian'"),
        ({"strategy": "slow"}, "strategy is 'slow'"),
        ({"images": 5}, "36 rows do not divide into 5 images"),
    ],
)
def test_bad_arguments(arguments, message):
    op, a, b, _ = random_op("linear")
    with pytest.raises(ValueError, match=message):
        search(op, a, b, **arguments)


def test_hessian_needs_a_gradient():
    op, a, b, _ = random_op("linear")
    op.fisher = None
    with pytest.raises(ValueError, match="squared gradient"):
        search(op, a, b, metric="hessian")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="operands must be"):
        Gemm(torch.zeros(2, 1, 3, 4), torch.zeros(3, 1, 4, 5))
    with pytest.raises(ValueError, match="fisher must be"):
        Gemm(torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 4, 5), None, torch.zeros(1))


@pytest.mark.parametrize("metric", ["cosine", "pearson", "mse", "l1"])
@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_fast_with_other_metrics(kind, metric):
    op, a, b, order = structured(kind, 6, seed=9)
    options = {"metric": metric, "rounds": 1, "order": order}
    options["images"] = 32 if kind == "linear" else 1
    best = search(op, a, b, strategy="exhaustive", **options)
    fast = search(op, a, b, strategy="fast", **options)
    assert fast.after <= best.after * 1.01
    # The least sample of an angle metric is all of so small a matmul: the search is exhaustive.
    assert fast.evaluations < best.evaluations or (kind == "matmul" and fast.after == best.after)


def loss_in_float64(op, a, b, result):
    """What the chosen scales lose, written out."""
    made = (
        a.fake_quantize(op.a, result.a_index).double()
        @ b.fake_quantize(op.b, result.b_index).double()
    )
    return float(((made - op.a.double() @ op.b.double()).square() * op.fisher.double()).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [800, 2500])
def test_scales_that_many_candidates_share(rows, bits):
    """With ratios that are powers of two, whole stretches of the table are one scale."""
    g = torch.Generator().manual_seed(rows + bits)
    x = torch.nn.functional.gelu(1.5 * normal(g, 1, 1, rows, 128))
    x[0, 0, :3] *= 3
    w = 0.05 * normal(g, 1, 1, 128, 32)
    op = Gemm(x, w, None, normal(g, 1, 1, rows, 32).square())
    found = {}
    for strategy in ("exhaustive", "fast"):
        a = TwinGELU(bits, TENSOR, SearchRange(), GELU_MINIMUM, "power_of_two")
        b = Uniform(bits, Grouping((1, 1, 1, 32)), SearchRange())
        a.observe(x)
        b.observe(w)
        result = search(op, a, b, strategy=strategy)
        found[strategy] = loss_in_float64(op, a, b, result)
        assert result.after == pytest.approx(found[strategy], rel=1e-4)
        assert len(result.curves["a"]) == a.n
    assert found["fast"] <= found["exhaustive"] * 1.001


@pytest.mark.parametrize("better", [False, True])
def test_a_choice_that_is_not_among_equals_is_compared_with_them(better):
    op, a, b, _ = random_op("linear", 4, "tensor")
    losses = Losses(problem.problem_of(op, {"a": a, "b": b}, "hessian", 1), lambda x: x)
    loss = [float(losses.at(losses.problem, "a", torch.full((1, 1, 1, 1), i)).sum()) for i in SEVEN]
    worst, best = (SEVEN[loss.index(f(loss))] for f in (max, min))
    equal, other = (worst, best) if better else (best, worst)
    a.table[equal + 1] = a.table[equal]  # two candidates of one scale
    losses.choice["a"] = torch.full((1, 1, 1, 1), other)
    which = torch.zeros(a.n, 1, 1, 1, 1, dtype=torch.bool)
    which[equal : equal + 2] = True
    losses._known.clear()
    chosen = int(losses.best(losses.problem, "a", which))
    assert chosen == (other if better else equal)
    losses.choice["a"] = torch.full((1, 1, 1, 1), chosen)
    assert losses.objective() == pytest.approx(min(loss), rel=1e-5)


SEVEN = list(range(2, 23, 3))


@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("queries", [9, 14])
def test_rows_with_scales_of_their_own_in_one_image(queries, hardware, chunk, monkeypatch):
    monkeypatch.setattr(problem, "has_int8_dot", lambda device: hardware)
    monkeypatch.setattr(elimination, "AHEAD", 0)  # samples decide
    monkeypatch.setattr(problem, "MOST", 2.0)
    if chunk:
        monkeypatch.setattr(problem, "CHUNK", chunk)
    g = torch.Generator().manual_seed(queries)
    attention = (4 * normal(g, 1, 2, queries, 9)).softmax(-1)
    op = Gemm(attention, normal(g, 1, 2, 9, 8), None, normal(g, 1, 2, queries, 8).square())
    a, b = Numerator(4, Grouping((1, 2, 1, 1)), SPAN), Uniform(4, Grouping((1, 2, 1, 1)), SPAN)
    a.observe(op.a)
    b.observe(op.b)
    found = {}
    for strategy in ("exhaustive", "fast"):
        result = search(op, a, b, order=("a", "b"), strategy=strategy)
        found[strategy] = loss_in_float64(op, a, b, result)
        assert result.after == pytest.approx(found[strategy], rel=1e-4)
    assert found["fast"] <= found["exhaustive"] * 1.01
    losses = Losses(problem.problem_of(op, {"a": a, "b": b}, "hessian", 1), lambda x: x)
    made = a.fake_quantize(op.a, losses.chosen("a")).double()
    wrong = (made @ op.b.double() - op.a.double() @ op.b.double()) * op.fisher.double()
    slope = Expansion(losses.problem, losses.chosen("a"))._slope
    assert torch.allclose(slope.double(), made.transpose(2, 3) @ wrong, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["linear_weighted_l2", "square_weighted_l2"])
def test_a_product_that_is_all_zero_has_nothing_to_search(metric):
    op, a, b, arguments = random_op("matmul", granularity="head")
    op.b.zero_()
    result = search(op, a, b, metric=metric, strategy="fast", **arguments)
    assert result.before == result.after == 0
