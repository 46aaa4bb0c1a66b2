"""Errors that a user can cause and can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class PTQ4ViTError(ValueError):
    """Base of every error a user can cause; the command line prints it as one line and exits 2."""


class ConfigError(PTQ4ViTError):
    """A config file or compression mapping says something that is not allowed."""


class DataError(PTQ4ViTError):
    """Images or labels are missing, unreadable or unusable."""


class ModelError(PTQ4ViTError):
    """The model cannot be built, or has nothing that can be quantized."""


class CheckpointError(PTQ4ViTError):
    """A checkpoint is damaged, of another model, too new, or not allowed to be loaded."""


class ExportError(PTQ4ViTError):
    """A model cannot be exported, or what was exported does not compute what the model does."""


class RegistryError(PTQ4ViTError):
    """A registered name is unknown, ambiguous or does not load."""


def one_line(error: Exception) -> str:
    """An exception's message without line breaks, as errors of the command line are one line."""
    return " ".join(str(error).split())


def nearest(name: object, allowed: Iterable[str]) -> str:
    """Return a suggestion to append to an error message.

    Parameters
    ----------
    name
        What the user wrote; anything, as YAML keys need not be strings.
    allowed
        The known names.

    Returns
    -------
    str
        ``"; did you mean 'x'?"`` when a known name is close to `name`, else the empty string.
    """
    by_lower = {known.lower(): known for known in allowed}
    match = get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[match[0]]}'?" if match else ""
