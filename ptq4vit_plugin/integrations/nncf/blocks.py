"""Blocks of a model: found on its module tree, seen in a forward pass, run by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.capture import with_gradient
from ptq4vit_plugin.integrations.nncf.decompose import decomposing
from ptq4vit_plugin.integrations.nncf.passes import (
    backward,
    frozen,
    outputs_of,
    run,
    taken_by_the_model,
)


@dataclass(frozen=True)
class Block:
    """A module that can be run by itself.

    Attributes
    ----------
    name
        Of the module; empty for the model itself.
    around
        Names of the modules around its call, the outermost first.
    ops
        Names of the ops that run in it.
    """

    name: str
    around: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


#: The whole model as a block.
WHOLE = Block("")


def find_blocks(model: nn.Module, batch: Batch) -> list[Block]:
    """The modules of a quantized model to be learned one after the other, as they are executed.

    They are the blocks around quantized ops. An op in no block is a block by itself if a module
    without children holds it.

    Parameters
    ----------
    model
        Wrapped by NNCF, with quantizers.
    batch
        Images to run it on, for the order.
    """
    around = locate(model, batch)
    found = list(hooks.quantizers(model))
    ports = {hook.op for hook in found if hook.when == "pre"}
    owners = {_owner(hook) for hook in found if hook.when == "post"}
    quantized = [op for op, modules in around.items() if op in ports or owners & set(modules[-1:])]
    blocks = blocks_around(model, around, quantized)
    inside = {op for block in blocks for op in block.ops}
    alone = dict.fromkeys(around[op][-1] for op in quantized if op not in inside and around[op])
    blocks += [
        _block(name, around) for name in alone if not list(model.get_submodule(name).children())
    ]
    order = list(around)
    return sorted(blocks, key=lambda block: order.index(block.ops[0]))


def blocks_around(
    model: nn.Module, around: Mapping[str, Sequence[str]], ops: Iterable[str]
) -> list[Block]:
    """The children of an `nn.Sequential` or `nn.ModuleList` with two of the ops in them at least,
    and no such child inside.

    Parameters
    ----------
    around
        The result of `locate`.
    ops
        Their names; what is not in `around` did not run, and is in no block.
    """
    modules = dict(model.named_modules())
    lists = (nn.Sequential, nn.ModuleList)
    ops_in = Counter(name for op in ops for name in set(around.get(op, ())) if name)
    repeated = [
        name
        for name, count in ops_in.items()
        if count > 1 and isinstance(modules[name.rpartition(".")[0]], lists)
    ]
    return [
        _block(name, around)
        for name in repeated
        if not any(other != name and _within(other, name) for other in repeated)
    ]


def locate(model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    """Inside which modules every op runs, in the order of execution, as `hooks.locate`.

    Raises
    ------
    DataError
        The model cannot take the images.
    """
    batch = batch.to(model)
    with frozen(model), taken_by_the_model(batch):
        return hooks.locate(model, batch.args, batch.kwargs)


def hooks_within(model: nn.Module, block: Block) -> list[hooks.Hook]:
    """The hooks that run inside a block."""
    if block == WHOLE:
        return list(hooks.hooks(model))
    ops = set(block.ops)
    return [
        hook
        for hook in hooks.hooks(model)
        if (_within(_owner(hook), block.name) if hook.when == "post" else hook.op in ops)
    ]


def _block(name: str, around: Mapping[str, Sequence[str]]) -> Block:
    ops = tuple(op for op, modules in around.items() if name in modules)
    modules = around[ops[0]]
    return Block(name, tuple(modules[: modules.index(name)]), ops)


def _owner(hook: hooks.Hook) -> str:
    """Name of the module whose parameter a hook runs on."""
    return hook.op.rpartition(".")[0]


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


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
        inputs.append((copied(args), copied(kwargs)))

    def see_output(_: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output.detach().clone() if isinstance(output, Tensor) else None)
        if gradient is None or outputs[-1] is None:
            return None
        total = torch.zeros_like(outputs[-1], dtype=torch.float32)
        squares.append(total)

        def add(grad: Tensor) -> None:
            total.add_(grad.float().square() / gradient.probes)

        return with_gradient(output, add)

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


def run_block(
    model: nn.Module, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Call a block by itself; it computes what it computes in the model's forward."""
    if block == WHOLE:
        return outputs_of(model, model(*args, **kwargs)).tensors[0]
    with hooks.inside(model, block.around, block.ops), decomposing(model):
        return model.get_submodule(block.name)(*args, **kwargs)


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def copied(values: Any, copy: Callable[[Tensor], Tensor] = _copy) -> Any:
    """Arguments with copies of their tensors, because a later op may write into them."""
    if isinstance(values, Tensor):
        return copy(values)
    if isinstance(values, dict):
        return {key: copied(value, copy) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(copied(value, copy) for value in values)
    return values


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
