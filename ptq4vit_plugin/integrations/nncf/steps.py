"""NNCF's own algorithms as steps of a compression config."""

from __future__ import annotations

from typing import Any

from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm
from nncf.quantization.algorithms.smooth_quant.algorithm import SmoothQuant
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ptq4vit_plugin.errors import ModelError
from ptq4vit_plugin.integrations.nncf.hooks import quantizers, unwrap


class SmoothQuantStep(BaseModel, Algorithm):
    """NNCF's SmoothQuant: moves activation outliers into the weights of the linears that follow.

    Attributes
    ----------
    alpha
        How much of a channel's range moves from activations into weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=0.95, ge=0, le=1)

    _algorithm: SmoothQuant = PrivateAttr()

    def __init__(self, dataset: Any = None, **fields: Any) -> None:
        # NNCF's pipeline collects SmoothQuant's statistics, so it needs no dataset of its own.
        super().__init__(**fields)
        # Negative: NNCF's way to leave convolutions alone.
        self._algorithm = SmoothQuant(alpha_map={"convolution": -1, "matmul": self.alpha})

    @property
    def available_backends(self) -> list[BackendType]:
        """Those of NNCF's algorithm."""
        return self._algorithm.available_backends

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """What NNCF's algorithm asks for."""
        return self._algorithm.get_statistic_points(model, graph)

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Run NNCF's algorithm.

        Raises
        ------
        ModelError
            The model is quantized already, by scales that would fit no more.
        """
        if next(quantizers(unwrap(model)), None) is not None:
            raise ModelError("smooth_quant: the model is quantized already; smooth it before that")
        return self._algorithm.apply(model, graph, statistic_points, dataset)
