"""Find the GEMMs of a model on its NNCF graph, by what the ops do and never by their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFGraphEdge, NNCFNode

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf.heads import head_dimension
from ptq4vit_plugin.integrations.nncf.hooks import is_factor
from ptq4vit_plugin.plan import FoundOp, LeftOut, OpKind, Source

# Functions that move, select or repeat numbers without changing any (padding adds zeros, which
# every range that is looked for contains).
KEEPS_NUMBERS = frozenset(
    """
    dropout dropout_ alpha_dropout reshape view view_as reshape_as permute transpose t
    swapaxes swapdims movedim moveaxis flatten unflatten contiguous clone detach to type_as
    float half bfloat16 squeeze unsqueeze expand expand_as repeat repeat_interleave tile
    __getitem__ getitem select narrow index_select gather unbind chunk split
    split_with_sizes tensor_split roll flip pad unfold einops_rearrange identity __get__
    max_pool2d pixel_shuffle pixel_unshuffle channel_shuffle
    """.split()
)
JOINS = frozenset("cat concat concatenate stack hstack vstack dstack".split())
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
    gelu silu silu_ hardswish hardswish_ mish mish_ relu relu_ relu6 relu6_ sigmoid sigmoid_
    hardsigmoid hardsigmoid_
    """.split()
)
PRODUCTS = frozenset(
    """
    matmul __matmul__ bmm mm linalg_matmul
    """.split()
)
# Contractions that are seen and not quantized, each with the reason that the plan gives.
NOT_QUANTIZED = {
    "scaled_dot_product_attention": "fused attention hides its products",
    "multi_head_attention_forward": "nn.MultiheadAttention's own function was not opened",
    "einsum": "an einsum that is not one product of two tensors",
    "tensordot": "a contraction written as tensordot has no fixed operand layout",
    "inner": "an inner product has no fixed operand layout",
    "conv3d": "3-D convolutions are not supported",
    "conv_transpose1d": "transposed convolutions are not supported",
    "conv_transpose2d": "transposed convolutions are not supported",
    "conv_transpose3d": "transposed convolutions are not supported",
    "deform_conv2d": "deformable convolutions are not supported",
    "bilinear": "bilinear layers are not supported",
    "__rmatmul__": "its operands are in reverse order",
    "addbmm": "a sum of products over the batch",
    "mv": "a product with a vector",
    "addmv": "a product with a vector",
    "addmv_": "a product with a vector",
    "dot": "a product of two vectors",
    "vdot": "a product of two vectors",
    "linalg_vecdot": "a product of two vectors",
    "linalg_multi_dot": "a chain of products hides those between",
    "chain_matmul": "a chain of products hides those between",
    "matrix_power": "a power of a matrix hides its products",
    "linalg_matrix_power": "a power of a matrix hides its products",
    "smm": "products of sparse matrices are not supported",
    "_sparse_mm": "products of sparse matrices are not supported",
    "addmm_": "it writes into its bias",
    "baddbmm_": "it writes into its bias",
    "rnn_tanh": "recurrent layers are not supported",
    "rnn_relu": "recurrent layers are not supported",
    "gru": "recurrent layers are not supported",
    "lstm": "recurrent layers are not supported",
    "rnn_tanh_cell": "recurrent layers are not supported",
    "rnn_relu_cell": "recurrent layers are not supported",
    "gru_cell": "recurrent layers are not supported",
    "lstm_cell": "recurrent layers are not supported",
    # Left only where the model was not prepared, see `decompose`.
    "conv1d": "1-D convolutions are quantized as 2-D ones, after preparing the model",
    "addmm": "addmm carries its bias as port 0",
    "baddbmm": "baddbmm carries its bias as port 0",
}
# Of these, products of the last two tensors given: every output number takes a row of the first.
OF_LAST_TWO = frozenset(
    """
    inner mv addmv addmv_ dot vdot linalg_vecdot smm _sparse_mm addmm addmm_ baddbmm baddbmm_
    """.split()
)
OPERAND_NAMES = {"linear": ("input", "weight", "bias"), "conv2d": ("input", "weight", "bias")}


def find_ops(
    graph: NNCFGraph, batch_size: int, buffers: Collection[str] = ()
) -> tuple[list[FoundOp], list[LeftOut]]:
    """Every linear, convolution and matrix product of the graph, in execution order.

    Parameters
    ----------
    graph
        NNCF's graph of one forward pass.
    batch_size
        Number of images in the example that was traced; multiply-accumulates are given for one
        image.
    buffers
        Names of the model's buffers: NNCF hooks parameters, so a weight that is a buffer has to be
        quantized where the op takes it.

    Returns
    -------
    found, left_out
        Ops that can be quantized, and those that cannot, with the reason.

    Raises
    ------
    ModelError
        No argument that forward names is a tensor; NNCF follows no other.
    """
    found, left_out = [], []
    from_image = _from_image(graph)
    if not from_image:
        raise ModelError(
            "model: none of the arguments that its forward names is a tensor, so no op can be "
            "followed from the images; allowed: forward(self, x), not *args, **kwargs or a "
            "collection of tensors"
        )
    for node in graph.topological_sort():
        overload = node.node_type.endswith(".default")
        kind = _kind(node.node_type.removesuffix(".default"))
        if kind is None:
            if node.node_type in NOT_QUANTIZED:
                left_out.append(
                    LeftOut(
                        name=node.node_name,
                        kind=node.node_type,
                        reason=NOT_QUANTIZED[node.node_type],
                        macs=_hidden_macs(graph, node) // batch_size,
                    )
                )
            continue
        op = _describe(graph, node, kind, batch_size, from_image, buffers)
        if isinstance(op, LeftOut):
            left_out.append(op)
        elif overload:
            reason = "called as an overload of torch.ops, not as a function of torch"
            left_out.append(LeftOut(name=op.name, kind=kind, reason=reason, macs=op.macs))
        else:
            found.append(op)
    return found, left_out


def _kind(function: str) -> OpKind | None:
    if function in ("linear", "conv2d"):
        return function
    return "matmul" if function in PRODUCTS else None


def _from_image(graph: NNCFGraph) -> set[int]:
    """Nodes whose values depend on the model's input."""
    inputs = [node for node in graph.get_all_nodes() if node.node_type == "nncf_model_input"]
    reached: set[int] = set()
    while inputs:
        node = inputs.pop()
        if node.node_id not in reached:
            reached.add(node.node_id)
            inputs += graph.get_next_nodes(node)
    return reached


def _describe(
    graph: NNCFGraph,
    node: NNCFNode,
    kind: OpKind,
    batch_size: int,
    from_image: set[int],
    buffers: Collection[str],
) -> FoundOp | LeftOut:
    edges = {edge.input_port_id: edge for edge in graph.get_input_edges(node)}
    operands = _operands(node)
    shapes = {port: tuple(operand.shape) for port, operand in enumerate(operands)}
    output_shape = _output_shape(graph, node, kind, shapes)
    inner = shapes[0][-1] if kind == "matmul" else prod(shapes[1][1:])
    macs = prod(output_shape) * inner // batch_size

    def left_out(reason: str) -> LeftOut:
        return LeftOut(name=node.node_name, kind=kind, reason=reason, macs=macs)

    if kind != "matmul" and _misplaced(node, kind):
        return left_out("its weight is not the second argument of the call")
    if min(len(shapes[0]), len(shapes[1])) < 2:
        return left_out("a product with a vector")
    sources = {
        port: source_of(graph, edges[port].from_node) if port in edges else Source("activation")
        for port in (0, 1)
    }
    # A tensor that forward makes, from numbers of its own, has no edge.
    varying = {
        port for port in (0, 1) if port in edges and edges[port].from_node.node_id in from_image
    }
    # A parameter of which the image chooses rows, as a table of embeddings.
    looked_up = {port for port in varying if sources[port].parameter}
    sources |= dict.fromkeys(looked_up, Source("activation"))
    if not varying:
        return left_out("depends on no image; it is a constant that exporters fold")
    others = [operand.dtype for operand in operands if not operand.dtype.is_floating_point]
    if others:
        kind_of_number = str(others[0]).removeprefix("torch.")
        return left_out(f"its numbers are {kind_of_number}, not real floating-point ones")
    if kind != "matmul":
        if 1 in varying:
            return left_out("its weight depends on the image")
        if _parameter(edges.get(1), buffers) is None:
            # Standardised, sliced or otherwise computed in forward: quantized where it arrives.
            sources[1] = Source("weight")
    else:
        sources = {
            port: source if port in varying else Source("constant")
            for port, source in sources.items()
        }
    return FoundOp(
        name=node.node_name,
        kind=kind,
        role=_role(graph, node, kind, sources),
        sources=sources,
        shapes=shapes,
        output_shape=output_shape,
        macs=macs,
        bias=_parameter(edges.get(2), buffers) if kind != "matmul" else None,
        convolution=_convolution(node) if kind == "conv2d" else {},
        heads=head_dimension(graph, node, len(output_shape)) if kind == "matmul" else None,
    )


def _parameter(edge: NNCFGraphEdge | None, buffers: Collection[str]) -> str | None:
    """Name of the parameter that an edge brings; None for what is computed, and for a buffer."""
    if edge is None or edge.from_node.node_type != "nncf_model_const":
        return None
    name = edge.from_node.node_name
    return None if name in buffers else name


def _operands(node: NNCFNode) -> tuple[Any, Any]:
    """What NNCF noted, type and shape, of the tensors at input ports 0 and 1 as it numbers them."""
    attributes = node.layer_attributes
    return (*attributes.op_args, *attributes.op_kwargs.values())[:2]


def _output_shape(
    graph: NNCFGraph, node: NNCFNode, kind: OpKind, shapes: dict[int, tuple[int, ...]]
) -> tuple[int, ...]:
    edges = graph.get_output_edges(node)
    if edges:
        return tuple(edges[0].tensor_shape)
    # Nothing that NNCF follows takes the result.
    if kind == "linear":
        return (*shapes[0][:-1], shapes[1][0])
    if kind == "matmul":
        left, right = shapes[0], shapes[1]
        return (*torch.broadcast_shapes(left[:-2], right[:-2]), *left[-2:-1], *right[-1:])
    return (shapes[0][0], shapes[1][0], *shapes[0][2:])


def _misplaced(node: NNCFNode, kind: OpKind) -> bool:
    """Whether keyword arguments put input and weight elsewhere than at ports 0 and 1."""
    attributes = node.layer_attributes
    names = (*OPERAND_NAMES[kind][: len(attributes.op_args)], *attributes.op_kwargs)
    return names[:2] != OPERAND_NAMES[kind][:2]


def _hidden_macs(graph: NNCFGraph, node: NNCFNode) -> int:
    """Multiply-accumulates of an op that is not quantized; 0 for what has no known size."""
    outputs = graph.get_output_edges(node)
    if node.node_type in OF_LAST_TWO and outputs:
        call = node.layer_attributes
        given = (*call.op_args, *call.op_kwargs.values())
        left, _ = [value.shape for value in given if hasattr(value, "shape")][-2:]
        return prod(outputs[0].tensor_shape) * left[-1]
    if not node.node_type.startswith("conv"):
        return 0
    images, kernel = _operands(node)
    # A transposed convolution spreads every input number over the kernel, an ordinary one gathers
    # the kernel for every output number.
    spread = "transpose" in node.node_type or not outputs
    return prod(images.shape if spread else outputs[0].tensor_shape) * prod(kernel.shape[1:])


def source_of(graph: NNCFGraph, node: NNCFNode) -> Source:
    """What made the numbers that leave ``node``, looking up through ops that keep them."""
    while node.node_type in KEEPS_NUMBERS or _fills_with_zero(node):
        edges = sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
        if not edges:
            break
        node = edges[0].from_node
    if node.node_type in JOINS:
        sources = {source_of(graph, before) for before in graph.get_previous_nodes(node)}
        return sources.pop() if len(sources) == 1 else Source("activation")
    if is_factor(node.node_name):
        product = graph.get_input_edge_by_port_id(node, 0)
        return replace(source_of(graph, product.from_node), rescaled=True)
    if node.node_type == "nncf_model_const":
        return Source("weight", parameter=node.node_name)
    if node.node_type == "nncf_model_input":
        return Source("image")
    if node.node_type == "softmax":
        return Source("softmax")
    if node.node_type in ACTIVATIONS:
        return Source(_activation_name(node))
    if node.node_type in ("hardtanh", "hardtanh_") and _argument(node, 1, "min_val") == 0:
        return Source("relu6")  # which is how nn.ReLU6 computes it
    gate = _sigmoid_gate(graph, node)
    return Source("silu", minimum_scale=gate) if gate else Source("activation")


def _fills_with_zero(node: NNCFNode) -> bool:
    """Whether the node masks some numbers with zero, as attention weights are."""
    if node.node_type not in ("masked_fill", "masked_fill_"):
        return False
    value = _argument(node, 2, "value")
    return isinstance(value, (int, float)) and value == 0


def _argument(node: NNCFNode, place: int, name: str) -> Any:
    """An argument of a call, or None if it was not given."""
    call = node.layer_attributes
    return call.op_args[place] if len(call.op_args) > place else call.op_kwargs.get(name)


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
