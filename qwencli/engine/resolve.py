"""Turns `auto` and what the user asked for into concrete modes, or says why they cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from qwencli.capabilities import (
    AXES,
    BATCH_INVARIANT,
    NOTHING,
    Lacks,
    Need,
    fastest_cache,
    lacks_gpu,
    why_not,
)
from qwencli.config import Attention, DType, EngineConfig, EngineName, check_device_name
from qwencli.engine.machine.host import has_code
from qwencli.errors import (
    DeviceError,
    MissingDependencyError,
    UnsupportedModeError,
    UsageError,
)
from qwencli.models.shapes import ModelShape

if TYPE_CHECKING:
    from qwencli.engine.machine.flash_attn import Misfit


def resolve_device(device: str) -> str:
    """ "auto" -> the first CUDA device, else Apple's MPS, else the CPU; others are checked.

    Raises:
        DeviceError: the device is unknown, not usable on this machine, or one that this torch
            carries no code for.
    """
    import torch

    check_device_name(device)
    if device == "auto":
        if torch.cuda.is_available():
            return _cuda_device(0)
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: this machine has no usable Apple GPU", "use --device cpu")
    if device in ("cpu", "mps"):
        return device
    return _cuda_device(int(device.partition(":")[2] or 0))


def device_without_torch(device: str) -> str | None:
    """What `resolve_device` gives, where that is known without importing torch; else None.

    Raises:
        DeviceError: it is known to be refused.
    """
    check_device_name(device)
    if device in ("cpu", "mps"):  # whether this is a Mac makes no difference to the modes
        return device
    from qwencli.engine.machine.packages import package_version

    # How PyTorch marks its wheels that have no CUDA and no ROCm; there are none for Macs.
    if not (package_version("torch") or "").endswith("+cpu"):
        return None
    if device == "auto":
        return "cpu"
    raise _no_cuda("this torch build is CPU-only")


def _no_cuda(why: str) -> DeviceError:
    return DeviceError(f"--device cuda: {why}", "use --device cpu, or see: qwencli diagnose")


def _cuda_device(index: int) -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        raise _no_cuda(
            "no usable NVIDIA GPU or driver was found" if built else "this torch build is CPU-only"
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"--device cuda:{index}: there is only one CUDA device"
            if count == 1
            else f"--device cuda:{index}: there are only {count} CUDA devices",
            "use cuda:0" if count == 1 else f"use cuda:0 to cuda:{count - 1}",
        )
    archs, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(index)
    # AMD's architectures have other names.
    if torch.version.cuda and archs and not has_code(capability, archs):
        name, digits = torch.cuda.get_device_name(index), "{}{}".format(*capability)
        raise DeviceError(
            f"--device cuda:{index}: torch {torch.__version__} has no code for {name} "
            f"(sm_{digits}), only for {' '.join(archs)}",
            "install a torch built for this GPU (qwencli diagnose has the command), or use "
            "--device cpu",
        )
    return f"cuda:{index}"


def resolve_dtype(dtype: DType, device: str, checkpoint_dtype: str | None) -> DType:
    """`auto` is the checkpoint's own dtype on a GPU, and float32 on the CPU.

    A CPU without native bf16 arithmetic emulates it several times slower than float32, so the
    CPU default trades memory for speed; `--dtype bfloat16` asks for the other trade.

    Raises:
        UnsupportedModeError: bfloat16 on a GPU that has none.
    """
    if dtype is DType.AUTO:
        if device == "cpu":
            return DType.FLOAT32
        wanted = DType(checkpoint_dtype) if checkpoint_dtype in set(DType) else DType.BFLOAT16
        return DType.FLOAT16 if wanted is DType.BFLOAT16 and not _has_bf16(device) else wanted
    if dtype is DType.BFLOAT16 and not _has_bf16(device):
        raise UnsupportedModeError(
            f"--dtype bfloat16: the GPU {device} has no bfloat16 arithmetic",
            nearest=DType.FLOAT16.value,
        )
    return dtype


def _has_bf16(device: str) -> bool:
    if not device.startswith("cuda"):
        return True
    import torch

    # Below compute capability 8.0 torch emulates bf16 and calls that supported too.
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def device_lacks(device: str) -> Lacks:
    """What a concrete device lacks of what modes need. Packages are looked for where they are
    used, because their absence has an error of its own that says how to install them."""
    if not device.startswith("cuda"):
        flash = f"flash_attention_2 needs a CUDA GPU, and the model runs on {device}"
        return {**lacks_gpu(device, None), Need.FLASH_ATTN: flash}
    import torch

    from qwencli.engine.machine.device import why_no_graphs

    found = lacks_gpu(device, torch.cuda.get_device_capability(device))
    if (why := why_no_graphs()) is not None:
        found[Need.GRAPHS] = why
    if torch.version.cuda is None:
        found[Need.TRITON] = f"triton kernels need an NVIDIA GPU, and this runs on {device}"
    elif importlib.util.find_spec("triton") is None:
        found[Need.TRITON] = (
            "the package triton is not installed (on Windows: pip install triton-windows)"
        )
    return found


def lacks_without_torch(device: str) -> Lacks:
    """What `device_lacks` gives for the device that is asked for, where that is known without
    importing torch; else nothing. Raises as `device_without_torch` does."""
    known = device_without_torch(device)
    return NOTHING if known is None else device_lacks(known)


def no_kernels(why: str) -> UnsupportedModeError:
    """What `warm` is told where nothing is there to be compiled."""
    return UnsupportedModeError(
        f"there are no kernels to compile: {why}",
        "nothing has to be warmed then; for the kernels of a GPU run it where that GPU is",
    )


def check_modes(
    config: EngineConfig,
    engine: EngineName,
    lacks: Lacks = NOTHING,
    of_model: Mapping[str, bool] = MappingProxyType({}),
) -> None:
    """Hold what the user asked for against the table of what runs with what.

    Args:
        lacks: of the device; where it is not known yet, what holds on any is checked.
        of_model: `capabilities.ROWS_ONLY` and `KEEPS_STATES`, where the model is known.

    Raises:
        UnsupportedModeError: a mode that cannot run, with the reason and the nearest that can.
    """
    refusal = why_not({**chosen_modes(config, engine, lacks), **of_model}, lacks)
    if refusal is not None:
        raise refusal.error()


def check_seq_len(config: EngineConfig, limit: int) -> None:
    """Raise UsageError where requests are to be longer than the model was made for."""
    wanted = config.max_seq_len
    if isinstance(wanted, int) and wanted > limit:
        raise UsageError(
            f"--max-seq-len {wanted}: {config.model.name} was made for {limit} tokens",
            f"use {limit} or less",
        )


def chosen_modes(config: EngineConfig, engine: EngineName, lacks: Lacks) -> dict[str, str | bool]:
    """Axis -> mode, the cache being the engine's fastest where the user named none."""
    modes: dict[str, str | bool] = {axis: str(getattr(config, axis)) for axis in AXES}
    modes[BATCH_INVARIANT] = config.batch_invariant
    return modes | {"engine": engine, "cache": config.cache or fastest_cache(engine, lacks)}


def resolve_attention(
    attention: Attention, engine: EngineName, shape: ModelShape, dtype: DType, device: str
) -> Attention:
    """`auto` is sdpa: it runs everywhere and picks its kernel by shape.

    flash-attn is tried on the model's heads here: what it cannot run it says when a kernel is
    launched, which would be in the middle of the first answer.

    Raises:
        MissingDependencyError: flash-attn is not installed or does not load.
        UnsupportedModeError: it has no kernels for this GPU, type or size of heads.
    """
    if attention is Attention.AUTO:
        return Attention.SDPA
    if attention is not Attention.FLASH:
        return attention
    from qwencli.engine.machine import flash_attn

    absent = flash_attn.load_misfit(for_transformers=engine is EngineName.TRANSFORMERS)
    if absent is not None:
        raise MissingDependencyError(f"--attention {attention}: {absent}", _instead(absent))
    unfit = flash_attn.run_misfit(shape.head_dims, dtype.value, device)
    if unfit is not None:
        raise UnsupportedModeError(
            f"--attention {attention} cannot run: {unfit}",
            _instead(unfit),
            nearest=Attention.SDPA.value,
        )
    return attention


def _instead(misfit: Misfit) -> str:
    other = f"use --attention {Attention.SDPA}"
    return f"{misfit.fix}, or {other}" if misfit.fix else other
