"""PTQ4ViT (Yuan et al., arXiv 2111.12293): twin uniform quantizers, Hessian-guided search."""

from __future__ import annotations

from ptq4vit_plugin.algorithms.scale_search import ScaleSearch


class PTQ4ViT(ScaleSearch):
    """Twin uniform quantizers after softmax and GELU, every scale by the Hessian-guided metric,
    three rounds.

    All defaults of `ScaleSearch` are PTQ4ViT's: candidates from 0.01 to 1.2 of the maximum
    (section 3.3 and the authors' settings). Weights have a scale per output channel;
    ``granularity: paper`` gives the paper's own.
    """
