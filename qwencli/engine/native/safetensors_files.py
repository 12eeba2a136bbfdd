"""Finds the tensors of a checkpoint folder: name -> file, dtype, shape and byte range.

Reads only the headers. The data is read later, straight to where it belongs (`weights`); a memory
map would count every weight twice in the process's resident memory.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "download the model again"
# The format's own limit; anything larger is not a header.
_MAX_HEADER_BYTES = 100_000_000

# Bytes a value, for every type the format knows in whole bytes.
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `start` is the offset of its first byte in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List all tensors of the checkpoint in `folder`, from one file or from a sharded index.

    Raises:
        ModelFileError: no weights here, an index or header that cannot be read, shards that are
            not there (all named), or a file that ends before its last tensor does.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(folder):
        for tensor in _header(file):
            found[tensor.name] = tensor
    return found


def _files(folder: Path) -> Iterable[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ModelFileError(
            f"{folder} holds neither {SINGLE} nor {INDEX}",
            "point --model at a folder with safetensors weights, or try --load-format dummy",
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{index} cannot be read as a weight index: {error!r}", _AGAIN
        ) from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelFileError(
            f"{index} names files outside its folder: {', '.join(outside)}", _AGAIN
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFileError(f"{folder} lacks weight files: {', '.join(missing)}", _AGAIN)
    return files


def _header(file: Path) -> Iterable[StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ModelFileError(f"{file} is not a safetensors file or is cut short", _AGAIN)
            header = json.loads(stream.read(length))
        return [
            _entry(file, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{file}: the safetensors header cannot be read: {error!r}", _AGAIN
        ) from error


def _entry(
    file: Path, name: str, entry: dict[str, Any], data_start: int, size: int
) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    # Types of less than a byte are never ours to read; their extent is checked by the file's end.
    bytes_each = ITEM_BYTES.get(dtype)
    if min(shape, default=0) < 0 or not 0 <= begin <= end:
        raise ModelFileError(
            f"{file}: tensor {name} has a shape or place that makes no sense", _AGAIN
        )
    if bytes_each is not None and end - begin != math.prod(shape) * bytes_each:
        raise ModelFileError(
            f"{file}: tensor {name} takes {end - begin} bytes, "
            f"its shape {list(shape)} in {dtype} needs {math.prod(shape) * bytes_each}",
            _AGAIN,
        )
    if data_start + end > size:
        raise ModelFileError(
            f"{file} is cut short: tensor {name} ends at byte {data_start + end} of {size}", _AGAIN
        )
    return StoredTensor(name, file, dtype, shape, data_start + begin)
