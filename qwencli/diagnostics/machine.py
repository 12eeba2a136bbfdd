"""All that checks know of a machine, behind one object.

A `Machine` answers by section; `SECTIONS` says what each is. `LiveMachine` reads a section when it
is first asked for, `RecordedMachine` replays what `record` wrote down. A section that cannot be
read raises `Unreadable`, and the check that wanted it becomes a SKIP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from qwencli.diagnostics.decode_work import work_of
from qwencli.diagnostics.facts import (
    CacheFacts,
    CpuFacts,
    DiskSpeed,
    Download,
    EngineProcess,
    HubFacts,
    SystemFacts,
)
from qwencli.engine.instruments.probes.answers import Work
from qwencli.engine.instruments.probes.ask import Outcome, ProbeAnswer
from qwencli.engine.machine.device import CudaDevice, TorchFacts
from qwencli.engine.machine.gpu_sensors import DriverReading, GpuReading, LoadReading
from qwencli.engine.machine.host import HostMemory
from qwencli.engine.machine.packages import Outdated
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

# Name -> type. What is None: no NVIDIA driver; processes that the system does not list.
SECTIONS: Mapping[str, Any] = {
    "system": SystemFacts,
    "cpu": CpuFacts,
    "memory": HostMemory,
    "packages": Mapping[str, str | None],
    "requirements": Mapping[str, str],
    "outdated_optional": tuple[Outdated, ...],
    "variables": Mapping[str, str],
    "driver": DriverReading,
    "cache": CacheFacts,
    "disk_speed": DiskSpeed,
    "hub": HubFacts,
    "downloads": tuple[Download, ...],
    "engines": tuple[EngineProcess, ...],
    "model": str,
    "hub_config": Mapping[str, Any],
}


class Unreadable(Exception):
    """Why a fact cannot be had; one line."""


class Machine(ABC):
    """What checks read."""

    @abstractmethod
    def section(self, name: str) -> Any:
        """A section of SECTIONS; raises Unreadable."""

    @abstractmethod
    def has_read(self, name: str) -> bool:
        """Whether a check has asked for the section already."""

    @abstractmethod
    def probe(self, name: str) -> ProbeAnswer:
        """How the probe of this name ended here; raises Unreadable where it must not run."""

    @abstractmethod
    def answered(self, name: str) -> ProbeAnswer | None:
        """The probe's answer if a check has already asked for it."""

    @abstractmethod
    def under_load(self, name: str) -> LoadReading | None:
        """The GPU while that probe ran."""

    @property
    def system(self) -> SystemFacts:
        return self.section("system")  # type: ignore[no-any-return]

    @property
    def cpu(self) -> CpuFacts:
        return self.section("cpu")  # type: ignore[no-any-return]

    @property
    def variables(self) -> Mapping[str, str]:
        return self.section("variables")  # type: ignore[no-any-return]

    @property
    def driver(self) -> DriverReading | None:
        return self.section("driver")  # type: ignore[no-any-return]

    @property
    def model(self) -> str:
        """Name of the model that probes imitate and advice is about."""
        return self.section("model")  # type: ignore[no-any-return]

    @property
    def shape(self) -> ModelShape:
        return read_shape(self.section("hub_config"), self.model)

    @property
    def work(self) -> Work:
        return work_of(self.shape)

    def version(self, package: str) -> str | None:
        """Installed version, None when it is not installed."""
        return self.section("packages").get(package)  # type: ignore[no-any-return]

    @property
    def torch(self) -> TorchFacts:
        """Raises Unreadable where torch does not load."""
        answer = self.probe("torch")
        if answer.outcome is not Outcome.OK:
            raise Unreadable("torch does not load")
        return answer.value  # type: ignore[no-any-return]

    @property
    def cuda_device(self) -> CudaDevice | None:
        """The device that a model would take: the one with most memory, the first of equals."""
        return max(self.torch.devices, key=lambda found: found.total_memory_bytes, default=None)

    @property
    def device(self) -> str:
        """Its name for torch; "mps" or "cpu" without one."""
        found = self.cuda_device
        if found is not None:
            return f"cuda:{found.index}"
        return "mps" if self.torch.mps else "cpu"

    @property
    def gpu(self) -> GpuReading | None:
        """What NVML says of `cuda_device`, or of the first GPU where torch finds none."""
        gpus = self.driver.gpus if self.driver else ()
        try:
            uuid = self.cuda_device.uuid if self.cuda_device else None
        except Unreadable:
            uuid = None
        same = (gpu for gpu in gpus if uuid is not None and gpu.uuid == uuid)
        return next(same, gpus[0] if gpus else None)

    def measured(self, name: str) -> Any:
        """The value of a probe that has been asked and has answered; else None."""
        answer = self.answered(name)
        return answer.value if answer is not None else None


def value_of(machine: Machine, name: str) -> Any:
    """The value of a probe that is asked now.

    Raises:
        Unreadable: it did not answer, and how.
    """
    answer = machine.probe(name)
    if answer.outcome is not Outcome.OK:
        raise Unreadable(how_it_ended(answer))
    return answer.value


def how_it_ended(answer: ProbeAnswer) -> str:
    """One line on a probe that has no value."""
    said = f": {answer.error}" if answer.error else ""
    return f"{answer.outcome.value} ({answer.kind}){said}" if answer.kind else answer.outcome + said
