"""Folding batch normalization changes weights and not what the model computes."""

import pytest
import torch
from torch import nn

from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch_norm import fold_batch_norms


class Stem(nn.Module):
    def __init__(self, bias=False, affine=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=3, bias=bias)
        self.norm = nn.BatchNorm2d(6, affine=affine)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.1, 4)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("bias", [False, True])
def test_same_output_and_folded_weight(bias):
    torch.manual_seed(0)
    model, x = Stem(bias).eval(), torch.randn(2, 3, 8, 8)
    expected, weight = model(x), model.conv.weight.detach().clone()
    norm = model.norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().clone()
    keys = list(model.state_dict())
    assert fold_batch_norms(model, hooks.trace(model, x)) == ["conv/conv2d/0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.conv.weight, weight * factor.reshape(-1, 1, 1, 1))
    assert list(model.state_dict()) == keys
    # What is left of the normalization adds a number per channel, none if the conv has a bias.
    y = torch.randn(2, 6, 4, 4)
    shift = norm(y) - y
    torch.testing.assert_close(shift, shift[:1, :, :1, :1].expand_as(shift), rtol=1e-5, atol=1e-5)
    assert bool(shift.abs().max() < 1e-5) == bias


def test_folding_twice_is_folding_once():
    model, x = Stem().eval(), torch.randn(2, 3, 8, 8)
    fold_batch_norms(model, hooks.trace(model, x))
    once = model.conv.weight.detach().clone()
    fold_batch_norms(model, hooks.trace(model, x))
    torch.testing.assert_close(model.conv.weight, once, rtol=1e-6, atol=0)


def test_left_alone_without_scale_or_when_the_convolution_is_used_elsewhere():
    class Branched(Stem):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    x = torch.randn(2, 3, 8, 8)
    for model in (Stem(affine=False).eval(), Branched().eval()):
        expected = model(x)
        assert fold_batch_norms(model, hooks.trace(model, x)) == []
        assert torch.equal(model(x), expected)
