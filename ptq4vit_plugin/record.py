"""What a calibration did: attached to the model, saved with it, printed by `describe`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.plan import Granularity, OpKind, Plan

_ATTRIBUTE = "ptq4vit_record"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Histogram(_Frozen):
    """How the values of an activation are distributed: ``counts[i]`` between ``edges[i]`` and
    ``edges[i + 1]``, of a sample of the calibration set.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class TwinTrial(_Frozen):
    """The objective with a twin quantizer and with the uniform one, each searched, and whether the
    twin stayed.
    """

    twin: float
    uniform: float
    kept: bool


class OperandRecord(_Frozen):
    """An operand's quantizer and the range of its searched parameter over groups.

    ``searched_min`` and ``searched_max`` are scales, or exponents m for a softmax twin.
    ``histogram`` is there for outputs of softmax and of GELU-like functions. ``curve`` is the
    search's objective over the candidates, all groups together: as many values as points, evenly
    spaced from the first candidate to the last; where the search works on samples, of a sample.
    ``twin`` is there where the search chose between a twin and a uniform quantizer.
    """

    port: int
    source: str
    parameter: str | None = None
    quantizer: str | None = None
    bits: int | None = None
    granularity: Granularity = "tensor"
    reason: str | None = None
    searched_min: float | None = None
    searched_max: float | None = None
    groups: int = 0
    histogram: Histogram | None = None
    curve: tuple[float, ...] = ()
    twin: TwinTrial | None = None


class OpRecord(_Frozen):
    """One op: its quantizers, the objective at the start scales and at the chosen ones, cost.

    ``sqnr_db`` is the signal-to-quantization-noise ratio of the op's own output with the chosen
    scales and exact inputs, in dB; infinite when there is no noise.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    name: str
    kind: OpKind
    role: str
    operands: tuple[OperandRecord, ...]
    objective_before: float
    objective_after: float
    evaluations: float
    seconds: float
    sqnr_db: float | None = None


class TrialRecord(_Frozen):
    """One model that was measured to hold an accuracy: raises of bits before it, points lost."""

    moves: int
    drop: float


class QuantizationRecord(_Frozen):
    """One run of an algorithm on a model.

    Attributes
    ----------
    passes
        How often the calibration images went forward and backward through the model; each pass
        records as many ops, or what reaches as many blocks, as fit the memory budget.
    replays
        How often they then went through a single block, whose ops are recorded there.
    peak_memory
        Most bytes the process had held by the end of it; None in checkpoints of older releases.
    trials
        What was tried, if there was an accuracy to hold.
    """

    algorithm: str
    settings: dict[str, Any]
    plan: Plan
    ops: tuple[OpRecord, ...]
    images: int
    seconds: float
    passes: int = 1
    replays: int = 0
    peak_memory: int | None = None
    trials: tuple[TrialRecord, ...] = ()


def attach(model: nn.Module, record: QuantizationRecord) -> None:
    """Remember a run on the model it was made on."""
    setattr(model, _ATTRIBUTE, record)


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The last run on a model, or None."""
    return getattr(model, _ATTRIBUTE, None)


def describe(model: nn.Module) -> list[OpRecord]:
    """One record per quantized op of a model that this plugin quantized: quantizers, objectives,
    cost.

    Raises
    ------
    ModelError
        The model was not quantized by this plugin.
    """
    record = record_of(model)
    if record is None:
        raise ModelError(
            f"{type(model).__name__} carries no record of a calibration; call quantize first"
        )
    return list(record.ops)
