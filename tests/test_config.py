"""Reading configs: defaults, every form of a compression, and errors that tell what to write."""

import json
import re

import pytest
import yaml

from ptq4vit_plugin import config
from ptq4vit_plugin.errors import ConfigError

TINY = """
from typing import Annotated, Literal
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator
from ptq4vit_plugin import registry

Bits = Annotated[int, Field(ge=2, le=8)]

class Weights(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bits: Bits = 8
    granularity: Literal["tensor", "channel"] = "channel"
    quantizer: str = "uniform"

    @field_validator("quantizer")
    @classmethod
    def registered(cls, name):
        return registry.find("quantizers", name).name

class Override(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weights: Weights | None = None
    bits: Bits | None = None

class Tiny(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weights: Weights = Weights()
    twin: dict[str, bool | str] = {"softmax": True}
    ignored_scopes: list[str] = []
    scope_overrides: dict[str, Override] = {}
    step: PositiveFloat = 0.5

    def __init__(self, dataset=None, **fields):
        super().__init__(**fields)
"""
TINY_FIELDS = {
    "weights": {"bits": 8, "granularity": "channel", "quantizer": "uniform"},
    "twin": {"softmax": True},
    "ignored_scopes": [],
    "scope_overrides": {},
    "step": 0.5,
}
BASE = {"model": {"name": "vit_tiny_patch16_224"}, "data": {"source": "digits"}}


@pytest.fixture
def tiny(distribution):
    """An algorithm `tiny` of another distribution, and a broken one."""
    points = {"algorithms": {"tiny": "tiny_module:Tiny", "broken": "broken_module:Broken"}}
    modules = {"tiny_module": TINY, "broken_module": "import nothing_"}
    distribution("tiny-algorithm", points, modules)


@pytest.fixture
def write(tmp_path):
    def write(content, name="config.yaml"):
        path = tmp_path / name
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def error(path) -> str:
    """The message of the error that reading gives, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        config.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def changed(**sections) -> dict:
    return BASE | {"compression": "tiny"} | sections


# ---------- what is right


def test_defaults_are_filled_in(tiny, write):
    resolved = config.read(write(BASE | {"compression": "tiny"})).dump()
    assert resolved == {
        "model": {
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "checkpoint": None,
            "args": {},
        },
        "data": {
            "source": "digits",
            "root": None,
            "options": {},
            "calibration": {
                "split": "train",
                "samples": 32,
                "seed": 3,
                "batch_size": 8,
                "skip_unreadable": 0,
            },
            "evaluation": {
                "split": "val",
                "samples": None,
                "batch_size": 64,
                "skip_unreadable": 0,
                "workers": 0,
                "precision": "float32",
            },
        },
        "compression": [{"algorithm": "tiny", **TINY_FIELDS}],
        "output": "runs/latest",
    }


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "config.JSON"])
def test_yaml_and_json_mean_the_same(tiny, write, name):
    content = changed(data={"source": "digits", "calibration": {"samples": 5}})
    text = json.dumps(content) if name != "config.yaml" else yaml.safe_dump(content)
    assert config.read(write(text, name)).data.calibration.samples == 5


def test_the_resolved_config_reads_back_as_itself(tiny, write):
    first = config.read(write(changed(compression={"algorithm": "tiny", "step": 2})))
    for name in ("again.yaml", "again.json"):
        assert config.read(write(first.dump(), name)) == first


@pytest.mark.parametrize(
    "value", ["tiny", {"algorithm": "tiny"}, ["tiny"], [{"algorithm": "tiny"}], ("tiny",)]
)
def test_compression_in_every_form(tiny, value):
    ((cls, fields),) = config.compression(value)
    assert cls.__name__ == "Tiny"
    assert fields == TINY_FIELDS
    assert cls(dataset=None, **fields).model_dump() == TINY_FIELDS


def test_steps_keep_their_order_and_their_fields(tiny, write):
    steps = [{"algorithm": "tiny", "step": 1}, "tiny", {"algorithm": "tiny", "step": 3}]
    found = config.compression(config.read(write(changed(compression=steps))))
    assert [fields["step"] for _, fields in found] == [1, 0.5, 3]


def test_yaml_words_for_true_and_false(tiny, write):
    text = "{algorithm: tiny, twin: {softmax: off, gelu: on, other: twin_gelu}}"
    (step,) = config.read(write(f"{json.dumps(BASE)[:-1]}, compression: {text}}}")).compression
    assert step["twin"] == {"softmax": False, "gelu": True, "other": "twin_gelu"}


def test_the_default_compression_is_ptq4vit(write):
    (step,) = config.read(write(BASE)).compression
    assert step["algorithm"] == "ptq4vit"
    assert step["weights"]["bits"] == step["activations"]["bits"] == 8


def test_a_list_of_nncfs_and_our_algorithms(write):
    steps = config.read(write(changed(compression=["smooth_quant", "ptq4vit"]))).compression
    assert [step["algorithm"] for step in steps] == ["smooth_quant", "ptq4vit"]


def test_options_of_a_data_source_are_its_arguments(tiny, distribution, write):
    source = "def noise(config, split, transform, level=1): ..."
    distribution("noise", {"datasets": {"noise": "noise_module:noise"}}, {"noise_module": source})
    data = {"source": "noise", "options": {"level": 3}}
    assert config.read(write(changed(data=data))).data.options == {"level": 3}
    data["options"] = {"levels": 3}
    assert error(write(changed(data=data))) == (
        "data.options: levels: unknown key; allowed: level; did you mean 'level'?"
    )


# ---------- what is wrong


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"modle": {}},
            "modle: unknown key; allowed: model, data, compression, output; did you mean 'model'?",
        ),
        (
            {"data": {"source": "digits", "calibration": {"sample": 3}}},
            "data.calibration.sample: unknown key; allowed: split, samples, seed, batch_size, "
            "skip_unreadable; did you mean 'samples'?",
        ),
        ({"model": {}}, "model.name: missing; allowed: text"),
        (
            {"model": None},
            "model: null is not allowed; "
            "allowed: a mapping with name, pretrained, checkpoint, args",
        ),
        (
            {"model": {"name": "vit", "pretrained": "maybe"}},
            "model.pretrained: 'maybe' is not allowed; allowed: true or false",
        ),
        (
            {"data": {"source": "digits", "calibration": {"samples": 0}}},
            "data.calibration.samples: 0 is not allowed; allowed: an integer above 0",
        ),
        (
            {"data": {"source": "digits", "evaluation": {"samples": "all"}}},
            "data.evaluation.samples: 'all' is not allowed; allowed: an integer above 0 or null",
        ),
        ({"output": 3}, "output: 3 is not allowed; allowed: a path"),
        (
            {"data": {"source": "digits", "evaluation": {"batchsize": 3}}},
            "data.evaluation.batchsize: unknown key; allowed: split, samples, batch_size, "
            "skip_unreadable, workers, precision; did you mean 'batch_size'?",
        ),
        (
            {"compression": {"algorithm": "ptq4vit", "search_range": {"N": 10}}},
            "compression.search_range.N: unknown key; allowed: alpha, beta, n; did you mean 'n'?",
        ),
        (
            {
                "compression": {
                    "algorithm": "ptq4vit",
                    "accuracy": {"max_drop": 1, "metrik": "top1"},
                }
            },
            "compression.accuracy.metrik: unknown key; allowed: max_drop, metric; "
            "did you mean 'metric'?",
        ),
    ],
)
def test_wrong_sections(tiny, write, sections, message):
    assert error(write(changed(**sections))) == message


def test_unknown_data_source(tiny, write):
    message = error(write(changed(data={"source": "digit"})))
    assert message.startswith("data.source: unknown dataset 'digit'; allowed: digits, folder, hf")
    assert message.endswith("; did you mean 'digits'?")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weigths": {}},
            ".weigths: unknown key; allowed: weights, twin, ignored_scopes, scope_overrides, step; "
            "did you mean 'weights'?",
        ),
        # An argument of the constructor is no field of the config.
        (
            {"dataset": 1},
            ".dataset: unknown key; allowed: weights, twin, ignored_scopes, scope_overrides, step",
        ),
        (
            {"weights": {"bit": 4}},
            ".weights.bit: unknown key; allowed: bits, granularity, quantizer; "
            "did you mean 'bits'?",
        ),
        (
            {"weights": {"granularity": "chanel"}},
            ".weights.granularity: 'chanel' is not allowed; allowed: 'tensor', 'channel'; "
            "did you mean 'channel'?",
        ),
        (
            {"weights": 8},
            ".weights: 8 is not allowed; allowed: a mapping with bits, granularity, quantizer",
        ),
        (
            {"twin": {"softmax": [1]}},
            ".twin.softmax: [1] is not allowed; allowed: true or false or text",
        ),
        (
            {"ignored_scopes": ["a", 1]},
            ".ignored_scopes[1]: 1 is not allowed; allowed: text",
        ),
        (
            {"scope_overrides": {"{re}blocks/.*": {"weights": {"bits": 12}}}},
            ".scope_overrides.{re}blocks/.*.weights.bits: 12 is not allowed; "
            "allowed: an integer from 2 to 8",
        ),
        (
            {"scope_overrides": {"head": {"bit": 4}}},
            ".scope_overrides.head.bit: unknown key; allowed: weights, bits; did you mean 'bits'?",
        ),
        ({"step": -1}, ".step: -1 is not allowed; allowed: a number above 0"),
        (
            {"step": -1, "weights": {"bits": 9, "bit": 9}},
            ".weights.bits: 9 is not allowed; allowed: an integer from 2 to 8 (and 2 more)",
        ),
    ],
)
def test_wrong_fields_of_an_algorithm(tiny, write, fields, message):
    step = {"algorithm": "tiny", **fields}
    assert error(write(changed(compression=step))) == "compression" + message
    assert error(write(changed(compression=["tiny", step]))) == "compression[1]" + message
    with pytest.raises(ConfigError, match=f"^{re.escape('compression' + message)}$"):
        config.compression(step)


@pytest.mark.parametrize("algorithm", ["ptq4vit", "base_ptq"])
@pytest.mark.parametrize("operands", ["weights", "activations"])
@pytest.mark.parametrize("bits", [1, 9, "eight", 7.5, None])
def test_wrong_bits(write, algorithm, operands, bits):
    message = error(write(changed(compression={"algorithm": algorithm, operands: {"bits": bits}})))
    shown = "null" if bits is None else repr(bits)
    assert message == (
        f"compression.{operands}.bits: {shown} is not allowed; allowed: an integer from 2 to 8"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignored_scopes": ["{re}["]}, ".ignored_scopes[0]: '{re}[' is no regular expression: "),
        ({"scope_overrides": {"{re}(": {}}}, ".scope_overrides.{re}(: '{re}(' is no regular "),
        ({"weights": {"quantizer": "numerator"}}, ".weights.quantizer: 'numerator' is for softmax"),
        (
            {"mixed_precision": {"average_bits": 3}},
            ".mixed_precision: average_bits: 3 is not allowed; allowed: at least 4",
        ),
    ],
)
def test_what_a_search_could_not_do_is_refused_before_it(write, fields, message):
    step = {"algorithm": "ptq4vit", **fields}
    assert error(write(changed(compression=step))).startswith(f"compression{message}")


def test_misspelt_field_of_ptq4vit(write):
    message = error(write(changed(compression={"algorithm": "ptq4vit", "weigths": {"bits": 8}})))
    assert message.startswith("compression.weigths: unknown key; allowed: ")
    assert message.endswith("; did you mean 'weights'?")


@pytest.mark.parametrize(
    ("algorithm", "section", "key"),
    [
        ("tiny", "weights", "quantizer"),
        ("ptq4vit", "weights", "quantizer"),
        ("ptq4vit", "twin", "softmax"),
    ],
)
def test_unknown_quantizer(tiny, write, algorithm, section, key):
    """The nearest name is suggested, also where true and false are allowed besides a name."""
    compression = {"algorithm": algorithm, section: {key: "unifrom"}}
    message = error(write(changed(compression=compression)))
    assert message.startswith(
        f"compression.{section}.{key}: unknown quantizer 'unifrom'; allowed: "
    )
    assert message.endswith("; did you mean 'uniform'?")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("ptq4vti", "compression"),
        ({"algorithm": "ptq4vti"}, "compression.algorithm"),
        (["tiny", {"algorithm": "ptq4vti"}], "compression[1].algorithm"),
    ],
)
def test_unknown_algorithm(tiny, write, value, key):
    message = error(write(changed(compression=value)))
    assert message.startswith(f"{key}: unknown algorithm 'ptq4vti'; allowed: base_ptq, broken, ")
    assert message.endswith("; did you mean 'ptq4vit'?")


def test_broken_algorithm_of_another_distribution(tiny, write):
    assert error(write(changed(compression="broken"))) == (
        "compression: algorithm 'broken' of tiny-algorithm 1.0 (broken_module:Broken) does not "
        "load: ModuleNotFoundError: No module named 'nothing_'"
    )


def test_algorithm_that_is_no_pydantic_model(distribution, write):
    distribution("odd", {"algorithms": {"odd": "odd_module:Odd"}}, {"odd_module": "class Odd: ..."})
    message = error(write(changed(compression="odd")))
    assert message.startswith("compression: algorithm 'odd' of odd 1.0 (odd_module:Odd) is not a ")


@pytest.mark.parametrize("value", [{}, {"weights": {"bits": 8}}, [{}]])
def test_compression_without_an_algorithm(write, value):
    assert re.match(
        r"compression(\[0\])?\.algorithm: missing; allowed: base_ptq, ",
        error(write(changed(compression=value))),
    )


@pytest.mark.parametrize("value", [None, 8, [], True])
def test_compression_of_the_wrong_kind(write, value):
    message = error(write(changed(compression=value)))
    assert message.startswith(f"compression: {json.dumps(value)} is not allowed; allowed: an algo")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "config.yaml", "is null; allowed: a mapping with model, data, compression, output"),
        ("- 1", "config.yaml", "is [1]; allowed: a mapping with model, data, compression, output"),
        ("model: {\n  name: [", "config.yaml", "not valid YAML in line 2, column 10: "),
        ("{'model': 1}", "config.json", "not valid: Expecting property name"),
        (b"\xff\xfe\x00", "config.yaml", "not valid: "),
        ("!!python/object:os.system {}", "config.yaml", "not valid YAML in line 1, column 1: "),
        (
            "model: 1\ndata: {a: 1,\n  a: 2}",
            "config.yaml",
            "not valid YAML in line 3, column 3: the key 'a' stands twice",
        ),
        ('{"model": {"b": 1, "b": 2}}', "config.json", "not valid: the key 'b' stands twice"),
    ],
)
def test_files_that_are_no_config(write, content, name, message):
    assert error(write(content, name)).startswith(message)


def test_a_merged_mapping_may_repeat_keys(write):
    text = "a: &a {split: val, samples: 4}\nb: {<<: *a, samples: 5}"
    assert config.load_file(write(text))["b"] == {"split": "val", "samples": 5}
    # A shallow mapping is made first, and writes what it merges into the deeper one.
    text = "a: {b: {c: &c {<<: {x: 1, y: 2}, y: 3}}}\nd: {<<: *c}"
    assert config.load_file(write(text)) == yaml.safe_load(text)


def test_paths_may_begin_at_home(tiny, write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config.read(write(changed(output="~/runs/a", data={"source": "npz", "root": "~/x"})))
    assert found.output == tmp_path / "runs" / "a" and found.data.root == tmp_path / "x"


def test_file_that_cannot_be_read(tmp_path):
    assert error(tmp_path / "none.yaml") == "cannot be read: No such file or directory"
    assert error(tmp_path) == "cannot be read: Is a directory"


# ---------- schema


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_schema_has_every_algorithms_fields_and_notes_the_broken(tiny):
    left_out = []
    found = config.schema(report=left_out.append)
    definitions = found["$defs"]
    assert len(left_out) == 1 and "'broken' of tiny-algorithm" in left_out[0]
    assert set(references(found)) <= {f"#/$defs/{name}" for name in definitions}
    for name in ("ptq4vit", "base_ptq", "smooth_quant", "tiny"):
        step = definitions[f"algorithm.{name}"]
        assert step["properties"]["algorithm"] == {"const": name}
        assert step["required"] == ["algorithm"]
        assert step["additionalProperties"] is False
    assert {"weights", "activations", "metric", "twin"} <= set(
        definitions["algorithm.ptq4vit"]["properties"]
    )
    # Both have a class `Weights`; neither hides the other's.
    bits = definitions["tiny.Weights"]["properties"]["bits"]
    assert (bits["minimum"], bits["maximum"]) == (2, 8)
    weights = definitions["algorithm.ptq4vit"]["properties"]["weights"]
    assert weights.get("$ref", "#/$defs/ptq4vit.").startswith("#/$defs/ptq4vit.")
    pattern = definitions["DataConfig"]["properties"]["source"]["pattern"]
    assert re.search(pattern, "digits") and re.search(pattern, "hfds/a/b")
    assert not re.search(pattern, "digit") and not re.search(pattern, "hfdsx/a")
    json.dumps(found)
