"""What limits of this process's control group took from it, and where it stalled (Linux).

`cpu.stat` of a group with a processor limit (`cpu.max`, `docker --cpus`) counts for how long the
limit kept it from running, over all processors: `throttled_usec` in version 2 of control groups,
`throttled_time` (ns) in version 1. A limit of any group above holds too, so all are read up to the
root that this process sees. `cpu.pressure`, `memory.pressure` and `io.pressure` say for how long
some task of the group waited for that (Documentation/accounting/psi.rst); where the group has
none, those of the whole system do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Self

from qwencli.bench.measure.thread_times import reread
from qwencli.engine.machine.cgroups import PROC, cpu_groups

PRESSURES = ("cpu", "memory", "io")
# The names of the same counter in the two versions, and what makes milliseconds of it.
_THROTTLED_MS = {b"throttled_usec": 1e-3, b"throttled_time": 1e-6}

Reading = tuple[bytes, ...]


class Stalls(NamedTuple):
    """Between two readings, in ms; None = the system does not tell."""

    throttled_ms: float | None = None
    cpu_pressure_ms: float | None = None
    memory_pressure_ms: float | None = None
    io_pressure_ms: float | None = None


class CgroupStats:
    """Reads them; a context manager. A reading is raw text, parsed by `stalls` afterwards."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._files: tuple[int, ...] = ()
        self._limits = 0

    def __enter__(self) -> Self:
        groups = list(cpu_groups(self._proc))
        limits = [path for group in groups if (path := group / "cpu.stat").is_file()]
        self._files = tuple(file for path in limits if (file := _opened(path)) is not None)
        self._limits = len(self._files)
        for name in PRESSURES:
            places = [group / f"{name}.pressure" for group in groups]
            opened = map(_opened, [*places, self._proc / "pressure" / name])
            file = next((file for file in opened if file is not None), None)
            self._files += (file if file is not None else -1,)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            if file >= 0:
                os.close(file)
        self._files = ()

    def read(self) -> Reading:
        return tuple([reread(file, 1024) for file in self._files])

    def stalls(self, earlier: Reading, later: Reading) -> Stalls:
        """What lay between two readings of this object."""
        at = self._limits
        throttled = [
            after - before
            for a, b in zip(earlier[:at], later[:at], strict=True)
            if (before := _throttled_ms(a)) is not None and (after := _throttled_ms(b)) is not None
        ]
        pressures = [
            None if (before := _stalled_ms(a)) is None or (after := _stalled_ms(b)) is None
            else after - before
            for a, b in zip(earlier[at:], later[at:], strict=True)
        ]  # fmt: skip
        return Stalls(max(throttled, default=None), *pressures)


def _opened(path: Path) -> int | None:
    """A descriptor that can be read from; None where there is none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if not reread(file, 1024):  # pressure that was turned off opens, and cannot be read
        os.close(file)
        return None
    return file


def _throttled_ms(text: bytes) -> float | None:
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name in _THROTTLED_MS:
            return int(value) * _THROTTLED_MS[name]
    return None


def _stalled_ms(text: bytes) -> float | None:
    """Of the line "some avg10=0.00 avg60=0.00 avg300=0.00 total=81094411" (us)."""
    for line in text.splitlines():
        if line.startswith(b"some "):
            return int(line.rpartition(b"=")[2]) / 1e3
    return None
