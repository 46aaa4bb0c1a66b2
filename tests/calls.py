"""An independent count of what a model calls; it knows nothing of NNCF or of this plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "addmm")
HIDDEN_PRODUCTS = ("scaled_dot_product_attention", "einsum", "multi_head_attention_forward")
LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


class Calls(TorchFunctionMode):
    """Count calls, and follow what softmax makes to the products that take it, and back.

    Attributes
    ----------
    count
        Calls by the function's name.
    multiplies_activations
        Whether two tensors that are no parameters are multiplied as matrices.
    after_softmax, before_softmax
        Numbers of the products, in the order of their calls, with a factor that comes out of a
        softmax, and of those whose result goes into one; whatever happens to it on the way, as long
        as no layer with weights takes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.multiplies_activations = False
        self.after_softmax: set[int] = set()
        self.before_softmax: set[int] = set()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        self.count[name] += 1
        arguments = (*args, *(kwargs or {}).values())
        if name in HIDDEN_PRODUCTS or name in PRODUCTS:
            factors = [x for x in args if isinstance(x, Tensor)]
            self.multiplies_activations |= len(factors) >= 2 and not any(
                isinstance(x, nn.Parameter) for x in factors
            )
        comes_from = set().union(*(_origins(x) for x in tensors(arguments)))
        if name in PRODUCTS:
            number = sum(self.count[product] for product in PRODUCTS)
            if "softmax" in comes_from:
                self.after_softmax.add(number)
            comes_from = {number}
        elif name in LAYERS:
            comes_from = set()
        elif name == "softmax":
            self.before_softmax |= comes_from - {"softmax"}
            comes_from = {"softmax"}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors([result]):
            tensor._comes_from = comes_from
        return result


def _origins(x: Tensor) -> set[Any]:
    return getattr(x, "_comes_from", set())


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of a sequence, also in sequences of it."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
