"""Which ops which calibration batches run: what is searched must run once in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from nncf.common.graph.graph import NNCFGraph
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ptq4vit_plugin.errors import DataError
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.hooks import watching
from ptq4vit_plugin.plan import FoundOp


@contextmanager
def run_by_all(
    model: nn.Module, data: Sequence[Batch], ops: Sequence[FoundOp]
) -> Iterator[Callable[[], None]]:
    """Refuse ops that not every batch runs once and with the same weight.

    Experts that are skipped where nothing is routed to them are such ops. Where a model calls them
    in a loop, NNCF numbers those that run, and one name means another expert in every batch.

    Yields
    ------
    function
        To be called after each batch.

    Raises
    ------
    DataError
        On leaving: there is such an op.
    """
    times: list[Counter[str]] = [Counter()]  # by batch, that which is running last
    others: list[set[str]] = [set()]  # that ran with another weight
    parameters = {id(parameter) for parameter in model.parameters()}
    computed: dict[str, Tensor] = {}

    def count(name: str) -> Callable[[Tensor], None]:
        def see(_: Tensor) -> None:
            times[-1][name] += 1

        return see

    def compare(op: FoundOp) -> Callable[[Tensor], None]:
        name, parameter = op.name, op.sources[1].parameter
        own = None if parameter is None else model.get_parameter(parameter)

        def see(x: Tensor) -> None:
            if own is not None:
                same = x is own or id(x) not in parameters
            else:
                same = _same(computed.setdefault(name, x.detach().clone()), x)
            if not same:
                others[-1].add(name)

        return see

    def ran() -> None:
        times.append(Counter())
        others.append(set())

    inputs = {(op.name, 0): count(op.name) for op in ops}
    inputs |= {(op.name, 1): compare(op) for op in ops if _is_fixed(op)}
    with watching(model, inputs, {}):
        yield ran
    faults: dict[str, list[tuple[Batch, str]]] = {}
    for batch, counted, changed in zip(data, times, others, strict=False):
        for op in ops:
            if counted[op.name] != 1:
                faults.setdefault(op.name, []).append((batch, f"{counted[op.name]} times"))
            elif op.name in changed:
                faults.setdefault(op.name, []).append((batch, "with another weight"))
    if faults:
        name, *more = faults
        batch, how = faults[name][0]
        raise DataError(
            f"{name}: runs {how} in the batch of calibration images {batch.first} to "
            f"{batch.first + len(batch) - 1} ({len(faults[name])} of {len(data)} batches are such)"
            f"{f'; likewise {_few(more)}' if more else ''}; allowed: ops that every batch runs "
            "once. Give batches that all run them, or leave them in float (ignored_scopes of "
            "'ptq4vit')"
        )


@contextmanager
def run_untraced(model: nn.Module, graph: NNCFGraph) -> Iterator[dict[str, str]]:
    """Note linears and convolutions that run though the graph has none of their parameters, as
    those do that a model runs for some images only.

    Yields
    ------
    dict
        Kinds by the modules' names, as they run.
    """
    nodes = {node.node_name for node in graph.get_all_nodes()}
    traced = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in nodes}
    ran: dict[str, str] = {}

    def note(name: str, kind: str) -> Callable[..., None]:
        def see(*_: object) -> None:
            ran[name] = kind

        return see

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            own = [id(p) for p in module.parameters()]
            if isinstance(module, (nn.Linear, _ConvNd)) and own and not traced.intersection(own):
                kind = type(module).__name__.lower()
                handle = module.register_forward_pre_hook(note(name, kind))
                hooks.callback(handle.remove)
        yield ran


def _is_fixed(op: FoundOp) -> bool:
    """Whether an op's second factor is taken to be the same in all batches."""
    if op.kind == "matmul":
        return len(op.output_shape) == 2 and op.sources[1].kind == "constant"
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same but for rounding."""
    if one.shape != other.shape:
        return False
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= 1e-3 * one.float().abs().max())


def _few(names: Sequence[str]) -> str:
    """Some names, and how many others there are."""
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} others"
