"""The config file: schema, reading, and errors that name the key, the value and what is allowed.

Relative paths in a config are relative to the working directory, as on the command line.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from . import registry
from .checking import checked, shown, unknown_key
from .errors import ConfigError, RegistryError, one_line

#: A path as in a shell: ``~`` is the home folder.
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


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
                    raise ConfigError(unknown_key("", key, known))
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
        raise ConfigError(f"{origin}: is {shown(data)}; allowed: a mapping with {keys}")
    try:
        return checked(Config, data)
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
            f"compression: {shown(value)} is not allowed; allowed: an algorithm's name, a mapping "
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
            raise ConfigError(unknown_key(f"{key}.", field, cls.model_fields))
    return name, cls, checked(cls, fields, f"{key}.").model_dump(mode="json")


def _algorithm(name: str) -> type[BaseModel]:
    cls = registry.load("algorithms", name)
    if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
        entry = registry.find("algorithms", name)
        raise RegistryError(
            f"algorithm '{name}' of {entry.distribution} {entry.version} ({entry.value}) is not a "
            "pydantic model, so its config fields are unknown"
        )
    return cls
