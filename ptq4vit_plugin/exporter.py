"""What a format has to bring: its exporter, to write a file and to run what was written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq4vit_plugin.integrations.timm.images import Preprocessing


class Exporter(ABC):
    """A format, registered in the entry-point group ``ptq4vit_plugin.exporters``.

    The constructor's parameters are the format's options.

    Attributes
    ----------
    suffix
        Of the file that `write` writes, with its dot.
    input_size
        Channels, height and width of the images that the file is compared on, once they are known.
    """

    suffix: str
    input_size: tuple[int, int, int] | None = None

    @abstractmethod
    def write(
        self, model: nn.Module, path: Path, example: Tensor, dynamic: Sequence[int]
    ) -> dict[str, Any]:
        """Write a quantized model to ``path``, and further files beside it if there are any.

        Parameters
        ----------
        example
            A batch of images ``[B, C, H, W]``.
        dynamic
            Dimensions of the images that may be of any size at run time.

        Returns
        -------
        dict
            What is worth knowing about the result, as JSON; `export` reports it.
        """

    def in_the_way(self, path: Path) -> Path | None:
        """A file or folder that `write` would replace and that nobody meant to give it; here, none.

        `export` refuses to write then, before it does anything else.
        """
        return None

    @abstractmethod
    def read(self, path: Path) -> Callable[[Tensor], Tensor]:
        """What was written, loaded fresh, as its runtime runs it by default in float32.

        Returns
        -------
        callable
            Images ``[B, C, H, W]`` to logits ``[B, classes]``.

        Raises
        ------
        CheckpointError
            The file is not what `write` wrote.
        """

    @abstractmethod
    def preprocessing(self, path: Path) -> Preprocessing:
        """What the images of a written model need, and the names of its classes.

        Raises
        ------
        CheckpointError
            As `read`.
        """

    def read_in_float(self, path: Path) -> Callable[[Tensor], Tensor] | None:
        """As `read`, with quantizers in float arithmetic; None where the runtime has no such mode.

        8-bit kernels for CPUs without VNNI add pairs of products in 16 bits, which saturate. This
        mode shows what the file means whatever the machine.
        """
        return None

    def op_outputs(
        self, path: Path, ops: Sequence[str]
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """What ops of the plan give in a written model, by name; in float arithmetic if there is
        such a mode. Ops that cannot be told apart in the file are left out; here, all."""
        return lambda images: {}
