"""PTQ4ViT plus with block reconstruction: minutes of learning for 4 and 3 bits."""

from __future__ import annotations

import copy
import time
from typing import Any

from nncf.common.graph.graph import NNCFGraph

from ptq4vit_plugin.algorithms.ptq4vit_plus import PTQ4ViTPlus
from ptq4vit_plugin.algorithms.reconstruct import Learning, Reconstruct, split
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.record import attach, record_of


class PTQ4ViTRecon(PTQ4ViTPlus):
    """`PTQ4ViTPlus`, and from where it ends `Reconstruct`, with the model as it came as target."""

    reconstruct: Learning = Learning()

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Fold, search, compensate and learn in place; return the model. Raises as these do."""
        started = time.perf_counter()
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        teacher = copy.deepcopy(module)
        # What decides is seen by no step before: it would favour what was fitted to it.
        fit, check = split(data)
        super().apply(model, graph, dataset=fit)
        Reconstruct(**dict(self.reconstruct)).reconstruct(module, teacher, fit, check)
        whole = {"images": sum(map(len, data)), "seconds": time.perf_counter() - started}
        attach(module, record_of(module).model_copy(update=whole))
        return model
