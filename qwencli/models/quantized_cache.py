"""Where quantized weights are kept between loads, and what they were made of. No torch.

A folder for each model folder, a file for each way to quantize it: a changed model overwrites its
file instead of adding one. The file says in its header what it was made of (`fingerprint`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qwencli.config import Quantization
from qwencli.errors import ModelFileError

# Counted up whenever the same weights would be quantized or stored otherwise than before.
LAYOUT = 1
_LENGTH_BYTES = 8


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
    return sum(file.stat().st_size for file in cache_folder(model).glob("*.safetensors"))


def fingerprint(files: Iterable[Path]) -> str:
    """Of the weight files by their sizes, times and headers, and of how they are quantized here.

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
        except OSError as error:
            raise ModelFileError(
                f"{file}: cannot be read ({error.strerror or error})",
                "check the file's permissions",
            ) from error
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
        digest.update(header)
    return digest.hexdigest()
