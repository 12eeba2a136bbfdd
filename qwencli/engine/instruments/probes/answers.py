"""What probes answer. Knows no torch: the process that asks never imports it.

Times named `_us` are of one call with its launch, as a decode loop pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwencli.config import EngineConfig


@dataclass(frozen=True)
class Work:
    """Sizes of the model that probes imitate; `decoder_bytes` is what one token reads in bf16.

    The vision fields are None for text models.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    decoder_bytes: int
    vision_heads: int | None = None
    vision_head_dim: int | None = None
    vision_hidden: int | None = None
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    in_channels: int | None = None


@dataclass(frozen=True)
class EngineWork:
    """A short run of the real engine: what to load, and how many tokens to time."""

    config: EngineConfig
    new_tokens: int
    runs: int


@dataclass(frozen=True)
class SmallWork:
    device: str
    seconds: float


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of device memory: the best of some ways to read, and of a copy (read and
    written bytes counted). `token_bytes_per_s`: of reading over and over as much as one token
    does, which may fit into a processor's caches."""

    read_bytes_per_s: float
    read_by: str
    copy_bytes_per_s: float
    token_bytes_per_s: float | None = None


@dataclass(frozen=True)
class LaunchRate:
    """Microseconds of one empty operation launched by the host, and as a node of a CUDA graph
    (None without graphs); `round_trip_us` is a launch and the wait for its result."""

    eager_us: float
    graph_us: float | None
    round_trip_us: float


@dataclass(frozen=True)
class HostLink:
    """Pinned copies between host and device, bytes a second."""

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float


@dataclass(frozen=True)
class AttentionRun:
    """One phase (prefill, decode, vision) through one SDPA backend.

    Args:
        backend: "chosen" where torch chose by itself, else the one that was forced.
        kernels: names that the profiler saw on the device; () where it sees none.
        family: what the names say ran: "flash", "cudnn", "mem_efficient" or "math".
        error: why the backend cannot run this shape.
    """

    phase: str
    backend: str
    us: float | None = None
    kernels: tuple[str, ...] = ()
    family: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class AttentionRuns:
    runs: tuple[AttentionRun, ...]


@dataclass(frozen=True)
class LinearRun:
    """One token through one linear layer: time, and error against the bf16 weight it came from."""

    scheme: str
    us: float | None = None
    relative_error: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class LinearRuns:
    rows: int
    columns: int
    runs: tuple[LinearRun, ...]


@dataclass(frozen=True)
class PatchEmbedding:
    """The vision tower's first layer over `patches` patches, as a convolution and as the linear
    layer that it equals, milliseconds."""

    patches: int
    conv3d_ms: float
    linear_ms: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class FlashAttention:
    version: str
    flash_us: float
    sdpa_us: float
    max_difference: float


@dataclass(frozen=True)
class TritonRun:
    version: str
    compile_and_run_s: float


@dataclass(frozen=True)
class EngineRun:
    """A short run of the engine and where its time went.

    Args:
        tok_per_s: decode speed of each run. gpu_busy_ms, kernels_per_token: of one decode step,
            from the profiler; None off CUDA or where it sees nothing.
        bytes_per_token: what a step has to read.
    """

    engine: str
    quantization: str
    attention: str
    cache: str
    load_s: float
    ttft_ms: float
    tok_per_s: tuple[float, ...]
    itl_p50_ms: float
    itl_p99_ms: float
    peak_allocated_bytes: int | None
    gpu_busy_ms: float | None
    kernels_per_token: float | None
    attention_kernels: tuple[str, ...]
    kernels: str = "torch"
