"""The self-check of accelerators checks what it says, shown on the CPU."""

import torch

from ptq4vit_plugin.integrations import device as devices
from ptq4vit_plugin.integrations.integer import selfcheck
from ptq4vit_plugin.integrations.integer.product import weight_product


def test_nothing_to_check_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(devices, "accelerators", lambda: [])
    assert selfcheck.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_a_right_and_a_wrong_product_are_told_apart(monkeypatch, capsys):
    monkeypatch.setattr(devices, "accelerators", lambda: [(torch.device("cpu"), "this CPU")])
    assert selfcheck.main() == 0
    assert capsys.readouterr().out.count("ok ") == 3

    def wrong(*arguments):
        product = weight_product(*arguments)
        right = product.accumulators
        product.accumulators = lambda codes, lowest: right(codes, lowest) + 1
        return product

    monkeypatch.setattr(selfcheck, "weight_product", wrong)
    assert selfcheck.main() == 1
    assert "FAILED linear" in capsys.readouterr().out
