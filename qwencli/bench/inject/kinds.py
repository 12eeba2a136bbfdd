"""Which faults there are and where each can be made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwencli.bench.attribution.causes import Cause
from qwencli.bench.inject import faults
from qwencli.errors import UsageError

ALL = "ALL"


def _cuda(device: str) -> str | None:
    return None if device.startswith("cuda") else "needs a CUDA device"


def _affinity(device: str) -> str | None:
    return None if sys.platform == "linux" else "this system ties no thread to a core"


def _signals(device: str) -> str | None:
    return None if sys.platform != "win32" else "this system cannot stop a process"


def _anywhere(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """`blocker(device)` says why the fault cannot be made there, or None."""

    make: Callable[[str], faults.Fault]
    blocker: Callable[[str], str | None]


KINDS: Mapping[Cause, Kind] = {
    Cause.GC: Kind(faults.GarbageCollection, _anywhere),
    Cause.GIL: Kind(faults.HeldInterpreter, _anywhere),
    Cause.PREEMPTION: Kind(faults.HogOnTheSameCore, _affinity),
    Cause.SUSPENDED: Kind(faults.Stopped, _signals),
    Cause.IDLE_GAP: Kind(faults.Idle, _anywhere),
    Cause.RECOMPILE: Kind(faults.Recompile, _anywhere),
    Cause.RELOAD: Kind(faults.Reload, _anywhere),
    Cause.ALLOCATOR: Kind(faults.AllocatorChurn, _cuda),
    Cause.GRAPH_CAPTURE: Kind(faults.GraphCapture, _cuda),
    Cause.HOST_SYNC: Kind(faults.SyncEveryToken, _cuda),
    Cause.OTHER_GPU_PROCESS: Kind(faults.OtherGpuProgram, _cuda),
}


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is neither ALL nor a cause that can be injected at all."""
    valid = [cause.value for cause in KINDS]
    for name in names:
        if name != ALL and name not in valid:
            raise UsageError(
                f"{name!r} cannot be injected", f"give {ALL} or one or more of {', '.join(valid)}"
            )


def choose(names: Sequence[str], device: str) -> tuple[list[Cause], dict[Cause, str]]:
    """The causes to inject, and those of ALL that cannot be made here with the reason.

    Raises:
        UsageError: a cause named that cannot be injected here.
    """
    check_names(names)
    blocked = {c: reason for c, kind in KINDS.items() if (reason := kind.blocker(device))}
    if ALL in names:
        return [cause for cause in KINDS if cause not in blocked], blocked
    wanted = [cause for cause in KINDS if cause in names]
    for cause in wanted:
        if cause in blocked:
            raise UsageError(f"{cause} cannot be injected on {device}: it {blocked[cause]}")
    return wanted, {}
