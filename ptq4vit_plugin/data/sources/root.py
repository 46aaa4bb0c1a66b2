"""Where files are: `data.root` of a config, and the small text files beside or inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptq4vit_plugin.errors import DataError, one_line


def data_name(config: Any, wanted: bool) -> str:
    """What follows the slash in `data.source`: a source wants it or does not take it."""
    source, _, name = config.source.partition("/")
    if bool(name) != wanted:
        allowed = f"{source}/<name>" if wanted else source
        raise DataError(f"data.source: '{config.source}' is not allowed; allowed: {allowed}")
    return name


def existing_root(config: Any) -> Path:
    """`data.root` as a path, which must exist."""
    if config.root is None:
        raise DataError(f"data.root is missing; source '{config.source}' needs a path")
    root = Path(config.root)
    if not root.exists():
        raise DataError(f"data.root {root} does not exist")
    return root


def text_file(root: Path, key: str, name: str) -> str:
    """Text of a file given by its path, or by its name inside `root`; `key` is the option's."""
    for path in (Path(name), root / name):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"data.options.{key} {path}: {one_line(error)}") from error
    raise DataError(f"data.options.{key} {name} does not exist, nor {root / name}")
