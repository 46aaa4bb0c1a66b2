"""Files that appear whole or not at all, and the JSON in them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ptq4vit_plugin.errors import PTQ4ViTError, one_line

#: Name of the file in a run folder that is locked while a run writes to it.
LOCK = ".lock"
#: What `json_text` writes for numbers that JSON lacks.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


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
        raise unwritable(folder, error) from error
    return folder


@contextmanager
def no_other_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the context, or the process, lasts.

    Raises
    ------
    PTQ4ViTError
        Another run is at work in the folder.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise PTQ4ViTError(
            f"output: another run is writing to '{folder}'; wait for it, or take another folder "
            "with --output"
        ) from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` only when the context ends without an
    error. A symbolic link stays, and what it points to is replaced.

    Raises
    ------
    PTQ4ViTError
        The place cannot be written to, or no longer: the disk is full.
    """
    path = Path(path)
    part = None
    try:
        # In the target's own folder, which may be on another file system than the link.
        target = pointed_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays, because writers look at it.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        part = Path(name)
        yield part
        # mkstemp makes private files; a result is as readable as any other file of the user.
        part.chmod(file_mode())
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def pointed_to(path: Path) -> Path:
    """Where a path that may be a symbolic link leads; the file need not exist."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def unwritable(path: Path, error: OSError | SafetensorError) -> PTQ4ViTError:
    """The error to raise for a file or folder that cannot be written to."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return PTQ4ViTError(f"output: cannot write '{path}': {reason}")


def json_text(value: Any, **options: Any) -> str:
    """JSON that every reader takes: numbers that it lacks become the strings ``Infinity``,
    ``-Infinity`` and ``NaN``, which `float` and pydantic read back.

    Parameters
    ----------
    options
        Of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return NOT_FINITE[0 if math.isnan(value) else 1 if value > 0 else 2]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def file_mode() -> int:
    """Who may read a new file, as the user's umask says."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
