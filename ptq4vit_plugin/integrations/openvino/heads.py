"""Quantizers with a step per head kept apart from the product whose output they quantize.

OpenVINO 2026.4 fuses a quantizer into the product of activations in front of it, but takes several
steps for those of the output's last dimension, and then compiles the model for no shape. Linear
attention has such quantizers: one product's output is another one's operand.
"""

from __future__ import annotations

import numpy as np
from openvino import Model
from openvino import opset13 as ops

from ptq4vit_plugin.integrations.openvino.graph import consumers, grid_of, replace, shape

#: Dimensions of a product per head: images, heads, rows, columns.
DIMENSIONS = 4


def keep_apart(model: Model) -> None:
    """Reshape the output of such products for their quantizer; the model is changed.

    A reshape moves no numbers, and OpenVINO fuses nothing across it.
    """
    for quantizer in model.get_ordered_ops():
        grid = grid_of(quantizer)
        if grid is None:
            continue
        product = quantizer.input_value(0)
        columns = shape(product)[-1]
        per_head = all(end.size in (1, end.shape[1]) for end in (*grid.taken, *grid.given))
        if (
            grid.is_single
            or len(shape(product)) != DIMENSIONS
            or not per_head
            or columns is None
            or product.get_node().get_type_name() != "MatMul"
            or len(consumers(product)) > 1
        ):
            continue
        # Zero stands for the dimension as it is.
        together = ops.reshape(product, np.array([0, 0, -1]), special_zero=True)
        limits = [
            ops.constant(end.reshape(1, -1, 1).astype(np.float32))
            for end in (*grid.taken, *grid.given)
        ]
        rounded = ops.fake_quantize(together, *limits, quantizer.get_attributes()["levels"])
        apart = ops.reshape(rounded, np.array([0, 0, -1, columns]), special_zero=True)
        replace(quantizer.output(0), apart.output(0))
    model.validate_nodes_and_infer_types()
