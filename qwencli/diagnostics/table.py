"""The table of checks, in the order they are shown."""

from __future__ import annotations

from collections.abc import Sequence

from qwencli.diagnostics import gpu_checks, host_checks
from qwencli.diagnostics.finding import Check, Finding, Level, skipped
from qwencli.diagnostics.machine import Machine
from qwencli.errors import UsageError

CHECKS: tuple[Check, ...] = (
    Check("cuda-device", "gpu", Level.QUICK, gpu_checks.cuda_device),
    Check("driver", "gpu", Level.QUICK, gpu_checks.driver),
    Check("arch-list", "gpu", Level.QUICK, gpu_checks.arch_list),
    Check("gpu-memory", "gpu", Level.QUICK, gpu_checks.gpu_memory),
    Check("sdpa-backends", "gpu", Level.QUICK, gpu_checks.sdpa_backends),
    Check("device-works", "gpu", Level.DEFAULT, gpu_checks.device_works),
    Check("python", "software", Level.QUICK, host_checks.python),
    Check("torch-loads", "software", Level.QUICK, host_checks.torch_loads),
    Check("torch-build", "software", Level.QUICK, gpu_checks.torch_build),
    Check("packages", "software", Level.QUICK, host_checks.packages),
    Check("known-bad", "software", Level.QUICK, gpu_checks.known_bad),
    Check("bitsandbytes", "software", Level.QUICK, host_checks.bitsandbytes),
    Check("flash-attn", "software", Level.QUICK, host_checks.flash_attn),
    Check("triton", "software", Level.QUICK, host_checks.triton),
    Check("cpu", "host", Level.QUICK, host_checks.cpu),
    Check("ram", "host", Level.QUICK, host_checks.ram),
    Check("disk", "host", Level.QUICK, host_checks.disk),
    Check("variables", "host", Level.QUICK, host_checks.variables),
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
    except Exception as error:  # noqa: BLE001 - one unreadable fact must not hide the others
        return skipped(f"cannot be checked: {type(error).__name__}: {error}".partition("\n")[0])
