"""The one door to NNCF's function hooks, which are not public API.

Everything the plugin needs of ``nncf.torch.function_hook`` goes through this module, and
``tests/test_nncf_hooks.py`` fails loudly when NNCF moves any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from nncf.common.graph.graph import NNCFGraph
from nncf.torch.function_hook import (
    register_post_function_hook,
    register_pre_function_hook,
    wrap_model,
)
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import (
    GraphModelWrapper,
    build_nncf_graph,
)
from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped
from torch import Tensor, nn


class Hook(NamedTuple):
    """A module that NNCF runs on the values of an op.

    ``when`` is ``"pre"`` (on an input port) or ``"post"`` (on an output port; on the value of a
    parameter when ``op`` is a parameter's name).
    """

    when: str
    op: str
    port: int
    module: nn.Module


class _Tap(nn.Module):
    """Show each value to a function; pass on what it returns, or the value itself if None."""

    def __init__(self, see: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, x: Tensor) -> Tensor:
        replacement = self.see(x)
        return x if replacement is None else replacement


def wrap(model: nn.Module) -> nn.Module:
    """Let NNCF's hooks run in the model's forward; the model itself is returned."""
    return wrap_model(model)


def unwrap(model: nn.Module | GraphModelWrapper) -> nn.Module:
    """The module inside NNCF's graph wrapper, or the module itself."""
    return model.model if isinstance(model, GraphModelWrapper) else model


def with_graph(model: nn.Module, example: Any) -> GraphModelWrapper:
    """What NNCF's torch algorithms take as their model: the wrapped module and an example input."""
    return GraphModelWrapper(wrap(model), example)


def trace(model: nn.Module, example: Any) -> NNCFGraph:
    """NNCF's graph of one forward pass. ``example`` is a tensor, a tuple of arguments or a dict."""
    return build_nncf_graph(wrap(model), example)


def insert(model: nn.Module, name: str, port: int | None, module: nn.Module) -> None:
    """Run ``module`` on what arrives at an op's input port, or on a parameter's value wherever it
    is used.

    Parameters
    ----------
    name
        Of an op in the NNCF graph, or of a parameter when ``port`` is None.
    """
    if port is None:
        register_post_function_hook(model, name, 0, module)
    else:
        register_pre_function_hook(model, name, port, module)


def hooks(model: nn.Module) -> Iterator[Hook]:
    """All hooks of a model, in the order in which they were registered per place."""
    if not is_wrapped(model):
        return
    for name, module in get_hook_storage(model).named_hooks(remove_duplicate=False):
        when, op, port = decode_hook_name(name)
        yield Hook("pre" if when.startswith("pre") else "post", op, port, module)


@contextmanager
def watching(
    model: nn.Module,
    inputs: dict[tuple[str, int], Callable[[Tensor], Tensor | None]],
    outputs: dict[str, Callable[[Tensor], Tensor | None]],
) -> Iterator[None]:
    """Show the values at input ports and outputs of ops to functions, for as long as the context
    lasts. What a function returns, unless None, takes the value's place.

    Parameters
    ----------
    inputs
        Functions by (op name, input port). They see the value after the hooks that are there
        already.
    outputs
        Functions by op name.
    """
    handles = [
        register_pre_function_hook(model, op, port, _Tap(see)) for (op, port), see in inputs.items()
    ]
    handles += [register_post_function_hook(model, op, 0, _Tap(see)) for op, see in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its hooks, for as long as the context lasts: the float model again."""
    if not is_wrapped(model):
        yield
        return
    storage = get_hook_storage(model)
    kept = storage.pre_hooks, storage.post_hooks
    storage.pre_hooks, storage.post_hooks = nn.ModuleDict(), nn.ModuleDict()
    try:
        yield
    finally:
        storage.pre_hooks, storage.post_hooks = kept


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a hook in the place of another one, everywhere where that one is."""
    storage = get_hook_storage(model)
    for places in (storage.pre_hooks, storage.post_hooks):
        for at_place in places.values():
            for key, hook in at_place.items():
                if hook is old:
                    at_place[key] = new
