"""Loads a checkpoint into the fused tensors of `weight_specs`, or fills them with random values.

Every tensor of the checkpoint is read from its byte range directly into its rows of the fused
tensor on the device. Where the file's type is ours and the device is the CPU no copy is made at
all; otherwise the bytes pass through one staging buffer of `STAGING_BYTES`. So host memory holds
the weights at most once (CPU) or not at all (GPU).
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwencli.config import Quantization
from qwencli.engine.native.quantized import SCHEMES, Quantized, quantize
from qwencli.errors import ModelFileError
from qwencli.models.safetensors_header import StoredTensor, stored_tensors
from qwencli.models.shapes import ModelShape
from qwencli.models.weight_specs import PREFIXES, PROBES, Part, Section, TensorSpec, specs
from qwencli.models.weights import all_named, find_weights

Tensors = dict[str, torch.Tensor]
Matrices = dict[str, Quantized]

STAGING_BYTES = 64 * 2**20
DUMMY_STD = 0.02
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_AGAIN = "download the model again"
# Found in checkpoints and of no use: a tied head (checked), frequencies that follow from the base.
HEAD = "text.head"
_DECODER_MATRICES = ("qkv", "o", "gate_up", "down")
_IDLE = ("lm_head.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class LoadedWeights:
    """The tensors by the names of `weight_specs`, and the idle ones the checkpoint has besides.

    `matrices` has those that were quantized, in place of the tensors of their names.
    """

    tensors: Tensors
    unused: tuple[str, ...]
    matrices: Matrices = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """How the decoder's matrices are stored, as results report it; "none" = unquantized."""
        inside = {matrix.label for name, matrix in self.matrices.items() if name != HEAD}
        return "+".join(sorted(inside)) or "none"


def load(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
) -> LoadedWeights:
    """Load the checkpoint in `folder` as `dtype` on `device`.

    A matrix that is to be quantized is so before the next one is read.

    Each tensor is checked for NaN and infinity with one reduction after it is in place (one more
    read of the weights on the device; a single synchronisation at the end).

    Raises:
        ModelFileError: tensors that are missing, not known, of another shape or an unknown type,
            not finite (all named), a tied head that contradicts the embedding, or an unreadable
            file.
    """
    stored = stored_tensors(find_weights(folder).files)
    wanted = specs(shape)
    sources = _match(wanted, stored, folder)
    used = set(sources.values())
    unused = tuple(sorted(name for name in stored if name not in used))
    _check_extra(unused, folder)
    kept = _Kept(shape, quantization)
    extremes: dict[str, torch.Tensor] = {}
    with _Reader(device) as reader:
        for spec in wanted:
            row = 0
            tensor = torch.empty(spec.shape, dtype=dtype, device=device)
            for part in spec.parts:
                source = stored[sources[part]]
                rows = tensor[row : row + part.shape[0]]
                reader.read(source, rows.view(-1))
                low, high = rows.aminmax()  # both carry a NaN through
                extremes[source.name] = torch.stack((low, high)).float()
                row += part.shape[0]
            kept.keep(spec.name, tensor)
        if shape.text.tied_head:
            _check_tied_head(stored, kept.tensors["text.embed"], reader)
    _check_finite(extremes, dtype)
    return kept.weights(unused)


def dummy(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
) -> LoadedWeights:
    """Fill every tensor: norms with ones, the rest with normal values of deviation `DUMMY_STD`.

    The values depend on the tensor's name and the kind of device alone.
    """
    kept = _Kept(shape, quantization)
    generator = torch.Generator(device)
    for spec in specs(shape):
        tensor = torch.empty(spec.shape, dtype=dtype, device=device)
        if spec.fill == "normal":
            tensor.normal_(
                0.0, DUMMY_STD, generator=generator.manual_seed(zlib.crc32(spec.name.encode()))
            )
        else:
            tensor.fill_(1.0 if spec.fill == "ones" else 0.0)
        kept.keep(spec.name, tensor)
    return kept.weights(())


class _Kept:
    """What has been read so far, the decoder's matrices and its head quantized as asked for."""

    def __init__(self, shape: ModelShape, quantization: Quantization) -> None:
        self.tensors: Tensors = {}
        self._matrices: Matrices = {}
        self._tied = shape.text.tied_head
        self._schemes = SCHEMES.get(quantization)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        part = name.rpartition(".")[2]
        if self._schemes and name.startswith("text.") and part in _DECODER_MATRICES:
            self._matrices[name] = quantize(tensor, self._schemes[0])
        elif self._schemes and name == HEAD:
            self._matrices[name] = quantize(tensor, self._schemes[1])
        else:
            self.tensors[name] = tensor

    def weights(self, unused: tuple[str, ...]) -> LoadedWeights:
        if self._schemes and self._tied:
            # Rows of the embedding are looked up as they are; the head reads a copy of fewer bits.
            self._matrices[HEAD] = quantize(self.tensors["text.embed"], self._schemes[1])
        return LoadedWeights(self.tensors, unused, self._matrices)


def _match(
    wanted: tuple[TensorSpec, ...], stored: dict[str, StoredTensor], folder: Path
) -> dict[Part, str]:
    """Find each part's name in this checkpoint, and check that all are there and fit."""
    prefix = {section: _prefix(section, stored) for section in PREFIXES}
    names = {part: prefix[part.section] + part.name for spec in wanted for part in spec.parts}
    missing = [name for name in names.values() if name not in stored]
    if missing:
        raise ModelFileError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing)}", _AGAIN)
    misfits = [
        f"{name} is {list(stored[name].shape)}, config.json asks for {list(part.shape)}"
        for part, name in names.items()
        if stored[name].shape != part.shape
    ]
    if misfits:
        raise ModelFileError(
            f"{folder}: {'; '.join(misfits)}", "weights and config.json belong to different models"
        )
    types = [
        f"{name} is {stored[name].dtype}"
        for name in names.values()
        if stored[name].dtype not in _DTYPES
    ]
    if types:
        raise ModelFileError(
            f"{folder}: {'; '.join(types)}; the native engine reads {', '.join(_DTYPES)}",
            "use an unquantized checkpoint, or --engine transformers",
        )
    return names


def _prefix(section: Section, stored: dict[str, StoredTensor]) -> str:
    for prefix in PREFIXES[section]:
        if prefix + PROBES[section] in stored:
            return prefix
    return PREFIXES[section][0]


def _check_extra(unused: tuple[str, ...], folder: Path) -> None:
    """Weights that a model has and we would not use make it another model."""
    extra = [name for name in unused if not name.endswith(_IDLE)]
    if extra:
        raise ModelFileError(
            f"{folder} has {len(extra)} tensors that config.json does not describe: "
            f"{all_named(extra)}",
            "they belong to different models; --engine transformers ignores such tensors",
        )


def _check_tied_head(stored: dict[str, StoredTensor], embed: torch.Tensor, reader: _Reader) -> None:
    """Some checkpoints carry the head although it is tied; it must then be the embedding."""
    head = stored.get(_prefix("root", stored) + PROBES["root"])
    if head is None:
        return
    same = head.shape == tuple(embed.shape) and head.dtype in _DTYPES
    if same:
        copy = torch.empty_like(embed)
        reader.read(head, copy.view(-1))
        same = torch.equal(copy, embed)
    if not same:
        raise ModelFileError(
            f"config.json ties the head to the embedding, but {head.name} holds other values",
            "set tie_word_embeddings to false in config.json, or download the model again",
        )


def _check_finite(extremes: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist()
    broken = [name for name, good in zip(extremes, finite, strict=True) if not good]
    if broken:
        hint = "use --dtype bfloat16 or float32 if the values exceed float16, else " + _AGAIN
        raise ModelFileError(
            f"weights with NaN or infinity: {', '.join(broken)}",
            hint if dtype == torch.float16 else _AGAIN,
        )


class _Reader:
    """Reads tensors from files to the device. Keeps one file open and one staging buffer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: io.FileIO | None = None
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def read(self, source: StoredTensor, to: torch.Tensor) -> None:
        """Fill the flat tensor `to` with the values of `source`, converted to its type."""
        stream = self._open(source)
        stream.seek(source.start)
        dtype = _DTYPES[source.dtype]
        if to.device.type == "cpu" and to.dtype == dtype:
            _fill(stream, to, source)
            return
        staging = self._buffer()
        step = staging.numel() // dtype.itemsize
        for start in range(0, math.prod(source.shape), step):
            piece = to[start : start + step]
            host = staging[: piece.numel() * dtype.itemsize].view(dtype)
            _fill(stream, host, source)
            # Blocking on purpose: the buffer is reused by the next piece.
            piece.copy_(host)

    def _open(self, source: StoredTensor) -> io.FileIO:
        if self._stream is None or self._stream.name != str(source.file):
            if self._stream is not None:
                self._stream.close()
            self._stream = source.file.open("rb", buffering=0)
        return self._stream

    def _buffer(self) -> torch.Tensor:
        if self._staging is None:
            pinned = self._device.type == "cuda"
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
        return self._staging


def _fill(stream: io.FileIO, to: torch.Tensor, source: StoredTensor) -> None:
    """Read exactly as many bytes as the contiguous CPU tensor `to` holds."""
    # numpy's stubs do not say that its arrays are buffers.
    view = memoryview(to.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = stream.readinto(view)
        if not count:
            raise ModelFileError(f"{source.file} ended while reading {source.name}", _AGAIN)
        view = view[count:]
