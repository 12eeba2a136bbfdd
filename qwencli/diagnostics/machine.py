"""All that checks know of a machine, behind one object.

`Machine` is what checks read. `LiveMachine` reads each fact when it is first asked for; a fact
that cannot be read raises, and the check that wanted it becomes a SKIP. A recorded machine is
any other object with these attributes.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Protocol

from qwencli.engine.device import TorchFacts, package_version, run_small_work, torch_facts
from qwencli.engine.host import (
    DriverFacts,
    HostMemory,
    cpu_model,
    driver_facts,
    host_memory,
    usable_cores,
)


class Machine(Protocol):
    @property
    def system(self) -> str:
        """E.g. "Linux 6.8 x86_64"."""

    @property
    def python(self) -> tuple[int, int, int]: ...

    @property
    def torch(self) -> TorchFacts:
        """Raises ImportError or OSError where torch does not load."""

    @property
    def driver(self) -> DriverFacts | None: ...

    @property
    def requirements(self) -> Mapping[str, str]:
        """Distribution -> smallest version that qwencli's own metadata asks for; empty where
        qwencli is not installed as a package."""

    @property
    def cpu(self) -> str | None: ...

    @property
    def cores(self) -> int: ...

    @property
    def memory(self) -> HostMemory: ...

    @property
    def variables(self) -> Mapping[str, str]: ...

    @property
    def cache_free_bytes(self) -> int:
        """Free space where downloaded models go."""

    def version(self, package: str) -> str | None:
        """Installed version, None when it is not installed."""

    def small_work(self, device: str) -> float:
        """Seconds of a small matmul and attention on `device`; raises RuntimeError when the
        device cannot run them."""


class LiveMachine:
    """This machine."""

    @cached_property
    def system(self) -> str:
        return f"{platform.system()} {platform.release()} {platform.machine()}"

    @property
    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    @cached_property
    def torch(self) -> TorchFacts:
        return torch_facts()

    @cached_property
    def driver(self) -> DriverFacts | None:
        return driver_facts()

    @cached_property
    def requirements(self) -> Mapping[str, str]:
        try:
            asked = metadata.requires("qwencli") or []
        except metadata.PackageNotFoundError:  # run from its source folder
            return {}
        plain = (line for line in asked if ";" not in line and ">=" in line)
        return {name: least for name, _, least in (line.partition(">=") for line in plain)}

    @cached_property
    def cpu(self) -> str | None:
        return cpu_model()

    @cached_property
    def cores(self) -> int:
        return usable_cores()

    @cached_property
    def memory(self) -> HostMemory:
        return host_memory()

    @property
    def variables(self) -> Mapping[str, str]:
        return os.environ

    @cached_property
    def cache_free_bytes(self) -> int:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def version(self, package: str) -> str | None:
        return package_version(package)

    def small_work(self, device: str) -> float:
        return run_small_work(device)
