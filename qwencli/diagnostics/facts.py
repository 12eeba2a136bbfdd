"""What checks read of the host, as data. None = the system does not tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SystemFacts:
    """Args:
    wsl: 1 or 2 inside the Windows Subsystem for Linux.
    hags: whether Windows schedules the GPU in hardware; inside WSL that of its host.
    """

    name: str
    release: str
    machine: str
    python: tuple[int, int, int]
    wsl: int | None = None
    hags: bool | None = None


@dataclass(frozen=True)
class CpuFacts:
    """Args:
    cores: logical cores this process may use.
    policy: what sets the clock: a Linux governor ("powersave") or a Windows power plan.
    driver, preference: Linux's cpufreq driver and its energy preference.
    busy_cores: cores' worth of work that others do (the one-minute load).
    """

    model: str | None
    cores: int
    policy: str | None = None
    driver: str | None = None
    preference: str | None = None
    busy_cores: float | None = None


@dataclass(frozen=True)
class CacheFacts:
    """Where downloaded models go: free bytes there, and the kind of filesystem."""

    free_bytes: int
    filesystem: str | None


@dataclass(frozen=True)
class DiskSpeed:
    """How fast that place is read, past the system's cache."""

    read_bytes_per_s: float
    read_bytes: int


@dataclass(frozen=True)
class HubFacts:
    """Whether the hub answers; `asked` is False where the user has switched it off."""

    asked: bool
    seconds: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Download:
    """A download that has not ended; `running` where a process holds its lock."""

    repo_id: str
    missing_files: int
    running: bool


@dataclass(frozen=True)
class EngineProcess:
    """Another process of this program; `orphaned` when what started it is gone, and it was not
    meant to stay."""

    pid: int
    what: str
    orphaned: bool
