"""Entry-point discovery, with distributions that are really on the path."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptq4vit_plugin
from ptq4vit_plugin import registry
from ptq4vit_plugin.errors import RegistryError

ROOT = Path(__file__).parents[1]


def names(group: str) -> list[str]:
    return [entry.name for entry in registry.entries(group)]


def test_own_things_are_registered_by_this_distribution():
    assert {"base_ptq", "ptq4vit", "smooth_quant"} <= set(names("algorithms"))
    assert {"uniform", "twin_gelu", "twin_softmax"} <= set(names("quantizers"))
    assert {"digits", "folder", "npz"} <= set(names("datasets"))
    entry = registry.find("algorithms", "ptq4vit")
    assert entry.distribution == "ptq4vit-plugin"
    assert entry.value == "ptq4vit_plugin.algorithms.ptq4vit:PTQ4ViT"
    assert entry.version == ptq4vit_plugin.__version__


@pytest.mark.parametrize("group", registry.GROUPS)
def test_everything_of_this_distribution_loads(group):
    for entry in registry.entries(group):
        if entry.distribution == "ptq4vit-plugin":
            assert callable(registry.load(group, entry.name))


def test_what_is_installed_meanwhile_is_found(distribution):
    folder = distribution("early", {"quantizers": {"early": "m:M"}}, {})
    os.utime(folder, (1, 1))  # not within one tick of the file system's clock
    assert registry.find("quantizers", "early").distribution == "early"
    # Made elsewhere and moved, as pip does.
    late = distribution("late", {"quantizers": {"late": "m:M"}}, {}) / "late-1.0.dist-info"
    sys.path.remove(str(late.parent))
    assert "late" not in names("quantizers")
    late.rename(folder / late.name)
    assert registry.find("quantizers", "late").distribution == "late"
    (folder / late.name).rename(late)
    assert "late" not in names("quantizers")


def test_listing_imports_nothing(distribution):
    folder = distribution(
        "bomb", {"quantizers": {"bomb": "bomb:Bomb"}}, {"bomb": "raise SystemExit('imported')"}
    )
    code = (
        "import sys; from ptq4vit_plugin import registry\n"
        "found = [e.name for g in registry.GROUPS for e in registry.entries(g)]\n"
        "assert 'bomb' in found and 'ptq4vit' in found, found\n"
        "heavy = {'torch', 'nncf', 'timm', 'bomb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_another_distribution_adds_a_quantizer(distribution):
    distribution(
        "my-quantizers", {"quantizers": {"mine": "my_module:Mine"}}, {"my_module": "Mine = 'it'"}
    )
    assert registry.load("quantizers", "mine") == "it"
    assert registry.find("quantizers", "mine") == registry.Entry(
        "mine", "my_module:Mine", "my-quantizers", "1.0"
    )


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import nothing_", "ModuleNotFoundError: No module named 'nothing_'"),
        ("raise OSError('no\\nlicence')", "OSError: no licence"),
        ("def (", "SyntaxError"),
        ("", "AttributeError: module 'broken_module' has no attribute 'Broken'"),
    ],
)
def test_a_broken_distribution_is_named_and_stops_no_other(distribution, source, cause):
    distribution(
        "broken-things",
        {"quantizers": {"broken": "broken_module:Broken"}},
        {"broken_module": source},
        version="0.7",
    )
    points = {"quantizers": {"good": "good_module:Good"}}
    distribution("good-things", points, {"good_module": "Good = 1"})
    with pytest.raises(RegistryError) as caught:
        registry.load("quantizers", "broken")
    message = str(caught.value)
    assert "quantizer 'broken' of broken-things 0.7 (broken_module:Broken) does not load" in message
    assert cause in message and "\n" not in message
    assert registry.load("quantizers", "good") == 1


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(RegistryError) as caught:
        registry.load("algorithms", "PTQ4VIT")
    message = str(caught.value)
    assert message.startswith("unknown algorithm 'PTQ4VIT'; allowed: base_ptq, ")
    assert message.endswith("; did you mean 'ptq4vit'?")


def test_unknown_name_without_a_near_one_suggests_nothing():
    with pytest.raises(RegistryError) as caught:
        registry.load("algorithms", "zzz")
    assert "did you mean" not in str(caught.value)


def test_a_name_registered_twice_is_ambiguous(distribution):
    distribution("first", {"exporters": {"same": "one_module:X"}}, {"one_module": "X = 1"})
    distribution("second", {"exporters": {"same": "two_module:X"}}, {"two_module": "X = 2"})
    assert names("exporters").count("same") == 2
    with pytest.raises(RegistryError, match="registered more than once, by first .* second "):
        registry.load("exporters", "same")


def test_unknown_group():
    with pytest.raises(RegistryError, match="unknown group 'quantiser'; allowed: algorithms, "):
        registry.entries("quantiser")


def test_options_are_what_follows_the_arguments_that_the_plugin_passes():
    def source(config, split, transform, *, shuffle=False, labels, **rest): ...

    assert registry.options("datasets", source) == {"shuffle": False, "labels": ...}


def test_the_quantizer_of_contributing_works(distribution):
    """The example in CONTRIBUTING.md is code that runs."""
    import torch

    from ptq4vit_plugin.quantizers.base import Grouping, SearchRange

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    name, value = re.search(r"(\w+) = (shift_quantizer:\w+)", text).groups()
    distribution("shift-quantizer", {"quantizers": {name: value}}, {"shift_quantizer": source})

    cls = registry.load("quantizers", name)
    quantizer = cls(8, Grouping((1, 1, 1, 1)), SearchRange())
    x = torch.linspace(-3, 5, 64).reshape(1, 1, 8, 8)
    quantizer.observe(x)
    mantissa, _ = torch.frexp(quantizer.table)
    assert (mantissa == 0.5).all()
    scale = float(quantizer.table[-1])
    nearest = (x / scale).round().clamp(-128, 127) * scale
    assert torch.equal(quantizer.fake_quantize(x, quantizer.n), nearest)
