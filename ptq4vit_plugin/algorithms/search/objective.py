"""What a candidate is judged by. All metrics are losses: lower is better, and they add up.

With ``O`` the full-precision output and ``E = O_hat - O`` the error of the simulated one:

- `hessian` (PTQ4ViT, section 3.3): ``sum (dL/dO)^2 E^2``, the expectation of the squared gradient
  being the Fisher diagonal;
- `mse`: ``sum E^2``; `l1`: ``sum |E|``; `linear_weighted_l2`: ``sum |O| E^2``;
  `square_weighted_l2`: ``sum O^2 E^2``;
- `cosine`: ``sum (1 - cos(O, O_hat))``; `pearson`: the same of the mean-centred vectors.

The error metrics split over single output elements, so one evaluation gives the loss of every
group of either operand. The angle metrics compare vectors, and which vectors depends on the group
searched (`View`): per position along the last dimension (within a row block), or, for scales per
output channel, per image and channel over the positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = (
    "hessian",
    "mse",
    "cosine",
    "l1",
    "linear_weighted_l2",
    "square_weighted_l2",
    "pearson",
)


@dataclass(frozen=True)
class View:
    """Along what a metric reduces: ``"element"``, ``"head"``, ``"row"`` or ``"column"``.

    `element` keeps a loss per head and output column, `head` (the same, cheaper) per head only.
    `row` and `column` say which vectors an angle metric compares; `blocks` cuts rows.
    """

    kind: str
    blocks: int = 1


def is_angle(metric: str) -> bool:
    """Whether the metric compares vectors instead of elements."""
    return metric in ("cosine", "pearson")


def view(metric: str, shape: tuple[int, ...], blocks: int, columns: int, per_column: bool) -> View:
    """The view under which groups of `shape` (tied in `blocks`) are judged.

    Parameters
    ----------
    columns
        Output columns of the op, O.
    per_column
        Whether any operand of the op has scales that differ between output columns: then the
        error metrics keep the columns for both operands and their evaluations are shared.
    """
    if not is_angle(metric):
        return View("element" if per_column else "head")
    # One column per head: a depthwise convolution, whose channels are the heads.
    if blocks == 0 and (shape[3] > 1 or shape[1] > columns == 1):
        return View("column")
    return View("row", max(1, blocks))


def error_weight(
    metric: str, output: Tensor, bias: Tensor | None, fisher: Tensor | None
) -> Tensor | None:
    """The factor of the error before it is squared (None: 1), like `output`.

    Raises ValueError if the metric is unknown or lacks its gradient.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}")
    if metric == "hessian":
        if fisher is None:
            raise ValueError("metric 'hessian' needs the squared gradient of the op's output")
        return fisher.sqrt()
    if metric not in ("linear_weighted_l2", "square_weighted_l2"):
        return None
    size = output.abs() if bias is None else (output + bias).abs_()
    return size.sqrt_() if metric == "linear_weighted_l2" else size


def error_loss(metric: str, error: Tensor, view: View, weight: Tensor | None) -> Tensor:
    """Loss ``[1,H,1,O]`` (view `element`) or ``[1,H,1,1]`` (`head`) of a chunk, float64.

    `error [B,H,N,O]` is overwritten.
    """
    if weight is not None:
        error.mul_(weight)
    error = error.abs_() if metric == "l1" else error.square_()
    if view.kind == "element":
        return error.sum((0, 2), keepdim=True).double()
    # One contiguous run per problem vectorises well; the few partial sums are added in float64.
    return error.flatten(2).sum(2).double().sum(0).view(1, -1, 1, 1)


def angle_loss(
    metric: str,
    error: Tensor,
    output: Tensor,
    view: View,
    images: int,
    weight: Tensor | None,
) -> Tensor:
    """Loss of a chunk of whole images, ``[1,H,1,O]``, float64.

    A row block's loss is spread evenly over its columns.

    Parameters
    ----------
    error, output
        ``O_hat - O`` and ``O`` (with bias), ``[B,H,N,O]``.
    images
        Number of images that the N rows hold; N is ``images x positions``.
    weight
        Weight per row ``[B,H,N,1]`` (view `row` only), or None.
    """
    columns = error.shape[3]
    if view.kind == "row":
        error, output = (t.unflatten(3, (view.blocks, -1)) for t in (error, output))
        along = 4
    else:
        error, output = (t.unflatten(2, (images, -1)) for t in (error, output))
        along = 3
    if metric == "pearson":
        error, output = (t - t.mean(along, keepdim=True) for t in (error, output))
    oo, oe, ee = (
        (x * y).sum(along).double() for x, y in ((output, output), (output, error), (error, error))
    )
    # |O|^2 |O_hat|^2 - (O.O_hat)^2 = |O|^2 |E|^2 - (O.E)^2: 1 - cos without cancellation.
    dot = oo + oe
    norms = (oo * (oo + 2 * oe + ee).clamp_min(0)).sqrt()
    gap = (oo * ee - oe.square()).clamp_min(0)
    loss = torch.where(dot > 0, gap / (norms * (norms + dot)), 1 - dot / norms.clamp_min(1e-300))
    loss = torch.where(norms > 0, loss, torch.ones_like(loss))
    if view.kind == "row":  # [B,H,N,blocks]
        if weight is not None:
            loss = loss * weight.double()
        width = columns // view.blocks
        return loss.sum((0, 2), keepdim=True).repeat_interleave(width, 3) / width
    return loss.sum((0, 2)).view(1, error.shape[1], 1, columns)  # [B,H,images,O]
