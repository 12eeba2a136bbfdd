"""How pre-quantized checkpoints store a linear layer: names, types, sizes. No torch.

A `Packing` is one way to store the matrix of a linear layer under names of its own. Which of a
checkpoint's layers are stored so is read from the names that are there, not from the lists of
exceptions in config.json (`modules_to_not_convert`, `ignore`, `llm_int8_skip_modules`), whose
patterns every tool matches a little differently. What the packed values mean is
`engine.quant.checkpoint_formats`'s.

Sources: NVIDIA ModelOpt modelopt/torch/export/quant_utils.py (weight = fp8 x weight_scale); ComfyUI
comfy/ops.py `scaled_fp8_ops` (weight = fp8 x scale_weight); AutoAWQ awq/utils/packing_utils.py and
awq/modules/linear/gemm.py; AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda.py;
compressed-tensors pack_quantized and naive_quantized compressors; transformers integrations
finegrained_fp8.py and fbgemm_fp8.py; bitsandbytes `QuantState.as_dict` and
`Linear8bitLt._save_to_state_dict`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.weight_files import StoredTensor

Stored = Mapping[str, StoredTensor]

UNPACKED = ("BF16", "F16", "F32")
# A group of the engine's own layouts: longer ones are cut, shorter ones than the last refused.
GROUPS = (128, 64, 32)
# Tensors that one layer may be stored as.
_MOST = 64
_OTHER_VERSION = "use another version of the model"
_OTHER_ENGINE = f"{_OTHER_VERSION}, or try --engine transformers"


@dataclass(frozen=True)
class Packing:
    """One way to store the matrix [rows, columns] of a linear layer.

    Args:
        name: for the table of readers.
        main: the tensor that stands for the weight, below the layer's name. types: its types.
        others: tensors that have to be there too.
        optional: tensors that may be. All that start with one of them count.
        scale: the tensor with the scales. group_bytes: of scale and zero of a group once loaded.
        bits: of a value; None = told by the shape of `main` ([rows, columns x bits / 32]).
    """

    name: str
    main: str
    types: tuple[str, ...]
    others: tuple[str, ...]
    optional: tuple[str, ...]
    scale: str
    group_bytes: int
    bits: int | None = None


_CT_ZERO = ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "output_scale")
_AWQ = Packing("awq", "qweight", ("I32",), ("qzeros", "scales"), (), "scales", 4, 4)
_GPTQ = Packing("gptq", "qweight", ("I32",), ("qzeros", "scales"), ("g_idx",), "scales", 4)
_CT_PACKED = Packing(
    "ct-packed", "weight_packed", ("I32",), ("weight_scale",), ("weight_shape", *_CT_ZERO),
    "weight_scale", 4,
)  # fmt: skip
_CT_INT8 = Packing(
    "int8", "weight", ("I8",), ("weight_scale",), _CT_ZERO, "weight_scale", 4, 8
)  # fmt: skip
_CT_FP8 = Packing("fp8", "weight", ("F8_E4M3",), ("weight_scale",), _CT_ZERO, "weight_scale", 4, 8)
_FP8 = Packing(
    "fp8", "weight", ("F8_E4M3",), ("weight_scale_inv",), ("activation_scale", "input_scale"),
    "weight_scale_inv", 4, 8,
)  # fmt: skip
_FBGEMM = Packing(
    "fp8", "weight", ("F8_E4M3",), ("weight_scale",), ("input_scale",), "weight_scale", 4, 8
)
_COMFY = Packing(
    "fp8", "weight", ("F8_E4M3",), ("scale_weight",), ("scale_input",), "scale_weight", 4, 8
)
_BNB4 = Packing(
    "bnb-4bit", "weight", ("U8", "I8", *UNPACKED), ("weight.absmax", "weight.quant_map"),
    ("weight.nested_", "weight.quant_state."), "weight.absmax", 4, 4,
)  # fmt: skip
_BNB8 = Packing("bnb-int8", "weight", ("I8",), ("SCB",), ("weight_format",), "SCB", 4, 8)


@dataclass(frozen=True)
class PackedFormat:
    """What a checkpoint's `quantization_config` says.

    Args:
        label: what results put before the scheme. Such a checkpoint keeps its head as it came.
        packings: the ways its layers may be stored, the first that fits.
        zero_offset: what is added to the stored zeros (GPTQ's first format stores one less).
    """

    label: str
    packings: tuple[Packing, ...]
    zero_offset: int = 0


_METHODS: Mapping[str, PackedFormat] = {
    "awq": PackedFormat("awq", (_AWQ,)),
    "gptq": PackedFormat("gptq", (_GPTQ,), zero_offset=1),
    "compressed-tensors": PackedFormat("ct", (_CT_PACKED, _CT_INT8, _CT_FP8)),
    "fp8": PackedFormat("hf", (_FP8, _FBGEMM)),
    "fbgemm_fp8": PackedFormat("fbgemm", (_FBGEMM,)),
    "bitsandbytes": PackedFormat("bnb", (_BNB4, _BNB8)),
    "modelopt": PackedFormat("modelopt", (_FBGEMM,)),
}
# Weights that config.json says nothing about, and that their names and types tell completely.
_UNSAID = (_FBGEMM, _FP8, _COMFY, _CT_INT8, _BNB8, _BNB4)
UNSAID = "scaled"
# Endings that only one kind of scheme has -> how an error calls it, the most telling first.
_SCHEMES: Sequence[tuple[str, str]] = (
    ("weight_scale_2", "NVFP4"),
    ("weight_global_scale", "NVFP4"),
    ("pre_quant_scale", "ModelOpt's AWQ"),
    ("weight_packed", "compressed-tensors"),
    ("qweight", "GPTQ or AWQ"),
    ("absmax", "bitsandbytes 4-bit"),
    ("SCB", "bitsandbytes int8"),
    ("scale_weight", "scaled fp8"),
    ("weight_scale_inv", "fp8 in blocks"),
    ("weight_scale", "fp8 or int8 with scales"),
    ("input_scale", "fp8 or int8 with scales"),
    ("_scales", "MXFP4"),
    ("scales", "weights in groups with scales"),
)
# method -> key -> values that are read. A key that is missing has the first.
_READ: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "version": ("gemm",)},
    "gptq": {"bits": (4, 8), "checkpoint_format": ("gptq", "gptq_v2")},
    "compressed-tensors": {
        "format": (
            "pack-quantized", "int-quantized", "naive-quantized", "float-quantized",
            "mixed-precision",
        )
    },
    "modelopt": {"quant_algo": ("fp8", "fp8_per_channel_per_token", "fp8_pb_wo")},
}  # fmt: skip
# The same, as other releases of the tools spell it.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "bits": ("bits", "w_bit"),
    "version": ("version", "format"),
    "checkpoint_format": ("checkpoint_format", "format"),
}


def packed_format(config: Mapping[str, Any], where: str = "config.json") -> PackedFormat | None:
    """The format that a config.json names; None for an unquantized checkpoint.

    Raises:
        ModelFileError: a method, bits or a variant that is not read here, named.
    """
    said = quantization_section(config)
    if said is None:
        return None
    method = said.get("quant_method")
    if method is None and any(said.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if str(method).startswith("modelopt") or (method is None and said.get("quant_algo")):
        method = "modelopt"
    found = _METHODS.get(str(method))
    if found is None:
        raise ModelFileError(
            f"{where}: quant_method {method!r:.60} is not read by the native engine",
            f"it reads {', '.join(_METHODS)}; {_OTHER_ENGINE}",
        )
    for key, values in _READ.get(str(method), {}).items():
        value = next((said[k] for k in _SPELLINGS.get(key, (key,)) if said.get(k)), values[0])
        value = value.lower() if isinstance(value, str) else value
        if value not in values:
            raise ModelFileError(
                f"{where}: {method} with {key} {value!r:.60} is not read by the native engine",
                f"it reads {', '.join(map(str, values))}; "
                # transformers does not read any of these.
                + (_OTHER_VERSION if method == "modelopt" else _OTHER_ENGINE),
            )
        if value == "gptq_v2":
            return PackedFormat(found.label, found.packings)
    return found


def format_of(
    config: Mapping[str, Any], stored: Stored, where: str = "config.json"
) -> PackedFormat | None:
    """The format of a checkpoint, told by its tensors where its config.json names none.

    Raises:
        ModelFileError: as `packed_format`.
    """
    said = packed_format(config, where)
    if said is not None or quantization_section(config) is not None:
        return said
    endings = {name.rpartition(".")[2] for name in stored} | {
        ".".join(name.split(".")[-2:]) for name in stored
    }
    types = {tensor.dtype for tensor in stored.values()}
    packings = tuple(
        packing
        for packing in _UNSAID
        if endings.issuperset(packing.others) and not types.isdisjoint(packing.types)
    )
    return PackedFormat(UNSAID, packings) if packings else None


def scheme_named_by(names: Iterable[str]) -> str | None:
    """What the endings of a checkpoint's tensors tell about how it is quantized."""
    names = list(names)
    return next(
        (title for ending, title in _SCHEMES if any(name.endswith(ending) for name in names)), None
    )


def quantization_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config.json, in either of its places."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("quantization_config"), Mapping):
            section: Mapping[str, Any] = part["quantization_config"]
            return section
    return None


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer of a checkpoint that is stored packed.

    Args:
        layer: its name. shape: of its matrix.
        tensors: its tensors by their names below the layer's.
        missing: the full names of those that should be there.
    """

    layer: str
    shape: tuple[int, int]
    packing: Packing
    tensors: Mapping[str, StoredTensor]
    missing: tuple[str, ...]

    @property
    def loaded_bytes(self) -> int:
        """Bytes once loaded, in the layouts of `engine.quant.quantized_tensor`."""
        rows, columns = self.shape
        bits = self.packing.bits or self.bits
        values = rows * columns * bits // 8
        scale = self.tensors[self.packing.scale]
        if self.packing.name == "bnb-4bit":
            groups = prod(scale.shape)
        elif bits == 8 and prod(scale.shape) in (1, rows):
            return values + 4 * rows
        else:
            in_columns = scale.shape[0] if self.packing.main == "qweight" else scale.shape[-1]
            if len(scale.shape) == 4:
                in_columns = scale.shape[2]
            group = -(-columns // in_columns)
            groups = rows * -(-columns // min(group, GROUPS[0]))
        return values + groups * self.packing.group_bytes

    @property
    def bits(self) -> int:
        """Bits of a value, told by the length of the packed dimension."""
        main = self.tensors[self.packing.main].shape
        packed = main[0] if self.packing.main == "qweight" else main[-1]
        return 32 * packed // self.shape[1]


def packed_layer(
    weight: str,
    shape: tuple[int, ...],
    stored: Stored,
    names: Sequence[str],
    packed: PackedFormat | None,
) -> PackedLayer | None:
    """The layer whose weight would be called `weight`, if `stored` has it packed.

    Args:
        names: of `stored`, sorted: models with experts have tens of thousands.
    """
    if packed is None or not weight.endswith(".weight") or len(shape) != 2:
        return None
    layer = weight.removesuffix(".weight")
    fitting = [
        packing
        for packing in packed.packings
        if (main := stored.get(f"{layer}.{packing.main}")) and main.dtype in packing.types
    ]
    plain = weight in stored and stored[weight].dtype in UNPACKED
    if plain:
        # bitsandbytes can store its bytes under a float type; its scales tell.
        fitting = [p for p in fitting if f"{layer}.{p.others[0]}" in stored]
    if not fitting:
        return None
    complete = [p for p in fitting if not _missing(layer, p, stored)]
    packing = (complete or fitting)[0]
    asked = {packing.main, *packing.others}
    within = f"{layer}."
    first = bisect_left(names, within)
    own = itertools.takewhile(lambda name: name.startswith(within), names[first : first + _MOST])
    tensors = {
        name.removeprefix(within): stored[name]
        for name in own
        if name.removeprefix(within) in asked
        or name.removeprefix(within).startswith(packing.optional)
    }
    rows, columns = shape
    return PackedLayer(layer, (rows, columns), packing, tensors, _missing(layer, packing, stored))


def _missing(layer: str, packing: Packing, stored: Stored) -> tuple[str, ...]:
    names = (f"{layer}.{other}" for other in packing.others)
    return tuple(name for name in names if name not in stored)
