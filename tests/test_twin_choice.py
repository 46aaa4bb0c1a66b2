"""`twin: auto` keeps a twin quantizer only where it lowers the objective enough."""

from types import SimpleNamespace

import pytest
from models import images, small_vit

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.twin_choice import WORTH, choose_twins
from ptq4vit_plugin.pipeline import plan as plan_of
from ptq4vit_plugin.plan import Op, Operand
from ptq4vit_plugin.record import record_of
from ptq4vit_plugin.reporting.tables import plan_table, record_table, twin_trial


def op_of(alternative):
    operands = (
        Operand(port=0, source="gelu", quantizer="twin_gelu", bits=8, alternative=alternative),
        Operand(port=1, source="weight", parameter="w", quantizer="uniform", bits=8),
    )
    return Op(name="fc2/linear/0", kind="linear", role="linear", operands=operands, macs=1)


@pytest.mark.parametrize(
    ("uniform", "kept"), [(WORTH * 3.0, False), (WORTH * 3.0 + 0.1, True), (1.0, False)]
)
def test_a_twin_stays_only_above_the_factor(uniform, kept):
    objective = {"twin_gelu": 3.0, "uniform": uniform}

    def searched(op):
        return SimpleNamespace(after=objective[op.operands[0].quantizer]), op

    chosen, found, trials = choose_twins(op_of("uniform"), searched)
    name = "twin_gelu" if kept else "uniform"
    assert chosen.operands[0].quantizer == found[1].operands[0].quantizer == name
    assert chosen.operands[1] == op_of("uniform").operands[1]
    assert trials[0].model_dump() == {"twin": 3.0, "uniform": uniform, "kept": kept}


def test_an_op_without_an_alternative_is_searched_once():
    seen = []
    chosen, _, trials = choose_twins(op_of(None), lambda op: (seen.append(op),))
    assert seen == [chosen] == [op_of(None)] and trials == {}


@pytest.fixture(scope="module")
def made():
    """The same model with all twins, with none, and with a choice: ops do not interact."""

    def quantized(choice):
        config = {
            "algorithm": "ptq4vit",
            "twin": {"softmax": choice, "gelu": choice},
            "activations": {"bits": 6},
            "search_range": {"n": 10},
            "rounds": 1,
        }
        return ptq.quantize(small_vit(2), images(1), config)

    return {choice: quantized(choice) for choice in (True, False, "auto")}


def test_both_objectives_are_those_of_a_search_with_either(made):
    twin, uniform, auto = (ptq.describe(made[choice]) for choice in (True, False, "auto"))
    trials = 0
    for with_twin, without, op in zip(twin, uniform, auto, strict=True):
        for operand in op.operands:
            if operand.source not in ("softmax", "gelu"):
                assert operand.twin is None
                continue
            trials += 1
            assert operand.twin.twin == pytest.approx(with_twin.objective_after, rel=1e-6)
            assert operand.twin.uniform == pytest.approx(without.objective_after, rel=1e-6)
            assert operand.twin.kept == (
                without.objective_after > WORTH * with_twin.objective_after
            )
            assert operand.quantizer.startswith("twin") == operand.twin.kept
            assert op.objective_after == (
                operand.twin.twin if operand.twin.kept else operand.twin.uniform
            )
    assert trials == 4


def test_the_plan_has_what_was_chosen_and_shows_what_was_in_question(made):
    record = record_of(made["auto"])
    for op, searched in zip(record.plan.ops, record.ops, strict=True):
        for operand, result in zip(op.operands, searched.operands, strict=True):
            assert operand.alternative is None and operand.quantizer == result.quantizer
    config = {"algorithm": "ptq4vit", "twin": {"gelu": "auto"}}
    plan = plan_of(small_vit(1), images(1)[0], config)
    cells = [cell for column in plan_table(plan).columns for cell in column.cells]
    assert any("twin_gelu or uniform" in cell for cell in cells)
    assert any("twin_softmax 8 bit" in cell for cell in cells)


def test_describe_and_checkpoint_tell_the_choice(made, tmp_path):
    ptq.save(made["auto"], tmp_path / "m.safetensors")
    records = ptq.describe(ptq.load(tmp_path / "m.safetensors", small_vit(2)))
    assert records == ptq.describe(made["auto"])
    trials = [o.twin for op in records for o in op.operands if o.twin]
    cells = [cell for column in record_table(records).columns for cell in column.cells]
    assert all(any(twin_trial(trial) in cell for cell in cells) for trial in trials)
