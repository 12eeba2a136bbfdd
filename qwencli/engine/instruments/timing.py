"""Times repeated work on a device, and measures what the device can do at best.

Memory read and work launched: run beside a measurement, never inside one, as each function keeps
the device busy by itself. The bench holds its cells against the best sample (`roofline.csv`),
`diagnose` reports the usual one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from qwencli.engine.event_timer import EventTimer

SAMPLES = 7
# Of one sample: long against the resolution of events and the wait at its end. Where the CPU is the
# device there is neither, and a sample must be short against a time slice: beside other programs
# the fastest of long ones was six times slower than the machine is.
SAMPLE_S, SAMPLE_ON_CPU_S = 0.02, 0.001
# Work that takes this long shows its time in a single call, and has no time for more.
LONG_S = 0.2


def seconds_per_call(device: str, work: Callable[[], object], samples: int = SAMPLES) -> float:
    """Median time of one call within a row of calls, its launch included."""
    once = _warm_seconds(device, work)
    if once >= LONG_S:
        return once
    return statistics.median(samples_s(device, work, _calls(once), samples))


def _warm_seconds(device: str, work: Callable[[], object]) -> float:
    """Time of a call after a first one, which pays for what is set up once."""
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _calls(once_s: float, sample_s: float = SAMPLE_S) -> int:
    return max(1, min(1000, round(sample_s / once_s)))


def sustained(device: str, work: Callable[[], object], duration_s: float) -> float:
    """Fastest sample's time of one call while `work` keeps the device busy for `duration_s`."""
    sample_s = SAMPLE_ON_CPU_S if device == "cpu" else SAMPLE_S
    calls = _calls(_warm_seconds(device, work), sample_s)
    until = time.monotonic() + duration_s
    times: list[float] = []
    while not times or time.monotonic() < until:
        times += samples_s(device, work, calls, 1)
    return min(times)


def samples_s(device: str, work: Callable[[], object], calls: int, samples: int) -> Iterator[float]:
    """Time of one call in each of `samples` rows of `calls` calls."""
    for _ in range(samples):
        clock = EventTimer(device)
        for _ in range(calls):
            work()
        end = clock.mark()
        synchronize(device)
        yield clock.seconds(clock.origin, end) / calls


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def still_works(device: str) -> bool:
    """Whether the device survived the last error; many leave it unusable for this process."""
    try:
        synchronize(device)
        return float(torch.ones(1, device=device)) == 1.0
    except RuntimeError:
        return False


def compute_dtype(device: str) -> torch.dtype:
    """What models compute in on this device: bfloat16, float16 where the GPU has no bfloat16,
    float32 on the CPU."""
    if not device.startswith("cuda"):
        return torch.float32
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


# Beyond the largest, on each kind of device, size makes no difference.
LARGEST_BUFFER, LARGEST_BUFFER_ON_CPU, SMALLEST_BUFFER = 1 << 30, 1 << 28, 1 << 22
_COLUMNS = 4096
_READ_S = 0.3
_LAUNCHES = 2000
_LAUNCH_SAMPLES = 5
_LAUNCH_PARTS_ON_CPU = 10  # samples within a time slice
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

    By matrix-vector products, which is how decoding reads weights; on a CPU by sums too, where a
    product of one shape may be slower than the engine's own of another. The buffer is as large as
    what one token reads, within bounds: a model that fits into a processor's caches is held
    against the caches. The fastest sample, because other load only ever takes from what the
    machine can do.
    """
    with torch.inference_mode():
        matrix = _buffer(device, working_set)
        ways = [_product(matrix)]
        if device == "cpu":
            ways.append(_sum(matrix))
        return max(matrix.nbytes / sustained(device, way, _READ_S) for way in ways)


def memory_rates(device: str, duration_s: float) -> MemoryRates:
    """Read a buffer beyond any cache in two ways, and copy it.

    Args:
        duration_s: of each way to read; long enough for a GPU to leave its idle clocks.
    """
    with torch.inference_mode():
        matrix = _buffer(device, LARGEST_BUFFER)
        other = torch.empty_like(matrix)
        ways: dict[str, Callable[[], object]] = {
            PRODUCT: _product(matrix),
            SUM: _sum(matrix),
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
        parts = _LAUNCH_PARTS_ON_CPU if device == "cpu" else 1
        _, *eager = samples_s(device, add, _LAUNCHES // parts, 1 + parts * _LAUNCH_SAMPLES)
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


def _sum(matrix: torch.Tensor) -> Callable[[], object]:
    words = matrix.view(torch.int32)
    return lambda: words.sum(dtype=torch.int32)


def _graph_times(device: str, add: Callable[[], object]) -> tuple[float, ...]:
    if not device.startswith("cuda"):
        return ()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_GRAPH_NODES):
            add()
    _, *replays = samples_s(device, graph.replay, _GRAPH_REPLAYS, 1 + _LAUNCH_SAMPLES)
    return tuple(seconds / _GRAPH_NODES for seconds in replays)
