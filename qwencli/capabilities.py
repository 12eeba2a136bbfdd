"""What runs with what: the one table of engine, modes and device.

The engines refuse by it, a matrix skips cells by it, and `--help` says it. An entry is a mode that
does not run together with others, or not on a device that lacks something, with the reason and the
nearest mode that does. Knows neither torch nor models: what a loaded model turns out to be is found
when it is loaded, and is an `UnsupportedModeError` all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from qwencli.config import Attention, Cache, EngineName, Kernels, KVDType, Quantization, Speculate
from qwencli.errors import UnsupportedModeError

AXES: Mapping[str, type[StrEnum]] = {
    "engine": EngineName,
    "quantization": Quantization,
    "attention": Attention,
    "cache": Cache,
    "kernels": Kernels,
    "kv_dtype": KVDType,
    "speculate": Speculate,
}


class Need(StrEnum):
    """What a mode asks of the machine; the value is what `--help` calls it."""

    CUDA = "CUDA"
    TRITON = "an NVIDIA GPU of compute capability 8.0"
    FLASH_ATTN = "CUDA and flash-attn"
    BITSANDBYTES = "bitsandbytes"
    COMPILER = "a compiler"
    GRAPHS = "torch's own allocator"


# Matrix units for bfloat16, and everything else that our kernels use.
TRITON_CAPABILITY = (8, 0)
# What a device lacks, each with the reason. Empty: nothing is known to be missing.
Lacks = Mapping[Need, str]
NOTHING: Lacks = MappingProxyType({})


@dataclass(frozen=True)
class Limit:
    """Modes of one axis that do not run.

    Args:
        given: axis -> values of it; the limit holds where every one of them is chosen. Also
            `BATCH_INVARIANT`, `ROWS_ONLY` and `KEEPS_STATES`, which are no axes.
        lacks: it holds only where the device lacks this.
        reason: a sentence without its full stop, `{value}` being the mode; "" = what `Lacks` says.
        nearest: the option that gives the nearest mode that runs.
    """

    axis: str
    values: tuple[StrEnum, ...]
    nearest: str
    reason: str = ""
    given: Mapping[str, tuple[StrEnum | bool, ...]] = field(default_factory=dict)
    lacks: Need | None = None


BATCH_INVARIANT = "batch_invariant"
# Whether the model runs in rows over pages alone (`TextShape.rows_only`), and whether it keeps
# states beside keys and values; the native engine knows once it has read the model's shape.
ROWS_ONLY, KEEPS_STATES = "rows_only", "keeps_states"
# Whether a checkpoint is quantized already: `fastest_kernels`.
PREQUANTIZED = "prequantized"
_INVARIANT = {BATCH_INVARIANT: (True,)}
_ROWS: Mapping[str, tuple[StrEnum | bool, ...]] = {
    ROWS_ONLY: (True,),
    "engine": (EngineName.NATIVE,),
}
_TRANSFORMERS = {"engine": (EngineName.TRANSFORMERS,)}
_BITSANDBYTES = (Quantization.INT8, Quantization.INT4)
_ONE_BYTE = (KVDType.INT8, KVDType.FP8)
_DRAFTING = tuple(mode for mode in Speculate if mode is not Speculate.OFF)

_REMOTE = {"engine": (EngineName.REMOTE,)}


def _of_the_server(axis: str, *default: StrEnum) -> Limit:
    """A mode that a server was started with; `default` is what a matrix says that names none."""
    values = tuple(mode for mode in AXES[axis] if mode not in default)
    nearest = f"--{axis.replace('_', '-')} {default[0]}"
    return Limit(axis, values, nearest, "it belongs to the server of --endpoint", given=_REMOTE)


# The first entry that holds is the one that is said.
TABLE: tuple[Limit, ...] = (
    _of_the_server("quantization", Quantization.NONE),
    _of_the_server("attention", Attention.AUTO, Attention.SDPA),
    _of_the_server("cache", Cache.DYNAMIC),
    _of_the_server("kernels", Kernels.AUTO),
    _of_the_server("kv_dtype", KVDType.AUTO),
    _of_the_server("speculate", Speculate.OFF),
    Limit(
        "engine",
        (EngineName.NATIVE,),
        "another model",
        "--batch-invariant has no operations for gated delta nets, which this model has",
        given={KEEPS_STATES: (True,), **_INVARIANT},
    ),
    Limit(
        "cache",
        (Cache.DYNAMIC, Cache.STATIC_COMPILE),
        "--cache static",
        "this model has gated delta nets or experts, which run in rows over pages alone, and "
        "{value} has none",
        given=_ROWS,
    ),
    Limit(
        "attention",
        (Attention.FLASH, Attention.EAGER),
        f"--attention {Attention.SDPA}",
        "this model has gated delta nets or experts, and its rows attend over pages by our kernel "
        "or sdpa",
        given=_ROWS,
    ),
    Limit(
        "engine",
        (EngineName.TRANSFORMERS,),
        "--engine native",
        "--batch-invariant needs the native engine: sums of transformers depend on the prompt",
        given=_INVARIANT,
    ),
    Limit(
        "engine",
        (EngineName.REMOTE,),
        "--engine native",
        "--batch-invariant needs the native engine: what else a server runs it does not say",
        given=_INVARIANT,
    ),
    Limit(
        "cache",
        (Cache.DYNAMIC, Cache.STATIC_COMPILE),
        "--cache static",
        "--batch-invariant runs over pages, which {value} has not",
        given=_INVARIANT,
    ),
    Limit(
        "attention",
        (Attention.FLASH, Attention.EAGER),
        f"--attention {Attention.SDPA}",
        "--batch-invariant has an attention of its own, and sdpa for pictures",
        given=_INVARIANT,
    ),
    Limit(
        "speculate",
        _DRAFTING,
        "--speculate off",
        "--batch-invariant does not draft tokens: how many are checked at once changes sums",
        given=_INVARIANT,
    ),
    Limit(
        "cache",
        (Cache.STATIC_GRAPH,),
        "--cache static-compile",
        "static-graph needs the native engine",
        given=_TRANSFORMERS,
    ),
    Limit(
        "cache",
        (Cache.STATIC_GRAPH,),
        "--cache static",
        "CUDA graphs need a CUDA device",
        lacks=Need.CUDA,
    ),
    Limit("cache", (Cache.STATIC_GRAPH,), "--cache static", lacks=Need.GRAPHS),
    Limit(
        "kernels",
        (Kernels.TRITON,),
        "--engine native",
        "triton kernels need the native engine",
        given=_TRANSFORMERS,
    ),
    Limit("kernels", (Kernels.TRITON,), "--kernels torch", lacks=Need.TRITON),
    # They read keys and values at addresses that stay, and torch.compile writes its own.
    Limit(
        "kernels",
        (Kernels.TRITON,),
        "--cache static",
        "triton kernels need --cache static-graph or static",
        given={"cache": (Cache.DYNAMIC, Cache.STATIC_COMPILE)},
    ),
    Limit(
        "kv_dtype",
        _ONE_BYTE,
        "--engine native",
        "{value} keys and values need the native engine",
        given=_TRANSFORMERS,
    ),
    Limit(
        "kv_dtype",
        _ONE_BYTE,
        "--cache static",
        "--cache dynamic keeps keys and values as they are computed",
        given={"cache": (Cache.DYNAMIC,)},
    ),
    Limit(
        "speculate",
        _DRAFTING,
        "--engine native",
        "drafted tokens need the native engine",
        given=_TRANSFORMERS,
    ),
    Limit(
        "speculate",
        _DRAFTING,
        "--cache static",
        "--cache dynamic grows and cannot take back the keys and values of wrong drafts",
        given={"cache": (Cache.DYNAMIC,)},
    ),
    Limit(
        "speculate",
        _DRAFTING,
        "--cache static",
        "--cache static-compile would compile anew for every number of drafted tokens",
        given={"cache": (Cache.STATIC_COMPILE,)},
    ),
    Limit(
        "quantization",
        (Quantization.FP8,),
        "--quantization 8bit",
        "fp8 needs the native engine: bitsandbytes has none",
        given=_TRANSFORMERS,
    ),
    Limit("attention", (Attention.FLASH,), f"--attention {Attention.SDPA}", lacks=Need.FLASH_ATTN),
    Limit(
        "quantization",
        _BITSANDBYTES,
        "--engine native",
        "{value} needs bitsandbytes, which is not installed",
        given=_TRANSFORMERS,
        lacks=Need.BITSANDBYTES,
    ),
    Limit(
        "cache",
        (Cache.STATIC_COMPILE,),
        "--cache static",
        "transformers does not compile a bitsandbytes model",
        given={**_TRANSFORMERS, "quantization": _BITSANDBYTES},
    ),
    Limit(
        "cache",
        (Cache.STATIC_COMPILE,),
        "--cache static",
        "transformers compiles on CUDA only",
        given=_TRANSFORMERS,
        lacks=Need.CUDA,
    ),
    Limit("cache", (Cache.STATIC_COMPILE,), "--cache static", lacks=Need.COMPILER),
)


@dataclass(frozen=True)
class Refusal:
    """A mode that cannot run with the others chosen, or here.

    `nearest` is the option that gives the nearest mode that can.
    """

    axis: str
    value: str
    reason: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.nearest} is the nearest"

    def error(self) -> UnsupportedModeError:
        return UnsupportedModeError(
            f"{_flag(self.axis)} {self.value} cannot run: {self.reason}",
            f"use {self.nearest} instead",
            nearest=self.nearest.split()[-1],
        )


def why_not(modes: Mapping[str, str | bool | None], lacks: Lacks = NOTHING) -> Refusal | None:
    """Why these modes do not run together on this device, or None.

    Args:
        modes: axis -> mode; an axis that is missing or None is left to the engine. And
            `BATCH_INVARIANT` where that is asked for.
    """
    for limit in TABLE:
        value = modes.get(limit.axis)
        if value not in limit.values or (limit.lacks is not None and limit.lacks not in lacks):
            continue
        if all(modes.get(axis) in given for axis, given in limit.given.items()):
            reason = limit.reason or lacks[limit.lacks or Need.CUDA]
            return Refusal(limit.axis, str(value), reason.format(value=value), limit.nearest)
    return None


def lacks_gpu(device: str, capability: tuple[int, int] | None) -> dict[Need, str]:
    """What a device lacks of an NVIDIA GPU; `capability` None = not known."""
    if not device.startswith("cuda"):
        return {
            Need.CUDA: f"this runs on {device}",
            Need.TRITON: f"triton kernels need an NVIDIA GPU, and this runs on {device}",
        }
    if capability is not None and capability < TRITON_CAPABILITY:
        return {Need.TRITON: f"the GPU {device} is older than compute capability 8.0"}
    return {}


def fastest_cache(engine: EngineName, lacks: Lacks) -> Cache:
    """The cache mode of an engine where the user named none."""
    if engine in (EngineName.TRANSFORMERS, EngineName.REMOTE):
        return Cache.DYNAMIC
    wanted = {"engine": engine, "cache": Cache.STATIC_GRAPH}
    return Cache.STATIC if why_not(wanted, lacks) else Cache.STATIC_GRAPH


def fastest_kernels(cache: Cache, quantized: bool, lacks: Lacks) -> Kernels:
    """The kernels of the native engine where the user named none.

    Without graphs the host launches each. With weights as they are that takes longer than torch's
    operators (an H200, 4B in bf16: 108 against 129 tok/s), but those read quantized weights back
    for every token (4bit: 96 against 7.5; docs/experiments/2026-11-30-kernels-without-graphs.md).
    """
    wanted = {"engine": EngineName.NATIVE, "cache": cache, "kernels": Kernels.TRITON}
    pays = quantized or cache is Cache.STATIC_GRAPH
    return Kernels.TRITON if pays and why_not(wanted, lacks) is None else Kernels.TORCH


def runs_with(axis: str) -> str:
    """For `--help`: of each mode of an axis that does not always run, what it runs with."""
    limits = [
        limit
        for limit in TABLE
        if limit.axis == axis
        and len(limit.given) < 2
        and not {BATCH_INVARIANT, ROWS_ONLY, KEEPS_STATES} & limit.given.keys()
        and limit.given is not _REMOTE
    ]
    parts = []
    for values in dict.fromkeys(limit.values for limit in limits):
        of_these = [limit for limit in limits if limit.values == values]
        asked = ", ".join(_what_is_left(of_these))
        if asked:
            named = len(values) < len(AXES[axis]) - 1
            parts.append(f"{', '.join(values)}: {asked}" if named else f"Runs with {asked}")
    return "; ".join(parts)


def _what_is_left(limits: Iterable[Limit]) -> Iterator[str]:
    """What limits leave: the other modes of an axis, or what the device must have."""
    refused: dict[str, set[StrEnum | bool]] = {}
    for limit in limits:
        if limit.lacks is None:
            for axis, values in limit.given.items():
                refused.setdefault(axis, set()).update(values)
    for axis, modes in refused.items():
        # A server's modes are chosen where it is started.
        others = (mode for mode in AXES[axis] if mode is not EngineName.REMOTE)
        yield " or ".join(mode for mode in others if mode not in modes)
    for limit in limits:
        # The allocator is another program's choice, see `device.why_no_graphs`.
        if limit.lacks not in (None, Need.GRAPHS) and not limit.given:
            yield limit.lacks


def _flag(axis: str) -> str:
    return f"--{axis.replace('_', '-')}"


def check_pictures(model: str, *, can_see: bool | None, wanted: bool) -> None:
    """Refuse pictures for a model that reads text only.

    Args:
        can_see: None where that is not known.

    Raises:
        UnsupportedModeError: they are wanted, and it cannot look at any.
    """
    if wanted and can_see is False:
        raise UnsupportedModeError(
            f"{model} reads text only: it cannot look at pictures",
            "choose a vision-language model, as --model qwen3-vl-4b",
        )


def check_thinking(model: str, *, can_think: bool | None, wanted: bool) -> None:
    """Refuse thoughts of a model that has none; before anything is asked of it.

    Args:
        can_think: see `Engine`.

    Raises:
        UnsupportedModeError: thoughts are wanted, and there cannot be any.
    """
    if wanted and can_think is False:
        raise UnsupportedModeError(
            f"{model} cannot think before it answers: its chat template has no switch for it and "
            "opens no thought",
            "leave out --think and --thinking-budget, or choose a model that thinks, "
            "as --model qwen3.5-4b",
        )
