"""House rules that are tedious to check by eye: no device in the code, no unpickling."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ptq4vit_plugin"
DEVICE = PACKAGE / "integrations" / "device.py"
FILES = sorted(PACKAGE.rglob("*.py"))
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def devices(tree: ast.AST) -> Iterator[int]:
    """Lines that name a CUDA device or move something to one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value == "cuda" or node.value.startswith("cuda:"):
                yield node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "cuda":
                yield node.lineno


def unpickling(tree: ast.AST) -> Iterator[int]:
    """Lines that import an unpickler, call `torch.load`, or allow numpy to unpickle."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                yield node.lineno
        if any(module.split(".")[0] in UNPICKLERS for module in modules):
            yield node.lineno
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.load":
                yield node.lineno
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rules(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(unpickling(tree)) == []
    if path != DEVICE:
        assert list(devices(tree)) == []


@pytest.mark.parametrize("code", ["x.cuda()", "x.to('cuda')", 'd = "cuda:0"', "f'cuda:{i}'"])
def test_the_device_rule_sees(code):
    assert list(devices(ast.parse(code))) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_unpickling_rule_sees(code):
    assert list(unpickling(ast.parse(code))) == [1]


@pytest.mark.parametrize("code", ["torch.cuda.is_available()", "np.load(p, allow_pickle=False)"])
def test_the_rules_let_through(code):
    assert list(devices(ast.parse(code))) == list(unpickling(ast.parse(code))) == []
