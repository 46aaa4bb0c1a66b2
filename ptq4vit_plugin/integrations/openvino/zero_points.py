"""Zero points of activations moved into the bias behind the product.

``s (q - z) · W + b = s q · W + (b - s z · sum(W))``: a product of codes needs no zero point if the
bias makes up for it. OpenVINO keeps the zero point instead, and behind it a product of bytes whose
rescaling, bias and rounding are not fused. Here the quantizer gives ``s q`` for the numbers that
gave ``s (q - z)``, and the bias changes; which numbers are rounded to which does not.
"""

from __future__ import annotations

import numpy as np
from openvino import Input, Model, Node
from openvino import opset13 as ops

from ptq4vit_plugin.integrations.openvino.graph import Grid, consumers, grid_of, int8_weight


def fold_zero_points(model: Model) -> None:
    """Move zero points of what enters linears and convolutions into their bias; changes the model.

    One stays where a convolution pads its input, as padding is zero and not the zero point's code,
    and where the weight is not one of int8 and its scale.
    """
    for quantizer in model.get_ordered_ops():
        grid = grid_of(quantizer)
        if grid is None or not grid.is_single or grid.is_signed or grid.given[0].item() == 0:
            continue
        taking = consumers(quantizer.output(0))
        sums = _weight_sums(taking[0]) if len(taking) == 1 else None
        if sums is not None:
            _fold(quantizer, grid, taking[0].get_node(), sums)
    model.validate_nodes_and_infer_types()


def _fold(quantizer: Node, grid: Grid, product: Node, sums: np.ndarray) -> None:
    lowest, highest = (end.item() for end in grid.given)
    for port, end in ((3, 0.0), (4, highest - lowest)):
        limit = quantizer.input_value(port).get_node().get_data()
        quantizer.input(port).replace_source_output(_constant(np.full_like(limit, end)).output(0))
    owed = lowest * sums
    taking = consumers(product.output(0))
    after = taking[0].get_node() if len(taking) == 1 else None
    if after is not None and after.get_type_name() == "Add":
        bias = after.input_value(1).get_node()
        if bias.get_type_name() == "Constant":
            after.input(1).replace_source_output(_constant(bias.get_data() + owed).output(0))
            return
    takers = product.output(0).get_target_inputs()
    added = ops.add(product, _constant(owed))
    added.set_friendly_name(f"{product.get_friendly_name()}/ZeroPoint")
    for taker in takers:
        taker.replace_source_output(added.output(0))


def _weight_sums(taken: Input) -> np.ndarray | None:
    """What a product gives for an input of ones, with as many dimensions as its output.

    None if that is not the same at every position, or the weight is unknown.
    """
    product = taken.get_node()
    kind, how = product.get_type_name(), product.get_attributes()
    linear = kind == "MatMul" and how["transpose_b"] and not how["transpose_a"]
    plain = kind == "Convolution" and how["auto_pad"] in ("explicit", "valid")
    unpadded = plain and not any((*how["pads_begin"], *how["pads_end"]))
    weight = int8_weight(product.input_value(1).get_node())
    if taken.get_index() != 0 or not (linear or unpadded) or weight is None:
        return None
    codes, scale = weight
    sums = (codes.astype(np.float64) * scale).reshape(len(codes), -1).sum(1)
    rank = product.get_output_partial_shape(0).rank.get_length()
    channel = rank - 1 if linear else 1
    return np.expand_dims(sums, [d for d in range(rank) if d != channel])


def _constant(value: np.ndarray) -> Node:
    return ops.constant(value.astype(np.float32))
