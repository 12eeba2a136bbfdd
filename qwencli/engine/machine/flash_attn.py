"""The flash-attn package: why it cannot be used here, and the command that mends it.

A build of it fits one torch, one release of CUDA, one Python and the GPUs it was compiled for, and
each misfit says something else: some where it is imported, some where a kernel is first launched.
`MISFITS` is what is known of them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qwencli.engine.machine.packages import package_spec

# The first with everything that is called here: padding at the front of a cache, and what the
# extra `flash` of this package asks for.
LEAST = (2, 8)
INSTALL = 'pip install "qwencli[flash]"'
# Without the first variable its setup fetches a wheel that somebody else built.
BUILD = (
    "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps --no-cache-dir "
    "--force-reinstall flash-attn"
)
UPGRADE = "pip install --no-build-isolation --no-deps --upgrade flash-attn"


@dataclass(frozen=True)
class Misfit:
    """Why flash-attn cannot be used, one clause; `fix`: a command or option, "" where none helps.

    `cause`: the package's own words, where it said any.
    """

    what: str
    fix: str
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}" if self.cause else self.what


# What it says -> what that means, and what mends it; the first that matches. {arch} is the GPU's,
# as nvcc writes it, and numbers are groups of the expression.
MISFITS: tuple[tuple[str, str, str], ...] = (
    (
        r"undefined symbol|symbol not found|procedure could not be found",
        "flash-attn was built for another torch",
        BUILD,
    ),
    (
        r"lib(?:torch_cuda|c10_cuda)\S*: cannot open",
        "flash-attn was built for a torch with CUDA, which this one is not",
        "install a torch with CUDA (`qwencli diagnose` names it)",
    ),
    (
        r"lib(?:cudart|cublas\w*|cusparse|cudnn)\S*?\.so\.(\d+)\S*: cannot open",
        "flash-attn was built for CUDA {0}, which this torch does not bring",
        BUILD,
    ),
    (
        r"version `?((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)'? not found",
        "flash-attn was built on a newer system ({0})",
        BUILD,
    ),
    (
        r"No module named 'flash_attn_2_cuda'|DLL load failed",
        "flash-attn's compiled part is missing, or is another Python's",
        BUILD,
    ),
    (r"No module named '(\w+)'", "flash-attn needs the package {0}", "pip install {0}"),
    (
        r"cannot import name '(\w+)'|has no attribute '(\w+)'",
        "flash-attn has no {0}: it is too old, or another package of that name",
        UPGRADE,
    ),
    (
        r"no kernel image|invalid device function|requires building with sm version",
        "flash-attn was not built for this GPU",
        "FLASH_ATTN_CUDA_ARCHS={arch} " + BUILD,
    ),
    (
        r"driver version is insufficient|unsupported toolchain",
        "flash-attn was built for a CUDA that is newer than the driver",
        "update the NVIDIA driver",
    ),
    (r"only supports? (Ampere|Hopper)", "flash-attn needs an {0} GPU or a newer one", ""),
    (
        r"only supports? fp16 and bf16",
        "flash-attn computes in bfloat16 and float16 alone",
        "--dtype bfloat16",
    ),
    (
        r"build of flash-attn has no kernels for (.+)|build does not support (.+?)\.?$",
        "flash-attn was built without {0}",
        BUILD,
    ),
    (r"head ?dim\w* at most (\d+)", "flash-attn has no kernels for heads above {0}", UPGRADE),
    (r"head_?size|head ?dim", "flash-attn has no kernels for heads of this size", UPGRADE),
)


def misfit(error: str, capability: tuple[int, int] | None = None) -> Misfit | None:
    """What an error of flash-attn means; None where it is not known."""
    line = _first_line(error)
    for pattern, what, fix in MISFITS:
        found = re.search(pattern, line, re.IGNORECASE)
        if found:
            words = [group for group in found.groups() if group]
            arch = "{}{}".format(*capability) if capability else "<compute capability, e.g. 90>"
            return Misfit(what.format(*words), fix.format(*words, arch=arch), line)
    return None


def load_misfit(*, for_transformers: bool = False) -> Misfit | None:
    """Why flash-attn does not load, or has not what is called here; None where it does.

    Args:
        for_transformers: also what transformers imports of it.
    """
    spec = package_spec("flash_attn")
    if spec is None:
        return Misfit("the package flash-attn is not installed", INSTALL)
    if spec.origin is None:
        # flash-attn-4 puts a folder of its own there, and nothing that this imports.
        return Misfit("the package flash-attn is not installed, only another of its name", INSTALL)
    try:
        package = importlib.import_module("flash_attn")
        for name in ("flash_attn_func", "flash_attn_with_kvcache"):
            getattr(package, name)
        if for_transformers:
            importlib.import_module("flash_attn.bert_padding")
    except Exception as error:  # noqa: BLE001 - see `packages.require`
        return misfit(str(error)) or Misfit(
            "flash-attn does not load", BUILD, _first_line(str(error)) or type(error).__name__
        )
    return _too_old(package)


def _too_old(package: Any) -> Misfit | None:
    version = str(getattr(package, "__version__", ""))
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not found or found >= LEAST:
        return None
    return Misfit(f"flash-attn {version} is older than {'.'.join(map(str, LEAST))}", UPGRADE)


def run_misfit(head_dims: Iterable[int], dtype: str, device: str) -> Misfit | None:
    """Why its kernels do not run on heads of these sizes in `dtype` on a CUDA device; None where
    they do. Each is launched once: for a prompt, and for a step over a cache."""
    import torch
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    for head_dim in head_dims:
        heads = torch.zeros(1, 1, 1, head_dim, dtype=getattr(torch, dtype), device=device)
        try:
            flash_attn_func(heads, heads, heads, causal=True)
            flash_attn_func(heads, heads, heads)
            flash_attn_with_kvcache(heads, heads, heads, causal=True)
        except RuntimeError as error:
            return misfit(str(error), capability) or Misfit(
                f"flash-attn does not run on heads of {head_dim}", BUILD, _first_line(str(error))
            )
    return None


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
