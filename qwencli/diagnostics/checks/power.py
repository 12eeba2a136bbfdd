"""Checks of power, clocks, heat and memory errors, idle and under load."""

from __future__ import annotations

from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine, value_of
from qwencli.engine.machine.gpu_sensors import GpuReading, LoadReading

LEAST_POWER_SHARE = 0.9
# CUDA runs in P2 on GeForce cards, in P0 on others.
DEEPEST_PSTATE = 2
LEAST_SM_SHARE, LEAST_MEM_SHARE = 0.5, 0.9
SLOWING = ("hw_slowdown", "hw_thermal", "sw_thermal", "hw_power_brake")
HEAT = ("hw_thermal", "sw_thermal")
NEAR_SLOWDOWN_C = 3
HOT_C = 88
NO_NVML = "no NVIDIA driver answers"


def _loaded(machine: Machine) -> tuple[GpuReading, LoadReading] | None:
    """The GPU and what it did while its memory was read at full speed."""
    if machine.gpu is None or not machine.torch.devices:
        return None
    value_of(machine, "bandwidth")
    load = machine.under_load("bandwidth")
    return None if load is None else (machine.gpu, load)


def power_limit(machine: Machine) -> Finding:
    """A power limit below the card's own costs clock."""
    gpu = machine.gpu
    if gpu is None:
        return skipped(NO_NVML)
    limit, default = gpu.power_limit_w, gpu.default_power_limit_w
    if limit is None or default is None:
        return skipped("the driver does not tell the power limit")
    evidence = f"{limit:.0f} W; default {default:.0f} W"
    if limit < LEAST_POWER_SHARE * default:
        return warned(
            "the power limit is lowered",
            evidence,
            f"nvidia-smi -i {gpu.index} -pl {default:.0f} (as administrator); on a laptop, plug in "
            "and choose its performance mode",
        )
    return passed("the power limit is the card's own", evidence)


def clocks(machine: Machine) -> Finding:
    """Only the clock under load says something; an idle GPU is slow on purpose."""
    found = _loaded(machine)
    if found is None:
        return skipped("the GPU's clocks cannot be read here")
    gpu, load = found
    now = gpu.now
    evidence = (
        f"idle P{now.pstate}, {now.sm_clock_mhz} MHz; under load P{load.pstate}, SM "
        f"{_of(load.sm_clock_mhz, gpu.max_sm_clock_mhz)}, memory "
        f"{_of(load.mem_clock_mhz, gpu.max_mem_clock_mhz)}, {_watts(load.power_w)}"
    )
    if load.pstate is not None and load.pstate > DEEPEST_PSTATE:
        return warned(
            f"the GPU stays in the low power state P{load.pstate} while it works",
            evidence,
            "nvidia-smi --reset-gpu-clocks --reset-memory-clocks (as administrator); set power "
            "management to maximum performance in the NVIDIA control panel",
        )
    slowed = set(load.throttle_reasons) & {*SLOWING, "sw_power_cap"}
    if _below(load.sm_clock_mhz, gpu.max_sm_clock_mhz, LEAST_SM_SHARE) and not slowed:
        return warned(
            "the GPU's clock stays low under load, and the driver names no reason",
            evidence,
            "nvidia-smi --reset-gpu-clocks (as administrator); remove tools that lock clocks",
            Confidence.MEDIUM,
        )
    if _below(load.mem_clock_mhz, gpu.max_mem_clock_mhz, LEAST_MEM_SHARE):
        return warned(
            "the memory clock stays low under load",
            evidence,
            "nvidia-smi --reset-memory-clocks (as administrator)",
            Confidence.MEDIUM,
        )
    return passed("clocks rise under load", evidence)


def _of(value: float | None, most: int | None) -> str:
    return "unknown" if value is None else f"{value:.0f} of {most or '?'} MHz"


def _watts(value: float | None) -> str:
    return "power unknown" if value is None else f"{value:.0f} W"


def _below(value: float | None, most: int | None, share: float) -> bool:
    return value is not None and most is not None and value < share * most


def throttling(machine: Machine) -> Finding:
    """The driver names the reason when it holds the clock back."""
    found = _loaded(machine)
    if found is None:
        return skipped("throttle reasons cannot be read here")
    gpu, load = found
    reasons = [reason for reason in load.throttle_reasons if reason != "idle"]
    slowing = [reason for reason in reasons if reason in SLOWING]
    evidence = (
        f"{', '.join(reasons) or 'none'} under load; SM "
        f"{_of(load.sm_clock_mhz, gpu.max_sm_clock_mhz)}, "
        f"{_watts(load.power_w)}, {load.temperature_c} C"
    )
    if not slowing:
        return passed("nothing but power and load sets the clock", evidence)
    hot = any(reason in HEAT for reason in slowing)
    return warned(
        f"the GPU throttles because of {'heat' if hot else 'power delivery'}",
        evidence,
        "clean the fans and filters, give the case air; on a laptop, lift it and use its fan boost"
        if hot
        else "check the power cables and the supply; on a laptop, use its own charger",
    )


def temperature(machine: Machine) -> Finding:
    """A GPU near its limit slows down within minutes."""
    gpu = machine.gpu
    if gpu is None or gpu.now.temperature_c is None:
        return skipped("the temperature cannot be read here")
    load = machine.under_load("bandwidth")
    hottest = max(
        c for c in (gpu.now.temperature_c, load.temperature_c if load else None) if c is not None
    )
    limit = gpu.slowdown_temperature_c
    evidence = f"{gpu.now.temperature_c} C idle"
    if load and load.temperature_c is not None:
        evidence += f", {load.temperature_c} C under a short load"
    evidence += f"; slows down at {limit} C" if limit else ""
    if hottest >= (limit - NEAR_SLOWDOWN_C if limit else HOT_C):
        return warned("the GPU is hot", evidence, "clean fans and filters, give the case air")
    return passed("the GPU is cool enough", evidence)


def ecc(machine: Machine) -> Finding:
    """Memory errors that could not be corrected mean wrong results or a dying card."""
    gpu = machine.gpu
    if gpu is None or gpu.ecc is None:
        return skipped("this GPU has no ECC" if gpu else NO_NVML)
    errors = gpu.uncorrected_errors
    evidence = f"ECC {'on' if gpu.ecc else 'off'}, {errors or 0} uncorrected errors since start"
    if errors:
        return failed(
            "the GPU's memory has uncorrected errors",
            evidence,
            "restart; if they return, replace it",
        )
    return passed("no uncorrected memory errors", evidence)
