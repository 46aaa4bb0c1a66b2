"""Blocks of a model: found on its module tree, seen in a forward pass, run by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.capture import Batch, backward, frozen, outputs_of, run
from ptq4vit_plugin.integrations.nncf.decompose import decomposing


def find_blocks(model: nn.Module, batch: Batch) -> list[str]:
    """The modules of a quantized model to be learned one after the other, as they are executed.

    A block is a child of an `nn.Sequential` or `nn.ModuleList` with two quantized ops in it at
    least and no such child inside. An op in no block is a block by itself if a module without
    children holds it.

    Parameters
    ----------
    model
        Wrapped by NNCF, with quantizers.
    batch
        Images to run it on once, for the order.
    """
    modules = dict(model.named_modules())
    places = _places_of_ops(model)
    lists = (nn.Sequential, nn.ModuleList)
    repeated = [
        name
        for name in modules
        if name
        and isinstance(modules[name.rpartition(".")[0]], lists)
        and sum(_within(place, name) for place in places) > 1
    ]
    blocks = {
        name
        for name in repeated
        if not any(other != name and _within(other, name) for other in repeated)
    }
    alone = {
        place
        for place in places
        if place in modules
        and not list(modules[place].children())
        and not any(_within(place, name) for name in blocks)
    }
    order: dict[str, None] = {}
    handles = [
        modules[name].register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in blocks | alone
    ]
    try:
        with torch.no_grad():
            run(model, batch.to(model))
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def hooks_within(model: nn.Module, block: str) -> list[hooks.Hook]:
    """The hooks that run inside a block; all of them if the name is empty."""
    return [hook for hook in hooks.hooks(model) if _within(_place(hook), block)]


def _place(hook: hooks.Hook) -> str:
    """Name of the module in which a hook runs: of the op's caller or the parameter's owner."""
    return hook.op.rpartition(".")[0] if hook.when == "post" else ".".join(hook.op.split("/")[:-2])


def _places_of_ops(model: nn.Module) -> list[str]:
    """The place of every quantized op, once for each op."""
    found = list(hooks.quantizers(model))
    places = [_place(hook) for hook in {h.op: h for h in found if h.when == "pre"}.values()]
    # Ops of which only the weight is quantized.
    return places + [_place(h) for h in found if h.when == "post" and _place(h) not in places]


def _within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(f"{block}.")


@dataclass(frozen=True)
class Call:
    """One call of a block with all images in it.

    Attributes
    ----------
    args, kwargs
        Of the block's forward. Tensors with an entry per image are cut by `of`.
    output
        What it returned, ``[images, ...]``.
    importance
        Mean squared gradient of the loss at the output, in its shape, if it was asked for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    importance: Tensor | None = None

    def of(self, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for some images, given by their places."""

        def cut(value: Any) -> Any:
            return value[images] if self._per_image(value) else value

        return tuple(map(cut, self.args)), {k: cut(v) for k, v in self.kwargs.items()}

    def _per_image(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self.output)


def watch_block(
    model: nn.Module, name: str, data: Sequence[Batch], gradient: Gradient | None = None
) -> Call | None:
    """What a block sees and returns in the model's forward.

    Parameters
    ----------
    model
        In evaluation mode, its hooks switched on or off.
    name
        Empty for the model itself.
    gradient
        If given, the loss is backpropagated to the block's output.

    Returns
    -------
    Call or None
        None if the block cannot be learned by itself: it is not called exactly once, or does not
        return one tensor with an entry per image.
    """
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    squares: list[Tensor] = []

    def see_inputs(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append((_kept(args), _kept(kwargs)))

    def see_output(_: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output.detach().clone() if isinstance(output, Tensor) else None)
        if gradient is None or outputs[-1] is None:
            return None
        # Parameters are frozen: autograd follows the forward pass from here. A copy, because what
        # comes next may write in place.
        first = output.detach().requires_grad_().clone()
        total = torch.zeros_like(first)
        squares.append(total)

        def add(grad: Tensor) -> None:
            total.add_(grad.square() / gradient.probes)

        first.register_hook(add)
        return first

    block = model.get_submodule(name)
    handles = [
        block.register_forward_pre_hook(see_inputs, with_kwargs=True),
        block.register_forward_hook(see_output),
    ]
    parts: list[Call] = []
    try:
        with frozen(model):
            for batch in data:
                for seen in (inputs, outputs, squares):
                    seen.clear()
                with torch.set_grad_enabled(gradient is not None):
                    result = run(model, batch.to(model))
                    if gradient is not None and squares:
                        backward(outputs_of(model, result), gradient, batch)
                if len(outputs) != 1 or outputs[0] is None or len(outputs[0]) != len(batch):
                    return None
                parts.append(Call(*inputs[0], outputs[0], squares[0] if squares else None))
    finally:
        for handle in handles:
            handle.remove()
    return _joined(parts)


def run_block(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a block by itself; it computes what it computes in the model's forward.

    Parameters
    ----------
    name
        Empty for the model itself.
    """
    if not name:
        return outputs_of(model, model(*args, **kwargs)).tensors[0]
    with hooks.inside(model, name), decomposing(model):
        return model.get_submodule(name)(*args, **kwargs)


def _kept(values: Any) -> Any:
    """Copies of the tensors in a tuple or a dict, because a later op may write into them."""
    if isinstance(values, dict):
        return {key: _kept((value,))[0] for key, value in values.items()}
    return tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in values)


def _joined(parts: Sequence[Call]) -> Call:
    """The calls of several batches as one."""

    def join(values: Sequence[Any]) -> Any:
        per_image = all(part._per_image(value) for part, value in zip(parts, values, strict=True))
        return torch.cat(list(values)) if per_image else values[0]

    return Call(
        tuple(map(join, zip(*(part.args for part in parts), strict=True))),
        {key: join([part.kwargs[key] for part in parts]) for key in parts[0].kwargs},
        torch.cat([part.output for part in parts]),
        join([part.importance for part in parts]),
    )
