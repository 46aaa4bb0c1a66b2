"""An op, all of it or a sample, whose loss can be evaluated at any choice of scales."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ptq4vit_plugin.algorithms.search.gemm import Gemm, Terms, difference, product
from ptq4vit_plugin.algorithms.search.objective import (
    View,
    angle_loss,
    error_loss,
    error_weight,
    is_angle,
)
from ptq4vit_plugin.algorithms.search.sampling import draw, enough, largest_and, shares
from ptq4vit_plugin.integrations.device import has_int8_dot

#: Elements of the output per chunk: few enough to stay in the last-level cache, enough rows for a
#: matrix product to reach its rate. Batched ops pass over their operands and outputs more often
#: than they multiply, and take less.
CHUNK, BATCHED_CHUNK = 1 << 20, 1 << 18
#: A sample of more than this share of the rows is not worth making.
MOST = 0.7


class Grouping(Protocol):
    """What the search needs of `ptq4vit_plugin.quantizers.base.Grouping`."""

    shape: tuple[int, ...]
    blocks: int

    def sum(self, err: Tensor) -> Tensor: ...


class Quantizer(Protocol):
    """What the search needs of `ptq4vit_plugin.quantizers.base.OperandQuantizer`."""

    n: int
    grouping: Grouping

    @property
    def table(self) -> Tensor: ...

    def fake_quantize(self, x: Tensor, index: Tensor | int) -> Tensor: ...

    def terms(self, x: Tensor, index: Tensor | int) -> list[tuple[Tensor, Tensor]]: ...

    def of_columns(self, columns: Tensor) -> "Quantizer": ...


@dataclass
class Problem:
    """An op, or a part of it, ready to be evaluated.

    Attributes
    ----------
    a, b
        Operands ``[B,H,N,I]`` and ``[B or 1,H,I,O]``. A weight stays whole when `blocks` take it
        apart: its scales belong to its columns.
    output
        The full-precision product without bias, contiguous.
    weight
        Multiplies the error before it is squared (error metrics) or the loss of a row (angle
        metrics).
    images
        Images that the N rows hold.
    integer
        Whether candidates are evaluated by integer products of codes.
    cost
        Output elements, as a share of the whole op's.
    blocks
        Column blocks that stand where the heads are, each with its own rows.
    """

    metric: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    output: Tensor
    weight: Tensor | None
    images: int
    quantizers: dict[str, Quantizer | None]
    integer: bool
    cost: float
    blocks: int = 1
    _kept: dict[str, tuple[bytes, Terms]] = field(default_factory=dict)

    # Evaluation -----------------------------------------------------------------------------------

    def loss(
        self, a_index: Tensor | None, b_index: Tensor | None, searched: str, view: View
    ) -> Tensor:
        """Loss per head, and per column as `view` says, ``[1,H,1,1 or O]``, float64.

        `searched` names the operand that changes from call to call; the other is quantized once.
        """
        total: Tensor | None = None
        for error, output, weight in self.errors(a_index, b_index, searched, view):
            if is_angle(self.metric):
                if self.bias is not None:
                    output = output + self.in_blocks(self.bias)
                whole = error.shape[0] > 1 or self.output.shape[0] > 1
                images = 1 if whole else error.shape[2] * self.images // self.output.shape[2]
                part = angle_loss(self.metric, error, output, view, images, weight)
            else:
                part = error_loss(self.metric, error, view, weight)
            total = part if total is None else total + part
        assert total is not None
        # Column blocks stand where heads do; they are columns again.
        return total.flatten()[None, None, None] if self.blocks > 1 else total

    def together(self, searched: str) -> int:
        """How many choices `losses` may evaluate at once; 1: use `loss`."""
        if self.blocks > 1 or is_angle(self.metric):
            return 1
        operand = self.a if searched == "a" else self.b
        chunk = BATCHED_CHUNK if self.output.shape[0] > 1 else CHUNK
        return max(1, chunk // max(self.output.numel(), operand.numel()))

    def losses(
        self, indices: Sequence[Tensor], fixed: Tensor | None, searched: str, view: View
    ) -> Tensor:
        """`loss` of several choices of one operand, stacked, by one product; `fixed` of the other.

        Of a small problem that takes about half the time: one by one, much of it is spent on
        calling some twenty functions.
        """
        operand, along = (self.a, 2) if searched == "a" else (self.b, 3)
        size, count = operand.shape[along], len(indices)
        stacked: Terms = []
        for same in zip(*(self._quantize(searched, operand, i) for i in indices), strict=True):
            codes = torch.cat([codes for codes, _ in same], along)
            scales = [
                scale.expand(*scale.shape[:along], size, *scale.shape[along + 1 :])
                for _, scale in same
                if scale is not None
            ]
            stacked.append((codes, torch.cat(scales, along) if scales else None))
        if searched == "a":
            error = product(stacked, self.fixed("b", fixed))
        else:
            error = product(self.fixed("a", fixed), stacked)
        error = error.unflatten(along, (count, size)).sub_(self.output.unsqueeze(along))
        if self.weight is not None:
            error.mul_(self.weight.unsqueeze(along))
        error = error.abs_() if self.metric == "l1" else error.square_()
        rows = 3 if searched == "a" else 2
        kept = error.sum(rows if view.kind == "element" else (rows, 4), True)
        return kept.movedim(along, 0).sum(1, True, dtype=torch.float64)

    def row_loss(self, a_index: Tensor | None, b_index: Tensor | None, groups: int) -> Tensor:
        """Loss ``[B,H,N,G]`` of rows in G blocks of columns (error metrics), float64."""
        losses = []
        for error, _, weight in self.errors(a_index, b_index, "a", View("head")):
            if weight is not None:
                error.mul_(weight)
            error = error.abs_() if self.metric == "l1" else error.square_()
            losses.append(error.unflatten(3, (groups, -1)).sum(4).double())
        return self._in_order(losses)

    def row_energy(self, groups: int) -> Tensor:
        """The squared weights' sum ``[B,H,N,G]`` in G blocks of columns, float64."""
        if self.weight is None:
            *shape, columns = self.output.shape
            return self.a.new_full((*shape, groups), columns // groups, dtype=torch.float64)
        return self._in_order(
            self.weight[images, :, rows].square().unflatten(3, (groups, -1)).sum(4).double()
            for images, rows in self._chunks(View("head"))
        )

    def _in_order(self, chunks: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(chunks), 0 if self.output.shape[0] > 1 else 2)

    def errors(
        self, a_index: Tensor | None, b_index: Tensor | None, searched: str, view: View
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield ``(error, output, weight)`` of every chunk at the given choice."""
        batched = self.output.shape[0] > 1
        a_whole = None if searched == "a" else self.fixed("a", a_index)
        # A weight is quantized once per candidate; a batched operand chunk by chunk.
        b_whole = None if searched == "b" and batched else self.fixed("b", b_index)
        for images, rows in self._chunks(view):
            if a_whole is None:
                a = self._quantize("a", self.a[images, :, rows], a_index)
            else:
                a = [(codes[images, :, rows], of_rows(scale, rows)) for codes, scale in a_whole]
            if b_whole is None:
                b = self._quantize("b", self.b[images], b_index)
            else:
                b = [(codes[images] if batched else codes, scale) for codes, scale in b_whole]
            output = self.output[images, :, rows]
            if not output.is_contiguous():
                output = output.contiguous()
            weight = None if self.weight is None else self.weight[images, :, rows]
            yield difference(a, b, output), output, weight

    def _quantize(self, operand: str, x: Tensor, index: Tensor | None) -> Terms:
        quantizer = self.quantizers[operand]
        if quantizer is None or index is None:
            terms = [(x, None)]
        elif self.integer:
            terms = quantizer.terms(x, index)
        else:
            terms = [(quantizer.fake_quantize(x, index), None)]
        if operand == "a":
            return terms
        return [
            (self.in_blocks(codes), None if scale is None else self.in_blocks(scale))
            for codes, scale in terms
        ]

    def in_blocks(self, x: Tensor) -> Tensor:
        """The right operand, or a bias, as the column blocks need it."""
        if self.blocks > 1:
            x = x.unflatten(3, (self.blocks, -1))[0, 0].transpose(0, 1)[None]
        return x

    def fixed(self, operand: str, index: Tensor | None) -> Terms:
        """The quantized operand, kept until another choice is asked for."""
        key = b"" if index is None else as_bytes(index)
        kept = self._kept.get(operand)
        if kept is None or kept[0] != key:
            self._kept[operand] = (key, self._quantize(operand, getattr(self, operand), index))
        return self._kept[operand][1]

    def values(self, operand: str, index: Tensor | None) -> Tensor:
        """What the fixed operand's codes stand for (one batch entry)."""
        parts = [
            codes.float() if scale is None else codes * scale
            for codes, scale in self.fixed(operand, index)
        ]
        return sum(parts[1:], parts[0])

    def _chunks(self, view: View) -> list[tuple[slice, slice]]:
        """Slices of the first and the third dimension whose outputs fit `CHUNK`."""
        batch, heads, rows, columns = self.output.shape
        if batch > 1:
            step = max(1, BATCHED_CHUNK // (heads * rows * columns))
            return [(slice(i, min(i + step, batch)), slice(None)) for i in range(0, batch, step)]
        unit = rows // self.images if view.kind == "column" else 1
        step = unit * max(1, CHUNK // (heads * columns * unit))
        return [(slice(None), slice(i, min(i + step, rows))) for i in range(0, rows, step)]

    # Parts ----------------------------------------------------------------------------------------

    def sample(
        self, count: int, rows_loss: Sequence[Tensor] | None, in_blocks: bool
    ) -> "Problem | None":
        """A sample of `count` rows; None if that is most of them.

        Error metrics (`rows_loss` from `row_loss`): rows that matter are likely to be drawn.
        Batched ops draw images per head, then rows per image; `in_blocks` draws rows per column
        block. Angle metrics: evenly spaced positions of every image.
        """
        batch, _, rows, columns = self.output.shape
        if count > MOST * batch * rows:
            return None
        if rows_loss is None:
            return self._spaced(count)
        if batch > 1:
            return self._sample_images(count, [x.sum(3) for x in rows_loss])
        blocks = rows_loss[0].shape[3] if in_blocks else 1
        if blocks == 1:  # the same rows for all columns and all groups of a convolution
            chosen, factor = draw(shares([x.sum((0, 1, 3))[None] for x in rows_loss]), count)
            part = self.of_rows(chosen[0])
            factor = factor[0][:, None]
            return self._sampled(part.a, part.b, part.output, part.weight, factor)
        chosen, factor = draw(shares([x[0, 0].T for x in rows_loss]), count)
        a = self.a[0, 0][chosen][None]
        column = torch.arange(columns, device=chosen.device).view(blocks, 1, -1)
        output = self.output[0, 0][chosen[..., None], column][None]
        weight = self.weight
        if weight is not None:
            weight = weight[0, 0][chosen[..., None], column][None]
        return self._sampled(a, self.b, output, weight, factor[..., None], blocks)

    def weighty(
        self, rows_loss: Sequence[Tensor], error: float, least: int = 0
    ) -> "Problem | None":
        """The rows that carry nearly everything and a sample of the others, behind them.

        As many rows of every image and head, `least` of them at least: enough to tell the loss of
        every head, with one batch entry of every block of columns too, within `error`, relative
        (error metrics). None if those are most rows.
        """
        if self.output.shape[0] > 1:
            rows_loss = [x.sum(3, keepdim=True) for x in rows_loss]
        parts = [x.permute(1, 3, 0, 2) for x in rows_loss]  # [H,G,B,N]
        size = shares([x.flatten(2).flatten(0, 1) for x in parts]).view_as(parts[0])
        certain, more = enough(size, error)
        more = max(more, least - certain, 1 - certain)
        if certain + more > MOST * size.shape[3]:
            return None
        drawn = size.mean(1)
        index, factor = (
            x.view(*drawn.shape[:2], -1).transpose(0, 1)[..., None]
            for x in largest_and(drawn.flatten(0, 1), certain, more)
        )
        a, output = picked(self.a, index), picked(self.output, index)
        weight = None if self.weight is None else picked(self.weight, index)
        return self._sampled(a, self.b, output, weight, factor)

    def _sample_images(self, count: int, parts: list[Tensor]) -> "Problem":
        """Images per head, then rows per image, by sizes of parts ``[B,H,N]``."""
        batch, heads, rows = parts[0].shape
        wanted = max(2, round((batch * count / rows) ** 0.5))
        chosen, first = draw(shares([x.sum(2).T for x in parts]), wanted)
        images, head = chosen.T, torch.arange(heads, device=chosen.device)
        count = min(rows, max(1, round(count / len(images))))
        chosen, second = draw(shares([x[images, head].flatten(0, 1) for x in parts]), count)
        index = chosen.view(*images.shape, count)[..., None]
        factor = (second.view(*images.shape, count) * first.T[..., None])[..., None]
        a, output = picked(self.a[images, head], index), picked(self.output[images, head], index)
        weight = None if self.weight is None else picked(self.weight[images, head], index)
        return self._sampled(a, self.b[images, head], output, weight, factor)

    def _sampled(
        self,
        a: Tensor,
        b: Tensor,
        output: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        blocks: int = 1,
    ) -> "Problem":
        factor = (factor if self.metric == "l1" else factor.sqrt()).float()
        return replace(
            self,
            a=a,
            b=b,
            output=output,
            weight=factor.expand(*output.shape[:3], 1) if weight is None else weight * factor,
            integer=self.integer and blocks == 1,
            cost=self.cost * output.numel() / self.output.numel(),
            blocks=blocks,
            _kept={},
        )

    def _spaced(self, count: int) -> "Problem":
        batch, _, rows, _ = self.output.shape
        images = 1 if batch > 1 else self.images
        positions = rows // images
        count = max(2, round(count / (batch * images)))
        step = positions / count
        inside = ((torch.arange(count, device=self.a.device) + 0.5) * step).long()
        index = (torch.arange(images, device=self.a.device)[:, None] * positions + inside).flatten()
        return replace(
            self,
            a=self.a[:, :, index],
            output=self.output[:, :, index],
            images=1,  # an image's few positions make a poor angle: take them all together
            cost=self.cost * len(index) / rows,
            _kept={},
        )

    def of_columns(self, columns: Tensor) -> "Problem":
        """The problem for some output columns (error metrics)."""

        def pick(x: Tensor) -> Tensor:  # several times as fast as an index
            return x.gather(3, columns.expand(*x.shape[:3], len(columns)))

        weight, quantizer = self.weight, self.quantizers["b"]
        if weight is not None and weight.shape[3] > 1:
            weight = pick(weight)
        if quantizer is not None and quantizer.grouping.shape[3] > 1:
            quantizer = quantizer.of_columns(columns)
        return replace(
            self,
            b=pick(self.b),
            output=pick(self.output),
            weight=weight,
            quantizers={**self.quantizers, "b": quantizer},
            cost=self.cost * len(columns) / self.output.shape[3],
            _kept={name: kept for name, kept in self._kept.items() if name == "a"},
        )

    def of_images(self, images: Tensor | slice) -> "Problem":
        """The problem for some images, or with its images in another order (batched ops)."""
        output = self.output[images]
        return replace(
            self,
            a=self.a[images],
            b=self.b[images],
            output=output,
            weight=None if self.weight is None else self.weight[images],
            cost=self.cost * len(output) / len(self.output),
            _kept={},
        )

    def of_rows(self, rows: Tensor | slice) -> "Problem":
        """The problem for some rows, or with its rows in another order (error metrics, one B)."""
        output = self.output[:, :, rows]
        return replace(
            self,
            a=self.a[:, :, rows],
            output=output,
            weight=None if self.weight is None else self.weight[:, :, rows],
            cost=self.cost * output.shape[2] / self.output.shape[2],
            _kept={},
        )


def problem_of(
    gemm: Gemm, quantizers: dict[str, Quantizer | None], metric: str, images: int
) -> Problem:
    """The problem on all data, without the rows that have no gradient.

    Raises
    ------
    ValueError
        Unknown metric, or one without its gradient.
    """
    bias = gemm.bias
    whole = gemm.a.shape[:3].numel() * gemm.b.shape[3]
    if metric == "hessian" and gemm.fisher is not None:
        gemm = _without_dead_rows(gemm)
    a, b, fisher = gemm.a.float(), gemm.b.float(), gemm.fisher
    if b.shape[0] == 1 and a.shape[0] > 1:  # one weight for all images: rows of one GEMM
        images = a.shape[0] if images == 1 else images
        a = a.transpose(0, 1).flatten(1, 2)[None]
        if fisher is not None:
            fisher = fisher.transpose(0, 1).flatten(1, 2)[None]
    output = torch.matmul(a, b)
    weight = None
    if not is_angle(metric):
        weight = error_weight(metric, output, bias, fisher)
    both = all(quantizer is not None for quantizer in quantizers.values())
    integer = both and a.shape[0] == 1 and has_int8_dot(a.device)
    cost = output.numel() / whole
    return Problem(metric, a, b, bias, output, weight, images, quantizers, integer, cost)


def _without_dead_rows(gemm: Gemm) -> Gemm:
    """Drop images and rows whose gradient is zero everywhere: they contribute exactly nothing.

    One is kept if all are such.
    """
    assert gemm.fisher is not None
    a, b, bias, fisher = gemm.a, gemm.b, gemm.bias, gemm.fisher
    alive = fisher.amax(3) > 0
    if not alive.any():
        alive[0, 0, 0] = True
    images, rows = alive.flatten(1).any(1), alive.flatten(0, 1).any(0)
    if not rows.all():
        a, fisher = a[:, :, rows], fisher[:, :, rows]
    if not images.all():
        a, fisher = a[images], fisher[images]
        b = b if b.shape[0] == 1 else b[images]
    return Gemm(a, b, bias, fisher)


def of_rows(scale: Tensor | None, rows: slice) -> Tensor | None:
    """The scales of some rows, where rows have scales of their own."""
    return scale if scale is None or scale.shape[2] == 1 else scale[:, :, rows]


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B,H,n,1]`` of ``x [B,H,N,X]``."""
    return x.gather(2, index.expand(*index.shape[:3], x.shape[3]))


def as_bytes(index: Tensor) -> bytes:
    """A choice of candidates as a key."""
    return index.cpu().numpy().tobytes()
