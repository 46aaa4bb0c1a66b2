"""Discovery of algorithms, quantizers, exporters and data sources through entry points.

This project's own things are registered in `setup.cfg`, the same way as anyone else's: what a
distribution declares in the entry-point group ``ptq4vit_plugin.<group>`` can be named in a config.
"""

import inspect
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import RegistryError, nearest, one_line

GROUPS = ("algorithms", "quantizers", "exporters", "datasets")

# How many leading arguments the plugin itself passes: a quantizer gets (bits, grouping, search), a
# data source (config, split, transform). What follows them is the thing's own options.
_PASSED = {"quantizers": 3, "datasets": 3}


@dataclass(frozen=True)
class Entry:
    """One registered thing, known from package metadata alone.

    Attributes
    ----------
    name
        The name that configs use.
    value
        Where it lives, ``"module:attribute"``.
    distribution, version
        Who registered it.
    """

    name: str
    value: str
    distribution: str
    version: str


def entries(group: str) -> list[Entry]:
    """Return everything registered in `group`, sorted by name; imports nothing.

    Raises
    ------
    RegistryError
        `group` is not one of `GROUPS`.
    """
    if group not in GROUPS:
        raise RegistryError(f"unknown group '{group}'; allowed: {', '.join(GROUPS)}")
    return list(_entries(group, tuple((folder, _modified(folder)) for folder in sys.path)))


def find(group: str, name: str) -> Entry:
    """Return the one thing of that name; imports nothing.

    Raises
    ------
    RegistryError
        The name is unknown (the message lists the known ones and the nearest), or more than one
        distribution registers it.
    """
    known = entries(group)
    matches = [entry for entry in known if entry.name == name]
    if not matches:
        names = sorted({entry.name for entry in known})
        raise RegistryError(
            f"unknown {_singular(group)} '{name}'; allowed: {', '.join(names) or 'none registered'}"
            + nearest(name, names)
        )
    if len(matches) > 1:
        owners = ", ".join(f"{entry.distribution} ({entry.value})" for entry in matches)
        raise RegistryError(
            f"{_singular(group)} '{name}' is registered more than once, by {owners}; "
            "uninstall one of them"
        )
    return matches[0]


def source_name(source: str) -> str:
    """Return the name that a config's data source is registered by: ``hfds`` of ``hfds/<name>``."""
    return source.partition("/")[0]


def load(group: str, name: str) -> Any:
    """Import and return the thing registered as `name` in `group`.

    Raises
    ------
    RegistryError
        As `find`; or importing it failed, whatever the reason: the message names the distribution
        to blame and the cause, which is chained.
    """
    entry = find(group, name)
    try:
        return EntryPoint(entry.name, entry.value, f"ptq4vit_plugin.{group}").load()
    except Exception as error:  # other people's module: any exception can come out of its import
        raise RegistryError(
            f"{_singular(group)} '{name}' of {entry.distribution} {entry.version} "
            f"({entry.value}) does not load: {type(error).__name__}: {one_line(error)}"
        ) from error


def options(group: str, thing: Any) -> dict[str, Any]:
    """Return the options that a config can set on a loaded thing, with their defaults.

    An algorithm's options are its pydantic fields; anything else's are its named parameters after
    those that the plugin passes. A default that is computed or absent is ``...``.
    """
    fields = getattr(thing, "model_fields", None)
    if group == "algorithms" and fields is not None:
        return {
            name: ... if field.is_required() or field.default_factory else field.default
            for name, field in fields.items()
        }
    parameters = [
        parameter
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return {
        parameter.name: ... if parameter.default is parameter.empty else parameter.default
        for parameter in parameters[_PASSED.get(group, 0) :]
    }


# All metadata of an environment takes a hundredth of a second and more to read, and a calibration
# asks a dozen times; what is installed in between changes one of the folders.
@lru_cache(maxsize=len(GROUPS))
def _entries(group: str, folders: tuple[tuple[str, int | None], ...]) -> tuple[Entry, ...]:
    found = {_entry(point) for point in entry_points(group=f"ptq4vit_plugin.{group}")}
    return tuple(sorted(found, key=lambda entry: (entry.name, entry.distribution, entry.value)))


def _modified(folder: str) -> int | None:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return None


def _entry(point: EntryPoint) -> Entry:
    # `dist` is optional only for entry points made by hand; an installed distribution's have it.
    distribution = point.dist
    name = distribution.name if distribution else "unknown distribution"
    version = distribution.version if distribution else ""
    return Entry(point.name, point.value, name, version)


def _singular(group: str) -> str:
    return group.removesuffix("s")
