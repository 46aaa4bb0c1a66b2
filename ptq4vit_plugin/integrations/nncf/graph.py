"""Find the GEMMs of a model on its NNCF graph, by what the ops do and never by their names."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from nncf.common.graph.graph import NNCFGraph, NNCFNode

from ptq4vit_plugin.plan import FoundOp, LeftOut, OpKind, Source

# Functions that move, select or repeat numbers without changing any (padding adds zeros, which
# every range that is looked for contains).
KEEPS_NUMBERS = frozenset(
    """
    dropout dropout_ alpha_dropout reshape view view_as reshape_as permute transpose t
    swapaxes swapdims movedim moveaxis flatten unflatten contiguous clone detach to type_as
    float half bfloat16 squeeze unsqueeze expand expand_as repeat repeat_interleave tile
    __getitem__ getitem select narrow index_select gather unbind chunk split
    split_with_sizes tensor_split roll pad unfold einops_rearrange identity
    """.split()
)
# Between a score product and its softmax: scaling, position biases, masks, mixing of heads.
SCORE_ARITHMETIC = KEEPS_NUMBERS | frozenset(
    """
    mul __mul__ __rmul__ imul __imul__ div __truediv__ truediv add __add__ __radd__ iadd
    __iadd__ add_ mul_ sub __sub__ where masked_fill masked_fill_ clamp exp sigmoid amax max
    """.split()
)
SPLITS = frozenset(
    """
    unbind chunk split split_with_sizes tensor_split
    """.split()
)
ACTIVATIONS = frozenset(
    """
    gelu silu silu_ hardswish hardswish_ mish mish_ relu relu_ relu6 relu6_
    """.split()
)
PRODUCTS = frozenset(
    """
    matmul __matmul__ __rmatmul__ bmm
    """.split()
)
# Contractions that are seen and not quantized, each with the reason that the plan gives.
NOT_QUANTIZED = {
    "scaled_dot_product_attention": "fused attention hides its products; no switch unfuses it",
    "einsum": "a contraction written as einsum has no fixed operand layout",
    "conv1d": "1-D convolutions are not supported",
    "conv3d": "3-D convolutions are not supported",
    "conv_transpose1d": "transposed convolutions are not supported",
    "conv_transpose2d": "transposed convolutions are not supported",
    "addmm": "addmm carries its bias as port 0",
    "baddbmm": "baddbmm carries its bias as port 0",
    "mm": "a product of two matrices without a batch of images",
    "multi_head_attention_forward": "nn.MultiheadAttention's own function was not opened",
}


def find_ops(graph: NNCFGraph, batch_size: int) -> tuple[list[FoundOp], list[LeftOut]]:
    """Every linear, convolution and matrix product of the graph, in execution order.

    Parameters
    ----------
    graph
        NNCF's graph of one forward pass.
    batch_size
        Number of images in the example that was traced; multiply-accumulates are given for one
        image.

    Returns
    -------
    found, left_out
        Ops that can be quantized, and those that cannot, with the reason.
    """
    found, left_out = [], []
    for node in graph.topological_sort():
        kind = _kind(node)
        if kind is None:
            if node.node_type in NOT_QUANTIZED:
                left_out.append(
                    LeftOut(
                        name=node.node_name,
                        kind=node.node_type,
                        reason=NOT_QUANTIZED[node.node_type],
                    )
                )
            continue
        op = _describe(graph, node, kind, batch_size)
        if isinstance(op, LeftOut):
            left_out.append(op)
        else:
            found.append(op)
    return found, left_out


def _kind(node: NNCFNode) -> OpKind | None:
    if node.node_type in ("linear", "conv2d"):
        return node.node_type
    return "matmul" if node.node_type in PRODUCTS else None


def _describe(graph: NNCFGraph, node: NNCFNode, kind: OpKind, batch_size: int) -> FoundOp | LeftOut:
    edges = {edge.input_port_id: edge for edge in graph.get_input_edges(node)}
    outputs = graph.get_output_edges(node)
    if 0 not in edges or 1 not in edges or not outputs:
        # An operand that is a constant tensor made inside forward has no edge; nothing calibrates
        # it.
        return LeftOut(
            name=node.node_name, kind=kind, reason="an operand is not a value of the traced graph"
        )
    shapes = {port: tuple(edge.tensor_shape) for port, edge in edges.items() if port < 2}
    output_shape = tuple(outputs[0].tensor_shape)
    sources = {port: source_of(graph, edges[port].from_node) for port in (0, 1)}
    inner = shapes[1][-2] if kind == "matmul" else prod(shapes[1][1:])
    macs = prod(output_shape) * inner // batch_size
    if kind != "matmul" and sources[1].kind != "weight":
        return LeftOut(
            name=node.node_name,
            kind=kind,
            reason="its weight is computed, not a parameter of the model",
            macs=macs,
        )
    bias = edges[2].from_node if kind != "matmul" and 2 in edges else None
    return FoundOp(
        name=node.node_name,
        kind=kind,
        role=_role(graph, node, kind, sources),
        sources=sources,
        shapes=shapes,
        output_shape=output_shape,
        macs=macs,
        bias=bias.node_name if bias is not None and bias.node_type == "nncf_model_const" else None,
        convolution=_convolution(node) if kind == "conv2d" else {},
    )


def source_of(graph: NNCFGraph, node: NNCFNode) -> Source:
    """What made the numbers that leave ``node``, looking up through ops that keep them."""
    while node.node_type in KEEPS_NUMBERS:
        edges = sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
        if not edges:
            break
        node = edges[0].from_node
    if node.node_type == "nncf_model_const":
        return Source("weight", parameter=node.node_name)
    if node.node_type == "nncf_model_input":
        return Source("image")
    if node.node_type == "softmax":
        return Source("softmax")
    if node.node_type in ACTIVATIONS:
        return Source(_activation_name(node))
    gate = _sigmoid_gate(graph, node)
    return Source("silu", minimum_scale=gate) if gate else Source("activation")


def _activation_name(node: NNCFNode) -> str:
    name = node.node_type.rstrip("_")
    attributes = node.layer_attributes
    if (
        name == "gelu"
        and attributes is not None
        and attributes.op_kwargs.get("approximate") == "tanh"
    ):
        return "gelu_tanh"
    return name


def _sigmoid_gate(graph: NNCFGraph, node: NNCFNode) -> float | None:
    """c when the node is x · sigmoid(c·x), written out as quick GELU and SiLU often are."""
    if node.node_type not in ("mul", "__mul__", "mul_"):
        return None
    inputs = [edge.from_node for edge in graph.get_input_edges(node)]
    if len(inputs) != 2:
        return None
    for x, gate in (inputs, inputs[::-1]):
        if gate.node_type not in ("sigmoid", "sigmoid_"):
            continue
        before = graph.get_previous_nodes(gate)
        if before and before[0].node_id == x.node_id:
            return 1.0
        if before and before[0].node_type in ("mul", "__mul__", "__rmul__"):
            scaled = graph.get_previous_nodes(before[0])
            constant = next(
                (a for a in before[0].layer_attributes.op_args if isinstance(a, float)), None
            )
            if constant and len(scaled) == 1 and scaled[0].node_id == x.node_id:
                return constant
    return None


def _role(graph: NNCFGraph, node: NNCFNode, kind: OpKind, sources: dict[int, Source]) -> str:
    if kind == "matmul":
        if "softmax" in (sources[0].kind, sources[1].kind):
            return "attention_v"
        return "qk" if _feeds_softmax(graph, node) else "matmul"
    if sources[0].kind == "image":
        return "patch_embedding"
    if kind == "linear" and _splits_in_three(graph, node):
        return "qkv"
    return kind


def _feeds_softmax(graph: NNCFGraph, node: NNCFNode) -> bool:
    return any(
        after.node_type == "softmax"
        for step in _downstream(graph, node, SCORE_ARITHMETIC)
        for after in graph.get_next_nodes(step)
    )


def _splits_in_three(graph: NNCFGraph, node: NNCFNode) -> bool:
    """Whether the output is cut into three: query, key and value."""
    return any(
        step.node_type in SPLITS
        and len({edge.output_port_id for edge in graph.get_output_edges(step)}) == 3
        for step in _downstream(graph, node, KEEPS_NUMBERS)
    )


def _downstream(graph: NNCFGraph, node: NNCFNode, through: frozenset[str]) -> Iterator[NNCFNode]:
    """``node`` and all nodes that can be reached from it through functions in ``through``."""
    stack, seen = [node], set()
    while stack:
        step = stack.pop()
        if step.node_id in seen:
            continue
        seen.add(step.node_id)
        yield step
        stack += [after for after in graph.get_next_nodes(step) if after.node_type in through]


def _convolution(node: NNCFNode) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a conv2d call."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    attributes = node.layer_attributes
    call = dict(zip(names, attributes.op_args, strict=False)) | attributes.op_kwargs
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {name: call.get(name, default) for name, default in defaults.items()}
