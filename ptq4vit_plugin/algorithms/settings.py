"""Sections that every scale-searching algorithm's config has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ptq4vit_plugin import registry


def _registered(name: str) -> str:
    return registry.find("quantizers", name).name


Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
QuantizerName = Annotated[str, AfterValidator(_registered)]
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
    quantizer: QuantizerName = "uniform"


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
