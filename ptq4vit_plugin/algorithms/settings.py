"""Sections that every scale-searching algorithm's config has."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ptq4vit_plugin import registry
from ptq4vit_plugin.errors import ConfigError

#: What a scope begins with that is a regular expression (NNCF's convention).
REGEX = "{re}"


def _registered(name: str) -> str:
    return registry.find("quantizers", name).name


#: Quantizers that weights cannot have, and why.
ACTIVATIONS_ONLY = {
    "numerator": "is for softmax outputs: weights have no rows to divide by",
    "piecewise": "is for activations: it has one scale per tensor",
}


def _for_weights(name: str) -> str:
    if name in ACTIVATIONS_ONLY:
        raise ConfigError(f"'{name}' {ACTIVATIONS_ONLY[name]}")
    return name


def _names(schema: dict[str, Any]) -> None:
    """Every registered name, for the JSON schema."""
    schema["enum"] = sorted({entry.name for entry in registry.entries("quantizers")})


def _names_for_weights(schema: dict[str, Any]) -> None:
    _names(schema)
    schema["enum"] = [name for name in schema["enum"] if name not in ACTIVATIONS_ONLY]


def _pattern(scope: str) -> str:
    if scope.startswith(REGEX):
        try:
            re.compile(scope.removeprefix(REGEX))
        except re.error as error:
            raise ConfigError(f"'{scope}' is no regular expression: {error}") from error
    return scope


Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
QuantizerName = Annotated[str, AfterValidator(_registered), Field(json_schema_extra=_names)]
Scope = Annotated[str, AfterValidator(_pattern)]
TwinChoice = bool | Literal["auto"] | QuantizerName


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Section):
    """How weights are quantized.

    Attributes
    ----------
    granularity
        ``channel``: a scale per output channel. ``tensor``: one scale. ``paper``: one scale for a
        linear, three for the rows of query, key and value, one per output channel for the patch
        embedding.
    """

    bits: Bits = 8
    granularity: Literal["channel", "tensor", "paper"] = "channel"
    quantizer: Annotated[
        QuantizerName, AfterValidator(_for_weights), Field(json_schema_extra=_names_for_weights)
    ] = "uniform"


class Activations(_Section):
    """How activations are quantized.

    Attributes
    ----------
    granularity
        ``head``: the operands of attention's products have a scale per head, all others one per
        tensor. ``tensor``: one scale everywhere. ``paper``: as ``head``, and the patch embedding's
        input stays in float.
    """

    bits: Bits = 8
    granularity: Literal["head", "tensor", "paper"] = "head"
    quantizer: QuantizerName = "uniform"


class Twin(_Section):
    """Which quantizer outputs of softmax and of GELU-like functions get.

    True means the twin uniform quantizer, False the uniform one, unsigned behind softmax, ``auto``
    the twin where it lowers the op's objective enough against that one (`twin_choice.WORTH`),
    another string any registered quantizer as it is.
    """

    softmax: TwinChoice = True
    gelu: TwinChoice = True


class Override(_Section):
    """Sections for some ops only; keys that are not given keep the algorithm's value."""

    weights: Weights | None = None
    activations: Activations | None = None
    twin: Twin | None = None


class MixedPrecision(_Section):
    """Bits per op by sensitivity, weights and activations alike.

    Attributes
    ----------
    average_bits
        Mean over ops that is not exceeded, weighted by `budget`.
    choices
        Widths an op can get.
    budget
        ``macs``: ops count by their multiply-accumulates; ``size``: by their weights (products of
        attention have none and get the widest choice).
    """

    average_bits: float = Field(ge=2, le=8)
    choices: tuple[Bits, ...] = Field(default=(4, 6, 8), min_length=1)
    budget: Literal["macs", "size"] = "macs"

    @model_validator(mode="after")
    def _reachable(self) -> MixedPrecision:
        if self.average_bits < min(self.choices):
            raise ConfigError(
                f"average_bits: {self.average_bits:g} is not allowed; allowed: at least "
                f"{min(self.choices)}, the least of choices"
            )
        return self


class Accuracy(_Section):
    """The drop on validation images that is not exceeded.

    Attributes
    ----------
    max_drop
        In points (hundredths) of `metric`.
    metric
        ``top1``: accuracy lost against the float model, needs labels; ``agreement``: images whose
        best class is another one than the float model's.
    """

    max_drop: float = Field(ge=0)
    metric: Literal["top1", "agreement"] = "top1"
