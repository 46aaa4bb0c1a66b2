"""BasePTQ: the baseline that PTQ4ViT's paper compares with."""

from __future__ import annotations

from pydantic import Field

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.scale_search import Metric, ScaleSearch
from ptq4vit_plugin.algorithms.settings import Twin
from ptq4vit_plugin.quantizers.base import SearchRange


class BasePTQ(ScaleSearch):
    """Uniform quantizers, every scale by cosine distance, one round, 0.5 to 1.2 of the maximum.

    Codes are signed, as in the paper, also behind softmax, where ``twin: {softmax: false}`` would
    leave out the negative ones.
    """

    twin: Twin = Twin(softmax="uniform", gelu="uniform")
    metric: Metric = "cosine"
    search_range: SearchRange = SearchRange(alpha=0.5)
    rounds: int = Field(default=1, ge=1)
    gradient: Gradient = Gradient()
