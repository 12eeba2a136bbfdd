"""Checks of Python, packages, processor, memory, disk and environment variables."""

from __future__ import annotations

from dataclasses import dataclass

from qwencli.diagnostics.finding import Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine
from qwencli.diagnostics.versions import numbers

_GB = 1e9
_LOW_MEMORY_BYTES = 4 * _GB
# The recommended 4B model is 9 GB in bf16.
_LOW_DISK_BYTES = 10 * _GB


def python(machine: Machine) -> Finding:
    """Which Python, on which system?"""
    version = ".".join(map(str, machine.python))
    if machine.python < (3, 11, 0):
        return failed(
            f"Python {version} is too old", machine.system, "install Python 3.11 or later"
        )
    return passed(f"Python {version}", machine.system)


def torch_loads(machine: Machine) -> Finding:
    """Does torch import at all? Most other checks need it."""
    try:
        return passed(f"torch {machine.torch.version} loads")
    except (ImportError, OSError) as error:
        return failed(
            "torch does not load", str(error).partition("\n")[0], "pip install --upgrade torch"
        )


def packages(machine: Machine) -> Finding:
    """Are the packages that qwencli needs there, and new enough?"""
    asked = machine.requirements
    if not asked:
        return skipped("qwencli runs from its source folder: its requirements are not recorded")
    have = {name: machine.version(name) for name in asked}
    missing = [name for name, version in have.items() if version is None]
    old = [
        f"{name} {version} (needs {asked[name]})"
        for name, version in have.items()
        if version is not None and numbers(version) < numbers(asked[name])
    ]
    fix = "pip install --upgrade qwencli"
    if missing:
        return failed("packages are missing", ", ".join(missing), fix)
    if old:
        return warned("packages are older than qwencli needs", ", ".join(old), fix)
    return passed(f"{len(have)} required packages", f"transformers {have.get('transformers')}")


@dataclass(frozen=True)
class Optional:
    """A package that one mode needs. `cuda_only`: of no use without a CUDA device."""

    package: str
    serves: str
    fix: str
    cuda_only: bool = True


BITSANDBYTES = Optional(
    "bitsandbytes", "--quantization 4bit and 8bit", "pip install bitsandbytes", cuda_only=False
)
FLASH_ATTN = Optional(
    "flash-attn", "--attention flash_attention_2",
    "pip install 'qwencli[flash]'",
)  # fmt: skip
TRITON = Optional(
    "triton", "--cache static-compile",
    "pip install triton (on Windows: triton-windows)",
)  # fmt: skip


def bitsandbytes(machine: Machine) -> Finding:
    return _optional(machine, BITSANDBYTES)


def flash_attn(machine: Machine) -> Finding:
    return _optional(machine, FLASH_ATTN)


def triton(machine: Machine) -> Finding:
    return _optional(machine, TRITON)


def _optional(machine: Machine, wanted: Optional) -> Finding:
    version = machine.version(wanted.package)
    if version is None and wanted.package == "triton":
        version = machine.version("triton-windows")
    if version is not None:
        return passed(f"{wanted.package} {version}", f"serves {wanted.serves}")
    if wanted.cuda_only and not machine.torch.devices:
        return skipped(f"not installed, and of no use without a CUDA device: {wanted.serves}")
    if wanted is FLASH_ATTN:
        return skipped(f"not installed; needed for {wanted.serves}")
    return warned(f"{wanted.package} is not installed", f"serves {wanted.serves}", wanted.fix)


def cpu(machine: Machine) -> Finding:
    """How many cores may be used? With a single one the system takes its time from decoding."""
    evidence = f"{machine.cpu or 'unnamed processor'}, {machine.cores} usable logical cores"
    if machine.cores < 2:
        return warned(
            "one CPU core: the system competes with the decode loop",
            evidence,
            "give this process more cores",
        )
    return passed(f"{machine.cores} CPU cores", evidence)


def ram(machine: Machine) -> Finding:
    """Is there host memory to load a model through?"""
    memory = machine.memory
    free = memory.available_bytes
    evidence = f"{memory.total_bytes / _GB:.1f} GB in all"
    if free is None:
        return passed(evidence, "the system does not say how much of it is free")
    evidence = f"{free / _GB:.1f} of {memory.total_bytes / _GB:.1f} GB free"
    if free < _LOW_MEMORY_BYTES:
        return warned("little host memory is free", evidence, "close other programs")
    return passed("host memory is free", evidence)


def disk(machine: Machine) -> Finding:
    """Is there room for a model where downloads go?"""
    free = machine.cache_free_bytes
    evidence = f"{free / _GB:.1f} GB free where models are stored"
    if free < _LOW_DISK_BYTES:
        return warned(
            "little room for models", evidence, "free some, or set HF_HOME to a larger disk"
        )
    return passed("room for models", evidence)


@dataclass(frozen=True)
class Variable:
    """An environment variable that changes behaviour; `bad` values cost speed or function."""

    name: str
    bad: tuple[str, ...]
    effect: str


VARIABLES = (
    Variable("CUDA_LAUNCH_BLOCKING", ("1",), "waits for every kernel: decoding is far slower"),
    Variable("PYTORCH_NO_CUDA_MEMORY_CACHING", ("1",), "asks the driver for every tensor"),
    Variable("TORCHDYNAMO_DISABLE", ("1",), "static-compile compiles nothing"),
    Variable("TORCH_COMPILE_DISABLE", ("1",), "static-compile compiles nothing"),
    Variable("NVIDIA_TF32_OVERRIDE", ("0",), "float32 products cannot use tensor cores"),
    Variable("OMP_NUM_THREADS", ("1",), "the CPU then computes on one core"),
    Variable("PYTORCH_CUDA_ALLOC_CONF", (), "changes the CUDA allocator"),
    Variable("PYTORCH_ALLOC_CONF", (), "changes the allocator"),
    Variable("CUDA_VISIBLE_DEVICES", (), "hides or reorders GPUs"),
    Variable("HF_HUB_OFFLINE", (), "nothing is downloaded"),
    Variable("TRANSFORMERS_OFFLINE", (), "nothing is downloaded"),
)


def variables(machine: Machine) -> Finding:
    """Which environment variables change what runs here?"""
    have = [entry for entry in VARIABLES if entry.name in machine.variables]
    bad = [entry for entry in have if machine.variables[entry.name] in entry.bad]
    evidence = ", ".join(f"{entry.name}={machine.variables[entry.name]}" for entry in have)
    if bad:
        effects = "; ".join(f"{entry.name} {entry.effect}" for entry in bad)
        return warned(effects, evidence, f"unset {' '.join(entry.name for entry in bad)}")
    return passed("no variable that slows things down", evidence)
