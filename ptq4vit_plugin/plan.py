"""Which op, which operand, which quantizer, how many bits: a value one can print and edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

OpKind = Literal["linear", "conv2d", "matmul"]
Granularity = Literal["tensor", "channel", "row_blocks", "head"]


@dataclass(frozen=True)
class Source:
    """Where an operand's numbers come from.

    ``kind`` is ``weight``, ``constant`` (a factor of a matrix product that no image reaches),
    ``image`` (the model's input), ``softmax``, ``activation`` or the name of an activation
    function; ``minimum_scale`` is c of x·sigmoid(c·x) for functions written that way. Where
    ``rescaled``, a factor per channel is multiplied in front of the op, so a function's own minimum
    is not that of the operand. A weight without ``parameter`` is computed in forward, or a buffer.
    """

    kind: str
    parameter: str | None = None
    minimum_scale: float = 1.0
    rescaled: bool = False


@dataclass(frozen=True)
class FoundOp:
    """A GEMM on the graph: its operands' sources and shapes (with the example's batch size).

    ``heads`` is the dimension of a matrix product's output that counts heads, if one does.
    """

    name: str
    kind: OpKind
    role: str
    sources: dict[int, Source]
    shapes: dict[int, tuple[int, ...]]
    output_shape: tuple[int, ...]
    macs: int
    bias: str | None = None
    convolution: dict[str, Any] = field(default_factory=dict)
    heads: int | None = None


class Operand(BaseModel):
    """One of the two factors of an op's GEMM.

    Attributes
    ----------
    port
        Input port of the op in the NNCF graph: 0 for activations and the left factor, 1 for
        weights and the right factor.
    source
        What the numbers are: ``weight``, ``activation``, ``softmax``, ``image`` or the name of the
        activation function they come out of (``gelu``, ``silu``, ...).
    parameter
        Name of the model's parameter when the operand is a weight.
    quantizer
        Registered quantizer's name; ``None`` when the operand stays in floating point, ``reason``
        says why.
    options
        Further arguments of the quantizer.
    alternative
        A quantizer that is tried too and takes its place unless it is worth its cost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int
    source: str
    parameter: str | None = None
    quantizer: str | None = None
    bits: int | None = None
    granularity: Granularity = "tensor"
    options: dict[str, Any] = {}
    alternative: str | None = None
    reason: str | None = None


class Op(BaseModel):
    """One linear, convolution or matrix product that is quantized.

    Attributes
    ----------
    name
        Name of the op in the NNCF graph, for example ``blocks/0/attn/matmul/1``.
    role
        ``patch_embedding``, ``qkv``, ``qk`` (scores), ``attention_v``, ``linear``, ``conv2d`` or
        ``matmul``.
    macs
        Multiply-accumulates for one image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: OpKind
    role: str
    operands: tuple[Operand, ...]
    macs: int

    def operand(self, port: int) -> Operand | None:
        """The operand at an input port, or None."""
        return next((operand for operand in self.operands if operand.port == port), None)


class LeftOut(BaseModel):
    """An op that could have been quantized and is not, with the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    reason: str
    macs: int = 0


class Plan(BaseModel):
    """All of a model's linears, convolutions and matrix products, quantized or left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ops: tuple[Op, ...]
    left_out: tuple[LeftOut, ...] = ()

    def at_bits(self, bits: Mapping[str, int]) -> Plan:
        """The plan with other bits for both operands of ops, by name. Images keep theirs."""

        def changed(operand: Operand, width: int) -> Operand:
            if operand.quantizer is None or operand.source == "image":
                return operand
            return operand.model_copy(update={"bits": width})

        ops = [
            op.model_copy(
                update={"operands": tuple(changed(o, bits[op.name]) for o in op.operands)}
            )
            if op.name in bits
            else op
            for op in self.ops
        ]
        return self.model_copy(update={"ops": tuple(ops)})

    @property
    def macs_quantized(self) -> float:
        """Share of multiply-accumulates whose two operands are both quantized, 0 ... 1.

        A parameter that several ops share is quantized for all of them.
        """
        total = sum(op.macs for op in self.ops) + sum(op.macs for op in self.left_out)
        shared = {o.parameter for op in self.ops for o in op.operands if o.quantizer} - {None}
        whole = sum(
            op.macs
            for op in self.ops
            if all(o.quantizer or o.parameter in shared for o in op.operands)
        )
        return whole / total if total else 0.0
