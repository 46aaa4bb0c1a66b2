"""Integer checkpoints: one ``.safetensors`` file, described in ``docs/integer-format.md``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import nncf
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4vit_plugin.errors import CheckpointError, ModelError
from ptq4vit_plugin.exporter import Exporter
from ptq4vit_plugin.integrations.device import device_of, dtype_of
from ptq4vit_plugin.integrations.integer.model import IntegerModel, drop_weight, integer_model
from ptq4vit_plugin.integrations.integer.ops import (
    FloatWeightOp,
    Grids,
    IntegerConv2d,
    IntegerLinear,
    IntegerMatmul,
    IntegerOp,
    WeightedOp,
)
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.decompose import decompose, is_decomposed
from ptq4vit_plugin.integrations.timm.attention import (
    fuse_attention,
    fused_attention,
    unfuse_attention,
)
from ptq4vit_plugin.integrations.timm.images import Preprocessing, preprocessing
from ptq4vit_plugin.integrations.timm.models import Recipe, recipe_of
from ptq4vit_plugin.loading import architecture, match_types, read_header
from ptq4vit_plugin.plan import OpKind
from ptq4vit_plugin.quantizers.branches import Branch
from ptq4vit_plugin.sealing import BLANK, check_seal, seal

FORMAT_VERSION = 1
KEY = "ptq4vit_integer"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GridEntry(_Frozen):
    """A branch without its tensors; see `Branch`."""

    lowest: int
    highest: int
    side: Literal["low", "high"] = "low"
    flag: int = 0
    bounded: bool = False
    per_row: bool = False
    knee: int = Field(default=0, ge=0)
    coarse: int = Field(default=1, ge=1)


class OpEntry(_Frozen):
    """One integer op.

    Attributes
    ----------
    parameter
        The weight that is kept as codes.
    shape, packed
        Of the weight; packed codes are two per byte.
    left, right
        Branches of the operands that are activations; None when one stays float.
    bits
        Width of a code by input port.
    """

    name: str
    kind: OpKind
    role: str
    bits: dict[int, int]
    parameter: str | None = None
    shape: tuple[int, ...] | None = None
    packed: bool = False
    left: tuple[GridEntry, ...] | None = None
    right: tuple[GridEntry, ...] | None = None


class Metadata(_Frozen):
    """What the file says beside its tensors."""

    format_version: int = FORMAT_VERSION
    seal: str = BLANK
    recipe: Recipe | None = None
    fused_attention: dict[str, bool] = {}
    decomposed: bool = False
    nncf: dict[str, Any] | None = None
    ops: tuple[OpEntry, ...]
    preprocessing: Preprocessing


class IntegerExporter(Exporter):
    """int8 weights and the layout of every activation's codes, for PyTorch.

    Parameters
    ----------
    packed
        Keep codes of 4 bits or fewer two per byte.
    """

    suffix = ".safetensors"

    def __init__(self, packed: bool = True) -> None:
        self.packed = packed
        self._architecture: nn.Module | None = None

    def write(
        self, model: nn.Module, path: Path, example: Tensor, dynamic: Sequence[int]
    ) -> dict[str, Any]:
        """Write the file; returns how many ops compute with integers."""
        made, found = integer_model(model)
        entries = []
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(made).items()}
        for op in found:
            module = made.named_ops()[op.name]
            entry = _entry(op.name, op.kind, op.role, op.bits, op.parameter, module)
            key = f"ops.{op.name}.codes"
            weighted = entry.shape is not None
            # Codes with a zero point reach further than their bits say.
            if self.packed and weighted and op.bits[1] <= 4 and fits_four_bits(op.grids[1][0]):
                entry = entry.model_copy(update={"packed": True})
                state[key] = pack(state[key])
            entries.append(entry)
        metadata = Metadata(
            recipe=recipe_of(model),
            fused_attention=fused_attention(model),
            decomposed=is_decomposed(model),
            nncf=_remaining_hooks(made.model),
            ops=tuple(entries),
            preprocessing=preprocessing(model, self.input_size),
        )
        # Without a recipe only this model itself knows how it is built.
        self._architecture = None if metadata.recipe else _without_hooks(made.model)
        save_file(state, path, {KEY: metadata.model_dump_json()})
        seal(path)
        names = [op.name for op in found if op.integer]
        return {"integer_ops": len(names), "float_ops": [o.name for o in found if not o.integer]}

    def in_the_way(self, path: Path) -> Path | None:
        """Tensors that are no integer checkpoint."""
        return path if path.exists() and not is_integer(path) else None

    def read(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Images to logits, in the model's own type inside; see `load`."""
        model = load(path, copy.deepcopy(self._architecture))
        return lambda images: model(images.to(device_of(model), dtype_of(model)))

    def op_outputs(self, path: Path, ops: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """The outputs of the modules that compute with integers."""
        model = load(path, copy.deepcopy(self._architecture))
        seen: dict[str, Tensor] = {}
        for name, op in model.named_ops().items():
            op.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))

        def run(images: Tensor) -> dict[str, Tensor]:
            model(images.to(device_of(model), dtype_of(model)))
            return seen

        return run

    def preprocessing(self, path: Path) -> Preprocessing:
        """From the file's metadata."""
        return read_metadata(path).preprocessing


def load(path: Path, model: nn.Module | None = None) -> IntegerModel:
    """Read an integer checkpoint into a model that computes with integers.

    Parameters
    ----------
    model
        A float model of the same architecture, instead of building the file's recipe with timm. It
        is changed in place.

    Raises
    ------
    CheckpointError
        The file is missing, cut off, edited, foreign, too new, or of another model.
    """
    path = Path(path)
    metadata = read_metadata(path)
    check_seal(path)
    model = architecture(path, metadata.recipe, model)
    try:
        unfuse_attention(model)
        fuse_attention(model, (name for name, fused in metadata.fused_attention.items() if fused))
        if metadata.decomposed and not is_decomposed(model):
            decompose(model)
        if metadata.nncf is not None:
            hooks.wrap(model)
            model = nncf.torch.load_from_config(model, metadata.nncf, allowed_modules=("nncf.*",))
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
        ops = {entry.name: _op(entry, state) for entry in metadata.ops}
        rest = {key.removeprefix("model."): t for key, t in state.items() if key[:4] != "ops."}
        match_types(model, rest)
        for entry in metadata.ops:
            if isinstance(ops[entry.name], WeightedOp):
                drop_weight(model, entry.parameter)
        model.load_state_dict(rest)
    except (RuntimeError, AttributeError, KeyError, SafetensorError, nncf.InternalError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"'{path}' is of another model: {detail}") from error
    return IntegerModel(model, ops).to(device_of(model)).eval()


def is_integer(path: Path) -> bool:
    """Whether a safetensors file is an integer checkpoint; False also when it is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_metadata(path: Path) -> Metadata:
    """What an integer checkpoint says about itself; no tensor is read.

    Raises
    ------
    CheckpointError
        As `load`.
    """
    return read_header(path, KEY, "an integer checkpoint", Metadata)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes ``-8 ... 7``, two per byte, the first in the low half; one dimension, uint8."""
    flat = codes.flatten().to(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


def fits_four_bits(branch: Branch) -> bool:
    """Whether all codes are among those that `pack` keeps."""
    return branch.lowest >= -8 and branch.highest <= 7


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`: int8 codes of a shape."""
    halves = torch.stack([packed & 15, packed >> 4], 1).flatten()[: torch.Size(shape).numel()]
    return ((halves.to(torch.int8) ^ 8) - 8).reshape(shape)


def _state(model: IntegerModel) -> dict[str, Tensor]:
    ops = {
        f"ops.{name}.{key}": tensor
        for name, op in model.named_ops().items()
        for key, tensor in op.state_dict().items()
    }
    rest = {f"model.{key}": tensor for key, tensor in model.model.state_dict().items()}
    # Clones: parameters that share memory are allowed in a model and not in the file.
    return {key: tensor.clone() for key, tensor in (rest | ops).items()}


def _without_hooks(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for hook in list(hooks.hooks(model)):
        hooks.take(model, hook.op, hook.port if hook.when == "pre" else None)
    return model


def _remaining_hooks(model: nn.Module) -> dict[str, Any] | None:
    return nncf.torch.get_config(model) if next(hooks.hooks(model), None) else None


def _entry(
    name: str, kind: OpKind, role: str, bits: dict[int, int], parameter: str | None, op: IntegerOp
) -> OpEntry:
    right = getattr(op, "right", None)
    weighted = isinstance(op, WeightedOp)
    return OpEntry(
        name=name,
        kind=kind,
        role=role,
        bits=bits,
        parameter=parameter if weighted else None,
        shape=tuple(op.codes.shape) if weighted else None,
        left=_grid_entries(op.left),
        right=_grid_entries(right),
    )


def _grid_entries(grids: Grids | None) -> tuple[GridEntry, ...] | None:
    return None if grids is None else tuple(GridEntry(**fields) for fields in grids.fields)


def _op(entry: OpEntry, state: dict[str, Tensor]) -> IntegerOp:
    def grids(side: str, entries: tuple[GridEntry, ...] | None) -> Grids | None:
        if entries is None:
            return None
        prefix = f"ops.{entry.name}.{side}."
        return Grids(
            [
                Branch(
                    state[f"{prefix}scale_{n}"],
                    split=state.get(f"{prefix}split_{n}"),
                    **grid.model_dump(),
                )
                for n, grid in enumerate(entries)
            ]
        )

    left, right = grids("left", entry.left), grids("right", entry.right)
    if entry.kind == "matmul":
        return IntegerMatmul(left, right)
    if entry.parameter is None:
        if left is None:
            raise ModelError(f"{entry.name} has no quantized operand")
        return FloatWeightOp(left)
    codes = state[f"ops.{entry.name}.codes"]
    if entry.packed:
        codes = unpack(codes, entry.shape)
    family = IntegerLinear if entry.kind == "linear" else IntegerConv2d
    return family(left, codes, state[f"ops.{entry.name}.scale"])
