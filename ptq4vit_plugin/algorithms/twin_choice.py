"""Whether a twin quantizer is worth what it costs: ``twin: {softmax: auto, gelu: auto}``.

At run time a twin operand is two integer products, a uniform one is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ptq4vit_plugin.algorithms.planning import uniform_options
from ptq4vit_plugin.plan import Op, Operand, Plan
from ptq4vit_plugin.record import OpRecord, TwinTrial

#: A twin stays where the uniform quantizer's objective is more than this many times the twin's.
WORTH = 2.0

Found = TypeVar("Found", bound=tuple)


def choose_twins(op: Op, searched: Callable[[Op], Found]) -> tuple[Op, Found, dict[int, TwinTrial]]:
    """Search an op with its twins, and again with what each could be replaced by.

    Parameters
    ----------
    op
        Operands with an ``alternative`` are in question.
    searched
        Searches all scales of an op. Returns a tuple that begins with the search's result, whose
        objective decides.

    Returns
    -------
    tuple
        The op as it is to be quantized, what `searched` returned for it, and both objectives by
        input port.
    """
    found, trials = searched(op), {}
    for operand in op.operands:
        if operand.alternative is None:
            continue
        other = _replaced(op, operand.port, operand.alternative)
        tried = searched(other)
        twin, uniform = found[0].after, tried[0].after
        trial = TwinTrial(twin=twin, uniform=uniform, kept=uniform > WORTH * twin)
        trials[operand.port] = trial
        if not trial.kept:
            op, found = other, tried
    return op, found, trials


def settled(plan: Plan, records: list[OpRecord]) -> Plan:
    """The plan with what was chosen in the place of what was in question."""
    chosen = {(r.name, o.port): o.quantizer for r in records for o in r.operands}
    ops = []
    for op in plan.ops:
        for operand in op.operands:
            if operand.alternative is not None:
                op = _replaced(op, operand.port, chosen[op.name, operand.port])
        ops.append(op)
    return plan.model_copy(update={"ops": tuple(ops)})


def _replaced(op: Op, port: int, quantizer: str) -> Op:
    """The op with another quantizer, or the same one, at a port, and nothing in question there."""

    def changed(operand: Operand) -> Operand:
        if operand.port != port:
            return operand
        kept = operand.quantizer == quantizer
        options = operand.options if kept else uniform_options(operand.source, port)
        update = {"quantizer": quantizer, "options": options, "alternative": None}
        return operand.model_copy(update=update)

    return op.model_copy(update={"operands": tuple(map(changed, op.operands))})
