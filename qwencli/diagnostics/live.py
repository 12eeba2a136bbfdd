"""This machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, Self

from qwencli.config import ModelSpec
from qwencli.diagnostics.machine import Machine
from qwencli.diagnostics.read_storage import (
    read_cache,
    read_disk_speed,
    read_downloads,
    read_hub,
)
from qwencli.diagnostics.read_system import read_cpu, read_engines, read_system
from qwencli.engine.instruments.gpu_clock_sampler import GpuClockSampler
from qwencli.engine.instruments.probes.answers import PROBES, EngineWork
from qwencli.engine.instruments.probes.ask import ProbeAnswer, ProbeProcess
from qwencli.engine.machine.gpu_sensors import LoadReading, read_driver
from qwencli.engine.machine.host import host_memory
from qwencli.engine.machine.packages import least_versions, outdated_optional, package_version

PACKAGES = (
    "torch", "transformers", "accelerate", "bitsandbytes", "flash-attn", "triton",
    "triton-windows", "nvidia-ml-py",
)  # fmt: skip
# Variables of these beginnings, or these names, may change what runs.
_PREFIXES = ("CUDA_", "PYTORCH_", "TORCH", "NVIDIA_TF32", "OMP_", "MKL_", "TRITON_", "BNB_")
_NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "QWENCLI_MODEL", "TORCHINDUCTOR_CACHE_DIR")
_PATHS = ("CUDA_HOME", "CUDA_PATH", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR")


class LiveMachine(Machine):
    """Reads each section once, when it is first asked for; a context manager.

    Args:
        model: the model that probes imitate and advice is about.
        engine: what the probe "engine" runs, once this machine is known.
    """

    def __init__(self, model: ModelSpec, engine: Callable[[Machine], EngineWork]) -> None:
        self._model, self._engine = model, engine
        self._read: dict[str, Any] = {}
        self._answers: dict[str, ProbeAnswer] = {}
        self._loads: dict[str, LoadReading | None] = {}
        self._stack = ExitStack()
        self._readers: Mapping[str, Callable[[], Any]] = {
            "system": read_system,
            "cpu": read_cpu,
            "memory": host_memory,
            "packages": self._packages,
            "requirements": _requirements,
            "outdated_optional": outdated_optional,
            "variables": _variables,
            "driver": read_driver,
            "cache": read_cache,
            "disk_speed": read_disk_speed,
            "hub": lambda: read_hub(os.environ),
            "downloads": read_downloads,
            "engines": read_engines,
            "model": lambda: self._model.name,
            "hub_config": lambda: self._model.hub_config,
        }

    def __enter__(self) -> Self:
        # Before our own work is part of what they show.
        for name in ("cpu", "driver"):
            with suppress(Exception):  # whoever asks for it again is told why
                self.section(name)
        self._probes = self._stack.enter_context(ProbeProcess())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def section(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def has_read(self, name: str) -> bool:
        return name in self._read

    def probe(self, name: str) -> ProbeAnswer:
        if name not in self._answers:
            self._answers[name] = self._ask(name)
        return self._answers[name]

    def _ask(self, name: str) -> ProbeAnswer:
        if name == "torch":
            return self._probes.ask(name, "", self.work)
        gpu = self.gpu
        watch = GpuClockSampler(gpu.index) if gpu is not None and PROBES[name].settles else None
        work: Any = self._engine(self) if name == "engine" else self.work
        with watch or nullcontext():
            answer = self._probes.ask(name, self.device, work)
        self._loads[name] = watch.reading() if watch else None
        return answer

    def answered(self, name: str) -> ProbeAnswer | None:
        return self._answers.get(name)

    def under_load(self, name: str) -> LoadReading | None:
        return self._loads.get(name)

    def _packages(self) -> dict[str, str | None]:
        names = dict.fromkeys((*PACKAGES, *self.section("requirements")))
        return {name: package_version(name) for name in names}


def _requirements() -> dict[str, str]:
    """Distribution -> smallest version that qwencli's own metadata asks for; empty where it is not
    installed as a package."""
    return {name: least.version for name, least in least_versions().items() if not least.extra}


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _PATHS
    }
