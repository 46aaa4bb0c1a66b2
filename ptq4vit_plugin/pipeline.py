"""Run the steps of a compression config on a copy of a model, as an NNCF pipeline."""

from __future__ import annotations

import copy
from typing import Any

import nncf
from nncf.quantization.algorithms.pipeline import Pipeline
from torch import nn

from ptq4vit_plugin import config as configs
from ptq4vit_plugin.algorithms.scale_search import ScaleSearch
from ptq4vit_plugin.errors import ConfigError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.capture import batches, taken_by_the_model
from ptq4vit_plugin.integrations.nncf.prepare import bare, prepare
from ptq4vit_plugin.integrations.timm.attention import fuse_attention
from ptq4vit_plugin.plan import Plan


def quantize(model: nn.Module, calibration_dataset: Any, compression: Any = "ptq4vit") -> nn.Module:
    """Quantize a model; the model that is given stays as it is.

    Parameters
    ----------
    model
        A timm transformer, or any model made of linears, convolutions and attention, on any device.
        Of a compiled or data-parallel model the one inside is quantized.
    calibration_dataset
        An ``nncf.Dataset``, or any iterable of image batches ``[B, C, H, W]`` or (images, labels)
        pairs. The paper uses 32 training images with the model's own test transform.
    compression
        A registered algorithm's name, a mapping ``{"algorithm": ..., fields}``, a list of these
        (steps of one NNCF pipeline), or a `config.Config`.

    Returns
    -------
    nn.Module
        An ordinary NNCF-compressed model in evaluation mode.

    Raises
    ------
    ConfigError
        The compression says something that is not allowed.
    DataError
        The calibration set is empty, not finite, or of a shape that the model does not take.
    ModelError
        The model has nothing to quantize.
    """
    model = bare(model)
    steps = configs.compression(compression)
    data = batches(calibration_dataset)
    model = copy.deepcopy(model).eval()
    # Without its calls taken apart NNCF cannot trace every model; each step decides on its own
    # whether it needs attention unfused.
    fuse_attention(model, prepare(model, data[0].to(model)))
    wrapper = hooks.with_graph(model, data[0].to(model).example)
    with taken_by_the_model(data[0]):
        wrapper.get_graph()
    pipeline = Pipeline([[algorithm(dataset=data, **fields)] for algorithm, fields in steps])
    result = pipeline.run(wrapper, nncf.Dataset([batch.to(model).example for batch in data]))
    return hooks.unwrap(result)


def plan(model: nn.Module, example_input: Any, compression: Any = "ptq4vit") -> Plan:
    """What `quantize` would do with a model, without calibrating.

    Parameters
    ----------
    example_input
        A batch of images, as the model takes them.

    Raises
    ------
    ConfigError
        No step of the compression is a scale search.
    """
    searches = [
        algorithm(**fields)
        for algorithm, fields in configs.compression(compression)
        if issubclass(algorithm, ScaleSearch)
    ]
    if not searches:
        raise ConfigError("compression: no step of it searches scales, so there is no plan to show")
    model = copy.deepcopy(bare(model)).eval()
    batch = batches([example_input])[0].to(model)
    prepare(model, batch)
    with taken_by_the_model(batch):
        graph = hooks.trace(model, batch.example)
    return searches[-1].plan(model, graph, len(batch))[0]
