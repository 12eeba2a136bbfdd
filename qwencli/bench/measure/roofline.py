"""How near a cell is to the machine's limits, and which of them holds it.

MBU, the share of memory bandwidth (Databricks 2023, "LLM Inference Performance Engineering"), is
the bytes that a token has to read, times tokens a second, over the bandwidth measured on this
machine. The rule for the verdict, first that holds:

    bandwidth        MBU is BANDWIDTH_BOUND percent or more
    host             the GPU was at work for less than GPU_BUSY percent of the time between
                     tokens: it waits for the host to launch, synchronise or read back
    kernels          the GPU was at work for longer, without reading at full speed
    not bandwidth    MBU is known and low, and nothing says how busy the device was (CPU)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

RawRow = Mapping[str, str]

BANDWIDTH_BOUND = 60.0
GPU_BUSY = 70.0
# What the driver calls the GPU's share of busy time is a mean over up to so long.
DRIVER_MEAN_S = 1.0

_COPIED = (
    "bytes_per_token", "read_bandwidth_bytes_per_s", "launch_rate_per_s",
    "graph_launch_rate_per_s", "launches_per_token", "kernels_per_token",
)  # fmt: skip


_RATES = ("launch_rate_per_s", "graph_launch_rate_per_s")
# Cells of one model differ a little in what a token reads, by the length of their contexts.
_ALIKE = 0.9


class Bottleneck(StrEnum):
    BANDWIDTH = "bandwidth"
    HOST = "host"
    KERNELS = "kernels"
    NOT_BANDWIDTH = "not bandwidth"


def roofline_columns(
    row: RawRow | None, tok_per_s: float | None, itl_p50_ms: float | None
) -> dict[str, Any]:
    """The columns of cells.csv; None for what was not measured.

    Args:
        row: the cell's row of roofline.csv. tok_per_s: median of its runs.
    """
    values = {name: _number(row, name) for name in (*_COPIED, "gpu_busy_ms_per_token")}
    read, bandwidth = values["bytes_per_token"], values["read_bandwidth_bytes_per_s"]
    busy_ms = values.pop("gpu_busy_ms_per_token")
    mbu = 100 * read * tok_per_s / bandwidth if read and bandwidth and tok_per_s else None
    # Kernels are timed in a run of their own, in which they may take longer than a token did.
    busy = min(100.0, 100 * busy_ms / itl_p50_ms) if busy_ms and itl_p50_ms else None
    return {
        **values,
        "mbu_percent": mbu,
        "gpu_busy_percent": busy,
        "bottleneck": bottleneck(mbu, busy),
    }


def with_best_limits(rows: Iterable[RawRow]) -> dict[str, dict[str, str]]:
    """The row of each cell, with the machine's limits as the campaign saw them at best.

    Other load takes from a reading and never adds to it. A larger buffer is no faster to read than
    a smaller one, so a cell may take the best bandwidth of those that read as much or more.
    """
    known = list(rows)
    best = {}
    for row in known:
        size = _number(row, "bytes_per_token") or 0.0
        larger = [r for r in known if (_number(r, "bytes_per_token") or 0.0) >= _ALIKE * size]
        limits = {name: _largest(known, name) for name in _RATES}
        limits["read_bandwidth_bytes_per_s"] = _largest(larger, "read_bandwidth_bytes_per_s")
        best[row["cell_id"]] = {**row, **limits}
    return best


def _largest(rows: Iterable[RawRow], name: str) -> str:
    values = [row[name] for row in rows if row[name]]
    return max(values, key=float, default="")


def bottleneck(mbu_percent: float | None, gpu_busy_percent: float | None) -> Bottleneck | None:
    """The rule above; None where neither figure is known."""
    if mbu_percent is not None and mbu_percent >= BANDWIDTH_BOUND:
        return Bottleneck.BANDWIDTH
    if gpu_busy_percent is not None:
        return Bottleneck.HOST if gpu_busy_percent < GPU_BUSY else Bottleneck.KERNELS
    return None if mbu_percent is None else Bottleneck.NOT_BANDWIDTH


def _number(row: RawRow | None, name: str) -> float | None:
    return float(row[name]) if row and row[name] else None
