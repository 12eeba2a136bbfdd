"""Reads where models are kept: room, speed, unfinished downloads; and whether the hub answers."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from qwencli.diagnostics.facts import CacheFacts, DiskSpeed, Download, HubFacts
from qwencli.engine.probes.ask import first_line
from qwencli.models.hub_cache import cache_root, unfinished_downloads

_READ_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_HUB_TIMEOUT_S = 3.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def read_cache() -> CacheFacts:
    folder = _existing(cache_root())
    mounts = Path("/proc/mounts")
    kind = filesystem_of(folder, mounts.read_text("utf-8")) if mounts.is_file() else None
    return CacheFacts(shutil.disk_usage(folder).free, kind)


def filesystem_of(folder: Path, mounts: str) -> str | None:
    """The filesystem that holds `folder` by the longest matching line of /proc/mounts."""
    place = str(folder.resolve()) + "/"
    found = [
        (mounted, kind)
        for _, mounted, kind, *_ in (line.split(" ") for line in mounts.splitlines())
        if place.startswith(mounted.rstrip("/") + "/")
    ]
    return max(found, key=lambda pair: len(pair[0]))[1] if found else None


def read_disk_speed() -> DiskSpeed:
    """Reads the start of the largest model file here; without one, a file written for this.

    Raises:
        OSError: there is no file, and none can be written.
    """
    largest = _largest_file(cache_root())
    if largest is not None:
        return _timed_read(largest)
    with tempfile.NamedTemporaryFile(dir=_existing(cache_root()), prefix=".qwencli-") as file:
        block = os.urandom(_BLOCK_BYTES)
        for _ in range(_READ_BYTES // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _timed_read(Path(file.name))


def _largest_file(root: Path) -> Path | None:
    blobs = [path for path in root.glob("models--*/blobs/*") if path.is_file()]
    large = [path for path in blobs if path.stat().st_size >= _READ_BYTES]
    return max(large, key=lambda path: path.stat().st_size, default=None)


def _timed_read(path: Path) -> DiskSpeed:
    advise = getattr(os, "posix_fadvise", None)
    with path.open("rb", buffering=0) as file:
        if advise is not None:  # else what the system has in memory makes the figure too good
            advise(file.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
        done, start = 0, time.perf_counter()
        while done < _READ_BYTES and (block := file.read(_BLOCK_BYTES)):
            done += len(block)
        return DiskSpeed(done / (time.perf_counter() - start), done)


def read_hub(variables: Mapping[str, str]) -> HubFacts:
    """Asks the hub for the shortest answer it has."""
    if any(variables.get(name, "") not in ("", "0") for name in _OFFLINE):
        return HubFacts(asked=False)
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it refuses, so it is there
    except (OSError, ValueError) as error:
        return HubFacts(True, problem=first_line(str(getattr(error, "reason", error))))
    return HubFacts(True, time.perf_counter() - start)


def read_downloads() -> tuple[Download, ...]:
    return tuple(Download(*found) for found in unfinished_downloads())
