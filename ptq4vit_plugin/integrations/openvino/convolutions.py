"""Convolutions of int8 that OpenVINO computes wrongly, written so that it does not.

With AMX, OpenVINO 2026.4 (oneDNN) computes something else in two cases: few input channels and a
wide kernel, as in PVT v2's reduction of keys and values (32 channels, 8 x 8), and groups whose
input is padded and has a zero point, as in Visformer. A file may run on another CPU than the one
that it is made on, so both are avoided everywhere. `wrong_convolutions` finds others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from openvino import Model, Node, Output
from openvino import opset13 as ops

from ptq4vit_plugin.integrations.openvino.graph import (
    Grid,
    grid_of,
    int8_weight,
    replace,
    shape,
)

#: Input channels that are enough.
ENOUGH = 64
#: Fewer are computed wrongly if they are a multiple of 8, the kernel's width is even, and channels
#: times width are as many at least: found by trying 2 to 128 channels, kernels of 1 to 16.
MULTIPLE, WIDE = 8, 128
#: Dimensions of images.
RANK = 4
KINDS = ("Convolution", "GroupConvolution")
#: A product of the same codes in integers and in float32 is nearer than this, in dB.
SAME = 50.0


def rewrite_convolutions(model: Model) -> None:
    """Give few channels more, of zeros, and pad groups in front of their quantizer.

    The model is changed; what it computes is the same.
    """
    for product in model.get_ordered_ops():
        kind = product.get_type_name()
        if kind not in KINDS:
            continue
        quantizer = product.input_value(0).get_node()
        grid = grid_of(quantizer)
        if grid is None or not grid.is_single or len(shape(product.output(0))) != RANK:
            continue
        if kind == "Convolution":
            _add_channels(product, quantizer)
        else:
            _pad_ahead(product, quantizer, grid)
    model.validate_nodes_and_infer_types()


def _add_channels(product: Node, quantizer: Node) -> None:
    """Channels of zeros behind those of a convolution that has too few."""
    _, channels, _, width = shape(product.input_value(1))
    if channels >= ENOUGH or channels % MULTIPLE or width % 2 or channels * width < WIDE:
        return
    behind = np.array([0, ENOUGH - channels, 0, 0])
    weight = int8_weight(product.input_value(1).get_node())
    if weight is None:
        return
    codes = ops.constant(np.pad(weight[0], [(0, n) for n in behind]))
    padded = ops.multiply(ops.convert(codes, "f32"), ops.constant(weight[1]))
    # Whatever the quantizer makes of zero: the weights there are zero.
    product.input(0).replace_source_output(_quantized(quantizer, 0 * behind, behind))
    product.input(1).replace_source_output(padded.output(0))


def _pad_ahead(product: Node, quantizer: Node, grid: Grid) -> None:
    """Pad a convolution of groups with a zero point in front of its quantizer."""
    how = product.get_attributes()
    begin, end = how["pads_begin"], how["pads_end"]
    padded = how["auto_pad"] == "explicit" and any((*begin, *end))
    depthwise = shape(product.input_value(1))[2] == 1
    if grid.is_signed or grid.taken[0].item() == 0 or depthwise or not padded:
        return
    ahead, behind = (np.array([0, 0, *pads]) for pads in (begin, end))
    made = ops.group_convolution(
        _quantized(quantizer, ahead, behind),
        product.input_value(1),
        how["strides"],
        [0] * len(begin),
        [0] * len(end),
        how["dilations"],
    )
    made.set_friendly_name(product.get_friendly_name())
    replace(product.output(0), made.output(0))


def _quantized(quantizer: Node, ahead: np.ndarray, behind: np.ndarray) -> Output:
    """What a quantizer gives for its input with zeros around it."""
    wide = ops.pad(quantizer.input_value(0), ahead, behind, "constant")
    limits = [quantizer.input_value(port) for port in range(1, 5)]
    return ops.fake_quantize(wide, *limits, quantizer.get_attributes()["levels"]).output(0)


def wrong_convolutions(
    model: Model, run: Callable[[Model, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    """Names of the convolutions that come out differently in integers and in float on this CPU.

    Parameters
    ----------
    model
        Not changed.
    run
        Gives the output of a model in integers and in float arithmetic for one input.

    Returns
    -------
    list of str
        Names of nodes; of convolutions alike in all but their numbers the first.
    """
    model, seen, wrong = model.clone(), set(), []
    for product in model.get_ordered_ops():
        quantizer = product.input_value(0).get_node() if product.get_type_name() in KINDS else None
        grid = None if quantizer is None else grid_of(quantizer)
        if grid is None or not grid.is_single:
            continue
        size = [1, *shape(quantizer.input_value(0))[1:]]
        how = product.get_attributes().values()
        codes = grid.is_signed, grid.taken[0].item() == 0
        alike = (*size, *shape(product.input_value(1)), *codes, *map(str, how))
        if None in size or alike in seen:
            continue
        seen.add(alike)
        images = ops.parameter(size, np.float32)
        quantizer.input(0).replace_source_output(images.output(0))
        low, high = (end.item() for end in grid.taken)
        x = np.random.default_rng(0).uniform(low, high, size).astype(np.float32)
        integer, floating = run(Model([product.output(0)], [images]), x)
        noise = np.square(integer - floating).mean()
        if noise * 10 ** (SAME / 10) > np.square(floating).mean():
            wrong.append(product.get_friendly_name())
    return wrong
