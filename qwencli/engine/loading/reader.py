"""Reads tensors from safetensors files to a device, and checks their values.

Each comes from its byte range. Where the file's type is the wanted one and the device is the CPU no
copy is made at all; otherwise the bytes pass through one staging buffer of `STAGING_BYTES`. Values
have to be finite, and zero where the model has no use for them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import torch

from qwencli.errors import ModelFileError
from qwencli.models.quant_formats import PackedFormat, PackedLayer
from qwencli.models.weight_files import StoredTensor, all_named

STAGING_BYTES = 64 * 2**20
# Types that become one another: those of weights that are not quantized.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Types that are read as they are.
DTYPES = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
AGAIN = "download the model again"


class Reader:
    """Keeps one file open and one staging buffer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: io.FileIO | None = None
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def read(self, source: StoredTensor, to: torch.Tensor) -> None:
        """Fill the flat tensor `to` with the values of `source`, converted to its type.

        Raises:
            ModelFileError: the file is shorter than its header says.
        """
        stream = self._open(source)
        stream.seek(source.start)
        dtype = DTYPES[source.dtype]
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

    def as_stored(self, source: StoredTensor) -> torch.Tensor:
        """The whole tensor in its own type and shape.

        Raises:
            ModelFileError: a type that is not read here, or as `read`.
        """
        if source.dtype not in DTYPES:
            raise ModelFileError(
                f"{source.file}: {source.name} is {source.dtype}, which is not read here",
                "use another version of the model, or try --engine transformers",
            )
        to = torch.empty(source.shape, dtype=DTYPES[source.dtype], device=self._device)
        self.read(source, to.view(-1))
        return to

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
            raise ModelFileError(f"{source.file} ended while reading {source.name}", AGAIN)
        view = view[count:]


# The least and the largest value of a tensor: numbers, or on its device [2].
Extremes = torch.Tensor | list[float]


def check_zero(biases: tuple[StoredTensor, ...], reader: Reader) -> None:
    """Biases of no use to the model may be left out only if they are zero."""
    others = [bias.name for bias in biases if reader.as_stored(bias).any()]
    if others:
        raise ModelFileError(
            f"{all_named(others)}: biases that config.json does not describe and that are not zero",
            "weights and config.json belong to different models",
        )


def check_finite(
    extremes: Mapping[str, Extremes], dtype: torch.dtype
) -> Mapping[str, Sequence[float]]:
    """Raise for every tensor whose extremes [2] are not numbers, else give these as numbers.

    Waits for the device once.
    """
    pairs = dict(extremes)
    waiting = [name for name, pair in pairs.items() if isinstance(pair, torch.Tensor)]
    if waiting:
        together = torch.stack([torch.as_tensor(pairs[name]) for name in waiting])
        pairs.update(zip(waiting, together.tolist(), strict=True))
    broken = [name for name, (low, high) in pairs.items() if not math.isfinite(low - high)]
    if broken:
        hint = "use --dtype bfloat16 or float32 if the values exceed float16, else " + AGAIN
        raise ModelFileError(
            f"weights with NaN or infinity: {all_named(broken)}",
            hint if dtype == torch.float16 else AGAIN,
        )
    return {name: (low, high) for name, (low, high) in pairs.items()}


def check_stored_scales(stored: Mapping[str, StoredTensor], packed: PackedFormat) -> None:
    """As `check_finite` and `check_scales`, of the scales in a checkpoint that another loads."""
    broken, lost = [], []
    with Reader(torch.device("cpu")) as reader:
        for main, scale in {(packing.main, packing.scale) for packing in packed.packings}:
            for name, tensor in stored.items():
                values = stored.get(name.removesuffix(scale) + main)
                if not name.endswith(f".{scale}") or tensor.dtype not in FLOATS or values is None:
                    continue
                low, high = reader.as_stored(tensor).float().aminmax()
                if not math.isfinite(low - high):
                    broken.append(name)
                elif not low and not high and _any(reader, values):
                    lost.append(name)
    if broken:
        raise ModelFileError(f"weights with NaN or infinity: {all_named(broken)}", AGAIN)
    if lost:
        raise ModelFileError(f"scales that are all zero: {all_named(lost)}", AGAIN)


def _any(reader: Reader, tensor: StoredTensor) -> bool:
    return bool(reader.as_stored(tensor).view(torch.uint8).any())


def check_scales(
    extremes: Mapping[str, Sequence[float]], scaled: Mapping[str, PackedLayer], reader: Reader
) -> None:
    """Raise for matrices that are zero although their stored values are not: their scales are.

    Args:
        scaled: the layers, by the name that `extremes` has of their scales, or of their product.
    """
    zero = [layer for name, layer in scaled.items() if not any(extremes[name])]
    lost = [
        f"{layer.layer}.{layer.packing.scale}"
        for layer in zero
        if _any(reader, layer.tensors[layer.packing.main])
    ]
    if lost:
        raise ModelFileError(f"scales that are all zero: {all_named(lost)}", AGAIN)
