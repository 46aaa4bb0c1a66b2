"""The options of a data source, compared with the annotations of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from ptq4vit_plugin.errors import DataError


def checked_options(source: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the annotations of `source` want them: a path from text, for example.

    Names that `source` does not have are left to it. So are annotations that only type checkers
    understand, as other distributions may have.

    Raises
    ------
    DataError
        A value is of another type.
    """
    try:
        parameters = inspect.signature(source, eval_str=True).parameters
    except NameError:  # imported for type checkers only
        return dict(options)
    return {
        key: _checked(key, value, parameters[key].annotation) if key in parameters else value
        for key, value in options.items()
    }


def _checked(key: str, value: Any, annotation: Any) -> Any:
    try:
        adapter = TypeAdapter(Any if annotation is inspect.Parameter.empty else annotation)
    except PydanticUserError:
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise DataError(
            f"data.options.{key}: {repr(value)[:60]} is not allowed; allowed: "
            f"{inspect.formatannotation(annotation)}"
        ) from error
