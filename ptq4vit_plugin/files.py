"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptq4vit_plugin.errors import PTQ4ViTError


def output_folder(folder: Path) -> Path:
    """Make a folder for results and prove, before any long work, that files can be written there.

    Raises
    ------
    PTQ4ViTError
        The folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PTQ4ViTError(f"output: cannot write to '{folder}': {error.strerror}") from error
    return folder


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` only when the context ends without an
    error.

    Raises
    ------
    PTQ4ViTError
        The place cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays, because writers look at it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        part = Path(name)
    except OSError as error:
        raise PTQ4ViTError(f"output: cannot write '{path}': {error.strerror}") from error
    try:
        yield part
        # mkstemp makes private files; a result is as readable as any other file of the user.
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
