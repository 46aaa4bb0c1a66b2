"""What is backpropagated to weigh the output errors of the ops: estimates of the Fisher
information.

The search minimises ``Σ (∂L/∂O)² (Ô − O)²`` (PTQ4ViT, section 3.3). Backpropagating the distance
of the model's output to itself gives zero; these give sound estimates of the same quantity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F


class Gradient(BaseModel):
    """How output errors are weighed.

    Attributes
    ----------
    kind
        ``fisher``: cross-entropy against labels sampled from the model's own softmax (Monte-Carlo
        Fisher). ``gauss_newton``: a random probe at the logits with covariance ``diag(p) − p pᵀ``.
        ``labels``: cross-entropy against the true labels of the calibration images (empirical
        Fisher). ``output``: a random probe of unit covariance at the output, the Gauss-Newton
        matrix of the output's squared distance; models that return no class scores (features,
        feature maps) always get this one.
    probes
        Backward passes per batch; squared gradients are averaged. More probes, less noise.
    seed
        Of the sampled labels and probes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fisher", "gauss_newton", "labels", "output"] = "fisher"
    probes: int = Field(default=1, ge=1)
    seed: int = 0


def output_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A scalar whose squared gradient estimates the curvature of ``Σ |output|²`` distances.

    With ``v`` of unit covariance, the squared gradient of ``⟨v, output⟩`` has the diagonal of
    ``JᵀJ`` as its expectation: the Gauss-Newton matrix of half the squared distance.

    Parameters
    ----------
    outputs
        Of any shapes, attached to the graph; the distance is summed over all of them.
    generator
        On the CPU, so that every device draws the same numbers.
    """
    loss = torch.zeros(())
    for output in outputs:
        v = torch.randn(output.shape, generator=generator).to(output.device)
        loss = loss.to(output.device) + (output.float() * v).sum()
    return loss


def probe_loss(
    logits: Tensor, kind: str, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """A scalar whose gradient, squared and averaged over probes, estimates the Fisher information.

    Parameters
    ----------
    logits
        ``[B, classes]``, attached to the graph.
    kind
        See `Gradient`; not ``output``, which is `output_loss`.
    generator
        On the CPU, so that every device draws the same numbers.
    labels
        ``[B]``, for kind ``labels``.

    Returns
    -------
    Tensor
        Scalar: the sum over images, so that an image's gradient does not depend on the batch size.
    """
    logits = logits.float()
    if kind == "labels":
        return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    probabilities = logits.detach().softmax(-1).cpu()
    if kind == "fisher":
        sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        return F.cross_entropy(logits, sampled.to(logits.device), reduction="sum")
    # v = √p ∘ e − p ⟨√p, e⟩ with e of unit covariance has covariance diag(p) − p pᵀ.
    root = probabilities.sqrt()
    e = torch.randn(root.shape, generator=generator)
    v = root * e - probabilities * (root * e).sum(-1, keepdim=True)
    return (logits * v.to(logits.device)).sum()
