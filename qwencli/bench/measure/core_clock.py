"""The clock of the processor core that this thread runs on, where the system tells (Linux).

`scaling_cur_freq` of a core is what the kernel measured or set last, in kHz
(Documentation/admin-guide/pm/cpufreq.rst). Virtual machines mostly have no such file.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

_CORES = Path("/sys/devices/system/cpu")


def _core_reader() -> Callable[[], int] | None:
    """Asks on which core this thread is; None where the system's library cannot say."""
    try:
        reader: Any = ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without name
        return None
    core: Callable[[], int] = reader
    return core


class CoreClock:
    """Reads it; a context manager. Costs nothing where there is nothing to read."""

    def __init__(self, cores: Path = _CORES, core: Callable[[], int] | None = None) -> None:
        self._cores = cores
        found = any(cores.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._core = (core or _core_reader()) if found else None
        self._files: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def read_mhz(self) -> float | None:
        """The clock of this moment's core; None where it is not known."""
        if sys.platform == "win32" or self._core is None:
            return None
        core = self._core()
        try:
            if core not in self._files:
                path = self._cores / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"
                self._files[core] = os.open(path, os.O_RDONLY)
            return int(os.pread(self._files[core], 32, 0)) / 1e3
        except (OSError, ValueError):  # a core that was taken away, or "<unknown>"
            return None
