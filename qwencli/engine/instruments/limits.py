"""What this device can do at best: read memory, take launches.

Run beside a measurement, never inside one: each function keeps the device busy by itself. The
bench holds its cells against the best sample (`roofline.csv`), `diagnose` reports the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qwencli.engine.instruments.timing import compute_dtype, samples_s, sustained

# Beyond the largest, on each kind of device, size makes no difference.
LARGEST_BUFFER, LARGEST_BUFFER_ON_CPU, SMALLEST_BUFFER = 1 << 30, 1 << 28, 1 << 22
_COLUMNS = 4096
_READ_S = 0.3
_LAUNCHES = 2000
_LAUNCH_SAMPLES = 5
_GRAPH_NODES = 1000
_GRAPH_REPLAYS = 4
PRODUCT, SUM = "matrix-vector product", "sum"


@dataclass(frozen=True)
class MemoryRates:
    """Bytes a second: of each way to read, and of a copy (read and written bytes counted)."""

    read: Mapping[str, float]
    copy: float


@dataclass(frozen=True)
class LaunchTimes:
    """Seconds that launching an operation takes which does next to nothing, sample by sample.

    `eager`: one by one from Python through torch. `graph`: a node of a CUDA graph in a replay; ()
    off CUDA.
    """

    eager: tuple[float, ...]
    graph: tuple[float, ...]


def read_bandwidth(device: str, working_set: int) -> float:
    """Bytes a second of reading a buffer of about `working_set` bytes over and over.

    By matrix-vector products, which is how decoding reads weights. The buffer is as large as what
    one token reads, within bounds: a model that fits into a processor's caches is held against
    the caches. The fastest sample, because other load only ever takes from what the machine can
    do.
    """
    with torch.inference_mode():
        matrix = _buffer(device, working_set)
        return matrix.nbytes / sustained(device, _product(matrix), _READ_S)


def memory_rates(device: str, duration_s: float) -> MemoryRates:
    """Read a buffer beyond any cache in two ways, and copy it.

    Args:
        duration_s: of each way to read; long enough for a GPU to leave its idle clocks.
    """
    with torch.inference_mode():
        matrix = _buffer(device, LARGEST_BUFFER)
        other = torch.empty_like(matrix)
        words = matrix.view(torch.int32)
        ways: dict[str, Callable[[], object]] = {
            PRODUCT: _product(matrix),
            SUM: lambda: words.sum(dtype=torch.int32),
        }
        read = {
            name: matrix.nbytes / sustained(device, way, duration_s) for name, way in ways.items()
        }
        copy_s = sustained(device, lambda: other.copy_(matrix), duration_s / 2)
    return MemoryRates(read, 2 * matrix.nbytes / copy_s)


def launch_times(device: str) -> LaunchTimes:
    """How fast this host launches additions to a single number."""
    with torch.inference_mode():
        number = torch.zeros(1, device=device)

        def add() -> object:
            return number.add_(1)

        # The first samples pay for what is set up once.
        _, *eager = samples_s(device, add, _LAUNCHES, 1 + _LAUNCH_SAMPLES)
        return LaunchTimes(tuple(eager), _graph_times(device, add))


def _buffer(device: str, working_set: int) -> torch.Tensor:
    dtype = compute_dtype(device)
    largest = LARGEST_BUFFER_ON_CPU if device == "cpu" else LARGEST_BUFFER
    size = min(largest, max(SMALLEST_BUFFER, working_set))
    if device.startswith("cuda"):
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    rows = max(1, size // (_COLUMNS * dtype.itemsize))
    return torch.ones(rows, _COLUMNS, dtype=dtype, device=device)


def _product(matrix: torch.Tensor) -> Callable[[], object]:
    vector, out = torch.ones_like(matrix[0]), torch.empty_like(matrix[:, 0])
    return lambda: torch.mv(matrix, vector, out=out)


def _graph_times(device: str, add: Callable[[], object]) -> tuple[float, ...]:
    if not device.startswith("cuda"):
        return ()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_GRAPH_NODES):
            add()
    _, *replays = samples_s(device, graph.replay, _GRAPH_REPLAYS, 1 + _LAUNCH_SAMPLES)
    return tuple(seconds / _GRAPH_NODES for seconds in replays)
