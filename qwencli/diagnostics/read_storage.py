"""Reads where models are kept: room, speed, unfinished downloads; and whether the hub answers."""

from __future__ import annotations

import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from qwencli.diagnostics.facts import CacheFacts, DiskSpeed, Download, HubFacts
from qwencli.errors import system_words
from qwencli.models.hub import cache_root, unfinished_downloads

_READ_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_HUB_TIMEOUT_S = 4.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def read_cache() -> CacheFacts:
    folder = _existing(cache_root())
    return CacheFacts(shutil.disk_usage(folder).free, filesystem_of(folder))


def filesystem_of(folder: Path) -> str | None:
    """The kind of filesystem that holds `folder`; None where the system does not say."""
    import psutil

    place = folder.resolve()
    try:
        disks = psutil.disk_partitions(all=True)
    except OSError:
        return None
    over = [disk for disk in disks if place.is_relative_to(disk.mountpoint)]
    # Of two that are mounted at one place the later one is seen.
    over.sort(key=lambda disk: len(Path(disk.mountpoint).parts))
    return over[-1].fstype if over else None


def read_disk_speed() -> DiskSpeed:
    """Reads the start of the largest model file here; without one, a file written for this.

    Raises:
        OSError: there is no file, and none can be written; or the system cannot be told to read
            from the disk and not from its memory.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("this system does not let a program read past its memory")
    largest = _largest_file(cache_root())
    if largest is not None:
        return _timed_read(largest)
    with tempfile.TemporaryDirectory(dir=_existing(cache_root()), prefix=".qwencli-") as folder:
        path = Path(folder) / "read"
        block = os.urandom(_BLOCK_BYTES)
        with path.open("wb") as file:
            for _ in range(_READ_BYTES // _BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _timed_read(path)


def _largest_file(root: Path) -> Path | None:
    blobs = [path for path in root.glob("models--*/blobs/*") if path.is_file()]
    large = [path for path in blobs if path.stat().st_size >= _READ_BYTES]
    return max(large, key=lambda path: path.stat().st_size, default=None)


def _timed_read(path: Path) -> DiskSpeed:
    with path.open("rb", buffering=0) as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
        done, start = 0, time.perf_counter()
        while done < _READ_BYTES and (block := file.read(_BLOCK_BYTES)):
            done += len(block)
        return DiskSpeed(done / (time.perf_counter() - start), done)


def read_hub(variables: Mapping[str, str]) -> HubFacts:
    """Asks the hub for the shortest answer it has."""
    if any(variables.get(name, "") not in ("", "0") for name in _OFFLINE):
        return HubFacts(asked=False)
    answers: queue.SimpleQueue[HubFacts] = queue.SimpleQueue()
    # Looking up a name has no time limit of its own.
    threading.Thread(target=lambda: answers.put(_ask_hub()), daemon=True).start()
    try:
        return answers.get(timeout=_HUB_TIMEOUT_S)
    except queue.Empty:
        return HubFacts(True, problem=f"no answer after {_HUB_TIMEOUT_S:g} s")


def _ask_hub() -> HubFacts:
    from huggingface_hub import constants

    start = time.perf_counter()
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it refuses, so it is there
    except (OSError, ValueError) as error:
        return HubFacts(True, problem=system_words(error))
    return HubFacts(True, time.perf_counter() - start)


def read_downloads() -> tuple[Download, ...]:
    return tuple(Download(*found) for found in unfinished_downloads())
