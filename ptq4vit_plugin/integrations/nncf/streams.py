"""One forward pass in which the float model and the quantized model run side by side.

The calibration images go in twice, as the two halves of one batch. At every op the first half
carries what the float model computes, the second half what the model computes whose ops so far are
quantized; so each op can be treated knowing its real inputs and its float target, and nothing has
to be stored or run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch, example_of
from ptq4vit_plugin.integrations.nncf.passes import run
from ptq4vit_plugin.integrations.nncf.runs import run_by_all
from ptq4vit_plugin.plan import FoundOp


@dataclass(frozen=True)
class Seen:
    """What one op sees. Inputs by port, in the model's own shapes.

    Attributes
    ----------
    exact
        Inputs in the float model.
    inputs
        Inputs in the model that is being quantized.
    target
        The op's output in the float model.
    """

    exact: dict[int, Tensor]
    inputs: dict[int, Tensor]
    target: Tensor


@dataclass(frozen=True)
class Images:
    """Where the images of a batch lie in the tensors of one op.

    Attributes
    ----------
    dim
        The dimension along which they lie, together with others perhaps: windows, heads, tokens.
    inner
        Whether the image is the fastest index of that dimension and not the slowest, as in rows
        ``[L · B, C]``.
    """

    dim: int = 0
    inner: bool = False

    def first(self, x: Tensor, count: int) -> Tensor:
        """The tensor with its images in front, perhaps with a dimension more."""
        if self.dim == 0 and not self.inner:
            return x
        if self.inner:
            return x.unflatten(self.dim, (-1, count)).movedim(self.dim + 1, 0)
        return x.unflatten(self.dim, (count, -1)).movedim(self.dim, 0)

    def back(self, x: Tensor, count: int) -> Tensor:
        """What `first` was made from."""
        if self.dim == 0 and not self.inner:
            return x
        if self.inner:
            return x.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 1)
        return x.movedim(0, self.dim).flatten(self.dim, self.dim + 1)


def one_size(data: Sequence[Batch]) -> None:
    """Refuse images of several sizes where all of them go through the model together.

    Raises
    ------
    DataError
        So it is.
    """
    sizes = sorted({tuple(batch.images.shape[1:]) for batch in data})
    if len(sizes) > 1:
        raise DataError(
            f"calibration images of the sizes {', '.join(map(str, sizes))}; compensation and "
            "reconstruction take one size: give images of one, or use 'ptq4vit'"
        )


@torch.no_grad()
def find_images(
    model: nn.Module, data: Sequence[Batch], ops: Sequence[FoundOp]
) -> dict[str, Images | None]:
    """Where the images lie in every op, proved by running it: of two images the second is exchanged
    for another, and what changes is of that one.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode.

    Returns
    -------
    dict
        By op name. None for a product or convolution whose images lie elsewhere than in front.

    Raises
    ------
    DataError
        The images are of several sizes.
    ModelError
        An op computes with several images together, or not with every image alike.
    """
    one_size(data)
    before, after = _two_images(data)
    ports = [(op.name, port) for op in ops for port in _ports(op)]
    kept: dict[tuple[str, int], Tensor] = {}
    changed: dict[tuple[str, int], Tensor] = {}
    irregular: list[str] = []

    def keep(place: tuple[str, int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            kept[place] = x.clone()

        return see

    def compare(place: tuple[str, int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if place in kept and kept[place].shape == x.shape:
                old = kept.pop(place)
                changed[place] = (x != old) & ~(x.isnan() & old.isnan())
            else:
                irregular.append(place[0])

        return see

    for batch, look in ((before, keep), (after, compare)):
        with hooks.watching(model, {place: look(place) for place in ports}, {}):
            run(model, batch.to(model))
    irregular += [name for name, _ in kept]
    if irregular:
        raise ModelError(
            f"compensate: {irregular[0]} runs for some images only, or takes more numbers of some "
            "than of others, so that the float and the quantized model cannot run side by side; "
            "use algorithm: ptq4vit"
        )
    found = {}
    for op in ops:
        masks = [changed[op.name, p] for p in _ports(op) if (op.name, p) in changed]
        if op.kind == "linear":
            masks = [mask.any(-1) for mask in masks]
        places = [_marked(mask) for mask in masks if mask.any()]
        if None in places or (len(places) == 2 and set(places) != {Images()}):
            raise ModelError(
                f"compensate: {op.name} computes with the images of a batch together, so that "
                "the float and the quantized model cannot run side by side; use algorithm: "
                "ptq4vit"
            )
        place = places[0] if places else Images()
        found[op.name] = place if op.kind == "linear" or place == Images() else None
    return found


def _two_images(data: Sequence[Batch]) -> tuple[Batch, Batch]:
    """A batch of one image twice, and of that and another."""
    example = example_of(data)
    same = example.of(torch.tensor([0, 0]))
    for other in range(1, len(example)):
        pair = example.of(torch.tensor([0, other]))
        values = zip(
            (*same.args, *same.kwargs.values()), (*pair.args, *pair.kwargs.values()), strict=True
        )
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in values):
            return same, pair

    def mirrored(value: Any) -> Any:  # there is no other
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != 2:
            return value
        return torch.cat([value[:1], value[1:].flip(-1)])

    return same, replace(
        same,
        args=tuple(map(mirrored, same.args)),
        kwargs={key: mirrored(value) for key, value in same.kwargs.items()},
    )


def _marked(mask: Tensor) -> Images | None:
    """Where the images lie in a tensor of two of which the second is marked; None if nowhere."""
    for dim, inner in ((0, False), *((dim, False) for dim in range(1, mask.ndim)), (0, True)):
        if mask.shape[dim] % 2 == 0:
            parts = mask.unflatten(dim, (-1, 2) if inner else (2, -1))
            if not parts.select(dim + inner, 0).any():
                return Images(dim, inner)
    return None


def _ports(op: FoundOp) -> tuple[int, ...]:
    """Ports of activations."""
    return (0, 1) if op.kind == "matmul" else (0,)


@torch.no_grad()
def run_side_by_side(
    model: nn.Module,
    data: Sequence[Batch],
    ops: Sequence[FoundOp],
    visit: Callable[[FoundOp, Seen], Tensor],
    places: Mapping[str, Images | None],
    traced: int,
) -> None:
    """Visit every op in the order of execution; what `visit` returns goes on as its output.

    Parameters
    ----------
    model
        Wrapped by NNCF, in evaluation mode, with its own hooks switched off.
    data
        All batches run as one.
    places
        The result of `find_images`. What an op sees has its images in front; those without a place
        are not visited, and stay as they are in both halves.
    traced
        How many images the shapes of the ops are of.

    Raises
    ------
    DataError
        The batch does not run all ops.
    """
    images = sum(map(len, data))
    ops = [op for op in ops if places.get(op.name) is not None]
    arrived: dict[tuple[str, int], Tensor] = {}

    def keep(place: tuple[str, int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            arrived[place] = x

        return see

    def halves_of(x: Tensor, shape: tuple[int, ...], place: Images) -> tuple[Tensor, Tensor]:
        """Float and quantized half; the same tensor twice where there is no image in it."""
        as_traced = len(x) == shape[0] and traced != 2 * images
        if place == Images() and (as_traced or len(x) * traced != shape[0] * 2 * images):
            return x, x
        x = place.first(x, 2 * images)
        return x[: len(x) // 2], x[len(x) // 2 :]

    def treat(op: FoundOp) -> Callable[[Tensor], Tensor]:
        place = places[op.name]

        def see(y: Tensor) -> Tensor:
            halves = {
                port: halves_of(arrived.pop((op.name, port)), op.shapes[port], place)
                for port in _ports(op)
            }
            output = halves_of(y, op.output_shape, place)
            seen = Seen(
                {port: half[0] for port, half in halves.items()},
                {port: half[1] for port, half in halves.items()},
                output[0],
            )
            result = visit(op, seen).to(y.dtype)
            if output[0] is output[1]:
                return result
            return place.back(torch.cat([output[0], result]), 2 * images)

        return see

    inputs = {(op.name, port): keep((op.name, port)) for op in ops for port in _ports(op)}
    outputs = {op.name: treat(op) for op in ops}
    whole = reduce(Batch.joined, [batch.to(model) for batch in data])
    with run_by_all(model, [whole], ops), hooks.watching(model, inputs, outputs):
        run(model, whole.joined(whole))
