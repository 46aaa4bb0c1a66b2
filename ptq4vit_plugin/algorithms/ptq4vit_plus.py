"""PTQ4ViT plus: folds, zero points, uneven levels, closed-form compensation; plain int8."""

from __future__ import annotations

from typing import Any, Literal

from nncf.common.graph.graph import NNCFGraph

from ptq4vit_plugin.algorithms.compensate import Compensate, Repairs
from ptq4vit_plugin.algorithms.fold_norms import FoldNorms, Folds
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.scale_search import ScaleSearch
from ptq4vit_plugin.algorithms.settings import Activations, QuantizerName, Twin, TwinChoice
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import example_of
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.passes import traced
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.nncf.streams import find_images


class PlusActivations(Activations):
    """As `Activations`; with a zero point where a bias can take it up, and below 8 bits with levels
    that may lie closer around zero."""

    quantizer: QuantizerName = "piecewise"


class PlusTwin(Twin):
    """As `Twin`; by default neither is a twin, both are single integer grids."""

    softmax: TwinChoice = "numerator"
    gelu: TwinChoice = "piecewise"


class PlusGradient(Gradient):
    """As `Gradient`; by default of the output's squared distance.

    Where a model is sure of its answer the Fisher information vanishes, and a few of the
    calibration images would decide everything.
    """

    kind: Literal["fisher", "gauss_newton", "labels", "output"] = "output"


class PTQ4ViTPlus(ScaleSearch):
    """The Hessian-guided search between exact folds and closed-form compensation.

    Same steps as the config ``[fold_norms, ptq4vit with these quantizers, compensate]``. Every
    operand is one integer tensor: no twin quantizers, so every product is a single integer
    product.
    """

    activations: PlusActivations = PlusActivations()
    twin: PlusTwin = PlusTwin()
    gradient: PlusGradient = PlusGradient()
    fold: Folds = Folds()
    compensate: Repairs = Repairs()

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Fold, search and compensate in place; return the model. Raises as the three steps do."""
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        example = example_of(data).to(module)
        prepare(module, example)
        if any(dict(self.fold).values()):
            FoldNorms(**dict(self.fold)).fold(module, data)
        graph = traced(module, example)
        repairs = any(dict(self.compensate).values())
        if repairs:  # refused here, a model that mixes images is not searched in vain
            buffers = {name for name, _ in module.named_buffers()}
            find_images(module, data, find_ops(graph, len(example), buffers)[0])
        super().apply(model, graph, dataset=data)
        if repairs:
            gradient = self.gradient if self.metric == "hessian" else None
            Compensate(**dict(self.compensate), gradient=gradient).compensate(module, data)
        return model
