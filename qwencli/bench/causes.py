"""What can make a token or a run slow, and the findings that name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args


class Cause(StrEnum):
    GC = "gc"
    RECOMPILE = "recompile"
    GRAPH_CAPTURE = "graph_capture"
    SUSPENDED = "suspended"
    PREEMPTION = "preemption"
    HELPER_PREEMPTED = "helper_preempted"
    CGROUP_THROTTLED = "cgroup_throttled"
    PAGE_FAULTS = "page_faults"
    GIL = "gil"
    ALLOCATOR = "allocator"
    HOST_SYNC = "host_sync"
    THROTTLE = "throttle"
    POWER_STATE = "power_state"
    CLOCK = "clock"
    THERMAL_DRIFT = "thermal_drift"
    OTHER_GPU_PROCESS = "other_gpu_process"
    IDLE_GAP = "idle_gap"
    PROCESSOR = "processor"
    RELOAD = "reload"
    UNKNOWN = "unknown"


# Each completes "because ...".
MEANINGS: Mapping[Cause, str] = {
    Cause.GC: "Python collected garbage",
    Cause.RECOMPILE: "torch compiled anew",
    Cause.GRAPH_CAPTURE: "a CUDA graph was captured",
    Cause.SUSPENDED: "the process was stopped and went on later",
    Cause.PREEMPTION: "other programs, or the hypervisor, had the processor",
    Cause.HELPER_PREEMPTED: "other programs had the processor of a helper thread",
    Cause.CGROUP_THROTTLED: "a limit of this control group (docker --cpus) took the processor",
    Cause.PAGE_FAULTS: "memory had to be read back from disk",
    Cause.GIL: "another Python thread held the interpreter",
    Cause.ALLOCATOR: "torch asked the driver for memory or gave it back",
    Cause.HOST_SYNC: "the host waited for the device more often than usual",
    Cause.THROTTLE: "the GPU held its clock back",
    Cause.POWER_STATE: "the GPU was in a lower power state",
    Cause.CLOCK: "the GPU ran at a lower clock",
    Cause.THERMAL_DRIFT: "the GPU grew warmer and slower from run to run",
    Cause.OTHER_GPU_PROCESS: "another program used the GPU",
    Cause.IDLE_GAP: "the host slept or waited for something outside",
    Cause.PROCESSOR: "the host's processor was slower at the same work",
    Cause.RELOAD: "the model had just been loaded",
    Cause.UNKNOWN: "of what no sensor shows",
}

# Reasons with which the driver holds clocks back against heat, power or a fault. "idle" and
# "application_clocks" are choices, not troubles.
POWER_CAP = "sw_power_cap"
THROTTLING = frozenset({POWER_CAP, "hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"})

Scope = Literal["gap", "decode", "prefill", "cell"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class SlowInterval:
    """A time of one run that took longer than usual; for the words see `Finding`."""

    scope: Scope
    start_s: float
    end_s: float
    lost_ms: float
    tokens: int
    token_index: int | None = None

    @property
    def span_ms(self) -> float:
        return 1e3 * (self.end_s - self.start_s)


@dataclass(frozen=True)
class Finding:
    """One row of causes.csv.

    Args:
        scope: "gap" = tokens of one run against the cell's usual token; "decode" and "prefill" =
            that phase of one run against the cell's other runs; "cell" = all decodes of the cell,
            against a fixed limit.
        run: "" where it is the whole cell.
        token_index: of the first slow token; None unless it is a gap.
        t_s, span_ms: end and length of the time in question.
        lost_ms: how much longer than usual it took.
        confidence: 0 to 1, from the rule that names the cause.
        evidence: the figures it rests on, in words.
    """

    cell_id: str
    run: str
    scope: Scope
    token_index: int | None
    tokens: int
    t_s: float
    span_ms: float
    lost_ms: float
    cause: Cause
    confidence: float
    evidence: str
