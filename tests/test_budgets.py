"""Mixed precision against trying everything; accuracy control against a known landscape."""

import itertools

import numpy as np
import pytest
import torch
from models import images, small_vit

import ptq4vit_plugin as ptq
from ptq4vit_plugin import pipeline
from ptq4vit_plugin.algorithms.accuracy import Move, hold_drop, ranked_moves
from ptq4vit_plugin.algorithms.mixed_precision import choose_bits
from ptq4vit_plugin.errors import ConfigError, DataError
from ptq4vit_plugin.record import record_of

CHOICES = (4, 6, 8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", [4, 5.5, 6, 8])
def test_bits_against_trying_everything(seed, average):
    random = np.random.default_rng(seed)
    losses = random.random((6, 1)) * np.array([16, 1, 1 / 16]) * random.uniform(0.8, 1.2, (6, 3))
    costs = random.integers(1, 50, 6)
    chosen = choose_bits(losses, costs, CHOICES, average)
    assert np.dot(costs, chosen) <= average * costs.sum() + 1e-6
    best = min(
        sum(losses[i, j] for i, j in enumerate(pick))
        for pick in itertools.product(range(3), repeat=6)
        if sum(c * CHOICES[j] for c, j in zip(costs, pick, strict=True)) <= average * costs.sum()
    )
    total = sum(losses[i, CHOICES.index(bits)] for i, bits in enumerate(chosen))
    assert total == pytest.approx(best)


def exact_least(losses, costs, choices, average):
    """The least total loss by dynamic programming over whole costs."""
    room = int(average * sum(costs) + 1e-6)
    least = np.full(room + 1, np.inf)
    least[0] = 0
    for op, cost in zip(losses, costs, strict=True):
        after = np.full(room + 1, np.inf)
        for loss, bits in zip(op, choices, strict=True):
            used = cost * bits
            if used <= room:
                after[used:] = np.minimum(after[used:], least[: room + 1 - used] + loss)
        least = after
    return least.min()


@pytest.mark.parametrize("choices", [(4, 6, 8), (2, 3, 4, 6, 8)])
@pytest.mark.parametrize("spread", [2, 6])
def test_bits_are_the_best_where_one_op_would_lose_far_more(choices, spread):
    random = np.random.default_rng(spread)
    for average in (4.5, 5.7, 7.3):
        costs = random.integers(1, 41, 30)
        sizes = 10.0 ** random.uniform(-spread, 0, 30)
        losses = sizes[:, None] * 4.0 ** -(np.array(choices) - 2.0)
        losses[0, 0] *= 1e4
        chosen = choose_bits(losses, costs, choices, average)
        assert np.dot(costs, chosen) <= average * costs.sum() + 1e-6
        total = sum(losses[i, choices.index(bits)] for i, bits in enumerate(chosen))
        assert total <= exact_least(losses, costs, choices, average) * (1 + 1e-6)


def test_ops_without_cost_get_the_widest():
    assert choose_bits([[3, 2, 1], [3, 2, 1]], [10, 0], CHOICES, 4) == [4, 8]


def test_a_budget_below_the_smallest_choice():
    with pytest.raises(ConfigError, match="average_bits"):
        choose_bits([[1, 1, 1]], [1], CHOICES, 3)


def test_moves_go_from_the_op_that_hurts_most_to_float():
    moves = ranked_moves({"a": 100.0, "b": 1.0}, {"a": 4, "b": 6})
    assert [(m.op, m.bits) for m in moves] == [
        ("a", 6),
        ("a", 8),
        ("b", 8),
        ("a", None),
        ("b", None),
    ]


@pytest.mark.parametrize("needed", range(0, 11))
def test_the_fewest_moves_that_hold(needed):
    def drop_of(moves):
        return max(0, needed - len(moves)) * 1.0

    model, trials = hold_drop(tuple, drop_of, (), list(range(10)), 0.5)
    assert len(model) == needed
    assert trials[0].moves == 0 and any(t.moves == needed and t.drop <= 0.5 for t in trials)
    assert len(trials) <= 10


def test_what_is_returned_was_measured_even_if_more_bits_can_hurt():
    drops = {0: 5, 1: 4, 2: 0.4, 3: 2, 4: 2, 5: 0.3, 6: 1, 7: 0.2, 8: 0}
    measured = []

    def drop_of(moves):
        measured.append(tuple(moves))
        return drops[len(moves)]

    model, _ = hold_drop(tuple, drop_of, (), list(range(8)), 0.5)
    assert drops[len(model)] <= 0.5 and model in measured


def test_more_bits_keep_what_else_is_overridden(monkeypatch):
    fc1, fc2 = (f"blocks/0/mlp/{layer}/linear/0" for layer in ("fc1", "fc2"))

    def moved(make, drop_of, first, moves, max_drop):
        return make([Move(fc2, 6)]), []

    monkeypatch.setattr(pipeline, "hold_drop", moved)
    compression = {
        "algorithm": "ptq4vit",
        "rounds": 1,
        "ignored_scopes": ["{re}attn|head|patch"],
        "accuracy": {"max_drop": 0, "metric": "agreement"},
        "scope_overrides": {
            fc2: {"twin": {"gelu": False}, "weights": {"bits": 3}},
            "{re}fc": {"weights": {"bits": 2, "granularity": "tensor"}, "activations": {"bits": 4}},
        },
    }
    result = ptq.quantize(small_vit(), images(1), compression, images(1))
    ops = {op.name: op.operands for op in ptq.describe(result)}
    x, weight = ops[fc2]
    assert (x.quantizer, x.bits) == ("uniform", 6)
    assert (weight.granularity, weight.bits) == ("tensor", 6)
    x, weight = ops[fc1]
    assert (x.bits, weight.granularity, weight.bits) == (4, "tensor", 2)


def test_measuring_leaves_every_mode_as_it_is():
    model = small_vit().train()
    model.blocks.eval()
    before = [module.training for module in model.modules()]
    pipeline._predictions(model, images(1), False)
    with pytest.raises(DataError, match="top1"):
        pipeline._predictions(model, images(1), True)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.ndim)


def test_the_float_model_that_is_left_is_in_evaluation_mode(monkeypatch):
    def moved(make, drop_of, first, moves, max_drop):
        return make(moves), []

    monkeypatch.setattr(pipeline, "hold_drop", moved)
    compression = {
        "algorithm": "ptq4vit",
        "rounds": 1,
        "ignored_scopes": ["{re}blocks"],
        "accuracy": {"max_drop": 0, "metric": "agreement"},
    }
    model = small_vit().train()
    result = ptq.quantize(model, images(1), compression, images(1))
    assert not any(module.training for module in result.modules())
    assert model.training
    x = images(1, seed=3)[0]
    assert torch.equal(result(x), model.eval()(x))


def test_bits_that_an_override_sets_are_not_chosen_and_count():
    head = {"head/linear/0": {"weights": {"bits": 8}, "activations": {"bits": 8}}}
    config = {
        "algorithm": "ptq4vit",
        "rounds": 1,
        "search_range": {"n": 10},
        "mixed_precision": {"average_bits": 5},
        "scope_overrides": head,
    }
    record = record_of(ptq.quantize(small_vit(1), images(1), config))
    widths = {
        op.name: max(o.bits for o in op.operands if o.source != "image") for op in record.plan.ops
    }
    macs = {op.name: op.macs for op in record.plan.ops}
    assert widths["head/linear/0"] == 8 and min(widths.values()) == 4
    assert sum(macs[op] * widths[op] for op in macs) <= 5 * sum(macs.values())
    pinned = {"{re}blocks": {"weights": {"bits": 8}, "activations": {"bits": 8}}}
    with pytest.raises(ConfigError, match="average_bits: 5 leaves -.* bits for the ops whose bits"):
        ptq.quantize(small_vit(1), images(1), config | {"scope_overrides": pinned})
