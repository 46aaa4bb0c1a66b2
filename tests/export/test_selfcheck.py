"""The self-check of accelerators checks what it says, shown on the CPU."""

import torch

from ptq4vit_plugin.integrations import device as devices
from ptq4vit_plugin.integrations.integer import selfcheck
from ptq4vit_plugin.integrations.integer.product import WeightProduct


def test_nothing_to_check_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(devices, "accelerators", lambda: [])
    assert selfcheck.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_a_right_and_a_wrong_product_are_told_apart(monkeypatch, capsys):
    monkeypatch.setattr(devices, "accelerators", lambda: [(torch.device("cpu"), "this CPU")])
    assert selfcheck.main() == 0
    assert capsys.readouterr().out.count("ok ") == 3
    right = WeightProduct.__call__
    monkeypatch.setattr(WeightProduct, "__call__", lambda self, codes: right(self, codes) + 1)
    assert selfcheck.main() == 1
    assert "FAILED linear" in capsys.readouterr().out
