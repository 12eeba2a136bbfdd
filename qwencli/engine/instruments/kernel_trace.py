"""What a GPU did, kernel by kernel, for a trace: torch's profiler, of the device alone.

It is begun before the model loads, as a graph that was captured without it has no kernels to show,
and ends after a while: a GPU runs tens of thousands of kernels a second, and each costs memory here
until the trace is written. What operators the host ran is not recorded, which is what makes a
profiler slow.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwencli.tracing import Event, Trace, active

# An answer that ends later than this after the beginning is the last one with kernels.
LONGEST_S = 15.0
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def trace_kernels(device: str) -> KernelTrace | None:
    """Begin to record what the GPU does, where a trace is made."""
    trace = active()
    if trace is None or not device.startswith("cuda"):
        return None
    try:
        return KernelTrace(trace)
    except Exception as error:  # noqa: BLE001 - the profiler is the driver's; phases are known without
        trace.notes.append(f"no kernels of {device}: {type(error).__name__}: {error}")
        return None


class KernelTrace:
    """Records from its making until `close`, at the latest until an answer after `LONGEST_S`."""

    def __init__(self, trace: Trace, categories: tuple[str, ...] = _ON_DEVICE) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._trace, self._categories = trace, categories
        self._thread, self._began_s = threading.get_ident(), time.perf_counter()
        device = ProfilerActivity.CUDA if categories == _ON_DEVICE else ProfilerActivity.CPU
        recording: Any = profile(activities=[device], acc_events=True)
        recording.__enter__()
        self._profile = recording
        trace.listeners.append(self._answered)
        trace.endings.append(self.close)

    def close(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        # The profiler's times are of the system's clock.
        offset_s = time.time() - time.perf_counter()
        try:
            profile.__exit__(None, None, None)
            with tempfile.TemporaryDirectory(prefix="qwencli-profile-") as folder:
                file = Path(folder) / "kernels.json"
                profile.export_chrome_trace(str(file))
                recorded = json.loads(file.read_bytes())
        except (RuntimeError, OSError, ValueError) as error:
            self._trace.notes.append(f"no kernels: {type(error).__name__}: {error}")
            return
        self._trace.add(kernel_events(recorded, self._categories, offset_s))

    def _answered(self) -> None:
        over = time.perf_counter() - self._began_s > LONGEST_S
        if over and threading.get_ident() == self._thread:
            self.close()


def kernel_events(
    recorded: Any, categories: tuple[str, ...] = _ON_DEVICE, offset_s: float = 0.0
) -> Iterator[Event]:
    """Events of these categories in a trace of torch's profiler.

    Args:
        offset_s: of `time.time` over `time.perf_counter`.
    """
    began_s = recorded.get("baseTimeNanoseconds", 0) / 1e9 - offset_s
    for each in recorded["traceEvents"]:
        if each.get("cat") not in categories or each.get("ph") != "X":
            continue
        about = each.get("args", {})
        start_s = began_s + each["ts"] / 1e6
        yield Event(
            f"cuda:{about.get('device', 0)}",
            f"stream {about.get('stream', 0)}",
            each["name"],
            start_s,
            start_s + each["dur"] / 1e6,
            {"grid": about["grid"], "block": about["block"]} if "grid" in about else None,
        )
