"""Calls that hide matrix products, taken apart so that NNCF's hooks see the products.

`F.scaled_dot_product_attention`, `F.conv1d`, `torch.einsum`, `torch.addmm` and `torch.baddbmm`
become `matmul`, `conv2d` and elementwise functions while a prepared model's forward runs, and only
then: no module is edited and other models are not touched. Op names count calls per module, so they
are the same each time a model is prepared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ptq4vit_plugin.integrations.nncf import hooks


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, its two products one after the other.

    Arguments as there: query ``[..., N, E]``, key ``[..., S, E]``, value ``[..., S, D]``.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    if is_causal:
        shape = (query.size(-2), key.size(-2))
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    elif attn_mask.dtype == torch.bool:
        # A query that may attend to nothing gets zeros, not the NaN of an empty softmax.
        weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~attn_mask, 0)
    else:
        nothing = attn_mask.amax(-1, keepdim=True) == -torch.inf
        weights = (scores + attn_mask.masked_fill(nothing, 0)).softmax(-1)
        weights = weights.masked_fill(nothing, 0)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def contraction(equation: str, *operands: Any) -> Tensor:
    """`torch.einsum` of two tensors as one `matmul`, or ``NotImplemented`` when it is none.

    Indices of both operands and the output become leading dimensions, those of one operand and the
    output rows or columns, and those of both operands alone the inner dimension.
    """
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(operands) != 2 or any(len(set(term)) < len(term) for term in terms):
        return NotImplemented
    (left, right), (a, b) = terms, operands
    lead = [i for i in left if i in right and i in output]
    inner = [i for i in left if i in right and i not in output]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    if not inner or not rows + columns or not set(rows + columns) <= set(output):
        return NotImplemented
    sizes = [dict(zip(term, x.shape, strict=True)) for term, x in zip(terms, (a, b), strict=True)]
    if any(sizes[0][i] != sizes[1][i] for i in inner):
        return NotImplemented  # one of them is repeated
    product = torch.matmul(
        _arranged(a, left, lead, rows, inner), _arranged(b, right, lead, inner, columns)
    )
    order = lead + rows + columns
    shape = [
        *product.shape[: len(lead)],
        *(sizes[0][i] for i in rows),
        *(sizes[1][i] for i in columns),
    ]
    return product.reshape(shape).permute([order.index(i) for i in output])


def _arranged(x: Tensor, term: str, lead: list[str], first: list[str], second: list[str]) -> Tensor:
    """``x`` with its indices in the order ``lead, first, second``, the last two as one dimension
    each."""
    size = dict(zip(term, x.shape, strict=True))
    x = x.permute([term.index(i) for i in (*lead, *first, *second)])
    shape = [size[i] for i in lead] + [prod(size[i] for i in part) for part in (first, second)]
    return x.reshape(shape)


def added_product(
    input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`torch.addmm` and `torch.baddbmm`: ``beta input + alpha first second``."""
    product = torch.matmul(first, second)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d` as a 2-D convolution of images that are one pixel high."""

    def flat(value: Any, height: int) -> tuple[int, int]:
        return (height, value[0] if isinstance(value, (tuple, list)) else value)

    padding = padding if isinstance(padding, str) else flat(padding, 0)
    call = (bias, flat(stride, 1), padding, flat(dilation, 1), groups)
    return F.conv2d(input.unsqueeze(-2), weight.unsqueeze(-2), *call).squeeze(-2)


#: What replaces a function, by the function's name (a tensor's method has the same name).
REPLACEMENTS: dict[str, Callable[..., Tensor]] = {
    "scaled_dot_product_attention": attention,
    "einsum": contraction,
    "addmm": added_product,
    "baddbmm": added_product,
    "conv1d": convolution,
}


#: Functions that take a sequence of tensors. NNCF does not look for parameters in a tuple, and
#: its tracing fails on one that it finds nowhere else; in a list it sees them.
JOINS = frozenset("cat concat concatenate stack hstack vstack dstack".split())


class _Decomposing(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _joins_tuple(func, args):
            args = (list(args[0]), *args[1:])
        inner = hooks.inner_function(func)
        if inner is not None:
            # NNCF runs a copy of the function's body; what that calls has to be seen here first.
            with self:
                return inner(*args, **kwargs)
        replacement = REPLACEMENTS.get(func.__name__)
        if replacement is not None:
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class _Search(TorchFunctionMode):
    """Note whether there is anything to take apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.constants = {id(x) for x in (*model.parameters(), *model.buffers())}
        self.found = False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found |= (
            func.__name__ in REPLACEMENTS
            or func is F.multi_head_attention_forward
            or (_joins_tuple(func, args) and any(id(x) in self.constants for x in args[0]))
        )
        return func(*args, **(kwargs or {}))


def _joins_tuple(func: Callable, args: tuple) -> bool:
    return func.__name__ in JOINS and bool(args) and isinstance(args[0], tuple)


class _Forward:
    """A model's forward with its calls decomposed; copies with the model."""

    def __init__(self, forward: Callable) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Decomposing():
            return self.forward(*args, **kwargs)

    # NNCF and torch.jit ask a forward for what a function has.
    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    @property
    def __name__(self) -> str:
        return self.forward.__name__

    @property
    def __globals__(self) -> dict[str, Any]:
        return self.forward.__globals__


@torch.no_grad()
def needs_decomposing(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether a run of the model makes calls that `decompose` would change."""
    with _Search(model) as search:
        run()
    return search.found


def decompose(model: nn.Module) -> None:
    """Take the calls in `REPLACEMENTS` apart whenever the model's forward runs."""
    if not is_decomposed(model):
        hooks.set_forward(model, _Forward(hooks.forward_of(model)))


def decomposing(model: nn.Module) -> AbstractContextManager[Any]:
    """What surrounds a call of one of the model's modules by itself: as in the model's forward."""
    return _Decomposing() if is_decomposed(model) else nullcontext()


def is_decomposed(model: nn.Module) -> bool:
    """Whether `decompose` was called on a model."""
    return isinstance(hooks.forward_of(model), _Forward)
