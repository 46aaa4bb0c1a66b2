"""From ops found on the graph and an algorithm's settings to a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from ptq4vit_plugin.algorithms.settings import REGEX, Activations, Override, Twin, Weights
from ptq4vit_plugin.errors import ConfigError, nearest
from ptq4vit_plugin.plan import FoundOp, Granularity, LeftOut, Op, Operand, Plan, Source
from ptq4vit_plugin.quantizers.twin_gelu import MINIMA

# Pixels are 8-bit data: fewer bits would lose information that costs nothing to keep.
IMAGE_BITS = 8
# Unsigned codes at the left of a product; integer kernels want the right one signed.
NON_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softmax"})


class Settings(Protocol):
    """What a plan depends on of an algorithm that searches scales."""

    weights: Weights
    activations: Activations
    twin: Twin
    scale_ratio: str
    ignored_scopes: tuple[str, ...]
    scope_overrides: dict[str, Override]

    def overridden(self, op_name: str) -> Settings: ...


def make_plan(found: Sequence[FoundOp], left_out: Sequence[LeftOut], settings: Settings) -> Plan:
    """Choose quantizer, bits and granularity of every operand.

    Raises
    ------
    ConfigError
        An ignored scope or an override names no op.
    """
    names = [op.name for op in found] + [op.name for op in left_out]
    for key, scopes in (
        ("ignored_scopes", settings.ignored_scopes),
        ("scope_overrides", settings.scope_overrides),
    ):
        for scope in scopes:
            if not any(matches(scope, name) for name in names):
                raise ConfigError(
                    f"{key}: '{scope}' matches no op of the model; allowed: op names as "
                    f"`ptq4vit plan` prints them, or '{{re}}' and a pattern" + nearest(scope, names)
                )
    ignored = {
        op.name: op.sources[1].parameter
        for op in found
        if any(matches(scope, op.name) for scope in settings.ignored_scopes)
    }
    # A weight's quantizer sits on the parameter, so it would reach an ignored op that shares it.
    sharing = {parameter: name for name, parameter in ignored.items() if parameter}
    ops, in_float = [], []
    owners: dict[str, str] = {}
    for op in found:
        other = sharing.get(op.sources[1].parameter)
        if op.name not in ignored and other is None:
            ops.append(_plan_op(op, settings.overridden(op.name), owners))
            continue
        reason = "listed in ignored_scopes"
        if op.name not in ignored:
            reason = f"shares its weight with {other}, which is {reason}"
        in_float.append(LeftOut(name=op.name, kind=op.kind, reason=reason, macs=op.macs))
    return Plan(ops=tuple(ops), left_out=(*in_float, *left_out))


def matches(scope: str, name: str) -> bool:
    """Whether an NNCF scope, a name or ``{re}`` and a pattern, means an op."""
    if scope.startswith(REGEX):
        return re.search(scope.removeprefix(REGEX), name) is not None
    return scope == name


def _plan_op(op: FoundOp, settings: Settings, owners: dict[str, str]) -> Op:
    operands = (_operand(op, 0, settings), _operand(op, 1, settings))
    parameter = operands[1].parameter
    if parameter in owners:
        shared = f"the parameter is quantized where {owners[parameter]} uses it"
        operands = (
            operands[0],
            operands[1].model_copy(update={"quantizer": None, "bits": None, "reason": shared}),
        )
    elif parameter:
        owners[parameter] = op.name
    return Op(name=op.name, kind=op.kind, role=op.role, operands=operands, macs=op.macs)


def _operand(op: FoundOp, port: int, settings: Settings) -> Operand:
    source = op.sources[port]
    if port == 1 and op.kind != "matmul":
        return Operand(
            port=1,
            source="weight",
            parameter=source.parameter,
            quantizer=settings.weights.quantizer,
            bits=settings.weights.bits,
            granularity=_weight_granularity(op, settings.weights.granularity),
        )
    if source.kind == "image" and settings.activations.granularity == "paper":
        return Operand(
            port=port,
            source="image",
            reason="the paper leaves the patch embedding's input in float",
        )
    quantizer, options = _activation_quantizer(source, port, settings)
    if quantizer == "asymmetric" and op.kind == "matmul" and source.kind != "softmax":
        # A zero point needs a bias that takes it up, or, as a softmax's, to be zero.
        quantizer = "uniform"
    if quantizer == "piecewise" and op.kind == "matmul":
        quantizer, options = "uniform", uniform_options(source.kind, port)
    if quantizer == "numerator" and (op.kind != "matmul" or port == 1):
        # Its rows' factors can be taken out of the left factor of a matrix product only.
        quantizer, options = "uniform", uniform_options(source.kind, port)
    return Operand(
        port=port,
        source=source.kind,
        quantizer=quantizer,
        bits=IMAGE_BITS if source.kind == "image" else settings.activations.bits,
        granularity="head"
        if op.kind == "matmul" and settings.activations.granularity != "tensor"
        else "tensor",
        options=options,
        alternative="uniform" if _choice(source, settings) == "auto" else None,
    )


def _weight_granularity(op: FoundOp, wanted: str) -> Granularity:
    if wanted != "paper":
        return wanted
    return {"qkv": "row_blocks", "linear": "tensor"}.get(
        op.role, "channel" if op.kind == "conv2d" else "tensor"
    )


def _choice(source: Source, settings: Settings) -> bool | str:
    """What the section `twin` says of an operand."""
    if source.kind == "softmax":
        return settings.twin.softmax
    return settings.twin.gelu if source.kind in MINIMA else False


def uniform_options(source: str, port: int) -> dict[str, Any]:
    """Options of the uniform quantizer of an activation: one bit more where nothing is negative."""
    return {"signed": False} if port == 0 and source in NON_NEGATIVE else {}


def _activation_quantizer(
    source: Source, port: int, settings: Settings
) -> tuple[str, dict[str, Any]]:
    if source.kind == "softmax":
        choice = _choice(source, settings)
        options = uniform_options(source.kind, port) if choice is False else {}
        return _twin(choice, "twin_softmax"), options
    if source.kind in MINIMA:
        quantizer = _twin(_choice(source, settings), "twin_gelu")
        if quantizer != "twin_gelu":
            return quantizer, {}
        minimum = None if source.rescaled else MINIMA[source.kind] / source.minimum_scale
        return quantizer, {"minimum": minimum, "scale_ratio": settings.scale_ratio}
    quantizer = settings.activations.quantizer
    return quantizer, uniform_options(source.kind, port) if quantizer == "uniform" else {}


def _twin(choice: bool | str, name: str) -> str:
    if isinstance(choice, str) and choice != "auto":
        return choice
    return name if choice else "uniform"
