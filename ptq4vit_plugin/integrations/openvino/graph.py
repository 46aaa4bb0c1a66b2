"""Reading and changing nodes of an OpenVINO graph, for the passes that rearrange quantizers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Input, Node, Output

LEVELS = 256
#: Signed codes.
LOWEST, HIGHEST = -128.0, 127.0


@dataclass(frozen=True)
class Grid:
    """What a quantizer of 256 levels takes for its lowest and highest code, and gives for them.

    One number each, or one per head, with as many dimensions as the value that is quantized.
    """

    taken: tuple[np.ndarray, np.ndarray]
    given: tuple[np.ndarray, np.ndarray]

    @property
    def is_single(self) -> bool:
        """Whether one step serves all numbers."""
        return all(end.size == 1 for end in (*self.taken, *self.given))

    @property
    def is_signed(self) -> bool:
        """Whether its codes are -128 to 127, with zero for zero."""
        return all(
            np.allclose(low * HIGHEST, high * LOWEST, rtol=1e-5, atol=0)
            for low, high in (self.taken, self.given)
        )


def grid_of(node: Node) -> Grid | None:
    """The grid of a quantizer whose limits are constants; None for another node."""
    if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != LEVELS:
        return None
    limits = [node.input_value(port).get_node() for port in range(1, 5)]
    if any(limit.get_type_name() != "Constant" for limit in limits):
        return None
    rank = len(shape(node.output(0)))
    values = [limit.get_data() for limit in limits]
    low, high, lowest, highest = (x.reshape([1] * (rank - x.ndim) + [*x.shape]) for x in values)
    return Grid((low, high), (lowest, highest))


def shape(value: Output) -> list[int | None]:
    """Dimensions; None where they are dynamic."""
    return [d.get_length() if d.is_static else None for d in value.get_partial_shape()]


def consumers(value: Output) -> list[Input]:
    """What takes a value itself, not only its shape."""
    everything = value.get_target_inputs()
    return [taken for taken in everything if taken.get_node().get_type_name() != "ShapeOf"]


def replace(old: Output, new: Output) -> None:
    """Let `new` go wherever `old` goes now."""
    for consumer in old.get_target_inputs():
        consumer.replace_source_output(new)


def int8_weight(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and scale of a weight that is constant codes times a constant; None for others."""
    if node.get_type_name() != "Multiply":
        return None
    codes, scale = (node.input_value(port).get_node() for port in (0, 1))
    if codes.get_type_name() == "Convert":
        codes = codes.input_value(0).get_node()
    if any(known.get_type_name() != "Constant" for known in (codes, scale)):
        return None
    return codes.get_data(), scale.get_data()
