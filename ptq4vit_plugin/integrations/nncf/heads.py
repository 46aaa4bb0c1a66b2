"""Which dimension of a matrix product counts the heads of attention.

Not every leading dimension does: in HaloNet the second one of four counts blocks of the image, and
scales along it would fit one image size only. Heads are what a model cuts its channels into, so a
dimension of heads is one that can be followed back to the output channels of a linear or a
convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFGraphEdge, NNCFNode
from torch import Tensor


class _Digit(NamedTuple):
    """Part of a dimension's index: ``index // step`` counts up to ``size`` and starts again.

    Where heads are moved into the batch, (image, head) is one dimension; the head is its last
    digit, with step 1.
    """

    dim: int
    step: int
    size: int


def head_dimension(graph: NNCFGraph, product: NNCFNode, rank: int) -> int | None:
    """The leading dimension of a product's output ``[..., N, O]`` that counts heads.

    Parameters
    ----------
    rank
        Number of dimensions of the output. Operands align with it at the right, as in broadcasting.

    Returns
    -------
    int or None
        None where there is one head, or where heads cannot be told from images or windows.
    """
    for edge in _inputs(graph, product):
        shape = tuple(edge.tensor_shape)
        for dim in range(len(shape) - 2):
            if shape[dim] > 1 and _is_of_channels(graph, edge, _Digit(dim, 1, shape[dim])):
                return dim + rank - len(shape)
    return None


def _is_of_channels(graph: NNCFGraph, edge: NNCFGraphEdge, digit: _Digit) -> bool:
    """Whether part of the tensor on an edge is part of an op's output channels."""
    while True:
        kind = edge.from_node.node_type
        channels = {"linear": len(edge.tensor_shape) - 1, "conv2d": 1}.get(kind)
        if channels is not None and digit.dim == channels:
            return True
        before = _before(graph, edge, digit)
        if before is None:
            return False
        edge, digit = before


def _before(
    graph: NNCFGraph, after: NNCFGraphEdge, digit: _Digit
) -> tuple[NNCFGraphEdge, _Digit] | None:
    """The input of the op that made a tensor, and the part of it that ``digit`` came from."""
    node, shape = after.from_node, tuple(after.tensor_shape)
    edges = _inputs(graph, node)
    if len(edges) == 1:
        source = _viewed(node, tuple(edges[0].tensor_shape), after.output_port_id, digit)
        if source is not None:
            return edges[0], source
    if (
        node.node_type.strip("_") in ("matmul", "bmm", "linalg_matmul")
        and digit.dim == len(shape) - 1
    ):
        edges = edges[1:]
    # Arithmetic, norms, pieces and joints keep the order of dimensions.
    edges = [edge for edge in edges if len(edge.tensor_shape) == len(shape)]
    same = [edge for edge in edges if edge.tensor_shape[digit.dim] == shape[digit.dim]]
    return next(((edge, digit) for edge in (*same, *edges)), None)


def _viewed(node: NNCFNode, shape: tuple[int, ...], port: int, digit: _Digit) -> _Digit | None:
    """The part of the input that a part of the output comes from, if the output is a view.

    The function runs once more on a tensor without memory: the strides of a view tell.
    """
    call = node.layer_attributes
    x = torch.empty(shape, device="meta")
    try:
        with torch.no_grad():
            output = call.func(x, *call.op_args[1:], **call.op_kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    y = output if isinstance(output, Tensor) else output[port]
    if y._base is not x:
        return None
    stride = y.stride(digit.dim) * digit.step
    for dim, (step, size) in enumerate(zip(x.stride(), x.shape, strict=True)):
        if step <= stride and stride * digit.size <= step * size:
            return _Digit(dim, stride // step, digit.size)
    return None


def _inputs(graph: NNCFGraph, node: NNCFNode) -> list[NNCFGraphEdge]:
    return sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
