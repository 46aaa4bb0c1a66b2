"""What this project's algorithms have in common as steps of an NNCF pipeline."""

from __future__ import annotations

from typing import Any

from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm
from pydantic import BaseModel, ConfigDict, PrivateAttr

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.nncf.batch import Batch, batches


class CalibratedAlgorithm(BaseModel, Algorithm):
    """An NNCF algorithm whose fields are its config and which runs the calibration images itself.

    Constructor: ``Algorithm(dataset, **fields)``, because an NNCF pipeline does not pass the
    dataset on to its steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    _dataset: Any = PrivateAttr(default=None)

    def __init__(self, dataset: Any = None, **fields: Any) -> None:
        super().__init__(**fields)
        self._dataset = dataset

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch only."""
        return [BackendType.TORCH]

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """NNCF collects nothing for this algorithm: it records what it needs itself."""
        return StatisticPointsContainer()

    def calibration_batches(self, dataset: Any = None) -> list[Batch]:
        """The checked batches of a dataset, by default the constructor's.

        Raises
        ------
        DataError
            There is none, or its images are empty or not finite.
        """
        source = self._dataset if dataset is None else dataset
        if source is None:
            name = type(self).__name__
            raise DataError(f"{name} needs calibration images: {name}(dataset, ...)")
        return batches(source)
