"""The config file: schema, reading, and errors that name the key, the value and what is allowed.

Relative paths in a config are relative to the working directory, as on the command line.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    PydanticUserError,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from . import registry
from .errors import ConfigError, PTQ4ViTError, RegistryError, nearest, one_line

#: A path as in a shell: ``~`` is the home folder.
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


Model = TypeVar("Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which model: the arguments of `timm.create_model`."""

    name: str = Field(description="timm model name, for example vit_small_patch16_224")
    pretrained: bool = Field(False, description="download timm's pretrained weights")
    checkpoint: UserPath | None = Field(None, description="local weights to load instead")
    args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class CalibrationConfig(_Section):
    """Which images the scales are searched on."""

    split: str = Field("train", description="split of the data source")
    samples: PositiveInt = Field(32, description="number of images")
    seed: int = Field(3, ge=0, le=2**32 - 1, description="seed of the choice of images")
    batch_size: PositiveInt = Field(8, description="images per forward and backward pass")
    skip_unreadable: NonNegativeInt = Field(
        0, description="images that may be undecodable; they are named and replaced"
    )


class EvaluationConfig(_Section):
    """Which images the quantized model is measured on."""

    split: str = Field("val", description="split of the data source")
    samples: PositiveInt | None = Field(None, description="number of images; null takes all")
    batch_size: PositiveInt = Field(64, description="images per forward pass")
    skip_unreadable: NonNegativeInt = Field(
        0, description="images that may be undecodable; they are named, counted and left out"
    )
    workers: NonNegativeInt = Field(0, description="processes that decode images; 0: none extra")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of matrix products and convolutions (autocast)"
    )


class DataConfig(_Section):
    """Where images come from. `source(config, split, transform, **options)` makes the dataset."""

    source: str = Field(
        description="registered data source: digits, folder, npz, tar, hfds/NAME, torch/NAME, ..."
    )
    root: UserPath | None = Field(None, description="folder or file that the source reads")
    options: dict[str, Any] = Field({}, description="further arguments of the source")
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig | None = Field(
        EvaluationConfig(), description="null: calibrate only, for images without labels"
    )

    @field_validator("source")
    @classmethod
    def _registered(cls, source: str) -> str:
        registry.find("datasets", registry.source_name(source))
        return source

    @field_validator("options")
    @classmethod
    def _known(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if options and "source" in info.data:  # only then is the source imported
            name = registry.source_name(info.data["source"])
            known = registry.options("datasets", registry.load("datasets", name))
            for key in options:
                if key not in known:
                    raise ConfigError(_unknown_key("", key, known))
        return options


class Config(_Section):
    """A whole config, checked and with every default filled in.

    Attributes
    ----------
    compression
        Steps in the order they run, each ``{"algorithm": name, **fields}``. A config may write one
        name, one mapping or a list of these.
    """

    model: ModelConfig
    data: DataConfig
    compression: Annotated[list[dict[str, Any]], Field(validate_default=True)] = [
        {"algorithm": "ptq4vit"}
    ]
    output: UserPath = Field(Path("runs/latest"), description="folder that results are written to")

    @field_validator("compression", mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> list[dict[str, Any]]:
        return [{"algorithm": name, **fields} for name, _, fields in _steps(value)]

    def dump(self) -> dict[str, Any]:
        """Return the resolved config as plain values that JSON and YAML can hold."""
        return self.model_dump(mode="json")


def read(path: str | PathLike[str]) -> Config:
    """Read and check a config file: JSON if its name ends in ``.json``, YAML otherwise.

    Raises
    ------
    ConfigError
        One line: the file, the key, the value, what is allowed and the nearest known name.
    """
    return parse(load_file(path), str(path))


def load_file(path: str | PathLike[str]) -> Any:
    """Return what a YAML or JSON file says, unchecked.

    Raises
    ------
    ConfigError
        It cannot be read, or is not valid YAML or JSON.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_no_key_twice)
        return yaml_value(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{where}: {error.problem}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid: mappings or lists too deep in each other") from error


#: A number that YAML 1.1, which PyYAML reads, takes for text: ``1e-3``, ``2.5e6``.
_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a key that stands twice, of which YAML would take the last, and takes
    ``1e-3`` for a number, as JSON, YAML 1.2 and whoever writes it do."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text that `_Loader` would take for a number in quotes."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def yaml_value(text: str) -> Any:
    """Return what YAML says.

    Raises
    ------
    yaml.YAMLError, ValueError, RecursionError
        It is not valid; the second is a date that there is not.
    """
    return yaml.load(text, _Loader)


def yaml_text(value: Any) -> str:
    """Return a value in the YAML that `read` reads, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The same for JSON."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key '{key}' stands twice")
    return dict(pairs)


def parse(data: Any, origin: str) -> Config:
    """Check a config that has been read already.

    Parameters
    ----------
    data
        What the file says: mappings, lists and plain values.
    origin
        Where it comes from; error messages begin with it.

    Raises
    ------
    ConfigError
        As `read`.
    """
    if not isinstance(data, dict):
        keys = ", ".join(Config.model_fields)
        raise ConfigError(f"{origin}: is {_shown(data)}; allowed: a mapping with {keys}")
    try:
        return _checked(Config, data)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def compression(value: Any) -> list[tuple[type[BaseModel], dict[str, Any]]]:
    """Return the algorithms that a compression names, in order, with all their fields.

    Parameters
    ----------
    value
        A registered algorithm's name; a mapping ``{"algorithm": name, **fields}``; a list of these;
        or a `Config`.

    Returns
    -------
    list of (class, fields)
        ``cls(dataset=..., **fields)`` makes the algorithm. Fields are plain values, defaults
        filled in.

    Raises
    ------
    ConfigError
        As `read`, with keys that start at ``compression``.
    """
    return [(cls, fields) for _, cls, fields in _steps(value)]


def schema(report: Callable[[str], object] = warnings.warn) -> dict[str, Any]:
    """Return the JSON schema of a config, with the fields of every registered algorithm.

    Parameters
    ----------
    report
        Called with one line for each algorithm that is left out because it does not load.
    """
    result = Config.model_json_schema()
    definitions = result["$defs"]
    names = sorted({entry.name for entry in registry.entries("algorithms")})
    steps = []
    for name in names:
        try:
            cls = _algorithm(name)
        except RegistryError as error:
            report(str(error))
            continue
        # Prefixed, because two algorithms may both have a class `Weights` among their fields.
        step = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for key, definition in step.pop("$defs", {}).items():
            definitions[f"{name}.{key}"] = definition
        step["properties"] = {"algorithm": {"const": name}, **step.get("properties", {})}
        step["required"] = ["algorithm", *step.get("required", [])]
        definitions[f"algorithm.{name}"] = step
        steps.append({"$ref": f"#/$defs/algorithm.{name}"})
    step = {"anyOf": [{"enum": names}, *steps]}
    result["properties"]["compression"] = {
        "description": "algorithm to run, or a list of them, run in this order",
        "default": "ptq4vit",
        "anyOf": [*step["anyOf"], {"type": "array", "items": step, "minItems": 1}],
    }
    sources = sorted({entry.name for entry in registry.entries("datasets")})
    names = "|".join(map(re.escape, sources))
    definitions["DataConfig"]["properties"]["source"]["pattern"] = f"^({names})(/.*)?$"
    return result


def _steps(value: Any) -> list[tuple[str, type[BaseModel], dict[str, Any]]]:
    if isinstance(value, Config):
        value = value.compression
    if isinstance(value, (str, Mapping)):
        return [_step(value, "compression")]
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(
            f"compression: {_shown(value)} is not allowed; allowed: an algorithm's name, a mapping "
            "with the key 'algorithm', or a list of these"
        )
    return [_step(step, f"compression[{index}]") for index, step in enumerate(value)]


def _step(value: Any, key: str) -> tuple[str, type[BaseModel], dict[str, Any]]:
    if isinstance(value, str):
        value, name_key = {"algorithm": value}, key
    else:
        name_key = f"{key}.algorithm"
    if not isinstance(value, Mapping) or "algorithm" not in value:
        names = ", ".join(entry.name for entry in registry.entries("algorithms"))
        raise ConfigError(f"{name_key}: missing; allowed: {names}")
    name = str(value["algorithm"])
    try:
        cls = _algorithm(name)
    except RegistryError as error:
        raise ConfigError(f"{name_key}: {error}") from error
    fields = {field: item for field, item in value.items() if field != "algorithm"}
    for field in fields:  # here, because the constructor's `dataset` is no key of a config
        if field not in cls.model_fields:
            raise ConfigError(_unknown_key(f"{key}.", field, cls.model_fields))
    return name, cls, _checked(cls, fields, f"{key}.").model_dump(mode="json")


def _algorithm(name: str) -> type[BaseModel]:
    cls = registry.load("algorithms", name)
    if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
        entry = registry.find("algorithms", name)
        raise RegistryError(
            f"algorithm '{name}' of {entry.distribution} {entry.version} ({entry.value}) is not a "
            "pydantic model, so its config fields are unknown"
        )
    return cls


def _checked(cls: type[Model], fields: dict[str, Any], prefix: str = "") -> Model:
    """Make a model of what a config says, and take nothing for what it is not.

    Raises
    ------
    ConfigError
        One line.
    """
    problems, cause = [], None
    try:
        made = cls.model_validate(fields)
    except ValidationError as error:
        problems, cause = error.errors(), error
    root = _json_schema(cls, tuple(registry.entries("quantizers")))
    problems += _converted(root, _resolve(root, root), fields)
    if problems:
        raise ConfigError(_explain(problems, root, prefix)) from cause
    return made


@lru_cache
def _json_schema(cls: type[BaseModel], registered: tuple[registry.Entry, ...]) -> dict[str, Any]:
    """A model's JSON schema, made once for the quantizers that are registered: it names them, and
    a sweep has many configs."""
    try:
        return cls.model_json_schema()
    except PydanticUserError:  # a field of another distribution's type, which has none
        return {}


def _converted(
    root: dict[str, Any], node: dict[str, Any], value: Any, path: tuple[str | int, ...] = ()
) -> list[dict[str, Any]]:
    """Problems of values that pydantic takes for a number or for true and false, and that are
    something else: ``true`` for 1, ``"8"`` for 8, ``1`` and ``"yes"`` for true.

    Strict models would refuse them too, but also a list where there is a tuple, and text where
    there is a path; and algorithms of other distributions are not ours to make strict.
    """
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inside = ((key, item, _child(root, node, key)) for key, item in items)
        return [
            problem
            for key, item, step in inside
            if step is not None
            for problem in _converted(root, step, item, (*path, key))
        ]
    # Nothing else is converted: a path or a date is made of text, which its schema says.
    if type(value) in _JSON_TYPES and _kinds(root, node) & {"number", "integer", "boolean"}:
        if not _is_taken(root, node, value):
            return [{"type": "wrong_type", "loc": path, "input": value}]
    return []


_JSON_TYPES = {
    bool: {"boolean"},
    str: {"string"},
    int: {"number", "integer"},
    float: {"number", "integer"},
}


def _kinds(root: dict[str, Any], node: dict[str, Any]) -> set[str]:
    """JSON's types that a schema allows, as far as it says so."""
    node = _resolve(root, node)
    inner = {kind for option in node.get("anyOf", []) for kind in _kinds(root, option)}
    return inner | ({node["type"]} if "type" in node else set())


def _is_taken(root: dict[str, Any], node: dict[str, Any], value: bool | str | float) -> bool:
    """Whether a schema allows a value as it is, bounds aside."""
    node = _resolve(root, node)
    if "anyOf" in node:
        return any(_is_taken(root, option, value) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return value in node.get("enum", [node.get("const")])
    return "type" not in node or node["type"] in _JSON_TYPES[type(value)]


# One line from pydantic's errors. What is allowed at a key is read from the JSON schema, which has
# every constraint in one form, wherever in the annotations it was written.


def _explain(problems: Sequence[Any], root: dict[str, Any], prefix: str) -> str:
    """Say in one line what is wrong first, and how many other keys are wrong."""
    located = [(*_locate(root, problem), problem) for problem in problems]
    path = located[0][0]
    # A union reports each of its members: an error of ours says more than "not true or false".
    here = [entry for entry in located if entry[0] == path]
    _, node, problem = next((entry for entry in here if _cause(entry[2])), here[0])
    others = len({other for other, _, _ in located} - {path})
    more = f" (and {others} more)" if others else ""
    return _one_problem(root, prefix, path, node, problem) + more


#: How pydantic calls a key that is none: of a model, of a dataclass, and one that is no text.
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")


def _cause(problem: Any) -> PTQ4ViTError | None:
    """Return the error of ours that a validator raised, if that is the problem."""
    error = problem.get("ctx", {}).get("error")
    return error if isinstance(error, PTQ4ViTError) else None


def _one_problem(
    root: dict[str, Any],
    prefix: str,
    path: tuple[str | int, ...],
    node: dict[str, Any],
    problem: Any,
) -> str:
    kind, value = problem["type"], problem["input"]
    key = (prefix + _dotted(path)).removesuffix(".")  # the path of a whole model is empty
    cause = _cause(problem)
    if kind in UNKNOWN:
        inside = prefix + (f"{_dotted(path[:-1])}." if path[1:] else "")
        return _unknown_key(inside, path[-1], _keys(root, node))
    if problem["loc"][-1:] == ("[key]",) and not cause:
        return f"{key}: the key {_shown(value)} is not allowed; allowed: text"
    if kind == "missing":
        return f"{key}: missing; allowed: {_allowed(root, node)}"
    if cause and path == ("compression",):
        return str(cause)  # written by `_steps`, which names the whole key
    if cause:
        return f"{key}: {cause}"
    if kind in ("literal_error", "enum") or kind.endswith(
        ("_type", "_parsing", "_from_float", "_than", "_than_equal")
    ):
        hint = nearest(value, _names(root, node)) if isinstance(value, str) else ""
        return f"{key}: {_shown(value)} is not allowed; allowed: {_allowed(root, node)}{hint}"
    return f"{key}: {_shown(value)} is not allowed: {problem['msg'].removeprefix('Value error, ')}"


def _locate(root: dict[str, Any], problem: Any) -> tuple[tuple[str | int, ...], dict[str, Any]]:
    """Return the path of a problem's key and the schema there; of an unknown key, its parent's.

    Pydantic appends the name of the union's member that failed, which is no key: the walk ends
    before it.
    """
    node = _resolve(root, root)
    for depth, item in enumerate(problem["loc"]):
        step = _child(root, node, item)
        if step is None:
            unknown = problem["type"] in UNKNOWN
            return problem["loc"][: depth + unknown], node
        node = step
    return problem["loc"], node


def _child(root: dict[str, Any], node: dict[str, Any], item: str | int) -> dict[str, Any] | None:
    for option in node.get("anyOf", []):
        step = _child(root, _resolve(root, option), item)
        if step is not None:
            return step
    values = node.get("additionalProperties")
    if item in node.get("properties", {}):
        return _resolve(root, node["properties"][item])
    if isinstance(item, int) and "items" in node:
        return _resolve(root, node["items"])
    if isinstance(item, str) and isinstance(values, dict):
        return _resolve(root, values)
    return None


def _resolve(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return node


def _keys(root: dict[str, Any], node: dict[str, Any]) -> list[str]:
    node = _resolve(root, node)
    inner = [key for option in node.get("anyOf", []) for key in _keys(root, option)]
    return inner + list(node.get("properties", {}))


def _names(root: dict[str, Any], node: dict[str, Any]) -> list[str]:
    node = _resolve(root, node)
    inner = [name for option in node.get("anyOf", []) for name in _names(root, option)]
    values = node.get("enum", [node["const"]] if "const" in node else [])
    return inner + [value for value in values if isinstance(value, str)]


def _allowed(root: dict[str, Any], node: dict[str, Any]) -> str:
    node = _resolve(root, node)
    if "anyOf" in node:
        return " or ".join(_allowed(root, option) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(_shown(value) for value in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _bounds(node)
    if kind == "object" and "properties" in node:
        return "a mapping with " + ", ".join(node["properties"])
    return {
        "string": "a path" if node.get("format") == "path" else "text",
        "boolean": "true or false",
        "array": "a list",
        "object": "a mapping",
        "null": "null",
    }.get(str(kind), "any value")


def _bounds(node: dict[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return "".join(f" {word} {node[key]}" for key, word in words.items() if key in node)


def _unknown_key(prefix: str, key: object, known: Iterable[str]) -> str:
    names = list(known)
    return f"{prefix}{key}: unknown key; allowed: {', '.join(names) or 'none'}" + nearest(
        key, names
    )


def _dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in path)
    return text.removeprefix(".")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, bool) and value is not None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
