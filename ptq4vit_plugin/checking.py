"""What a config says, checked by pydantic and explained in one line.

What is allowed at a key is read from the model's JSON schema, which has every constraint in one
form, wherever in the annotations it was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, PydanticUserError, ValidationError

from . import registry
from .errors import ConfigError, PTQ4ViTError, nearest

Model = TypeVar("Model", bound=BaseModel)


def checked(cls: type[Model], fields: dict[str, Any], prefix: str = "") -> Model:
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
        return unknown_key(inside, path[-1], _keys(root, node))
    if problem["loc"][-1:] == ("[key]",) and not cause:
        return f"{key}: the key {shown(value)} is not allowed; allowed: text"
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
        return f"{key}: {shown(value)} is not allowed; allowed: {_allowed(root, node)}{hint}"
    return f"{key}: {shown(value)} is not allowed: {problem['msg'].removeprefix('Value error, ')}"


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
        return ", ".join(shown(value) for value in node.get("enum", [node.get("const")]))
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


def unknown_key(prefix: str, key: object, known: Iterable[str]) -> str:
    names = list(known)
    return f"{prefix}{key}: unknown key; allowed: {', '.join(names) or 'none'}" + nearest(
        key, names
    )


def _dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in path)
    return text.removeprefix(".")


def shown(value: object) -> str:
    text = repr(value) if not isinstance(value, bool) and value is not None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
