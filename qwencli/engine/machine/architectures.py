"""Which GPUs the code in a torch wheel runs on."""

from __future__ import annotations

from collections.abc import Sequence

Capability = tuple[int, int]


def has_code(capability: Capability, archs: Sequence[str]) -> bool:
    """Whether a GPU of this compute capability can run a wheel's code, given as torch lists it.

    Machine code (sm_NN) runs on its own major version from its own minor on; PTX (compute_NN) on
    anything later. Source: CUDA C++ Programming Guide, "Application Compatibility". An "a" suffix
    ties code to that one device, an "f" suffix to its family.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        suffix = number[-1:] if not number.isdecimal() else ""
        digits = number.removesuffix(suffix)
        if suffix not in ("", "a", "f") or not digits.isdecimal() or len(digits) < 2:
            continue
        built_for = (int(digits[:-1]), int(digits[-1]))
        if suffix == "a":
            if built_for == capability:
                return True
            continue
        same_major = built_for[0] == capability[0]
        if built_for <= capability and (same_major or (kind == "compute" and not suffix)):
            return True
    return False
