"""Reads tensors from safetensors files to a device, and checks their values.

Each comes from its byte range, in pieces that other threads read with plain reads: a file need not
fit in memory, nor its system know how to map it. Where the file's type is the wanted one and the
device is the CPU no copy is made at all; otherwise pieces pass through a ring of `STAGING_BYTES`.
For a GPU it is pinned, several threads read, and pieces are copied on a stream of their own while
the next ones are read. Values have to be finite, and zero where the model has no use for them.
"""

from __future__ import annotations

import io
import math
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from qwencli.engine.protocol import BytesRead
from qwencli.errors import ModelFileError
from qwencli.models.quant_formats import PackedFormat, PackedLayer
from qwencli.models.weight_files import StoredTensor, all_named
from qwencli.tracing import span

# Of the ring, which has two pieces for each thread: one is copied while the next is read.
STAGING_BYTES, GPU_STAGING_BYTES = 64 * 2**20, 256 * 2**20
# One core copies 5 to 10 GB/s from the page cache, and a GPU takes five times as many.
GPU_THREADS = 8
_LARGEST_VALUE = 8
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


def pin_ahead(device: torch.device) -> None:
    """Have the ring of a GPU's reader pinned, and the GPU's context made: as long as reading a
    quarter of a model, and nothing of it takes the interpreter's lock."""
    # What cannot be had is said when it is needed.
    with suppress(RuntimeError), torch.cuda.device(device):
        # torch keeps what is given back.
        torch.empty(GPU_STAGING_BYTES, dtype=torch.uint8, pin_memory=True)


class PendingRead:
    """A tensor on its way to its place; `wait` before it is used."""

    def __init__(
        self, reader: Reader, pieces: Sequence[tuple[_Piece, Future[_Staging | None]]]
    ) -> None:
        self._reader, self._pieces = reader, pieces

    def wait(self) -> None:
        """Until what the current stream does next sees the tensor. Raises as `read`."""
        self.read()
        self._reader.join()

    def read(self) -> None:
        """Until all of it has been read; on a GPU it is on its way then, see `Reader.join`.

        Raises:
            ModelFileError: the file is shorter than its header says, or cannot be read.
        """
        for piece, reading in self._pieces:
            staging = reading.result()
            if staging is not None:
                self._reader.finish(piece, staging)


class Reader:
    """Threads that read, and the ring that they read into.

    Args:
        progress: is told of each piece.
    """

    def __init__(self, device: torch.device, progress: BytesRead | None = None) -> None:
        self._device = device
        self._progress = progress or BytesRead()
        self._cuda = device.type == "cuda"
        self._num_threads = GPU_THREADS if self._cuda else 1
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="reader")
        self._streams: set[io.FileIO] = set()
        self._own = threading.local()
        self._ring: queue.SimpleQueue[_Staging] | None = None
        self._closed = False
        self._copies = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all reading. What was read is where it belongs then."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self._num_threads if self._ring is not None else 0):
            # What a thread waits for that nobody will give back after a failure.
            assert self._ring is not None
            self._ring.put(_Staging(torch.empty(0, dtype=torch.uint8)))
        self._pool.shutdown(cancel_futures=True)
        for stream in self._streams:
            stream.close()
        if self._copies is not None:
            self._copies.synchronize()  # the ring goes, and copies read from it

    def read(self, source: StoredTensor, to: torch.Tensor) -> None:
        """Fill the flat tensor `to` with the values of `source`, converted to its type. Raises as
        `PendingRead.read`."""
        self.begin(source, to).wait()

    def now(self) -> torch.cuda.Event | None:
        """On a GPU, the end of what the current stream has been given."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def join(self) -> None:
        """What the current stream does next sees all that has been read."""
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def begin(
        self, source: StoredTensor, to: torch.Tensor, ready: torch.cuda.Event | None = None
    ) -> PendingRead:
        """Begin to `read`.

        Args:
            ready: of `now`, when nothing used the place of `to` any more; None = what the current
                stream has yet to do comes first.
        """
        dtype = DTYPES[source.dtype]
        direct = to.device.type == "cpu" and to.dtype == dtype
        if not direct and self._ring is None:
            self._ring = self._make_ring()
        ready = ready or self.now()
        step = self._piece_bytes // dtype.itemsize
        pieces = [
            _Piece(source, start * dtype.itemsize, dtype, to[start : start + step], ready)
            for start in range(0, math.prod(source.shape), step)
        ]
        work = self._read_directly if direct else self._read_through
        return PendingRead(self, [(piece, self._pool.submit(work, piece)) for piece in pieces])

    def finish(self, piece: _Piece, staging: _Staging) -> None:
        """Have a piece where it belongs that was read into the ring."""
        if staging.copied is not None:
            return  # `join`
        assert self._ring is not None, "the piece is in it"
        # In the caller's thread, whose operators share out their work among threads that are there.
        piece.to.copy_(staging.bytes[: piece.num_bytes].view(piece.dtype))
        self._ring.put(staging)

    def as_stored(self, source: StoredTensor) -> torch.Tensor:
        """The whole tensor in its own type and shape.

        Raises:
            ModelFileError: a type that is not read here, or as `PendingRead.read`.
        """
        to, reading = self.begin_as_stored(source)
        reading.wait()
        return to

    def begin_as_stored(self, source: StoredTensor) -> tuple[torch.Tensor, PendingRead]:
        """Begin `as_stored`."""
        if source.dtype not in DTYPES:
            raise ModelFileError(
                f"{source.file}: {source.name} is {source.dtype}, which is not read here",
                "use another version of the model, or try --engine transformers",
            )
        to = torch.empty(source.shape, dtype=DTYPES[source.dtype], device=self._device)
        return to, self.begin(source, to.view(-1))

    def _read_directly(self, piece: _Piece) -> None:
        self._fill(piece, piece.to)

    def _read_through(self, piece: _Piece) -> _Staging:
        """Read a piece into the ring; for a GPU begin its copy, whose end is in what is given."""
        assert self._ring is not None, "made before the first piece"
        if self._closed:  # what `close` puts in the ring is for those that wait already
            raise CancelledError
        staging = self._ring.get()
        if self._closed:
            raise CancelledError
        host = staging.bytes[: piece.num_bytes]
        try:
            if staging.copied is not None:
                staging.copied.synchronize()
            self._fill(piece, host)
        except BaseException:
            self._ring.put(staging)
            raise
        if self._copies is None:
            return staging  # the caller copies, and gives it back
        assert piece.ready is not None, "on a GPU there is one"
        with torch.inference_mode(), torch.cuda.stream(self._copies):
            self._copies.wait_event(piece.ready)
            piece.to.copy_(host.view(piece.dtype), non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._copies)
        self._ring.put(_Staging(staging.bytes, copied))
        return _Staging(staging.bytes, copied)

    def _fill(self, piece: _Piece, host: torch.Tensor) -> None:
        source = piece.source
        with span("read", tensor=source.name, bytes=piece.num_bytes):
            try:
                _fill(self._open(source), host, source, piece.start)
            except OSError as error:
                raise ModelFileError(
                    f"{source.file}: {source.name} cannot be read ({error.strerror or error})",
                    "see that the file is there, and its disk in order",
                ) from error
        self._progress.add(piece.num_bytes)

    def _open(self, source: StoredTensor) -> io.FileIO:
        """This thread's own, as threads share neither its place nor its lock."""
        stream: io.FileIO | None = getattr(self._own, "stream", None)
        if stream is None or stream.name != str(source.file):
            if stream is not None:
                self._streams.discard(stream)
                stream.close()
            stream = self._own.stream = source.file.open("rb", buffering=0)
            self._streams.add(stream)
        return stream

    def _make_ring(self) -> queue.SimpleQueue[_Staging]:
        ring, size = queue.SimpleQueue[_Staging](), self._piece_bytes
        whole = torch.empty(2 * self._num_threads * size, dtype=torch.uint8, pin_memory=self._cuda)
        for part in torch.split(whole, size):
            ring.put(_Staging(part))
        return ring

    @property
    def _piece_bytes(self) -> int:
        ring = GPU_STAGING_BYTES if self._cuda else STAGING_BYTES
        return max(ring // (2 * self._num_threads) // _LARGEST_VALUE, 1) * _LARGEST_VALUE


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: values from byte `start` of it on, and where they go.

    Args:
        ready: on a GPU, when nothing uses the place any more.
    """

    source: StoredTensor
    start: int
    dtype: torch.dtype
    to: torch.Tensor
    ready: torch.cuda.Event | None

    @property
    def num_bytes(self) -> int:
        return self.to.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Staging:
    """A part of the ring, and the end of the copy that read from it last."""

    bytes: torch.Tensor
    copied: torch.cuda.Event | None = None


def _fill(stream: io.FileIO, to: torch.Tensor, source: StoredTensor, start: int) -> None:
    """Read exactly as many bytes as the contiguous CPU tensor `to` holds, from byte `start` of
    `source` on."""
    stream.seek(source.start + start)
    # numpy's stubs do not say that its arrays are buffers.
    view = memoryview(to.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = stream.readinto(view)
        if not count:
            raise ModelFileError(f"{source.file} ended while reading {source.name}", AGAIN)
        view = view[count:]


# The largest size of a tensor's values, which carries a NaN through; on a GPU still on its way.
Largest = torch.Tensor | float


def check_zero(biases: tuple[StoredTensor, ...], reader: Reader) -> None:
    """Biases of no use to the model may be left out only if they are zero."""
    others = [bias.name for bias in biases if reader.as_stored(bias).any()]
    if others:
        raise ModelFileError(
            f"{all_named(others)}: biases that config.json does not describe and that are not zero",
            "weights and config.json belong to different models",
        )


def largest_of(values: torch.Tensor) -> Largest:
    """The largest size of any of the values; NaN where one is. Does not wait for a GPU."""
    if values.device.type != "cpu":
        largest: torch.Tensor = torch.linalg.vector_norm(values, math.inf)
        return largest
    # Numbers: small tensors that stay keep the heap from giving back what was in use below them.
    low, high = values.aminmax()
    return max(abs(float(low)), abs(float(high)))


def largest_of_each(values: Mapping[str, torch.Tensor]) -> dict[str, Largest]:
    """`largest_of`, of tensors of one device; on a GPU a few kernels for all."""
    alike: dict[torch.dtype, list[str]] = {}
    for name, tensor in values.items():
        if tensor.device.type == "cpu":
            return {name: largest_of(tensor) for name, tensor in values.items()}
        alike.setdefault(tensor.dtype, []).append(name)
    found: dict[str, Largest] = {}
    for names in alike.values():
        norms = torch._foreach_norm([values[name] for name in names], math.inf)
        found.update(zip(names, norms, strict=True))
    return found


def check_finite(largest: Mapping[str, Largest], dtype: torch.dtype) -> Mapping[str, float]:
    """Raise for every tensor whose largest value is no number, else give these as numbers.

    Waits for the device once.
    """
    found = dict(largest)
    waiting: dict[torch.dtype, list[str]] = {}
    for name, value in largest.items():
        if isinstance(value, torch.Tensor):
            waiting.setdefault(value.dtype, []).append(name)
    for names in waiting.values():
        together = torch.stack([torch.as_tensor(largest[name]) for name in names])
        found.update(zip(names, together.tolist(), strict=True))
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        hint = "use --dtype bfloat16 or float32 if the values exceed float16, else " + AGAIN
        raise ModelFileError(
            f"weights with NaN or infinity: {all_named(broken)}",
            hint if dtype == torch.float16 else AGAIN,
        )
    return {name: float(value) for name, value in found.items()}


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
    largest: Mapping[str, float], scaled: Mapping[str, PackedLayer], reader: Reader
) -> None:
    """Raise for matrices that are zero although their stored values are not: their scales are.

    Args:
        scaled: the layers, by the name that `largest` has of their scales, or of their product.
    """
    zero = [layer for name, layer in scaled.items() if not largest[name]]
    lost = [
        f"{layer.layer}.{layer.packing.scale}"
        for layer in zero
        if _any(reader, layer.tensors[layer.packing.main])
    ]
    if lost:
        raise ModelFileError(f"scales that are all zero: {all_named(lost)}", AGAIN)
