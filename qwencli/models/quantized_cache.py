"""Where quantized weights are kept between loads, and what they were made of. No torch.

A folder for each model folder, a file for each way to quantize it: a changed model overwrites its
file instead of adding one. The file says in its header what it was made of (`fingerprint`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from qwencli.config import Quantization
from qwencli.errors import ModelFileError

# Counted up whenever the same weights would be quantized or stored otherwise than before.
LAYOUT = 3
_LENGTH_BYTES = 8
# Of each weight file's values: pieces of this size, spread evenly.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def cache_root() -> Path:
    """The user's cache folder as the platform has it; may not exist."""
    from platformdirs import user_cache_path

    return user_cache_path("qwencli", appauthor=False) / "weights"


def cache_folder(model: Path) -> Path:
    """What is kept of the model in this folder."""
    place = model.resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:16]
    return cache_root() / f"{place.name}-{digest}"


def cache_file(model: Path, quantization: Quantization, dtype: str) -> Path:
    return cache_folder(model) / f"{quantization}-{dtype}.safetensors"


def cached_bytes(model: Path) -> int:
    """Bytes that the model's quantized weights take on disk."""
    total = 0
    for file in cache_folder(model).glob("*.safetensors"):
        with suppress(OSError):  # another process replaced it just now
            total += file.stat().st_size
    return total


def fingerprint(files: Iterable[Path]) -> str:
    """A fingerprint of the weight files, and of how they are quantized here.

    Of each file its size, the times of its last change, its header and samples of its values. The
    time of the last change to the file itself (ctime) cannot be set back, as that of its content
    (mtime) can; where a system has none, samples tell other weights.

    Raises:
        ModelFileError: a file cannot be read.
    """
    digest = hashlib.sha256(f"layout {LAYOUT}".encode())
    for file in files:
        try:
            found = file.stat()
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
                header = stream.read(min(length, found.st_size))
                digest.update(header)
                for part in range(_SAMPLES):
                    stream.seek(found.st_size * part // _SAMPLES)
                    digest.update(stream.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelFileError(
                f"{file}: cannot be read ({error.strerror or error})",
                "check the file's permissions",
            ) from error
        times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
        digest.update(f"{file.name} {found.st_size} {times}".encode())
    return digest.hexdigest()


def temporary_file(file: Path) -> Path:
    """A name beside `file` for what is being written; `remove_leftovers` knows it."""
    return file.with_name(f".{file.name}.{os.getpid()}-{token_hex(4)}")


def claimed(file: Path) -> BinaryIO:
    """Make a temporary file that counts as in use for as long as it is open.

    Where a system or a file system has no such locks, an open file cannot be deleted (Windows), or
    `remove_leftovers` takes none for a leftover.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        stream = file.open("xb")
        _lock(stream)
        if file.exists():
            return stream
        stream.close()  # another load took it for a leftover before it was locked


def remove_leftovers() -> None:
    """Delete what writers that were killed left behind, in all models' folders."""
    for path in cache_root().glob("*/.*.safetensors.*"):
        try:
            with path.open("rb") as stream:
                left = _lock(stream)
            if left:
                path.unlink()
        except OSError:
            continue  # in use, gone already, or not ours to delete


def _lock(stream: BinaryIO) -> bool:
    """Whether nobody else had the file locked; it is now, until it is closed."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
