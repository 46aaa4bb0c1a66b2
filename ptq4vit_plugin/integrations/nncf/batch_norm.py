"""Batch normalization that follows a convolution, folded into the convolution's weight."""

from __future__ import annotations

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from torch import nn

EPS_PORT = 7  # torch.batch_norm(input, weight, bias, mean, variance, training, momentum, eps, ...)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, graph: NNCFGraph) -> list[str]:
    """Scale convolutions by the batch normalization that follows them, as runtimes do.

    What is quantized is then the weight that a runtime multiplies with. No module is added or
    removed, so a checkpoint needs nothing but the changed values: the normalization stays, with
    unit scale and variance; what it still adds goes to the convolution's bias where there is one.
    In evaluation mode the model computes the same as before, but for rounding.

    Parameters
    ----------
    model
        Changed in place.
    graph
        Its NNCF graph.

    Returns
    -------
    list of str
        Names of the folded convolutions in the graph.
    """
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    folded = []
    for norm in graph.get_all_nodes():
        if norm.node_type != "batch_norm":
            continue
        sources = {edge.input_port_id: edge.from_node for edge in graph.get_input_edges(norm)}
        arguments = norm.layer_attributes.op_args
        if len(arguments) <= EPS_PORT or not _own_constants(graph, sources, range(1, 5)):
            continue
        convolution = sources.get(0)
        if convolution is None or convolution.node_type != "conv2d":
            continue
        if len(graph.get_output_edges(convolution)) != 1:
            continue
        operands = {e.input_port_id: e.from_node for e in graph.get_input_edges(convolution)}
        has_bias = 2 in operands
        if not _own_constants(graph, operands, (1, 2) if has_bias else (1,)):
            continue
        gamma, beta, mean, variance = (values[sources[port].node_name] for port in range(1, 5))
        eps = arguments[EPS_PORT]
        factor = gamma.double() / (variance.double() + eps).sqrt()
        weight = values[operands[1].node_name]
        weight.copy_(weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
        shift = beta.double() - mean.double() * factor
        if has_bias:
            bias = values[operands[2].node_name]
            bias.copy_(bias * factor + shift)
            shift = torch.zeros_like(shift)
        gamma.fill_(1)
        beta.copy_(shift)
        mean.zero_()
        variance.fill_(1 - eps)
        folded.append(convolution.node_name)
    return folded


def _own_constants(graph: NNCFGraph, sources: dict[int, NNCFNode], ports: range | tuple) -> bool:
    """Whether the values at these ports are the model's constants, each used nowhere else."""
    return all(
        port in sources
        and sources[port].node_type == "nncf_model_const"
        and len(graph.get_output_edges(sources[port])) == 1
        for port in ports
    )
