"""PTQ4ViT as an NNCF plugin: vision transformers in 8 bits or fewer, without retraining.

The public verbs. They are imported when they are first used, because torch and NNCF take seconds
to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4vit_plugin.artefacts import load, save, upload
    from ptq4vit_plugin.evaluation import evaluate
    from ptq4vit_plugin.exporting import export
    from ptq4vit_plugin.pipeline import quantize
    from ptq4vit_plugin.record import describe

__version__ = "0.1.0"
__all__ = ["describe", "evaluate", "export", "load", "quantize", "save", "upload"]

_HOMES = {
    "describe": "record",
    "evaluate": "evaluation",
    "export": "exporting",
    "load": "artefacts",
    "quantize": "pipeline",
    "save": "artefacts",
    "upload": "artefacts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
