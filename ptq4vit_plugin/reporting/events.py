"""What happens during a run, one event at a time, through Python's logging.

Programs that want to follow a run attach a handler to the logger ``ptq4vit_plugin.events``; each
record's message is the event's name, its ``fields`` are JSON values. `json_lines` is such a
handler.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any, TextIO

from ptq4vit_plugin.errors import PTQ4ViTError
from ptq4vit_plugin.files import json_text

_LOG = logging.getLogger("ptq4vit_plugin.events")


def event(name: str, /, **fields: Any) -> None:
    """Tell whoever listens that something has happened."""
    _LOG.info(name, extra={"fields": fields})


@contextmanager
def json_lines(stream: TextIO) -> Iterator[None]:
    """Write one JSON object per event and line while the context lasts: ``event``, ``time`` (UTC,
    ISO 8601) and the event's fields.

    A stream that takes no more is left alone, so that it ends no run.

    Raises
    ------
    PTQ4ViTError
        At the end: not all could be written, and not because the reader has closed a pipe.
    """
    handler = _Lines(stream)
    handler.setFormatter(_JSONFormatter())
    level, propagate = _LOG.level, _LOG.propagate
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
        _LOG.propagate = propagate
    if handler.failure is not None and not isinstance(handler.failure, BrokenPipeError):
        raise PTQ4ViTError(
            f"events: cannot be written: {handler.failure.strerror}; all else of the run is done"
        )


class _Lines(logging.StreamHandler):
    """Writes until it fails once; logging's own would print a traceback for every event."""

    failure: OSError | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.failure is None:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        self.failure = error
        forget_unwritten(self.stream)


def forget_unwritten(stream: TextIO) -> None:
    """Lead a stream that takes no more to nowhere: Python would try again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def nncf_messages(quiet: bool = False) -> Iterator[None]:
    """While the context lasts, what NNCF warns of goes to standard error, and only errors if
    `quiet`.

    Standard output, where it would go, is for what a command was asked for. What NNCF merely tells
    is shown where its kernels have yet to be compiled, because that takes most of a minute.
    """
    from ptq4vit_plugin.integrations.nncf.kernels import are_compiled

    log = logging.getLogger("nncf")
    handlers = [h for h in log.handlers if hasattr(h, "setStream")]
    streams, level = [h.setStream(sys.stderr) for h in handlers], log.level
    log.setLevel(logging.ERROR if quiet else logging.WARNING if are_compiled() else level)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler, before in zip(handlers, streams, strict=True):
            if before is not None:  # None: it was standard error already
                handler.setStream(before)


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
        return json_text(
            {"event": record.getMessage(), "time": time, **getattr(record, "fields", {})}
        )
