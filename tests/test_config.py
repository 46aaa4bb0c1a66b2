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


def fits(node, value, root):
    """Whether a value is what a JSON schema allows, for the keywords that ours has."""
    if "$ref" in node and not fits(root["$defs"][node["$ref"].split("/")[-1]], value, root):
        return False
    if "anyOf" in node and not any(fits(option, value, root) for option in node["anyOf"]):
        return False
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        "type" in node
        and not {
            "null": value is None,
            "boolean": isinstance(value, bool),
            "number": number,
            "integer": number and value == int(value),
            "string": isinstance(value, str),
            "array": isinstance(value, list),
            "object": isinstance(value, dict),
        }[node["type"]]
    ):
        return False
    if "enum" in node and value not in node["enum"]:
        return False
    if "const" in node and value != node["const"]:
        return False
    if number and not (
        node.get("minimum", value) <= value <= node.get("maximum", value)
        and node.get("exclusiveMinimum", value - 1) < value
        and value < node.get("exclusiveMaximum", value + 1)
    ):
        return False
    if isinstance(value, str) and not re.search(node.get("pattern", ""), value):
        return False
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(
            fits(node.get("items", {}), item, root) for item in value
        )
    if isinstance(value, dict):
        known, others = node.get("properties", {}), node.get("additionalProperties", True)
        return set(node.get("required", [])) <= set(value) and all(
            fits(known[key], item, root)
            if key in known
            else others is True or (others is not False and fits(others, item, root))
            for key, item in value.items()
        )
    return True


# A key, values that it takes and values that it refuses.
ALLOWED = [
    ("model.pretrained", [True, False], [1, 0, "yes", "true", None]),
    ("model.name", ["vit_tiny_patch16_224"], [1, True, None]),
    ("model.checkpoint", ["a.safetensors", None], [1, True]),
    ("data.source", ["digits", "npz", "hfds/a/b"], ["digit", "hfdsx/a", 1, True]),
    ("data.calibration.samples", [1, 10**6], [0, -1, True, "8", 1.5, None]),
    ("data.calibration.seed", [0, 2**32 - 1], [-1, 2**32, True, "3"]),
    ("data.calibration.batch_size", [1], [0, True, "8"]),
    ("data.calibration.skip_unreadable", [0], [-1, False, "0"]),
    ("data.evaluation", [None], [True, 1, "none"]),
    ("data.evaluation.samples", [1, None], [0, True, "8", "all"]),
    ("data.evaluation.batch_size", [1], [0, True, "8"]),
    ("data.evaluation.workers", [0], [-1, False, "0", 0.5]),
    ("data.evaluation.precision", ["bfloat16"], ["int8", 16, True]),
    ("compression", ["ptq4vit", ["fold_norms", "ptq4vit"]], ["ptq4vti", [], 1, None, [1]]),
    ("compression.rounds", [1, 7], [0, True, "8", 1.5, None]),
    ("compression.weights.bits", [2, 8], [1, 9, True, "8", 7.5]),
    ("compression.weights.quantizer", ["uniform"], ["unifrom", "numerator", 1, True, None]),
    ("compression.activations.quantizer", ["numerator", "asymmetric"], ["twin", 1, False]),
    ("compression.activations.granularity", ["head", "paper"], ["channel", True]),
    ("compression.twin.softmax", [True, False, "auto", "numerator"], [1, 0, "yes", [1], None]),
    ("compression.search_range.n", [1], [0, -3, True, "8", 1.5, None]),
    ("compression.search_range.alpha", [1, 0.1], [0, -1, True, "0.1"]),
    ("compression.search_range.beta", [2, 0.1], [0, True, "1.2", None]),
    ("compression.gradient.probes", [1], [0, True, "1"]),
    ("compression.gradient.seed", [0, -1], [True, "1", 0.5]),
    ("compression.mixed_precision.average_bits", [4, 5.5, 8], [1, 9, True, "5", None]),
    ("compression.accuracy.max_drop", [0, 0.5], [-0.1, True, "1", None]),
    ("compression.memory_budget", [1, 0.5, None], [0, -1, True, "1"]),
    ("compression.scope_overrides.head.weights.bits", [2], [1, True, "8"]),
    ("compression.ignored_scopes", [[], ["head"]], [["head", 1], "head", True]),
    ("base_ptq:compression.rounds", [1], [0, True, "1"]),
    ("base_ptq:compression.search_range.n", [1], [0]),
    ("fold_norms:compression.norms", [True, False], [1, "yes", None]),
    ("compensate:compression.ranges", [True], [0, "no"]),
    ("smooth_quant:compression.alpha", [0, 1], [-0.1, 1.1, True, "0.5"]),
    ("ptq4vit_plus:compression.fold.smooth", [False], ["no", 0]),
    ("ptq4vit_plus:compression.compensate.bias", [True], ["on", 1]),
    ("ptq4vit_plus:compression.twin.gelu", ["asymmetric", True], ["asymetric", 1]),
    ("reconstruct:compression.iterations", [0], [-1, True, "50"]),
    ("reconstruct:compression.drop", [0, 0.5], [1, -0.1, True, "0.5"]),
    ("ptq4vit_recon:compression.reconstruct.seed", [-(2**63), 2**63 - 1], [2**63, True, "0"]),
    ("ptq4vit_recon:compression.reconstruct.batch_size", [1], [0, True, "16"]),
]


@pytest.fixture(scope="module")
def schema():
    return config.schema()


@pytest.mark.parametrize(("place", "taken", "refused"), ALLOWED, ids=[p for p, *_ in ALLOWED])
def test_program_and_schema_refuse_the_same(schema, place, taken, refused):
    algorithm, _, key = place.rpartition(":")
    for value in taken + refused:
        content = json.loads(json.dumps(BASE))
        *parents, last = key.split(".")
        if len(parents) > 0 and parents[0] == "compression":
            content["compression"] = {"algorithm": algorithm or "ptq4vit"}
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        try:
            config.parse(content, "it")
        except ConfigError as error:
            message = str(error)
            assert value in refused and message.startswith("it: compression") or key in message
            assert "\n" not in message
        else:
            assert any(value is item for item in taken), f"{value!r} was taken"
        assert fits(schema, content, schema) == any(value is item for item in taken), repr(value)


@pytest.mark.parametrize(
    ("place", "value", "allowed"),
    [
        (("compression", "rounds"), True, "an integer at least 1"),
        (("compression", "search_range", "n"), "8", "an integer at least 1"),
        (("data", "calibration", "samples"), True, "an integer above 0"),
        (("model", "pretrained"), 1, "true or false"),
    ],
)
def test_nothing_is_taken_for_a_number_that_is_none(place, value, allowed):
    section, *inner, last = place
    content = {"model": dict(BASE["model"]), "data": dict(BASE["data"])}
    node = content.setdefault(section, {"algorithm": "ptq4vit"})
    for key in inner:
        node = node.setdefault(key, {})
    node[last] = value
    shown = "true" if value is True else repr(value)
    message = f"it: {'.'.join(place)}: {shown} is not allowed; allowed: {allowed}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        config.parse(content, "it")


def test_every_wrong_key_is_counted_once():
    wrong = {"algorithm": "ptq4vit", "rounds": "three", "search_range": {"n": True}, "metric": "x"}
    with pytest.raises(ConfigError, match=r"^compression\.metric: 'x' .* \(and 2 more\)$"):
        config.compression(wrong)


def test_an_algorithm_whose_field_has_no_schema_is_taken(distribution):
    module = (
        "from pydantic import BaseModel, ConfigDict\n"
        "class Own: pass\n"
        "class Odd(BaseModel):\n"
        "    model_config = ConfigDict(arbitrary_types_allowed=True, extra='forbid')\n"
        "    step: int = 1\n"
        "    own: Own | None = None\n"
    )
    distribution("odd", {"algorithms": {"odd": "odd_module:Odd"}}, {"odd_module": module})
    assert config.compression({"algorithm": "odd", "step": 2})[0][1] == {"step": 2, "own": None}


def test_numbers_with_an_exponent(tiny, write):
    """YAML 1.1, which PyYAML reads, takes those without a dot and a sign for text."""
    text = "a: 1e-3\nb: '1e-3'\nc: 2E3\nd: -.5e1\ne: 1.e+2\nf: 1e\ng: e5\nh: 3e2x\n"
    found = config.load_file(write(text))
    assert found == {
        "a": 0.001, "b": "1e-3", "c": 2000.0, "d": -5.0, "e": 100.0, "f": "1e", "g": "e5",
        "h": "3e2x",
    }  # fmt: skip
    assert config.yaml_value(config.yaml_text(found)) == found
    step = "{algorithm: tiny, step: 1e-3}"
    path = write(f"model: {{name: vit}}\ndata: {{source: digits}}\ncompression: {step}\n")
    assert config.read(path).compression[0]["step"] == 0.001


@pytest.mark.parametrize(("name", "opened"), [("deep.yaml", "{a: "), ("deep.json", '{"a": ')])
def test_a_file_too_deep_to_be_read(write, name, opened):
    message = error(write(opened * 100_000 + "1" + "}" * 100_000, name))
    assert message == "not valid: mappings or lists too deep in each other"


def test_a_key_that_is_no_text(write):
    content = {**BASE, "model": {**BASE["model"], 3: 4}}
    assert error(write(content)).startswith("model.3: unknown key; allowed: name, pretrained")
