"""What a run is asked to do: modes, engine configuration, sampling.

Everything here is frozen. `resolve_sampling` and `qwencli.engine.resolve` turn what a user
said into concrete values once; nothing changes them afterwards. This module knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from qwencli.errors import DeviceError, ModelFileError, UsageError


class EngineName(StrEnum):
    NATIVE = "native"
    TRANSFORMERS = "transformers"
    REMOTE = "remote"


class Quantization(StrEnum):
    NONE = "none"
    INT8 = "8bit"
    INT4 = "4bit"
    FP8 = "fp8"


class Attention(StrEnum):
    AUTO = "auto"
    SDPA = "sdpa"
    FLASH = "flash_attention_2"
    EAGER = "eager"


class Cache(StrEnum):
    DYNAMIC = "dynamic"
    STATIC = "static"
    STATIC_COMPILE = "static-compile"
    STATIC_GRAPH = "static-graph"


class Kernels(StrEnum):
    """What computes a decode step of the native engine."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class KVDType(StrEnum):
    """How the native engine stores keys and values; auto: as the model computes them."""

    AUTO = "auto"
    INT8 = "int8"
    FP8 = "fp8"


class Speculate(StrEnum):
    """Tokens drafted for each greedy step, from earlier text; mtp = for any step, by the model's
    own head, as many as pay at the moment; auto = by that where it has one, else from text."""

    OFF = "off"
    AUTO = "auto"
    MTP = "mtp"
    ONE = "1"
    TWO = "2"
    THREE = "3"
    FOUR = "4"
    FIVE = "5"
    SIX = "6"
    SEVEN = "7"


class LoadMode(StrEnum):
    KEEP = "keep"
    RELOAD = "reload"


class LoadFormat(StrEnum):
    AUTO = "auto"
    DUMMY = "dummy"


class Existing(StrEnum):
    """What becomes of a caption that a picture of a set has already."""

    SKIP = "skip"
    OVERWRITE = "overwrite"
    APPEND = "append"
    PREPEND = "prepend"


class DType(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class ModelSource(StrEnum):
    BUNDLED = "bundled"
    BUILTIN = "builtin"
    CUSTOM = "custom"
    LOCAL = "local"
    HUB = "hub"
    REMOTE = "remote"


# The largest phone sensors give 199.8 megapixels. Such a PNG takes 7 s of a core, nearly all in
# zlib; the reduced decoding that JPEG has would give other pixels than the reference sees.
MAX_PIXELS = 200_000_000
# Frames of a video: the most Qwen's own processors take.
MAX_FRAMES = 768

# "auto" = as many tokens as fit, up to the model's limit.
SeqLen = int | Literal["auto"]


@dataclass(frozen=True)
class ModelSpec:
    """One model that can be asked for by name.

    Args:
        name: the name used on the command line.
        source: where the entry comes from.
        repo_id: hub repository, None for a local folder.
        path: local folder with config.json and weights, None when not (yet) on this machine.
        hub_config: contents of the model's config.json (true shapes), None when not known
            before a download.
        vram_requirement: GB by quantization as stated by the entry ("4bit", "8bit", "full");
            empty when nobody stated it.
        default: whether custom_models.json marks this entry as the one to use.
        quantized: whether the checkpoint itself is quantized already.
    """

    name: str
    source: ModelSource
    repo_id: str | None = None
    path: Path | None = None
    hub_config: Mapping[str, Any] | None = None
    vram_requirement: Mapping[str, float] = field(default_factory=dict)
    default: bool = False
    quantized: bool = False


def keep_tuples(made: object, *names: str) -> None:
    """Make tuples of lists that a caller gave to a frozen dataclass, which would not be hashable
    with them; of one text a tuple of it."""
    for name in names:
        value = getattr(made, name)
        if type(value) is not tuple:
            kept = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(made, name, kept)


@dataclass(frozen=True)
class EngineConfig:
    """How to load and run one model. `auto` values are made concrete by the engine's resolver.

    Args:
        engine: None = native, or transformers for what native cannot run; remote where there are
            endpoints.
        cache: None = the engine's own choice.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        min_pixels: bound on height x width after resizing; None = the model's own.
        max_pixels: the same; kept as it is. None = the model's own, and less where that does not
            fit the memory.
        max_seq_len: tokens (prompt and new) the cache must hold; "auto" = as many as fit, up to
            the model's limit; None = the engine's own choice.
        speculate: who drafts tokens for steps to check, and how many.
        allow_pickle: load .bin/.pt weights, which can run code; off unless asked for.
        threads: that compute where the CPU is the device; None = as many as pay.
        batch_invariant: whether an answer must not depend on what runs beside it, to the bit.
        endpoints: addresses of the servers that the remote engine asks.
    """

    model: ModelSpec
    engine: EngineName | None = None
    quantization: Quantization = Quantization.NONE
    attention: Attention = Attention.AUTO
    cache: Cache | None = None
    kernels: Kernels = Kernels.AUTO
    kv_dtype: KVDType = KVDType.AUTO
    device: str = "auto"
    dtype: DType = DType.AUTO
    load_format: LoadFormat = LoadFormat.AUTO
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_seq_len: SeqLen | None = None
    speculate: Speculate = Speculate.OFF
    offline: bool = False
    allow_pickle: bool = False
    threads: int | None = None
    batch_invariant: bool = False
    endpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep_tuples(self, "endpoints")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling as the user said it; None = not said, so the model's own default applies."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep_tuples(self, "stop")


@dataclass(frozen=True)
class SamplingParams:
    """Concrete sampling of one request.

    Args:
        top_k: 0 = off. top_p: 1.0 = off. min_p: 0.0 = off. repetition_penalty: 1.0 = off.
        seed: -1 = a new random one each request.
        stop: texts that end the answer; neither they nor what follows is part of it.
        ignore_eos: generate exactly `max_new_tokens` (equal work for measurements).
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        keep_tuples(self, "stop")


@dataclass(frozen=True)
class Bound:
    """Inclusive range of a sampling option, with what it means for the error line."""

    low: float
    high: float
    integer: bool = False


SAMPLING_BOUNDS: Mapping[str, Bound] = {
    "temperature": Bound(0.0, 2.0),
    "top_p": Bound(0.0, 1.0),
    "top_k": Bound(0, 200, integer=True),
    "min_p": Bound(0.0, 1.0),
    "repetition_penalty": Bound(1.0, 2.0),
    "max_new_tokens": Bound(1, 8192, integer=True),
    "seed": Bound(-1, 2**32 - 1, integer=True),
}

# Said by a user, each of these asks for sampling; the others mean something in greedy too.
_SAMPLING_SWITCHES = ("temperature", "top_p", "top_k", "min_p")
# What a model's files may state. Not the longest answer: hub files limit it by total length or a
# default of 20, and neither is what a user means.
_MODEL_DEFAULTS = (*_SAMPLING_SWITCHES, "repetition_penalty", "do_sample")


def check_device_name(device: str) -> None:
    """Raise DeviceError for what names no device on any machine."""
    kind, _, index = device.partition(":")
    numbered = kind == "cuda" and (not index or (index.isascii() and index.isdecimal()))
    if not numbered and device not in ("auto", "cpu", "mps"):
        raise DeviceError(
            f"--device {device!r} is not a device", "use auto, cpu, cuda, cuda:N or mps"
        )


def check_pixels(min_pixels: int | None, max_pixels: int | None) -> None:
    """Raise UsageError for bounds that no picture can meet, whatever the model."""
    for flag, value in (("--min-pixels", min_pixels), ("--max-pixels", max_pixels)):
        if value is not None and not 1 <= value <= MAX_PIXELS:
            raise UsageError(
                f"{flag} {value} is out of range", f"give a value from 1 to {MAX_PIXELS}"
            )
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise UsageError(
            f"--min-pixels {min_pixels} is more than --max-pixels {max_pixels}",
            "give the smaller one as --min-pixels",
        )


def check_sampling(options: SamplingOptions) -> None:
    """Raise UsageError for the first option outside its range."""
    if "" in options.stop:
        raise UsageError("--stop is empty", "give the text that ends the answer")
    for name, bound in SAMPLING_BOUNDS.items():
        value = getattr(options, name)
        if value is None:
            continue
        if math.isnan(value) or not bound.low <= value <= bound.high:
            flag = "--" + name.replace("_", "-")
            low, high = (
                (int(bound.low), int(bound.high)) if bound.integer else (bound.low, bound.high)
            )
            raise UsageError(
                f"{flag} {value} is out of range", f"give a value from {low} to {high}"
            )


def check_thinking_budget(budget: int | None, max_new_tokens: int | None) -> None:
    """Raise UsageError for thoughts that leave nothing of an answer."""
    most, bound = max_new_tokens, SAMPLING_BOUNDS["max_new_tokens"]
    if not budget or most is None or budget < most:
        return
    enough = budget + SamplingParams().max_new_tokens
    raise UsageError(
        f"--thinking-budget {budget} leaves nothing of --max-new-tokens {most} for an answer",
        f"raise --max-new-tokens to {enough}"
        if enough <= bound.high
        else "give a smaller --thinking-budget",
    )


def _check_model_defaults(model_defaults: Mapping[str, Any]) -> None:
    if not isinstance(model_defaults.get("do_sample"), bool | None):
        raise ModelFileError(
            f"generation_config.json: do_sample is {model_defaults['do_sample']!r:.60}",
            "correct it to true or false",
        )
    for name in (*_SAMPLING_SWITCHES, "repetition_penalty"):
        value, bound = model_defaults.get(name), SAMPLING_BOUNDS[name]
        # A model's own top_k may exceed what we offer; nothing else has room beyond its range.
        high = math.inf if name == "top_k" else bound.high
        types = (int,) if bound.integer else (int, float)
        # `type`, not isinstance: true and false are no numbers.
        if value is None or (type(value) in types and bound.low <= value <= high):
            continue
        raise ModelFileError(
            f"generation_config.json: {name} is {value!r:.60}",
            f"correct it to a value from {bound.low:g} to {bound.high:g}",
        )


def resolve_sampling(
    options: SamplingOptions, model_defaults: Mapping[str, Any], *, ignore_eos: bool = False
) -> SamplingParams:
    """Merge the user's options over the model's generation_config.json over our own defaults.

    `temperature` 0 means greedy. A user who sets temperature, top_p, top_k or min_p gets
    sampling even where the model's own default is greedy, unless `do_sample` is False.

    Raises:
        UsageError: an option outside its range.
        ModelFileError: a default of the model outside its range.
    """
    check_sampling(options)
    _check_model_defaults(model_defaults)
    base = SamplingParams()
    said = {f.name: getattr(options, f.name) for f in fields(options)}
    merged: dict[str, Any] = {}
    for name in said:
        fallback = model_defaults.get(name) if name in _MODEL_DEFAULTS else None
        default = getattr(base, name) if fallback is None else fallback
        merged[name] = default if said[name] is None else said[name]
        # Equal options resolve alike, whatever their types: engines keep them by equality.
        if name in SAMPLING_BOUNDS:
            merged[name] = (int if SAMPLING_BOUNDS[name].integer else float)(merged[name])
    if said["do_sample"] is None:
        if said["temperature"] == 0:
            merged["do_sample"] = False
        elif any(said[name] is not None for name in _SAMPLING_SWITCHES):
            merged["do_sample"] = True
    if merged["temperature"] == 0:
        merged["do_sample"] = False
        merged["temperature"] = 1.0
    return SamplingParams(**merged, ignore_eos=ignore_eos)
