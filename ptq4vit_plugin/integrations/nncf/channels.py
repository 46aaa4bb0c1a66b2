"""Which channel of one op arrives where at another: found on the graph, proved by running it.

The graph says which ops lie between a producer and its consumers. Which number goes where through
reshapes, splits and permutations is not read off the graph: the producer's output is replaced by
the numbers of its channels, and what arrives is the map. A path that does more than moving (and
scaling) numbers does not pass this test.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from torch import Tensor, nn

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.graph import KEEPS_NUMBERS
from ptq4vit_plugin.integrations.nncf.hooks import is_factor, watching
from ptq4vit_plugin.integrations.nncf.passes import run, tensors_of
from ptq4vit_plugin.plan import FoundOp

NORMS = ("layer_norm", "rms_norm")
# timm scales queries, or queries and keys, by a constant before their product.
MOVES_OR_SCALES = KEEPS_NUMBERS | {"mul", "__mul__", "__rmul__"}
# What may happen to scores on their way to softmax without breaking its invariance to a constant
# per row: numbers are moved, scaled by a constant, or get a bias or mask added.
SCORES_TO_SOFTMAX = MOVES_OR_SCALES | {"add", "__add__", "__radd__", "add_", "iadd", "__iadd__"}


@dataclass(frozen=True)
class NormPath:
    """A norm whose output goes to linears only, channel by channel.

    Attributes
    ----------
    shift
        Whether a constant may be moved as well: the norm and every consumer have a bias, and no
        zeros are padded in between.
    """

    weight: str
    bias: str | None
    consumers: tuple[FoundOp, ...]
    shift: bool


@dataclass(frozen=True)
class HeadRows:
    """Rows ``[heads, D]`` of a linear that make one factor of a product of attention."""

    linear: FoundOp
    rows: Tensor


@dataclass(frozen=True)
class ScorePath:
    """Queries and keys of one attention. ``shift``: a constant may be taken off the keys."""

    product: FoundOp
    queries: HeadRows
    keys: HeadRows
    shift: bool


@dataclass(frozen=True)
class ValuePath:
    """Values of one attention and the input columns ``[heads, D]`` of the linear behind it.

    ``shift``: a constant may be taken off the values, because the weights of every row sum to 1.
    """

    product: FoundOp
    values: HeadRows
    projection: FoundOp
    columns: Tensor
    shift: bool


def norm_paths(
    model: nn.Module, graph: NNCFGraph, found: Sequence[FoundOp], batch: Batch
) -> list[NormPath]:
    """Norms whose scale, and perhaps shift, can be folded into the linears behind them."""
    linears = {op.name: op for op in found if op.kind == "linear"}
    norms = {}
    for node in graph.topological_sort():
        parameters = _norm_parameters(model, graph, node)
        consumers = _leaves(graph, node, KEEPS_NUMBERS)
        if parameters is not None and consumers and set(consumers) <= set(linears):
            norms[node.node_name] = (parameters, [linears[name] for name in sorted(consumers)])
    replacing = {name: _count_last for name in norms}
    watched = [(op.name, 0) for _, consumers in norms.values() for op in consumers]
    seen = _run(model, batch, replacing, watched)
    ports = {name: [(op.name, 0) for op in consumers] for name, (_, consumers) in norms.items()}
    hidden = used_elsewhere(model, batch, ports)
    paths = []
    for name, ((weight, bias), consumers) in norms.items():
        arrived = [seen.get((op.name, 0)) for op in consumers]
        channels = model.get_parameter(weight).numel()
        count = torch.arange(1.0, channels + 1)
        fits = [x is not None and x.shape[-1] == channels for x in arrived]
        owned = all(_owns_weight(graph, op) for op in consumers)
        if name in hidden or not owned or not all(fits):
            continue
        if not all(((x == count.to(x)) | (x == 0)).all() for x in arrived):
            continue
        padded = any((x == 0).any() for x in arrived)
        shift = not padded and bias is not None and all(op.bias for op in consumers)
        paths.append(NormPath(weight, bias, tuple(consumers), shift))
    return paths


def attention_paths(
    model: nn.Module, graph: NNCFGraph, found: Sequence[FoundOp], batch: Batch
) -> tuple[list[ScorePath], list[ValuePath]]:
    """Attentions whose queries and keys, or values, are rows of linears, moved and scaled only."""
    ops = {op.name: op for op in found}
    linears = {op.name: op for op in found if op.kind == "linear" and _owns_weight(graph, op)}
    products = {
        op.name: op
        for op in found
        if op.role in ("qk", "attention_v") and len(op.output_shape) == 4
    }
    watched = [(name, port) for name in products for port in (0, 1)]
    numbers = _run(model, batch, {name: _count_last for name in linears}, watched)
    factors = _run(model, batch, {name: torch.ones_like for name in linears}, watched)
    ports: dict[str, list[tuple[str, int]]] = {}  # where the numbers of a changed op may go

    def rows(product: FoundOp, port: int) -> HeadRows | None:
        node = _up(graph, graph.get_node_by_name(product.name), port)
        linear = linears.get(node.node_name) if node is not None else None
        if linear is None:
            return None
        reached = _leaves(graph, node, MOVES_OR_SCALES)
        if not set(reached) <= set(products):
            return None
        ports[linear.name] = [(name, port) for name in reached for port in (0, 1)]
        if linear.bias is None and any(e.input_port_id == 2 for e in graph.get_input_edges(node)):
            return None  # a bias that is computed cannot be changed
        place = (product.name, port)
        if place not in numbers or place not in factors:
            return None
        channel_last = not (product.role == "qk" and port == 1)
        found_rows = _decode(numbers[place], factors[place], channel_last)
        if found_rows is None or found_rows.max() >= linear.shapes[1][0]:
            return None
        return HeadRows(linear, found_rows)

    scores, weighted = [], []
    for product in products.values():
        left, right = rows(product, 0), rows(product, 1)
        node = graph.get_node_by_name(product.name)
        if product.role == "qk":
            if left and right:
                leaves = _reached(graph, node, SCORES_TO_SOFTMAX)
                invariant = {kind for _, kind in leaves} == {"softmax"}
                shift = invariant and right.linear.bias is not None
                if shift:
                    ports[product.name] = [(name, 0) for name, _ in leaves]
                scores.append(ScorePath(product, left, right, shift))
            continue
        consumers = _leaves(graph, node, KEEPS_NUMBERS)
        if right is not None and len(consumers) == 1 and consumers[0] in linears:
            weighted.append((product, right, ops[consumers[0]]))
            ports[product.name] = [(consumers[0], 0)]
    counting = {product.name: _count_heads for product, _, _ in weighted}
    watched = [(op.name, 0) for product, _, linear in weighted for op in (product, linear)]
    arrived = _run(model, batch, counting, watched)
    values = []
    for product, right, projection in weighted:
        columns = _columns(product, arrived.get((projection.name, 0)))
        if columns is not None:
            # A row that a mask leaves nothing of has a sum of zero.
            sums = arrived[product.name, 0].double().sum(-1)
            shift = (
                product.sources[0].kind == "softmax"
                and bool(((sums - 1).abs() < 0.01).all())
                and right.linear.bias is not None
                and projection.bias is not None
            )
            values.append(ValuePath(product, right, projection, columns, shift))
    hidden = used_elsewhere(model, batch, ports)
    return (
        [
            replace(path, shift=path.shift and path.product.name not in hidden)
            for path in scores
            if hidden.isdisjoint((path.queries.linear.name, path.keys.linear.name))
        ],
        [
            path
            for path in values
            if hidden.isdisjoint((path.values.linear.name, path.product.name))
        ],
    )


def unreached_linears(
    graph: NNCFGraph, found: Sequence[FoundOp], reached: Collection[str]
) -> list[FoundOp]:
    """Linears whose input channels no fold can rescale, and whose input nothing else takes.

    Parameters
    ----------
    reached
        Names of the linears that folds do reach.
    """
    linears = []
    for op in found:
        if op.kind != "linear" or op.name in reached or not op.sources[1].parameter:
            continue
        before = graph.get_input_edge_by_port_id(graph.get_node_by_name(op.name), 0).from_node
        alone = len(graph.get_next_nodes(before)) == 1 and not is_factor(before.node_name)
        if alone and op.sources[0].kind != "image" and _owns_weight(graph, op):
            linears.append(op)
    return linears


def used_elsewhere(
    model: nn.Module, batch: Batch, ports: dict[str, list[tuple[str, int]]]
) -> set[str]:
    """Names of ops whose outputs reach the model's result past the input ports given for each.

    A tensor that is returned in a mapping or a nested list is no edge of the graph. With the usual
    numbers at the ports and none at the outputs, the result has none where it has another way.
    """
    seen = _run(model, batch, {}, [place for places in ports.values() for place in places])

    def used(names: Sequence[str]) -> bool:
        places = {place for name in names for place in ports[name]} & set(seen)
        usual = {place: lambda _, x=seen[place]: x.clone() for place in places}
        none = {name: lambda y: torch.full_like(y, torch.nan) for name in names}
        try:
            with torch.no_grad(), watching(model, usual, none):
                return any(x.isnan().any() for x in tensors_of(run(model, batch)))
        except DataError:  # as of what is looked up by these numbers
            return True

    return {name for name in ports if used([name])} if used(list(ports)) else set()


def _norm_parameters(
    model: nn.Module, graph: NNCFGraph, node: NNCFNode
) -> tuple[str, str | None] | None:
    """Names of a norm's weight and bias, if they are parameters and nothing else uses them."""
    if node.node_type not in NORMS:
        return None
    constants = [
        edge.from_node
        for edge in sorted(graph.get_input_edges(node), key=lambda edge: edge.input_port_id)
        if edge.from_node.node_type == "nncf_model_const"
    ]
    if not constants or any(len(graph.get_next_nodes(constant)) > 1 for constant in constants):
        return None
    names = [constant.node_name for constant in constants]
    if not set(names) <= {name for name, _ in model.named_parameters()}:
        return None  # a buffer stays as it is
    return names[0], names[1] if len(names) > 1 else None


def _owns_weight(graph: NNCFGraph, op: FoundOp) -> bool:
    """Whether the linear's weight is a parameter and no other op uses it or the bias."""
    if op.sources[1].parameter is None:
        return False  # a weight that is computed cannot be changed
    names = [name for name in (op.sources[1].parameter, op.bias) if name]
    nodes = [graph.get_node_by_name(name) for name in names]
    return all(len(graph.get_next_nodes(node)) == 1 for node in nodes)


def _leaves(graph: NNCFGraph, node: NNCFNode, through: frozenset[str]) -> list[str]:
    """Names of the ops that a node's numbers reach; "" for a use that is not an op's port 0 or 1.

    A product uses both its ports, any other op its first only.
    """
    return sorted({name for name, _ in _reached(graph, node, through)})


def _reached(graph: NNCFGraph, node: NNCFNode, through: frozenset[str]) -> set[tuple[str, str]]:
    reached, stack, visited = set(), [node], set()
    while stack:
        step = stack.pop()
        if step.node_id in visited:
            continue
        visited.add(step.node_id)
        edges = graph.get_output_edges(step)
        if not edges:
            reached.add(("", "unused"))
        for edge in edges:
            after = edge.to_node
            if after.node_type in through and _one_input_moves(graph, after):
                stack.append(after)
            else:
                reached.add((after.node_name, after.node_type))
    return reached


def _one_input_moves(graph: NNCFGraph, node: NNCFNode) -> bool:
    """Whether only one input of a product by a constant is a number of the model."""
    if node.node_type not in ("mul", "__mul__", "__rmul__"):
        return True
    return len(graph.get_input_edges(node)) == 1


def _up(graph: NNCFGraph, node: NNCFNode, port: int) -> NNCFNode | None:
    """The node whose numbers arrive at a port, through functions that move or scale them."""
    edges = {edge.input_port_id: edge.from_node for edge in graph.get_input_edges(node)}
    step = edges.get(port)
    while step is not None and step.node_type in MOVES_OR_SCALES:
        previous = graph.get_previous_nodes(step)
        step = previous[0] if previous else None
    return step


def _count_last(y: Tensor) -> Tensor:
    """1, 2, 3, ... along the last dimension."""
    return torch.arange(1.0, y.shape[-1] + 1, dtype=y.dtype, device=y.device).expand_as(y).clone()


def _decode(number: Tensor, factor: Tensor, channel_last: bool) -> Tensor | None:
    """Row of the linear for every head and dimension ``[H, D]``, or None if it is no such map."""
    if not channel_last:
        number, factor = number.transpose(-1, -2), factor.transpose(-1, -2)
    number, factor = number.double(), factor.double()
    constant = factor.flatten()[0]
    if constant == 0 or not torch.allclose(factor, constant.expand_as(factor), rtol=1e-5):
        return None
    rows = number / constant - 1
    first = rows[:1, :, :1].round()
    if (rows - first).abs().max() > 0.01 or first.min() < 0:
        return None
    first = first[0, :, 0].long()
    return first if first.unique().numel() == first.numel() else None


def _count_heads(y: Tensor) -> Tensor:
    """1, 2, 3, ... along heads and dimensions of ``[B, H, N, D]``."""
    heads, dim = y.shape[1], y.shape[3]
    numbers = torch.arange(1.0, heads * dim + 1, dtype=y.dtype, device=y.device)
    return numbers.view(1, heads, 1, dim).expand_as(y).clone()


def _columns(product: FoundOp, arrived: Tensor | None) -> Tensor | None:
    """Input column of the projection that every head and dimension ``[H, D]`` of a product is.

    Parameters
    ----------
    arrived
        At the projection when the product gives `_count_heads`.
    """
    heads, dim = product.output_shape[1], product.output_shape[3]
    if arrived is None or arrived.shape[-1] != heads * dim:
        return None
    first = arrived.flatten(0, -2)[0]
    if not (arrived == first).all() or first.sort().values.unique().numel() != heads * dim:
        return None
    columns = torch.empty(heads * dim, dtype=torch.long)
    columns[first.long().cpu() - 1] = torch.arange(heads * dim)
    return columns.view(heads, dim)


@torch.no_grad()
def _run(
    model: nn.Module,
    batch: Batch,
    replacing: dict[str, Any],
    watched: Sequence[tuple[str, int]],
) -> dict[tuple[str, int], Tensor]:
    """What arrives at input ports when the outputs of ops are replaced."""
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(place: tuple[str, int]):
        def see(x: Tensor) -> None:
            seen[place] = x.detach().clone()

        return see

    with watching(model, {place: keep(place) for place in watched}, replacing):
        run(model, batch)
    return seen
