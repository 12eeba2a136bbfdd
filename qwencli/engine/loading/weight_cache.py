"""Keeps quantized matrices on disk, so that only the first load quantizes.

The file is a safetensors file that is written matrix by matrix when the model is loaded, beside the
first requests (`BackgroundWriter`): room for the header is left free, and the header is written
last, with a checksum of all tensors' bytes and a digest of the header itself. It gets its name
when it is whole. What cannot be kept (a full disk) is a warning; what is there but damaged,
outdated or of another layout is written anew, and what killed writers left is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwencli.engine.loading.reader import DTYPES, Reader
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme
from qwencli.errors import ModelFileError
from qwencli.models.quantized_cache import claimed, temporary_file
from qwencli.models.weight_files import StoredTensor, TensorInfo, read_header
from qwencli.tracing import span

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Of a tensor's entry in the header; what is left over is filled with spaces, as the format allows.
_ENTRY_BYTES = 320
_PARTS = ("data", "scale", "zero")
# What files call a part that has another name here.
_IN_FILES = {"zero_point": "zero"}
# How long one tensor may take to be written once nobody waits for the file any more.
_TENSOR_S = 2.0
# Of the table that is summed.
_ROW_BYTES = 8 * 4096
# Where tensors begin at multiples of this, kernels read as many bytes at once.
_ALIGNED = 16


class DamagedCache(Exception):
    """The file's bytes are not those that were written."""


class CachedMatrices:
    """The matrices in a file of this cache.

    Args:
        whole: all that is behind the header, as one tensor.
        parts: type, shape, and the bytes of `whole`, by "matrix.part".
        checksum: of `whole`, when it was written.
        schemes: by matrix.
    """

    def __init__(
        self,
        whole: StoredTensor,
        parts: Mapping[str, TensorInfo],
        checksum: str,
        schemes: Mapping[str, Scheme],
    ) -> None:
        self._whole, self._parts, self._checksum = whole, parts, checksum
        self._schemes = schemes

    def __contains__(self, name: str) -> bool:
        return name in self._schemes

    @property
    def size_bytes(self) -> int:
        return self._whole.size_bytes

    def begin(self, reader: Reader) -> Callable[[], Mapping[str, QuantizedTensor]]:
        """Begin to read them all to the reader's device; what is returned ends it.

        What that returns are views of one tensor: a read, a check and an allocation for the whole
        file instead of three for each part of hundreds of matrices.

        Raises:
            DamagedCache: the file went away, or became shorter, since it was opened; or its bytes
                are not those that were written.
        """
        whole, reading = reader.begin_as_stored(self._whole)

        def finish() -> Mapping[str, QuantizedTensor]:
            try:
                reading.wait()
            except ModelFileError as error:
                raise DamagedCache from error
            if checksum(whole) != self._checksum:
                raise DamagedCache
            return {name: self._matrix(name, whole) for name in self._schemes}

        return finish

    def _matrix(self, name: str, whole: torch.Tensor) -> QuantizedTensor:
        parts = [self._part(f"{name}.{part}", whole) for part in _PARTS]
        data, scale, zero_point = parts
        assert data is not None and scale is not None, "looked at in `open_cache`"
        return QuantizedTensor(self._schemes[name], data, scale, zero_point)

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor | None:
        info = self._parts.get(name)
        if info is None:
            return None
        raw = whole[info.start : info.start + info.size_bytes]
        if info.start % _ALIGNED:
            raw = raw.clone()  # where a tensor of its own would begin
        return raw.view(DTYPES[info.dtype]).view(info.shape)


def open_cache(file: Path, fingerprint: str, names: Collection[str]) -> CachedMatrices | None:
    """The matrices of these names; None where the file does not have them all, as they would be
    made now."""
    try:
        header = read_header(file)
    except ModelFileError:
        return None
    said = dict(header.metadata)
    entries = {
        name: [info.dtype, list(info.shape), [info.start, info.start + info.size_bytes]]
        for name, info in header.tensors.items()
    }
    if said.pop("digest", None) != _digest(said, entries) or said["fingerprint"] != fingerprint:
        return None
    try:
        schemes = {name: Scheme(kind) for name, kind in _schemes(header.metadata).items()}
    except (KeyError, ValueError, RecursionError):
        return None
    parts, sums = header.tensors, header.metadata.get("sum")
    whole = all(f"{name}.{part}" in parts for name in schemes for part in _PARTS[:2])
    if not whole or set(schemes) != set(names) or sums is None:
        return None
    size = (header.data_bytes,)
    stored = StoredTensor("quantized weights", file, "U8", size, header.data_start)
    return CachedMatrices(stored, parts, sums, schemes)


def _digest(metadata: Mapping[str, str], entries: Mapping[str, list[Any]]) -> str:
    """A digest of what a header says: `metadata`, and each tensor's type, shape and place."""
    said = json.dumps([metadata, entries], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _schemes(metadata: Any) -> dict[str, str]:
    found: dict[str, str] = json.loads(metadata["schemes"])
    return found


class CacheWriter:
    """Writes a file of this cache. Never raises: `warning` says why nothing is kept.

    Args:
        matrices: by name.
    """

    def __init__(
        self, file: Path, fingerprint: str, matrices: Mapping[str, QuantizedTensor]
    ) -> None:
        self.warning: str | None = None
        self._file, self._fingerprint, self._matrices = file, fingerprint, matrices
        self._temporary = temporary_file(file)
        self._room = _ENTRY_BYTES * (1 + len(_PARTS) * len(matrices))
        self._entries: dict[str, dict[str, Any]] = {}
        self._sums = ByteSums()
        self._schemes: dict[str, str] = {}
        self._position = 0
        self._stream: BinaryIO | None = None

    def begin(self) -> None:
        """Make the file, under another name; where it cannot be, or there is no room, that is a
        warning now."""
        needed = self._room + sum(matrix.nbytes for matrix in self._matrices.values())
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._file.parent).free < needed:
                self._give_up(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
                return
            self._stream = claimed(self._temporary)
            self._stream.seek(8 + self._room)
        except OSError as error:
            self._give_up(error)

    def write(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """After `begin`: write all of it, each tensor through host memory, and name the file.

        Args:
            stopped: asked before each tensor; once it is true nothing is left behind.
        """
        try:
            for name, matrix in self._matrices.items():
                self._schemes[name] = matrix.scheme.value
                for part, tensor in matrix.parts.items():
                    if self._stream is None or stopped():
                        self.abandon()
                        return
                    self._append(f"{name}.{_IN_FILES.get(part, part)}", tensor)
        except (OSError, RuntimeError, MemoryError) as error:  # a copy finds no memory
            self._give_up(error)
        else:
            self._finish()
        finally:
            self._matrices = {}

    def _finish(self) -> None:
        """Write the header and give the file its name."""
        stream = self._stream
        if stream is None:
            return
        try:
            metadata = {
                "fingerprint": self._fingerprint,
                "schemes": json.dumps(self._schemes),
                "sum": self._sums.digest(),
            }
            entries = {name: list(entry.values()) for name, entry in self._entries.items()}
            metadata["digest"] = _digest(metadata, entries)
            header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
            assert len(header) <= self._room, "an entry is shorter than _ENTRY_BYTES"
            stream.seek(0)
            stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            # Not forced onto the disk: a file that a failure of power left torn has other sums.
            stream.flush()
            if sys.platform == "win32":  # which renames no file that is open
                stream.close()
            self._temporary.replace(self._file)
            stream.close()
        except OSError as error:
            self._give_up(error)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._stream is not None:
            with suppress(OSError):  # a full disk does not take what is still to be written
                self._stream.close()
            self._stream = None
        with suppress(OSError):
            self._temporary.unlink()

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        assert self._stream is not None, "the caller looked"
        host = tensor.cpu().contiguous()
        raw = host.view(-1).view(torch.uint8)
        self._sums.add(raw)
        end = self._position + host.nbytes
        self._entries[name] = {
            "dtype": _NAMES[host.dtype],
            "shape": list(host.shape),
            "data_offsets": [self._position, end],
        }
        self._stream.write(memoryview(raw.numpy()))  # type: ignore[arg-type]
        self._position = end

    def _give_up(self, error: Exception) -> None:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.warning = (
            f"the quantized weights could not be kept in {self._file.parent} "
            f"({said.splitlines()[0]}); the next load quantizes them again"
        )
        self.abandon()


class BackgroundWriter:
    """Writes a file of this cache in a thread, beside what the engine does.

    What is on a GPU is copied on a stream of its own; nothing is allocated or computed there.
    """

    def __init__(self, writer: CacheWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device
        self._stop = threading.Event()
        # A process that ends without `end` leaves what it has written to the next load to delete.
        self._thread = threading.Thread(target=self._write, name="keep weights", daemon=True)
        self._thread.start()

    def end(self, wait_s: float | None) -> str | None:
        """Wait until the file is there, then give up; returns why it is not kept.

        Args:
            wait_s: at most, None = until it is there. Ctrl-C ends it too.
        """
        try:
            self._thread.join(wait_s)
        finally:
            self._stop.set()
            self._thread.join(_TENSOR_S)
        return self._writer.warning

    def _write(self) -> None:
        with span("keep weights"), torch.inference_mode():
            if self._device.type != "cuda":
                self._writer.write(self._stop.is_set)
                return
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                self._writer.write(self._stop.is_set)


def checksum(tensor: torch.Tensor) -> str:
    """A checksum of a tensor's bytes, the same on every device. Waits for a GPU."""
    sums = ByteSums()
    sums.add(tensor.contiguous().view(-1).view(torch.uint8))
    return sums.digest()


class ByteSums:
    """A checksum of bytes and their order, however they come: in one piece or in several.

    They are a table of words of eight bytes. Its sums over rows and over columns take little longer
    than one sum of all, and a word that changes, or changes its place, changes some of them. The
    checksum is a digest of these sums, in order.
    """

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._columns: torch.Tensor | None = None
        self._rest = torch.empty(0, dtype=torch.uint8)

    def add(self, raw: torch.Tensor) -> None:
        """Go on with a tensor of uint8, of the device of those before it."""
        if len(self._rest):
            raw = torch.cat((self._rest, raw))
        whole = raw.numel() // _ROW_BYTES * _ROW_BYTES
        table = raw[:whole].view(torch.int64).view(-1, _ROW_BYTES // 8)
        columns = table.sum(0)
        self._columns = columns if self._columns is None else self._columns + columns
        self._rows.append(table.sum(1))
        self._rest = raw[whole:].clone()

    def digest(self) -> str:
        """The checksum as text; what is on a GPU is copied to the host here."""
        digest = hashlib.sha256()
        for part in (*self._rows, self._columns, self._rest):
            if part is not None:
                digest.update(memoryview(part.cpu().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return digest.hexdigest()[:16]
