"""The probes: what each is called and answers, how long it may take, and how answers travel.

Knows no torch: the process that asks never imports it. Times named `_us` are of one call with its
launch, as a decode loop pays for it.
"""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from qwencli.config import EngineConfig
from qwencli.engine.machine.device import TorchFacts


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


@dataclass(frozen=True)
class Probe:
    """`place` is "module:function" below `measure`; the function takes a device and the Work (or
    for the engine's run the EngineWork) and returns `answer`.

    `settles` marks work long enough for clocks and link to show what they do under load.
    """

    place: str
    answer: type
    timeout_s: float
    settles: bool = False

    def function(self) -> Callable[[str, Any], Any]:
        module, _, name = self.place.partition(":")
        found: Callable[[str, Any], Any] = getattr(
            importlib.import_module(f"qwencli.engine.instruments.probes.measure.{module}"), name
        )
        return found


PROBES: Mapping[str, Probe] = {
    # The import of torch itself, from a cold disk.
    "torch": Probe("rates:torch_build", TorchFacts, 120.0),
    "small-work": Probe("rates:small_work", SmallWork, 60.0),
    "bandwidth": Probe("rates:bandwidth", Bandwidth, 20.0, settles=True),
    "host-link": Probe("rates:host_link", HostLink, 20.0, settles=True),
    "launch-rate": Probe("rates:launch_rate", LaunchRate, 20.0),
    "attention": Probe("attention_runs:attention", AttentionRuns, 30.0),
    "patch-embedding": Probe("linears:patch_embedding", PatchEmbedding, 30.0),
    "bitsandbytes": Probe("linears:quantized_linears", LinearRuns, 60.0),
    "flash-attn": Probe("attention_runs:flash_attention", FlashAttention, 30.0),
    "triton": Probe("triton_add:triton_run", TritonRun, 60.0),
    "engine": Probe("engine_run:engine_run", EngineRun, 900.0, settles=True),
}


def dumps(value: Any) -> str:
    """One line of JSON, as answers, engine settings and readings travel.

    Dataclasses become objects, paths strings.
    """
    return json.dumps(value, default=plain)


def plain(value: Any) -> Any:
    """What `json` cannot write by itself, as what it can."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):  # dict itself never gets here, read-only views do
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def decode(kind: Any, value: Any) -> Any:
    """`value` (as `json.loads` gives it) as an instance of `kind`, nested dataclasses included.

    A key that `kind` does not have is ignored and a missing one takes its default, so that
    answers recorded by another version can still be read.

    Raises:
        TypeError: a field without a default is missing.
    """
    if value is None:
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        return kind(**{name: decode(hints[name], value[name]) for name in known & value.keys()})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        kinds = (args[0],) * len(value) if args[1:] == (...,) else args
        return tuple(decode(inner, item) for inner, item in zip(kinds, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: decode(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return kind(value)
    return value
