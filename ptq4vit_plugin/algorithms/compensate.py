"""Repair of a quantized model in closed form: weights, rounding and biases, op by op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4vit_plugin.algorithms.calibrated import CalibratedAlgorithm
from ptq4vit_plugin.algorithms.compensation.normal import Normal
from ptq4vit_plugin.algorithms.compensation.ranges import best_range
from ptq4vit_plugin.algorithms.compensation.ridge import held_out_ridge
from ptq4vit_plugin.algorithms.compensation.rounding import held_out_rounding
from ptq4vit_plugin.algorithms.compensation.steps import RowGrid, best_grid
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.views import view_of
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch, example_of
from ptq4vit_plugin.integrations.nncf.capture import in_parts, token_weights
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.passes import traced
from ptq4vit_plugin.integrations.nncf.streams import (
    Images,
    Seen,
    find_images,
    run_side_by_side,
)
from ptq4vit_plugin.plan import FoundOp

#: One image in so many is held out when a damping is chosen.
HELD_OUT = 4


class Repairs(BaseModel):
    """What compensation changes.

    Attributes
    ----------
    ranges
        An input of a linear or of a product of attention whose range few independent tokens have
        decided gets another one. Tokens of one image resemble each other, so they count less.
    weights
        Ridge regression moves the float weights to where the quantized inputs serve them best;
        then the steps of the weights are chosen anew. Off unless asked for: it did not pay
        (docs/accuracy.md).
    rounding
        Error-compensating rounding (GPTQ) in place of rounding to nearest.
    bias
        The bias absorbs the mean output error of every channel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranges: bool = Field(default=True, description="widen ranges that few tokens decided")
    weights: bool = Field(default=False, description="ridge regression on the quantized inputs")
    rounding: bool = Field(default=True, description="error-compensating rounding")
    bias: bool = Field(default=True, description="biases absorb the mean output error")


class Compensate(CalibratedAlgorithm, Repairs):
    """After quantization, let ranges, weights and biases absorb the errors.

    Lifecycle of `apply`: a backward pass of the float model weighs every token; then one forward
    pass runs the float and the quantized model side by side, and every linear or convolution,
    when its turn comes, is fitted to the float model's output from its real, quantized inputs.
    Attention's products have no parameters; only their ranges are looked at.

    Attributes
    ----------
    gradient
        How tokens are weighed: by its root mean square. None weighs all alike.
    """

    gradient: Gradient | None = Gradient(kind="output")

    def apply(
        self, model: Any, graph: NNCFGraph, statistic_points: Any = None, dataset: Any = None
    ) -> Any:
        """Compensate in place and return the model.

        Raises
        ------
        DataError
            No calibration data, or too large numbers inside the model.
        ModelError
            The model is not quantized, or mixes the images of a batch.
        """
        module = hooks.unwrap(model)
        data = self.calibration_batches(dataset)
        if next(hooks.quantizers(module), None) is None:
            raise ModelError("compensate: the model has no quantizers; quantize it before that")
        self.compensate(module, data)
        return model

    @torch.no_grad()
    def compensate(self, module: nn.Module, data: Sequence[Batch]) -> None:
        """`apply` for a bare module and checked batches."""
        quantizers = {
            (hook.op, hook.port if hook.when == "pre" else None): hook.module
            for hook in hooks.quantizers(module)
        }
        first = example_of(data).to(module)
        with hooks.unquantized(module):
            graph = traced(module, first)
            buffers = {name for name, _ in module.named_buffers()}
            ops, _ = find_ops(graph, len(first), buffers)
            # A weight or bias that is computed in forward cannot be written to.
            ops = [op for op in ops if op.kind == "matmul" or op.sources[1].parameter]
            places = find_images(module, data, ops)
            parts = in_parts(data, ops, len(first))
            importance = self._importance(module, parts, ops, places)
            shared = _shared_parameters(ops)
            exchanged: list[tuple[nn.Module, nn.Module]] = []

            images = sum(map(len, data))

            def visit(op: FoundOp, seen: Seen) -> Tensor:
                for port in (0, 1) if self.ranges else ():
                    old = quantizers.get((op.name, port))
                    new = _new_range(module, op, port, seen, old, importance, images)
                    if new is not old:
                        quantizers[op.name, port] = new
                        exchanged.append((old, new))
                inputs = [
                    _through(quantizers.get((op.name, port)), x)
                    for port, x in sorted(seen.inputs.items())
                ]
                if op.kind == "matmul":
                    return torch.matmul(*inputs)
                name = op.sources[1].parameter
                quantizer = quantizers.get((name, None))
                fixed = name in shared or op.convolution.get("groups", 1) > 1
                layer = _Layer(module, op, seen, inputs[0], quantizer, importance.get(op.name))
                if not fixed:
                    changed = self._treat(layer, images)
                    if changed is not None:
                        exchanged.append((quantizer, changed))
                return layer.output()

            run_side_by_side(module, data, ops, visit, places, len(first))
        for old, new in exchanged:
            hooks.replace(module, old, new)

    def _importance(
        self,
        module: nn.Module,
        data: Sequence[Batch],
        ops: Sequence[FoundOp],
        places: Mapping[str, Images | None],
    ) -> dict[str, Tensor]:
        """Weights of the tokens of ops, image after image; none where no token has any."""
        if self.gradient is None:
            return {}
        weights = token_weights(
            module,
            data,
            [op for op in ops if op.kind != "matmul" and places.get(op.name) is not None],
            self.gradient,
            lambda name, x, images: places[name].first(x, images),
        )
        # Squared gradients are so uneven that a few dozen tokens would decide everything.
        return {name: weight.sqrt() for name, weight in weights.items() if weight.any()}

    def _treat(self, layer: _Layer, images: int) -> nn.Module | None:
        """Fit one layer; returns the quantizer that its weight needs now, if it is another one."""
        fit, check = layer.sums(images)
        whole = fit if check is None else fit + check
        if not whole.finite:
            raise DataError(
                f"compensate: {layer.op.name} takes numbers of up to {layer.x.abs().max():.1e} and "
                f"gives numbers of up to {layer.target.abs().max():.1e} for the calibration "
                "images; allowed: those whose squares add up in float32; or use algorithm: ptq4vit"
            )
        grid = RowGrid.of(layer.quantizer)
        weight, changed = layer.weight, None
        if grid is not None:
            if self.weights and check is not None:
                weight = held_out_ridge(fit, check, weight)
                grid = best_grid(grid, weight, whole.gram.diagonal())
                changed = grid.module(layer.quantizer)
            if self.rounding:
                weight = held_out_rounding(fit, check, weight, grid)
            else:
                weight = grid.nearest(weight.double())
            layer.write_weight(weight)
        elif layer.quantizer is not None:
            weight = layer.quantizer(layer.parameter).flatten(1)
        if self.bias and layer.op.bias:
            layer.write_bias(whole.bias(weight))
        layer.quantizer = changed or layer.quantizer
        return changed


class _Layer:
    """A linear or convolution in the middle of the pass: canonical views, and writing back."""

    def __init__(
        self,
        module: nn.Module,
        op: FoundOp,
        seen: Seen,
        quantized: Tensor,
        quantizer: nn.Module | None,
        importance: Tensor | None,
    ) -> None:
        self.op = op
        self.parameter = module.get_parameter(op.sources[1].parameter)
        self.bias = module.get_parameter(op.bias) if op.bias else None
        self.quantizer = quantizer
        self.x = quantized
        self.importance = importance
        self._view = view_of(op)
        self.target = seen.target
        self._rest = None
        if not op.bias:  # where the bias is no parameter it stays as it is, whatever it is
            whole = self._apply(seen.exact[0][:1].float(), self.parameter.float(), None)
            self._rest = self._of_channels(seen.target[:1].float() - whole)

    @property
    def weight(self) -> Tensor:
        """``[O, I]``."""
        return self.parameter.detach().flatten(1)

    def _rows(self, x: Tensor) -> Tensor:
        """Canonical rows ``[N, I]`` (one group)."""
        return self._view.operands(x.float(), self.parameter.float())[0][0, 0]

    def sums(self, images: int) -> tuple[Normal, Normal | None]:
        """Normal equations of the images that are fitted, and of those held out if any can be."""
        x, y = self._rows(self.x), self._view.output(self.target.float())[0, 0]
        if self._rest is not None:
            y = y - self._rest
        weight = torch.ones(len(x)) if self.importance is None else self.importance
        weight = weight.to(x) / weight.mean().clamp_min(1e-30).to(x)
        centred = self.bias is not None
        if images < HELD_OUT or len(x) % images:
            return Normal.of(x, y, weight, centred), None
        image = torch.arange(len(x), device=x.device) // (len(x) // images)
        out = image % HELD_OUT == HELD_OUT - 1
        fit, check = (Normal.of(x[m], y[m], weight[m], centred) for m in (~out, out))
        return fit, check

    def write_weight(self, weight: Tensor) -> None:
        self.parameter.copy_(weight.view_as(self.parameter))

    def write_bias(self, bias: Tensor) -> None:
        self.bias.copy_(bias)

    def output(self) -> Tensor:
        """The op's output from its quantized input, weight and bias as they are now."""
        weight = _through(self.quantizer, self.parameter)
        return self._apply(
            self.x, weight, self.bias if self._rest is None else self._rest.to(weight)
        )

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.op.kind == "conv2d":
            return F.conv2d(x, weight, bias, **self.op.convolution)
        return F.linear(x, weight, bias)

    def _of_channels(self, y: Tensor) -> Tensor:
        """One number per output channel of something that differs between channels only."""
        return y[0].flatten(1)[:, 0] if self.op.kind == "conv2d" else y.flatten(0, -2)[0]


def _new_range(
    module: nn.Module,
    op: FoundOp,
    port: int,
    seen: Seen,
    quantizer: nn.Module | None,
    importance: dict[str, Tensor],
    images: int,
) -> nn.Module | None:
    """The quantizer of an activation with the range that suits it better, see `best_range`."""
    if quantizer is None or port not in seen.inputs:
        return quantizer
    x = seen.inputs[port].float()
    if op.kind == "linear":
        matrix = module.get_parameter(op.sources[1].parameter).float()
        rows = x.flatten(0, -2)[None]
        weight = importance.get(op.name, torch.ones(rows.shape[1])).to(x)[None]
        return best_range(quantizer, rows, matrix.square().sum(0)[None], weight, images)
    if op.heads != 1 or x.ndim != 4 or len(seen.inputs) < 2:
        return quantizer
    other = seen.inputs[1 - port].float()
    if other.shape[:2] != x.shape[:2]:
        return quantizer
    if op.role == "qk":
        x, factor = (x, other) if port == 0 else (x.mT, other.mT)
        columns = factor.square().sum((0, 3))
        weight = torch.ones(1, x.shape[0] * x.shape[2]).to(x)
    elif op.role == "attention_v" and port == 1:
        # An error of a value is spread over the rows that attend to it.
        columns = torch.ones(x.shape[1], x.shape[3]).to(x)
        weight = other.square().sum(2).transpose(0, 1).flatten(1)
    else:
        return quantizer
    return best_range(quantizer, x.transpose(0, 1).flatten(1, 2), columns, weight, images)


def _through(quantizer: nn.Module | None, x: Tensor) -> Tensor:
    return x if quantizer is None else quantizer(x)


def _shared_parameters(ops: Sequence[FoundOp]) -> set[str]:
    """Weights that several ops use: no single one of them may change them."""
    names = [op.sources[1].parameter for op in ops if op.sources[1].parameter]
    return {name for name in names if names.count(name) > 1}
