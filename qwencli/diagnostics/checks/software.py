"""Checks of Python, torch, the packages, and versions known to be bad."""

from __future__ import annotations

from dataclasses import dataclass

from qwencli.diagnostics.checks.driver import get_cuda_torch
from qwencli.diagnostics.finding import Finding, failed, passed, skipped, warned
from qwencli.diagnostics.known_bad import cudnn_text, known_bad, numbers, present
from qwencli.diagnostics.machine import Machine, how_it_ended
from qwencli.engine.instruments.probes.ask import Outcome

OLDEST_PYTHON = (3, 11, 0)
UPGRADE = "pip install --upgrade . in a new clone of qwencli"


def python(machine: Machine) -> Finding:
    """An unsupported Python fails in ways that look like something else."""
    version = ".".join(map(str, machine.system.python))
    system = f"{machine.system.name} {machine.system.release} {machine.system.machine}"
    if machine.system.python < OLDEST_PYTHON:
        return failed(f"Python {version} is too old", system, "install Python 3.11 or later")
    return passed(f"Python {version}", system)


def torch_loads(machine: Machine) -> Finding:
    """Everything needs torch; it is imported in a process of its own, as it may crash there."""
    answer = machine.probe("torch")
    if answer.outcome is Outcome.OK:
        return passed(f"torch {answer.value.version} loads", f"in {answer.seconds:.1f} s")
    return failed(
        "torch does not load", how_it_ended(answer), "pip install --force-reinstall torch"
    )


def torch_build(machine: Machine) -> Finding:
    """What torch was built for decides what it can run on."""
    torch = machine.torch
    if torch.cuda_build:
        cudnn = cudnn_text(torch.cudnn_version) if torch.cudnn_version else "none"
        return passed(f"torch {torch.version}", f"CUDA {torch.cuda_build}, cuDNN {cudnn}")
    if torch.hip_build:
        return warned(
            f"torch {torch.version} is a ROCm build",
            f"HIP {torch.hip_build}",
            "AMD GPUs are not tested with qwencli; please report what you see",
        )
    if torch.mps:
        return passed(f"torch {torch.version}", "built for Apple's GPU")
    what, evidence = f"torch {torch.version} is a CPU-only build", "it is built without CUDA"
    if machine.driver is None:
        return passed(what, f"{evidence}; no NVIDIA driver answers here that could use it")
    return warned(what, evidence, get_cuda_torch(machine))


def packages(machine: Machine) -> Finding:
    """Older packages than qwencli was written for fail or run slowly."""
    asked = machine.section("requirements")
    if not asked:
        return skipped("qwencli runs from its source folder: its requirements are not recorded")
    have = {name: machine.version(name) for name in asked}
    missing = [name for name, version in have.items() if version is None]
    old = [
        f"{name} {version} (needs {asked[name]})"
        for name, version in have.items()
        if version is not None and numbers(version) < numbers(asked[name])
    ]
    if missing:
        return failed("packages are missing", ", ".join(missing), UPGRADE)
    optional = machine.section("outdated_optional")
    fixes = [UPGRADE] * bool(old) + [each.fix for each in optional]
    old += [f"{each.name} {each.version} (needs {each.least.version})" for each in optional]
    if old:
        return warned(
            "packages are older than qwencli needs",
            ", ".join(old),
            "\n".join(dict.fromkeys(fixes)),
        )
    return passed(f"{len(have)} required packages", f"transformers {have.get('transformers')}")


def known_bad_versions(machine: Machine) -> Finding:
    """Some combinations of versions run, but slowly or wrongly."""
    rows = known_bad()
    hits = [row for row in rows if present(row, machine)]
    newest = max(row.noted for row in rows)
    if not hits:
        return passed(
            "no known-bad combination of versions", f"{len(rows)} looked for, as of {newest}"
        )
    least_sure = min(hits, key=lambda row: ("low", "medium", "high").index(row.confidence))
    return warned(
        hits[0].what if len(hits) == 1 else f"{len(hits)} known-bad combinations of versions",
        "\n".join(
            f"{row.id} ({row.confidence}, noted {row.noted}): {row.what}: {row.sources[0]}"
            for row in hits
        ),
        "\n".join(dict.fromkeys(row.fix for row in hits)),
        least_sure.confidence,
    )


@dataclass(frozen=True)
class Optional:
    """A package that one mode needs, under any of its names. `cuda_only`: of no use without a
    CUDA device. `needed`: whether its absence is worth a warning."""

    names: tuple[str, ...]
    serves: str
    fix: str
    cuda_only: bool = True
    needed: bool = True


BITSANDBYTES = Optional(
    ("bitsandbytes",),
    "4-bit and 8-bit weights of --engine transformers",
    "pip install bitsandbytes",
    cuda_only=False,
    needed=False,
)
FLASH_ATTN = Optional(
    ("flash-attn",), "--attention flash_attention_2", 'pip install "qwencli[flash]"', needed=False
)
TRITON = Optional(
    ("triton", "triton-windows"), "the native engine's fused kernels and --cache static-compile",
    "pip install triton (on Windows: pip install triton-windows)",
)  # fmt: skip


def bitsandbytes(machine: Machine) -> Finding:
    """4-bit and 8-bit weights of the transformers engine need bitsandbytes."""
    return _optional(machine, BITSANDBYTES)


def flash_attn(machine: Machine) -> Finding:
    """`--attention flash_attention_2` needs flash-attn; nothing else does."""
    return _optional(machine, FLASH_ATTN)


def triton(machine: Machine) -> Finding:
    """The native engine's fused kernels need Triton, which Windows does not get with torch."""
    return _optional(machine, TRITON)


def _optional(machine: Machine, wanted: Optional) -> Finding:
    name = wanted.names[0]
    version = next((found for n in wanted.names if (found := machine.version(n))), None)
    if version is not None and wanted.cuda_only and not machine.torch.devices:
        return skipped(f"{name} {version} is installed, and of no use without a CUDA device")
    if version is not None:
        return passed(f"{name} {version}", f"serves {wanted.serves}")
    if wanted.cuda_only and not machine.torch.devices:
        return skipped(f"not installed, and of no use without a CUDA device: {wanted.serves}")
    if not wanted.needed:
        return skipped(f"not installed; needed for {wanted.serves} alone")
    return warned(f"{name} is not installed", f"serves {wanted.serves}", wanted.fix)
