"""Loads a checkpoint into the fused tensors of `models.tensors`, or fills them with random values.

Every tensor of the checkpoint is read directly into its rows of the fused tensor on the device
(`reader`), so host memory holds the weights at most once (CPU) or not at all (GPU). Reading begins
with `begin`, and goes on while the caller does other things until `finish`. Matrices are
quantized, or taken over from a checkpoint that is quantized already, one at a time; those that were
quantized here may be kept on disk for the next load (`weight_cache`), once this one is over.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwencli.config import Quantization
from qwencli.engine.device_memory import reserve
from qwencli.engine.loading.reader import (
    FLOATS,
    GPU_STAGING_BYTES,
    Largest,
    Reader,
    check_finite,
    check_scales,
    check_zero,
    largest_of,
    largest_of_each,
)
from qwencli.engine.protocol import BytesRead
from qwencli.engine.quant.quantized_tensor import (
    SCHEMES,
    QuantizedTensor,
    Quantizer,
    Scheme,
    quantize,
    stack,
)
from qwencli.errors import ModelFileError
from qwencli.models.checkpoint import Checkpoint, find_sources
from qwencli.models.memory import with_activation_bits
from qwencli.models.quant_formats import PackedFormat, PackedLayer
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import TensorSpec, specs
from qwencli.models.weight_files import StoredTensor, find_weights, stored_tensors
from qwencli.tracing import span

if TYPE_CHECKING:
    from qwencli.engine.loading.weight_cache import CachedMatrices, CacheWriter

Tensors = dict[str, torch.Tensor]
Matrices = dict[str, QuantizedTensor]

# Ends the reading of a tensor, and gives it.
Begun = Callable[[], torch.Tensor | QuantizedTensor]

DUMMY_STD = 0.02
# On their way to a GPU while a tensor is checked and quantized: as much as the readers' ring.
AHEAD_BYTES = GPU_STAGING_BYTES
DUMMY_DECAYS = 1.0, 16.0
HEAD = "text.head"
TOWER_POSITIONS = "vision.positions"
_DECODER_MATRICES = ("qkv", "o", "gate_up", "down", "shared_gate_up", "shared_down")


@dataclass(frozen=True)
class LoadedWeights:
    """The tensors by the names of `models.tensors`, and the idle ones the checkpoint has besides.

    `matrices` has those that are quantized, in place of the tensors of their names. `origin` is
    the label of a checkpoint that came quantized. `keeping` writes what was quantized here to disk,
    when it is told to; None = nothing is to be written.
    """

    tensors: Tensors
    unused: tuple[str, ...]
    matrices: Matrices = field(default_factory=dict)
    origin: str = ""
    keeping: CacheWriter | None = None

    @property
    def scheme(self) -> str:
        """How the decoder's matrices are stored; "none" = unquantized."""
        return self.effective_scheme(lambda matrix: None)

    def effective_scheme(self, activation_bits: Callable[[QuantizedTensor], int | None]) -> str:
        """`scheme` and what decode steps round, as results report it (`models.memory`).

        Args:
            activation_bits: as in `DecoderOps`.
        """
        kinds = {
            with_activation_bits(
                matrix.label,
                matrix.bits,
                None if self._is_of_experts(name) else activation_bits(matrix),
            )
            for name, matrix in self.matrices.items()
            if name != HEAD
        }
        if kinds and any(is_decoder_matrix(name) for name in self.tensors):
            kinds.add("none")
        label = "+".join(sorted(kinds)) or "none"
        return f"{self.origin}-{label}" if self.origin and kinds else label

    def _is_of_experts(self, name: str) -> bool:
        """Whether this is a matrix of a mixture of experts; those round no vectors."""
        layer, _, matrix = name.rpartition(".")
        return f"{layer}.router" in self.tensors and matrix not in ("qkv", "o")


def is_decoder_matrix(name: str) -> bool:
    """Whether this tensor of `models.tensors` is a matrix of a decoder's layer."""
    return name.startswith("text.") and name.rpartition(".")[2] in _DECODER_MATRICES


def is_tower_matrix(spec: TensorSpec) -> bool:
    """Whether the vision tower multiplies by this tensor."""
    return len(spec.shape) == 2 and spec.name.startswith("vision.") and spec.name != TOWER_POSITIONS


def load(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    packed: PackedFormat | None = None,
    cache_file: Path | None = None,
    progress: BytesRead | None = None,
    quantizer: Quantizer = quantize,
) -> LoadedWeights:
    """`begin`, and `PendingWeights.finish`."""
    settings = quantization, packed, cache_file, progress
    with begin(folder, shape, dtype, device, *settings) as pending:
        return pending.finish(quantizer)


def begin(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    packed: PackedFormat | None = None,
    cache_file: Path | None = None,
    progress: BytesRead | None = None,
) -> PendingWeights:
    """Begin to load the checkpoint in `folder` as `dtype` on `device`.

    Args:
        packed: how a checkpoint that is quantized already stores its layers. The decoder's
            matrices and the head stay quantized; other layers become `dtype`.
        cache_file: where the matrices that are quantized here are kept (`LoadedWeights.keeping`);
            None = nowhere.
        progress: is told how much there is to read, and what has been read.

    Raises:
        ModelFileError: tensors that are missing, not known, of another shape or an unknown type
            (all named), or an unreadable file.
    """
    files = find_weights(folder).files
    written = {file: _last_written(file) for file in files}
    found = find_sources(shape, stored_tensors(files), packed, folder)
    zero_offset = 0 if packed is None else packed.zero_offset
    origin = "" if packed is None else packed.label

    def attempt(cached: CachedMatrices | None) -> _Attempt:
        kept = _Kept(found.shape, quantization, origin)
        reader = Reader(device, progress)
        try:
            loading = _Loading(found, reader, dtype, device, zero_offset)
            return _Attempt(found, kept, reader, loading, device, progress, cached, written)
        except BaseException:
            reader.close()
            raise

    if cache_file is None:
        return PendingWeights(attempt, None, None)
    from qwencli.engine.loading.weight_cache import CacheWriter, open_cache
    from qwencli.models.quantized_cache import fingerprint, remove_leftovers

    wanted = [spec.name for spec in specs(found.shape)]
    names = {HEAD, *(name for name in wanted if is_decoder_matrix(name))}
    remove_leftovers()
    made_of = fingerprint(files)

    def writer(loaded: LoadedWeights) -> CacheWriter:
        made = {name: matrix for name, matrix in loaded.matrices.items() if name in names}
        return CacheWriter(cache_file, made_of, made)

    return PendingWeights(attempt, open_cache(cache_file, made_of, names), writer)


class PendingWeights:
    """Weights that threads read.

    What stays as it is stored is read from the beginning on; what has to be quantized, or was so by
    others, in `finish`: a matrix is quantized before the next one is read.
    """

    def __init__(
        self,
        attempt: Callable[[CachedMatrices | None], _Attempt],
        cached: CachedMatrices | None,
        writer: Callable[[LoadedWeights], CacheWriter] | None,
    ) -> None:
        self._begin, self._writer, self._has_cached = attempt, writer, cached is not None
        self._attempt: _Attempt | None = attempt(cached)

    def __enter__(self) -> PendingWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all reading."""
        if self._attempt is not None:
            self._attempt.reader.close()

    def finish(self, quantizer: Quantizer = quantize) -> LoadedWeights:
        """All weights, each checked for NaN and infinity (one more read on the device, and one
        synchronisation at the end).

        Args:
            quantizer: of what has to be quantized.

        Raises:
            ModelFileError: values that are not finite (all named), or a file that cannot be read or
                was changed meanwhile.
        """
        assert self._attempt is not None, "as long as nothing has failed"
        if self._has_cached:
            from qwencli.engine.loading.weight_cache import DamagedCache

            try:
                return self._attempt.finish(quantizer)
            except DamagedCache:
                self.close()
                self._attempt = None  # its memory is what the other one needs
            self._attempt = self._begin(None)
        loaded = self._attempt.finish(quantizer)
        return loaded if self._writer is None else replace(loaded, keeping=self._writer(loaded))


class _Attempt:
    """One try to read a checkpoint, with the matrices that were kept or without.

    Args:
        written: see `_last_written`, of each file before it was looked at.
    """

    def __init__(
        self,
        found: Checkpoint,
        kept: _Kept,
        reader: Reader,
        loading: _Loading,
        device: torch.device,
        progress: BytesRead | None,
        cached: CachedMatrices | None,
        written: Mapping[Path, tuple[int, int] | None],
    ) -> None:
        self.reader, self._written = reader, written
        self._found, self._kept, self._loading, self._device = found, kept, loading, device
        wanted = [spec for spec in specs(found.shape) if cached is None or spec.name not in cached]
        sizes = {spec.name: found.size_bytes(spec) for spec in wanted}
        if progress is not None:
            progress.begin(sum(sizes.values()) + (0 if cached is None else cached.size_bytes))
        plain, self._later = list[TensorSpec](), dict[TensorSpec, int]()
        for spec in wanted:
            if kept.quantizes(spec.name) or not loading.is_stored(spec):
                self._later[spec] = sizes[spec.name]
            else:
                plain.append(spec)
        reserve(device, (loading.size_bytes(spec) for spec in plain))
        ready = reader.now()
        self._plain = {spec.name: loading.begin(spec, ready) for spec in plain}
        self._cached = None if cached is None else cached.begin(reader)

    def finish(self, quantizer: Quantizer) -> LoadedWeights:
        kept, loading, reader = self._kept, self._loading, self.reader
        kept.quantizer = quantizer
        while self._plain:
            name = next(iter(self._plain))
            kept.keep(name, self._plain.pop(name)())
        for name, finish in _ahead(self._later, loading.begin, self._device):
            kept.keep(name, finish())
            del finish  # it holds what is not quantized
        if self._cached is not None:
            kept.keep_matrices(self._cached())
            self._cached = None
        changed = [file for file, before in self._written.items() if _last_written(file) != before]
        if changed:
            raise ModelFileError(
                f"{changed[0]} was changed while it was read", "load it once it is written"
            )
        reader.join()
        check_zero(self._found.zero_biases, reader)
        largest = check_finite(loading.largest(), loading.dtype)
        check_scales(largest, loading.scaled, reader)
        reader.close()
        return kept.weights(self._found.unused)


def _last_written(file: Path) -> tuple[int, int] | None:
    """Size of a file and when it was last written to; None = it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _ahead(
    sizes: Mapping[TensorSpec, int], begin: Callable[[TensorSpec], Begun], device: torch.device
) -> Iterator[tuple[str, Begun]]:
    """What ends the reading of each, in order; on a GPU the next ones have begun by then.

    Args:
        sizes: bytes to read.
    """
    begun: deque[tuple[TensorSpec, Begun]] = deque()
    most = AHEAD_BYTES if device.type == "cuda" else 0
    on_their_way = 0
    for spec, size in sizes.items():
        begun.append((spec, begin(spec)))
        on_their_way += size
        while begun and on_their_way - sizes[begun[0][0]] >= most:
            first, finish = begun.popleft()
            on_their_way -= sizes[first]
            yield first.name, finish
            del finish
    while begun:
        first, finish = begun.popleft()
        yield first.name, finish
        del finish


def dummy(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    quantizer: Quantizer = quantize,
) -> LoadedWeights:
    """Fill every tensor: norms such that they change no value's size, decays as models are begun
    with, the rest with normal values of deviation `DUMMY_STD`.

    The values depend on the tensor's name and the kind of device alone; "meta" tensors have none.
    """
    kept = _Kept(shape, quantization, quantizer=quantizer)
    if device.type == "meta":
        for spec in specs(shape):
            kind = torch.float32 if spec.float32 else dtype
            kept.keep(spec.name, torch.empty(spec.shape, dtype=kind, device=device))
        return kept.weights(())
    generator = torch.Generator(device)
    for spec in specs(shape):
        kind = torch.float32 if spec.float32 else dtype
        tensor = torch.empty(spec.shape, dtype=kind, device=device)
        generator.manual_seed(zlib.crc32(spec.name.encode()))
        if spec.fill == "normal":
            tensor.normal_(0.0, DUMMY_STD, generator=generator)
        elif spec.fill == "decay":
            tensor.uniform_(*DUMMY_DECAYS, generator=generator).log_()
        else:
            tensor.fill_(1.0 if spec.fill == "ones" else 0.0)
        kept.keep(spec.name, tensor)
    return kept.weights(())


class _Loading:
    """Makes tensors of what a checkpoint has, and notes what is checked of values and scales."""

    def __init__(
        self,
        found: Checkpoint,
        reader: Reader,
        dtype: torch.dtype,
        device: torch.device,
        zero_offset: int,
    ) -> None:
        self.dtype = dtype
        self.scaled: dict[str, PackedLayer] = {}
        self._largest: dict[str, Largest] = {}
        self._staying: Tensors = {}  # of these they are asked for together
        self._sources = found.sources
        self._reader = reader
        self._device = device
        self._zero_offset = zero_offset

    def is_stored(self, spec: TensorSpec) -> bool:
        """Whether all parts of a tensor are stored as they are wanted."""
        return len(self._stored(spec)) == len(spec.parts)

    def size_bytes(self, spec: TensorSpec) -> int:
        """Bytes that a tensor takes on the device."""
        sources = [self._sources[part] for part in spec.parts]
        return math.prod(spec.shape) * self._dtype_of(spec, sources).itemsize

    def begin(self, spec: TensorSpec, ready: torch.cuda.Event | None = None) -> Begun:
        """Begin to read a tensor, if all its parts are stored as they are wanted; what is returned
        ends that, and gives it.

        Args:
            ready: as in `Reader.begin`.
        """
        stored = self._stored(spec)
        if len(stored) < len(spec.parts):
            return lambda: self._tensor(spec)
        tensor = torch.empty(spec.shape, dtype=self._dtype_of(spec, stored), device=self._device)
        places = torch.split(tensor, [part.rows for part in spec.parts])
        on_their_way = [
            (source.name, rows, self._reader.begin(source, rows.view(-1), ready))
            for source, rows in zip(stored, places, strict=True)
        ]

        def finish() -> torch.Tensor:
            for name, rows, reading in on_their_way:
                if ready is None:
                    reading.wait()
                    self._note(name, rows)
                else:
                    reading.read()
                    self._staying[name] = rows
            return tensor

        return finish

    def _stored(self, spec: TensorSpec) -> list[StoredTensor]:
        sources = [(part, self._sources[part]) for part in spec.parts]
        return [
            source
            for part, source in sources
            if isinstance(source, StoredTensor) and not part.is_transposed(source.shape)
        ]

    def _tensor(self, spec: TensorSpec) -> torch.Tensor | QuantizedTensor:
        """The tensor; quantized where all its parts came so in one kind, and it may stay so."""
        sources = [self._sources[part] for part in spec.parts]
        layers = [source for source in sources if isinstance(source, PackedLayer)]
        if len(layers) == len(sources) and (is_decoder_matrix(spec.name) or spec.name == HEAD):
            matrices = [self._matrix(layer) for layer in layers]
            alike = [matrix for matrix in matrices if isinstance(matrix, QuantizedTensor)]
            whole = stack(alike) if len(alike) == len(layers) else None
            if whole is not None:
                return whole
            del matrices, alike
        tensor = torch.empty(spec.shape, dtype=self._dtype_of(spec, sources), device=self._device)
        row = 0
        for part, source in zip(spec.parts, sources, strict=True):
            rows = tensor[row : row + part.rows]
            if isinstance(source, PackedLayer):
                matrix = self._matrix(source)
                plain = (
                    matrix.dequantize(self.dtype) if isinstance(matrix, QuantizedTensor) else matrix
                )
                rows.copy_(plain)
                self._note(source.layer, rows)
                self.scaled[source.layer] = source
            elif part.is_transposed(source.shape):
                self._read_transposed(source, rows)
                self._note(source.name, rows)
            else:
                self._reader.read(source, rows.view(-1))
                self._note(source.name, rows)
            row += part.rows
        return tensor

    def _dtype_of(
        self, spec: TensorSpec, sources: Sequence[StoredTensor | PackedLayer]
    ) -> torch.dtype:
        """The wanted type, or what the tensor needs; of a tower's matrices for the CPU in float32,
        that of the file.

        The tower runs once a picture and converts each matrix when it comes to it, which costs
        hardly any time and saves half of its memory.
        """
        if spec.float32:
            return torch.float32
        if (self._device.type, self.dtype) == ("cpu", torch.float32) and is_tower_matrix(spec):
            stored = {source.dtype for source in sources if isinstance(source, StoredTensor)}
            if len(stored) == 1 and not any(isinstance(s, PackedLayer) for s in sources):
                return FLOATS[stored.pop()]
        return self.dtype

    def _read_transposed(self, source: StoredTensor, rows: torch.Tensor) -> None:
        """Fill `rows` with [experts, in, out] as [experts * out, in], one expert at a time."""
        experts, columns, each = source.shape
        size = source.size_bytes // experts
        turned = torch.empty(columns, each, dtype=rows.dtype, device=rows.device)
        for expert, own in enumerate(torch.split(rows, each)):
            start = source.start + expert * size
            one = replace(source, shape=(columns, each), start=start)
            self._reader.read(one, turned.view(-1))
            own.copy_(turned.t())

    def _matrix(self, layer: PackedLayer) -> QuantizedTensor | torch.Tensor:
        from qwencli.engine.quant.checkpoint_formats import read_packed

        matrix = read_packed(layer, self._reader, self._zero_offset)
        if isinstance(matrix, torch.Tensor):
            return matrix  # checked where it ends up
        scale = f"{layer.layer}.{layer.packing.scale}"
        self._note(scale, matrix.scale)
        self.scaled[scale] = layer
        if matrix.data.dtype == torch.float8_e4m3fn:
            # Its one NaN has all bits but the sign set, and there is no infinity.
            top = (matrix.data.view(torch.uint8) & 0x7F).amax()
            self._note(f"{layer.layer}.weight", torch.where(top == 0x7F, torch.nan, 0.0))
        return matrix

    def largest(self) -> dict[str, Largest]:
        """The largest values of all that was read, by name in the checkpoint."""
        return self._largest | largest_of_each(self._staying)

    def _note(self, name: str, values: torch.Tensor) -> None:
        self._largest[name] = largest_of(values)


class _Kept:
    """What has been read so far, the decoder's matrices and its head quantized as asked for."""

    def __init__(
        self,
        shape: ModelShape,
        quantization: Quantization,
        origin: str = "",
        quantizer: Quantizer = quantize,
    ) -> None:
        self.tensors: Tensors = {}
        self.quantizer = quantizer
        self._matrices: Matrices = {}
        self._tied = shape.text.tied_head
        self._schemes = SCHEMES.get(quantization)
        self._origin = origin

    def quantizes(self, name: str) -> bool:
        """Whether a tensor of this name is quantized here."""
        return bool(self._schemes) and (is_decoder_matrix(name) or name == HEAD)

    def keep(self, name: str, tensor: torch.Tensor | QuantizedTensor) -> None:
        if isinstance(tensor, QuantizedTensor):
            self._matrices[name] = tensor
        elif self._schemes and self.quantizes(name):
            self._quantize(name, tensor, self._schemes[name == HEAD])
        else:
            self.tensors[name] = tensor

    def keep_matrices(self, matrices: Mapping[str, QuantizedTensor]) -> None:
        self._matrices |= matrices

    def weights(self, unused: tuple[str, ...]) -> LoadedWeights:
        if self._schemes and self._tied and HEAD not in self._matrices:
            # Rows of the embedding are looked up as they are; the head reads a copy of fewer bits.
            self._quantize(HEAD, self.tensors["text.embed"], self._schemes[1])
        return LoadedWeights(self.tensors, unused, self._matrices, self._origin)

    def _quantize(self, name: str, tensor: torch.Tensor, scheme: Scheme) -> None:
        with span("quantize", tensor=name):
            self._matrices[name] = self.quantizer(tensor, scheme)
