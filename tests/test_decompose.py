"""Calls that hide products are taken apart exactly, per model, and survive copies."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import Batch
from ptq4vit_plugin.integrations.nncf.decompose import (
    added_product,
    attention,
    contraction,
    convolution,
    decompose,
    is_decomposed,
)
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.prepare import prepare

# The first queries may attend to nothing.
NOTHING = torch.arange(5)[:, None] < 2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.arange(35).reshape(5, 7) % 3 > 0},
        {"attn_mask": torch.arange(35).reshape(5, 7) > 13},  # the first queries see nothing
        {"attn_mask": torch.linspace(-2, 2, 70).reshape(2, 1, 5, 7)},
        {"attn_mask": torch.linspace(-2, 2, 5)[:, None].masked_fill(NOTHING, -torch.inf)},
        {
            "attn_mask": torch.zeros(5, 7).masked_fill(
                torch.arange(35).reshape(5, 7) < 9, -torch.inf
            )
        },
    ],
)
def test_attention_computes_what_torch_does(arguments):
    shapes = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = F.scaled_dot_product_attention(*given, **arguments)
    found = attention(*given, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(expected)
    of_torch, of_ours = (torch.autograd.grad(y, given, probe) for y in (expected, found))
    torch.testing.assert_close(of_ours, of_torch, rtol=1e-4, atol=1e-5)


def test_grouped_query_attention():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, enable_gqa=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bnhk,bmk->bnhm", (2, 3, 4, 5), (2, 6, 5)),
        ("bhwc,wkc->bhwk", (2, 3, 4, 5), (4, 6, 5)),
        ("bnhv,dhv->bdn", (2, 3, 4, 5), (7, 4, 5)),
        ("nm,hnm->h", (2, 3), (4, 2, 3)),
        ("ij, jk -> ki", (2, 3), (3, 4)),
        ("bnc,bcd->bnd", (2, 3, 4), (1, 4, 5)),  # of the one all items of the batch
        ("bhnc,bhdc->hbdn", (1, 2, 3, 4), (6, 1, 5, 4)),
    ],
)
def test_contraction_computes_what_einsum_does(equation, left, right):
    a, b = torch.randn(left), torch.randn(right)
    torch.testing.assert_close(contraction(equation, a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,ij->", "ii,ij->j", "...j,jk->...k", "ij,jk"])
def test_other_einsums_stay(equation):
    assert contraction(equation, torch.randn(3, 3), torch.randn(3, 3)) is NotImplemented


def test_an_inner_index_of_one_that_is_repeated_stays():
    assert contraction("ij,jk->ik", torch.randn(2, 1), torch.randn(3, 4)) is NotImplemented


def test_convolution_and_added_product():
    x, weight, bias = torch.randn(2, 4, 9), torch.randn(6, 2, 3), torch.randn(6)
    call = dict(bias=bias, stride=(2,), padding=1, groups=2)
    torch.testing.assert_close(convolution(x, weight, **call), F.conv1d(x, weight, **call))
    a, b, c = torch.randn(2, 4), torch.randn(2, 3), torch.randn(3, 4)
    scaled = dict(beta=0.5, alpha=2)
    torch.testing.assert_close(added_product(a, b, c, **scaled), torch.addmm(a, b, c, **scaled))


class Mixed(nn.Module):
    """nn.MultiheadAttention, a bare attention call, an einsum and a parameter in a tuple."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.token = nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = self.attention(x, x, x, need_weights=False)[0]
        z = F.scaled_dot_product_attention(y, y, y)
        scores = torch.einsum("bnc,bmc->bnm", z, y)
        return scores.mean() * torch.cat((self.token, self.token))


def test_every_hidden_product_is_found_and_nothing_changes():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 5, 16)
    expected = model(x)
    prepare(model, Batch((x,), {}))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    found, left_out = find_ops(hooks.trace(model, x), 2)
    assert [op.name for op in found] == [
        "attention/linear/0",
        "attention/matmul/0",
        "attention/matmul/1",
        "attention/linear/1",
        "/matmul/0",
        "/matmul/1",
        "/matmul/2",
    ]
    assert left_out == []


def test_a_copy_runs_its_own_weights():
    model, x = Mixed().eval(), torch.randn(2, 5, 16)
    decompose(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.token.zero_()
    assert is_decomposed(twin)
    assert not twin(x).any() and model(x).any()


def test_a_model_without_hidden_products_stays_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    prepare(model, Batch((torch.randn(2, 3),), {}))
    assert not is_decomposed(model) and "forward" not in vars(model)


def test_other_models_keep_fused_attention():
    model, other, x = Mixed().eval(), Mixed().eval(), torch.randn(2, 5, 16)
    decompose(model)
    model(x)
    names = [node.node_type for node in hooks.trace(_Bare(), x).get_all_nodes()]
    assert "scaled_dot_product_attention" in names
    assert not is_decomposed(other)


class _Bare(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)
