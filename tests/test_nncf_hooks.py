"""The part of NNCF that is not public API is still where, and what, this plugin thinks it is."""

import ast
import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ptq4vit_plugin
from ptq4vit_plugin.integrations.nncf import hooks


class Chain(nn.Module):
    """Layers in a row. Not nn.Sequential, which would call the module that NNCF adds to it."""

    def __init__(self, *layers):
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class _Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_only_one_module_imports_function_hook():
    package = Path(ptq4vit_plugin.__file__).parent
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "function_hook" in (node.module or "")
    }
    assert importing == {"integrations/nncf/hooks.py"}


def test_names_of_ops_and_parameters():
    model = Chain(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    graph = hooks.trace(model, torch.zeros(1, 3))
    names = {node.node_name for node in graph.get_all_nodes()}
    assert {"0/linear/0", "1/gelu/0", "2/linear/0", "0.weight", "2.bias"} <= names


def test_hooks_on_inputs_and_parameters_run_and_are_listed():
    model = hooks.wrap(Chain(nn.Linear(3, 3, bias=False)))
    x = torch.eye(3)
    plain = model(x)
    on_input, on_weight = _Double(), _Double()
    hooks.insert(model, "0/linear/0", 0, on_input)
    hooks.insert(model, "0.weight", None, on_weight)
    assert torch.equal(model(x), 4 * plain)
    found = {(hook.when, hook.op, hook.port): hook.module for hook in hooks.hooks(model)}
    assert found == {("pre", "0/linear/0", 0): on_input, ("post", "0.weight", 0): on_weight}


def test_watching_sees_values_and_leaves_no_trace():
    model = hooks.wrap(Chain(nn.Linear(3, 2)))
    x = torch.randn(5, 3)
    plain = model(x)
    seen = {}
    with hooks.watching(
        model,
        {("0/linear/0", 0): lambda value: seen.update(input=value)},
        {"0/linear/0": lambda value: seen.update(output=value)},
    ):
        watched = model(x)
    assert torch.equal(seen["input"], x)
    assert torch.equal(seen["output"], plain) and torch.equal(watched, plain)
    assert list(hooks.hooks(model)) == []


@pytest.fixture
def busy_threads():
    """Threads that take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("busy_threads")
@pytest.mark.parametrize("kind", ["hooked", "replaced", "copied"])
def test_threads_that_share_a_model_get_its_output(kind):
    model = hooks.wrap(Chain(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)))
    hooks.insert(model, "2/linear/0", 0, _Double())
    x = torch.randn(5, 4)
    first, gelu, last = model.layers
    expected = last(2 * gelu(first(x)))
    called = {
        "hooked": lambda: model,
        "replaced": lambda: hooks.ReplacedOps(model, {}),
        "copied": lambda: copy.deepcopy(model),
    }[kind]()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(called, [x] * 40))
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize(
    "around", [lambda model: model, lambda model: hooks.ReplacedOps(model, {})]
)
def test_a_hooked_model_can_be_compiled(around):
    model = hooks.wrap(Chain(nn.Linear(4, 4), nn.Linear(4, 3)))
    hooks.insert(model, "1/linear/0", 0, _Double())
    x = torch.randn(5, 4)
    first, last = model.layers
    compiled = torch.compile(around(model), backend="eager")
    assert torch.equal(compiled(x), last(2 * first(x)))


def test_nncf_checkpoint_format_takes_our_hooks():
    """`nncf.torch.get_config` lists hooks under names that `load_from_config` puts back."""
    import nncf

    from ptq4vit_plugin.quantizers.base import Grouping
    from ptq4vit_plugin.quantizers.uniform import Uniform

    quantizer = Uniform(8, Grouping((1, 1, 1, 1)))
    quantizer.observe(torch.randn(1, 1, 4, 3))
    model = hooks.wrap(Chain(nn.Linear(3, 2)))
    hooks.insert(model, "0/linear/0", 0, quantizer.module(quantizer.n, lambda s: s))
    state = nncf.torch.get_config(model)["compression_state"]
    assert [entry["hook_names_in_model"] for entry in state] == [["pre_hooks.0/linear/0__0.0"]]
