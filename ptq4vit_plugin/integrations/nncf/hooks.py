"""The one door to NNCF's function hooks, which are not public API.

Everything the plugin needs of ``nncf.torch.function_hook`` goes through this module, and
``tests/test_nncf_hooks.py`` fails loudly when NNCF moves any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock, get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.torch.function_hook import (
    register_post_function_hook,
    register_pre_function_hook,
    wrap_model,
)
from nncf.torch.function_hook.handle_inner_functions import get_handle_inner_function
from nncf.torch.function_hook.hook_executor_mode import (
    IGNORED_FN_NAMES,
    FunctionHookMode,
    OpMeta,
)
from nncf.torch.function_hook.hook_storage import HookStorage, decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import (
    GraphModelWrapper,
    build_nncf_graph,
)
from nncf.torch.function_hook.wrapper import (
    ATR_HOOK_STORAGE,
    ForwardWithHooks,
    get_hook_storage,
    is_wrapped,
)
from nncf.torch.quantization.layers import SQMultiply
from torch import Tensor, nn

from ptq4vit_plugin import registry


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
        # What is computed of a value is no part of the model: NNCF need not look at every call.
        with torch._C.DisableTorchFunction():
            replacement = self.see(x)
        return x if replacement is None else replacement


class _PassingStorage(HookStorage):
    """NNCF's store of hooks for a model that is a container, such as `nn.Sequential`.

    Such a model calls all its children in a row, so also this one, which NNCF adds as the last.
    """

    def forward(self, x: Any) -> Any:
        return x


#: By model. NNCF notes in a model's modules which forward runs, so one runs at a time.
_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def _alone(model: nn.Module) -> AbstractContextManager[Any]:
    """What a thread holds while it runs a model with hooks; `torch.compile` cannot trace locks."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _LOCKS.setdefault(model, RLock())


class _OwnThreadMode(FunctionHookMode):
    """NNCF's own mode, which does not note calls of the model by threads that wait for it."""

    def __init__(self, model: nn.Module, hook_storage: HookStorage) -> None:
        super().__init__(model, hook_storage)
        self.thread = get_ident()

    def push_module_call_stack(self, module: nn.Module) -> None:
        if get_ident() == self.thread:
            super().push_module_call_stack(module)

    def pop_module_call_stack(self) -> None:
        if get_ident() == self.thread:
            super().pop_module_call_stack()


class _OneAtATime(ForwardWithHooks):
    """NNCF's forward, for a model that several threads call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        storage = get_hook_storage(self.model)
        if storage.is_empty() or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with _alone(self.model), _OwnThreadMode(self.model, storage) as mode:
            args, kwargs = mode.process_model_inputs(args, kwargs)
            return mode.process_model_outputs(self.orig_forward(*args, **kwargs))


def wrap(model: nn.Module) -> nn.Module:
    """Let NNCF's hooks run in the model's forward; the model itself is returned."""
    if not is_wrapped(model):
        wrap_model(model)
        forward = model.__dict__.pop("forward").orig_forward
        model.forward = _OneAtATime(model, forward)
        if isinstance(model, (nn.Sequential, nn.ModuleDict, nn.ModuleList)):
            setattr(model, ATR_HOOK_STORAGE, _PassingStorage())
    return model


def forward_of(model: nn.Module) -> Callable:
    """A model's forward without NNCF's hooks."""
    return model.forward.orig_forward if is_wrapped(model) else model.forward


def set_forward(model: nn.Module, forward: Callable) -> None:
    """Replace a model's forward; NNCF's hooks stay around it."""
    if is_wrapped(model):
        model.forward._orig_forward = forward
    else:
        model.forward = forward


def inner_function(function: Callable) -> Callable | None:
    """NNCF's copy of the body of a function whose inner calls Python cannot see otherwise."""
    return get_handle_inner_function(function)


def forget_graph(model: nn.Module | GraphModelWrapper) -> None:
    """Make NNCF trace the model again when it is asked for its graph: the model has changed."""
    if isinstance(model, GraphModelWrapper):
        model.reset_graph()


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


def multiply(model: nn.Module, name: str, port: int, factor: Tensor) -> None:
    """Multiply what arrives at an op's input port by a factor per channel, as SmoothQuant does.

    The factor is a part of the float model: quantizers that are inserted later come behind it.

    Parameters
    ----------
    factor
        ``[C]``, in the dtype of the activation.
    """
    module = SQMultiply(tuple(factor.shape)).requires_grad_(False)
    module.scale = factor
    insert(model, name, port, module)


def is_factor(node: str) -> bool:
    """Whether a node of the NNCF graph is the multiplication that `multiply` inserts."""
    return "/pre_hook__" in node and "/mul/" in node


def quantizers(model: nn.Module) -> Iterator[Hook]:
    """`hooks` but for the factors of `multiply` and of SmoothQuant, which are no quantizers."""
    return (hook for hook in hooks(model) if not isinstance(hook.module, SQMultiply))


def restore(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Put back the hooks of ``nncf.torch.get_config``; their tensors come with the state dict.

    Classes of hooks are imported only from NNCF, from this plugin and from distributions that
    registered a quantizer through an entry point, which the user installed.

    Raises
    ------
    nncf.InternalError
        A class is of none of these, or is not there.
    """
    values = (entry.value for entry in registry.entries("quantizers"))
    packages = sorted({value.split(":")[0].split(".")[0] for value in values})
    allowed = ("nncf.*", *(pattern for name in packages for pattern in (name, f"{name}.*")))
    return nncf.torch.load_from_config(model, config, allowed_modules=allowed)


def take(model: nn.Module, name: str, port: int | None) -> list[nn.Module]:
    """Remove the modules that `insert` put at a place, and return them in their order."""
    if not is_wrapped(model):
        return []
    wanted = ("post", name, 0) if port is None else ("pre", name, port)
    storage = get_hook_storage(model)
    taken = []
    for key, module in list(storage.named_hooks(remove_duplicate=False)):
        when, op, at = decode_hook_name(key)
        if (when.removesuffix("_hooks"), op, at) == wanted:
            storage.delete_hook(key)
            taken.append(module)
    return taken


class ReplacedOps(nn.Module):
    """A model in which some ops are computed by modules; its other hooks run as before.

    Attributes
    ----------
    model
        The model, changed by nothing but its hooks.
    ops
        By op name in the NNCF graph: what runs instead. Called as ``op(function, args, kwargs)``
        with the arguments after the hooks on them.
    """

    def __init__(self, model: nn.Module, ops: dict[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.ops = nn.ModuleDict({self.key(name): op for name, op in ops.items()})

    @staticmethod
    def key(name: str) -> str:
        """The name of an op's module; converters keep it in the names of their nodes."""
        return name.replace("/", ":")

    def named_ops(self) -> dict[str, nn.Module]:
        """The replacing modules by op name."""
        return {key.replace(":", "/"): op for key, op in self.ops.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        storage = get_hook_storage(self.model) if is_wrapped(self.model) else HookStorage()
        forward = forward_of(self.model)
        ops = self.named_ops()
        with _alone(self.model), _ReplacingMode(self.model, storage, ops) as mode:
            args, kwargs = mode.process_model_inputs(args, kwargs)
            return mode.process_model_outputs(forward(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        # What is asked of an image model (its input size, its classes) is asked of this one too.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class _ReplacingMode(FunctionHookMode):
    """NNCF's own mode, which names every call and runs the hooks, with some calls replaced."""

    def __init__(
        self, model: nn.Module, hook_storage: HookStorage, ops: dict[str, nn.Module]
    ) -> None:
        super().__init__(model, hook_storage)
        self.ops = ops
        # Naming calls and looking for hooks that are not there take longer than many of the calls.
        hooked = [decode_hook_name(name)[1] for name, _ in hook_storage.named_hooks()]
        self.hooked = bool(hooked)
        #: Functions of which some calls matter; None: all, as any may take a parameter.
        self.functions: set[str] | None = None
        if all("/" in place for place in hooked):
            self.functions = {place.split("/")[-2] for place in (*ops, *hooked)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inner = get_handle_inner_function(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        if not self.enabled or func.__name__ in IGNORED_FN_NAMES:
            return func(*args, **kwargs)
        if self.functions is not None and func.__name__ not in self.functions:
            return func(*args, **kwargs)
        meta = OpMeta(self.get_next_op_call_name(func.__name__), func)
        if self.hooked:
            args, kwargs = self.execute_pre_hooks(args, kwargs, meta)
        op = self.ops.get(meta.op_name)
        output = func(*args, **kwargs) if op is None else op(func, args, kwargs)
        return self.execute_post_hooks(output, meta) if self.hooked else output


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
        Functions by op name. A tensor that one returns takes the value's place.
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


class _LocatingMode(FunctionHookMode):
    """NNCF's own mode, which notes inside which calls of modules every op runs."""

    def __init__(self, model: nn.Module, hook_storage: HookStorage) -> None:
        super().__init__(model, hook_storage)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.around: dict[str, tuple[str, ...]] = {}

    def get_next_op_call_name(self, fn_name: str) -> str:
        op = super().get_next_op_call_name(fn_name)
        _, *modules = (self.names.get(id(module), "") for module in self.module_call_stack)
        self.around[op] = tuple(modules)
        return op


@torch.no_grad()
def locate(model: nn.Module, args: Any, kwargs: Any) -> dict[str, tuple[str, ...]]:
    """Run a model once and tell inside which modules every op runs.

    An op's name does not say it where a model calls modules past their parents, as a loop over an
    `nn.ModuleList` does: then NNCF leaves them out and numbers the calls of all of them together.

    Parameters
    ----------
    args, kwargs
        Of its forward.

    Returns
    -------
    dict
        By op name, the modules' names, the outermost first and without the model itself.
    """
    storage = get_hook_storage(model) if is_wrapped(model) else HookStorage()
    with _LocatingMode(model, storage) as mode:
        args, kwargs = mode.process_model_inputs(args, kwargs)
        forward_of(model)(*args, **kwargs)
    return mode.around


@contextmanager
def inside(model: nn.Module, around: Sequence[str], ops: Iterable[str]) -> Iterator[None]:
    """Let a submodule that is called by itself run its hooks, as it does in the model's forward.

    Parameters
    ----------
    around
        Names of the modules around the submodule's call, the outermost first.
    ops
        Those inside it, which are to have the names that they have in the model's forward.
    """
    if not is_wrapped(model):
        yield
        return
    with FunctionHookMode(model, get_hook_storage(model)) as mode:
        for name in around:
            mode.push_module_call_stack(model.get_submodule(name))
        calls = sorted((op.rpartition("/")[0], int(op.rpartition("/")[2])) for op in ops)
        mode.op_calls.update({name: first for name, first in reversed(calls)})
        yield


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """The model without its quantizers, for as long as the context lasts: the float model again."""
    if not is_wrapped(model):
        yield
        return
    storage = get_hook_storage(model)
    kept = storage.pre_hooks, storage.post_hooks
    storage.pre_hooks, storage.post_hooks = (_factors_only(places) for places in kept)
    try:
        yield
    finally:
        storage.pre_hooks, storage.post_hooks = kept


def _factors_only(places: nn.ModuleDict) -> nn.ModuleDict:
    factors = nn.ModuleDict()
    for place, at_place in places.items():
        kept = {key: hook for key, hook in at_place.items() if isinstance(hook, SQMultiply)}
        if kept:
            factors[place] = nn.ModuleDict(kept)
    return factors


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a hook in the place of another one, everywhere where that one is."""
    storage = get_hook_storage(model)
    for places in (storage.pre_hooks, storage.post_hooks):
        for at_place in places.values():
            for key, hook in at_place.items():
                if hook is old:
                    at_place[key] = new
