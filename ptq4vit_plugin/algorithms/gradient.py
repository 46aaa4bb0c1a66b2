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


def generators(seed: int, first: int, images: int) -> list[torch.Generator]:
    """A source of randomness per image, which depends on the seed and on the image's place in the
    calibration set alone: not on the batch, the pass or the process in which the image is run.

    Parameters
    ----------
    first
        Place of the first image.
    images
        How many there are.
    """
    # Seeds far apart for neighbouring images; torch takes 64 bits.
    return [
        torch.Generator().manual_seed(
            (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03) % 2**63
        )
        for place in range(first, first + images)
    ]


def output_loss(outputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
    """A scalar whose squared gradient estimates the curvature of ``Σ |output|²`` distances.

    With ``v`` of unit covariance, the squared gradient of ``⟨v, output⟩`` has the diagonal of
    ``JᵀJ`` as its expectation: the Gauss-Newton matrix of half the squared distance.

    Parameters
    ----------
    outputs
        Of any shapes, attached to the graph; the distance is summed over all of them.
    generators
        One per image, on the CPU, so that every device draws the same numbers.
    """
    loss = torch.zeros(())
    for output in outputs:
        if len(output) == len(generators):
            v = torch.stack([torch.randn(output.shape[1:], generator=g) for g in generators])
        else:  # not an entry per image
            v = torch.randn(output.shape, generator=generators[0])
        v = v.to(output.device)
        loss = loss.to(output.device) + (output.float() * v).sum()
    return loss


def probe_loss(
    logits: Tensor,
    kind: str,
    generators: Sequence[torch.Generator],
    labels: Tensor | None = None,
) -> Tensor:
    """A scalar whose gradient, squared and averaged over probes, estimates the Fisher information.

    Parameters
    ----------
    logits
        ``[B, classes]``, attached to the graph.
    kind
        See `Gradient`; not ``output``, which is `output_loss`.
    generators
        One per image, on the CPU, so that every device draws the same numbers.
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
        sampled = torch.cat(
            [
                torch.multinomial(p, 1, generator=generator)
                for p, generator in zip(probabilities, generators, strict=True)
            ]
        )
        return F.cross_entropy(logits, sampled.to(logits.device), reduction="sum")
    # v = √p ∘ e − p ⟨√p, e⟩ with e of unit covariance has covariance diag(p) − p pᵀ.
    root = probabilities.sqrt()
    e = torch.stack([torch.randn(root.shape[1], generator=g) for g in generators])
    v = root * e - probabilities * (root * e).sum(-1, keepdim=True)
    return (logits * v.to(logits.device)).sum()
