"""Machines from their files: `machines/NAME.json`, which may build on another one."""

from __future__ import annotations

import json
from pathlib import Path

from qwencli.diagnostics.record import RecordedMachine
from qwencli.models.resolve import resolve_model

FOLDER = Path(__file__).parent / "machines"

# Machine -> the findings that are neither PASS nor SKIP, up to the deep level.
EXPECTED = {
    "healthy-5090": {},
    "h200": {},
    "h100-recorded": {},
    "5090-windows-wddm": {"hags": "warn", "triton": "warn"},
    "5090-wsl2": {"gpu-memory": "warn", "memory-spill": "warn", "disk": "warn"},
    "5070ti-wheel-without-sm_120": {
        "arch-list": "fail", "device-works": "fail", "engine-run": "fail",
        "packages": "warn", "known-bad": "warn", "triton-runs": "fail",
    },
    "old-driver": {"driver": "fail", "cuda-device": "fail", "engine-run": "fail"},
    "throttling-laptop": {
        "power-limit": "warn", "throttling": "warn", "temperature": "warn", "cpu-clock": "warn",
        "engine-run": "warn",
    },
    "x8-pcie": {"pcie": "warn"},
    "no-gpu": {"cuda-device": "warn"},
    "cpu-only-torch": {"cuda-device": "fail", "torch-build": "warn", "engine-run": "fail"},
    "origin": {
        "packages": "warn", "known-bad": "warn", "patch-embedding": "warn", "engine-run": "warn",
    },
}  # fmt: skip
MACHINES = sorted(path.stem for path in FOLDER.glob("*.json"))


def recorded(name: str) -> dict:
    """The record, what it builds on filled in."""
    raw = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    raw.pop("about", None)
    like = raw.pop("like", None)
    return merged(recorded(like), raw) if like else raw


def merged(base, change):
    """`base` with the keys of `change` over it, level by level; lists are replaced."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return {
        key: merged(base[key], change[key])
        if key in base and key in change
        else {**base, **change}[key]
        for key in {**base, **change}
    }


def machine(name: str, **change) -> RecordedMachine:
    """A recorded machine, with sections replaced in part."""
    record = merged(recorded(name), change)
    record.setdefault("hub_config", dict(resolve_model(record["model"]).hub_config))
    return RecordedMachine(record)
