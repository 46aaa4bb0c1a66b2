"""Quantizers moved up to the product whose output they quantize.

Between a product and the quantizer of its output there is often nothing but a new order of the
same numbers: queries, keys and values are cut out of one linear's output, and heads are merged
before the projection. OpenVINO fuses a quantizer into the product in front of it, so that 8-bit
codes are what is reordered; behind a reordering it is a pass of its own over floats, and two more
where the execution hint is bfloat16, because its kernel takes float32 only. Which numbers are
rounded to which does not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from openvino import Model, Node, Output
from openvino import opset13 as ops

from ptq4vit_plugin.integrations.openvino.graph import (
    HIGHEST,
    LEVELS,
    LOWEST,
    Grid,
    consumers,
    grid_of,
    replace,
    shape,
)

#: Nodes that give the same numbers in another order or shape.
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
SPLITS = ("Split", "VariadicSplit")
#: Fewest dimensions of a value to which a quantizer moves. OpenVINO 2026.4 computes a mean over
#: positions, a factor per channel and a quantizer behind each other wrongly.
DIMENSIONS = 3


@dataclass(frozen=True)
class Place:
    """A value at which a quantizer could stand, and its steps there.

    Attributes
    ----------
    value
        What it would quantize.
    steps
        One number or several, with as many dimensions as `value` has.
    """

    value: Output
    steps: np.ndarray


def place_quantizers(model: Model) -> None:
    """Move quantizers of activations up, past what splits and reorders; the model is changed."""
    for node in model.get_ordered_ops():
        if node.get_type_name() in SPLITS:
            _move_past_split(node)
    for node in model.get_ordered_ops():
        grid = grid_of(node)
        if grid is not None and grid.is_single:
            _move(node, grid)
    model.validate_nodes_and_infer_types()


def _move(quantizer: Node, grid: Grid) -> None:
    """Move a quantizer with one step past what only reorders."""
    start = Place(quantizer.input_value(0), grid.taken[1])
    place = _highest(start)
    if place is not start:
        limits = (end.reshape(()) for end in (*grid.taken, *grid.given))
        _insert(place.value, limits)
        replace(quantizer.output(0), start.value)


def _move_past_split(split: Node) -> None:
    """Put one quantizer in front of a split in place of one behind each of its outputs.

    It has the steps of all of them and gives codes, which are scaled behind the split.
    """
    found = [_quantizer_below(output) for output in split.outputs()]
    grids = [None if quantizer is None else grid_of(quantizer) for quantizer in found]
    if not all(grid is not None and grid.is_signed for grid in grids):
        return
    axis = int(split.input_value(1).get_node().get_data())
    steps = []
    for quantizer, grid, output in zip(found, grids, split.outputs(), strict=True):
        place = _highest(Place(quantizer.input_value(0), grid.taken[1] / HIGHEST))
        width = shape(output)[axis]
        if place.value != output or width is None:
            return
        steps.append(np.repeat(place.steps, width // place.steps.shape[axis], axis))
    most = np.max([x.shape for x in steps], 0)
    most[axis] = 1
    spread = [np.broadcast_to(x, np.maximum(x.shape, most)) for x in steps]
    place = _highest(Place(split.input_value(0), np.concatenate(spread, axis)))
    if len(consumers(place.value)) > 1:
        return
    _insert(place.value, (place.steps * LOWEST, place.steps * HIGHEST, LOWEST, HIGHEST))
    for quantizer, grid in zip(found, grids, strict=True):
        step = ops.constant((grid.given[1] / HIGHEST).astype(np.float32))
        replace(quantizer.output(0), ops.multiply(quantizer.input_value(0), step).output(0))


def _highest(place: Place) -> Place:
    """The highest place that a quantizer at `place` can move to."""
    while (above := _above(place)) is not None:
        place = above
    return place


def _above(place: Place) -> Place | None:
    """The place one node higher; None if the quantizer cannot move there."""
    node = place.value.get_node()
    if node.get_type_name() not in LAYOUT or len(consumers(place.value)) > 1:
        return None
    if len(shape(node.input_value(0))) < DIMENSIONS:
        return None
    steps = _before(node, place.steps)
    return None if steps is None else Place(node.input_value(0), steps)


def _before(node: Node, steps: np.ndarray) -> np.ndarray | None:
    """Steps for what enters a node that reorders, from those for what leaves it."""
    inside, outside = shape(node.input_value(0)), shape(node.output(0))
    if steps.size == 1:
        return steps.reshape([1] * len(inside))
    if node.get_type_name() == "Transpose":
        order = node.input_value(1).get_node()
        known = order.get_type_name() == "Constant"
        return steps.transpose(np.argsort(order.get_data())) if known else None
    if node.get_type_name() == "Squeeze":
        axes = node.input_value(1).get_node().get_data().reshape(-1)
        return np.expand_dims(steps, tuple(int(axis) for axis in axes))
    # A last dimension that is taken apart, and steps that vary inside of it.
    for first in range(len(outside)):
        apart = outside[first:]
        if None in apart or math.prod(apart) != inside[-1]:
            continue
        within = steps[(0,) * first]
        if within.size < steps.size:
            return None
        return np.broadcast_to(within, apart).reshape([1] * (len(inside) - 1) + [-1])
    return None


def _quantizer_below(output: Output) -> Node | None:
    """The quantizer that a value goes to, by way of what reorders and to nothing else."""
    while True:
        taking = consumers(output)
        if len(taking) != 1:
            return None
        node = taking[0].get_node()
        if node.get_type_name() == "FakeQuantize":
            return node
        if node.get_type_name() not in LAYOUT:
            return None
        output = node.output(0)


def _insert(value: Output, limits: Iterable[np.ndarray | float]) -> None:
    """Put a quantizer between `value` and what takes it."""
    taking = value.get_target_inputs()
    constants = [ops.constant(np.asarray(limit, np.float32)) for limit in limits]
    quantizer = ops.fake_quantize(value, *constants, LEVELS)
    for consumer in taking:
        consumer.replace_source_output(quantizer.output(0))
