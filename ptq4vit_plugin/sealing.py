"""A checksum inside a file, so that a truncated or edited artefact is noticed before it is used.

It says that a file is whole, not who wrote it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from ptq4vit_plugin.errors import CheckpointError

# Written into a file's metadata; `seal` replaces the digits.
BLANK = "ptq4vit-sha256-" + "0" * 64
_SEAL = re.compile(rb"ptq4vit-sha256-([0-9a-f]{64})")


def seal(path: Path, companions: Iterable[Path] = ()) -> None:
    """Put the checksum of a file, and of files that belong to it, in the place of `BLANK`."""
    content = path.read_bytes()
    digest = _digest(content, companions)
    path.write_bytes(content.replace(BLANK.encode(), b"ptq4vit-sha256-" + digest.encode(), 1))


def is_sealed(path: Path) -> bool:
    """Whether a file has a checksum, right or wrong; False also when it cannot be read."""
    try:
        return _SEAL.search(path.read_bytes()) is not None
    except OSError:
        return False


def check_seal(path: Path, companions: Iterable[Path] = ()) -> None:
    """Compare a file with the checksum in it.

    Raises
    ------
    CheckpointError
        The file cannot be read, has no checksum, or is not what was written.
    """
    try:
        content = path.read_bytes()
        found = _SEAL.search(content)
        if found is None:
            raise CheckpointError(f"'{path}' was not written by ptq4vit's export: it has no seal")
        blank = content[: found.start()] + BLANK.encode() + content[found.end() :]
        digest = _digest(blank, companions)
    except OSError as error:
        raise CheckpointError(f"'{error.filename}' cannot be read: {error.strerror}") from error
    if digest.encode() != found.group(1):
        raise CheckpointError(
            f"'{path}' was changed or cut off after it was written: its checksum does not match; "
            "export it again"
        )


def _digest(content: bytes, companions: Iterable[Path]) -> str:
    digest = hashlib.sha256(content)
    for companion in companions:
        digest.update(companion.read_bytes())
    return digest.hexdigest()
