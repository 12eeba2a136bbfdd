"""The table of checks, in the order they are shown."""

from __future__ import annotations

from collections.abc import Sequence

from qwencli.diagnostics.checks import driver as device
from qwencli.diagnostics.checks import (
    kernels,
    memory,
    power,
    software,
    speed,
    storage,
    system,
)
from qwencli.diagnostics.finding import Check, Finding, Level, skipped
from qwencli.diagnostics.machine import Machine, Unreadable
from qwencli.engine.instruments.probes.ask import first_line
from qwencli.errors import UsageError

QUICK, DEFAULT, DEEP = Level.QUICK, Level.DEFAULT, Level.DEEP

CHECKS: tuple[Check, ...] = (
    Check("cuda-device", "gpu", QUICK, device.cuda_device),
    Check("driver", "gpu", QUICK, device.driver),
    Check("driver-model", "gpu", QUICK, system.driver_model),
    Check("arch-list", "gpu", QUICK, device.arch_list),
    Check("device-works", "gpu", DEFAULT, device.device_works),
    Check("ecc", "gpu", QUICK, power.ecc),
    Check("python", "software", QUICK, software.python),
    Check("torch-loads", "software", QUICK, software.torch_loads),
    Check("torch-build", "software", QUICK, software.torch_build),
    Check("packages", "software", QUICK, software.packages),
    Check("known-bad", "software", QUICK, software.known_bad_versions),
    Check("bitsandbytes", "software", QUICK, software.bitsandbytes),
    Check("flash-attn", "software", QUICK, software.flash_attn),
    Check("triton", "software", QUICK, software.triton),
    Check("sdpa-backends", "kernels", QUICK, kernels.sdpa_backends),
    Check("attention-kernels", "kernels", DEFAULT, kernels.attention_kernels),
    Check("flash-attn-runs", "kernels", DEFAULT, kernels.flash_attn_runs),
    Check("bitsandbytes-runs", "kernels", DEFAULT, kernels.bitsandbytes_runs),
    Check("patch-embedding", "kernels", DEFAULT, kernels.patch_embedding),
    Check("triton-runs", "kernels", DEFAULT, kernels.triton_runs),
    Check("launch-rate", "speed", DEFAULT, speed.launch_rate),
    Check("bandwidth", "speed", DEFAULT, speed.bandwidth),
    Check("pcie", "speed", DEFAULT, speed.pcie),
    Check("power-limit", "power", QUICK, power.power_limit),
    Check("clocks", "power", DEFAULT, power.clocks),
    Check("throttling", "power", DEFAULT, power.throttling),
    Check("temperature", "power", QUICK, power.temperature),
    Check("gpu-memory", "memory", QUICK, memory.gpu_memory),
    Check("gpu-processes", "memory", QUICK, memory.gpu_processes),
    Check("bar1", "memory", QUICK, memory.bar1),
    Check("memory-spill", "memory", QUICK, memory.system_memory_spill),
    Check("ram", "memory", QUICK, memory.ram),
    Check("wsl", "host", QUICK, system.wsl),
    Check("hags", "host", QUICK, system.hags),
    Check("cpu", "host", QUICK, system.cpu),
    Check("cpu-clock", "host", QUICK, system.cpu_clock),
    Check("cpu-load", "host", QUICK, system.cpu_load),
    Check("variables", "host", QUICK, system.variables),
    Check("disk", "storage", QUICK, storage.disk),
    Check("disk-speed", "storage", DEFAULT, storage.disk_speed),
    Check("downloads", "storage", QUICK, storage.downloads),
    Check("engines", "storage", QUICK, storage.resident_engines),
    Check("hub", "storage", DEFAULT, storage.hub),
    Check("engine-run", "engine", DEEP, speed.engine_run),
)


def select(level: Level, only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """The checks up to `level`; `only` and `skip` name checks or groups.

    A check that `only` names runs whatever its level.

    Raises:
        UsageError: a name that is neither, or nothing is left.
    """
    known = {check.id for check in CHECKS} | {check.group for check in CHECKS}
    for flag, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{flag} has no check {name!r}", f"known: {', '.join(sorted(known))}"
                )
    chosen = [
        check
        for check in CHECKS
        if (check.id in only or (check.level <= level and (not only or check.group in only)))
        and check.id not in skip
        and check.group not in skip
    ]
    if not chosen:
        raise UsageError("no check is left", "--only and --skip contradict each other")
    return chosen


def run_check(check: Check, machine: Machine) -> Finding:
    """The check's finding; one that raises is a SKIP with the reason."""
    try:
        return check.run(machine)
    except Unreadable as error:
        return skipped(f"cannot be checked: {error}")
    except Exception as error:  # noqa: BLE001 - one unreadable fact must not hide the others
        return skipped(f"cannot be checked: {type(error).__name__}: {first_line(str(error))}")
