"""Reads the operating system: Windows, WSL, the GPU scheduler, the processor's clock policy, and
other processes of this program (engines that were left behind hold GPU memory)."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qwencli.diagnostics.facts import CpuFacts, EngineProcess, SystemFacts
from qwencli.engine.machine.host import cpu_model, usable_cores

_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_GRAPHICS_KEY = r"SYSTEM\CurrentControlSet\Control\GraphicsDrivers"
_HAGS_ON, _HAGS_OFF = 2, 1
# Windows' tool seen from inside WSL.
_REG_FROM_WSL = Path("/mnt/c/Windows/System32/reg.exe")
_TOOL_TIMEOUT_S = 5.0
_INIT = 1
# Options of Python that another word belongs to.
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
# In a container the first process is often one of these, and the parent of what it started.
_STARTS_OTHERS = re.compile(r"(ba|da|z|fi|k|c|tc)?sh|python.*|node|supervisord")
# A kept model ends by itself; a server may be a service, or stay when its terminal closes.
_RESIDENT = "qwencli.server.resident_process"
_MEANT_TO_STAY = (_RESIDENT, "qwencli serve")
_KEPT_MODEL = "the model that is kept loaded (qwencli stop ends it)"


def read_system() -> SystemFacts:
    wsl = wsl_version(platform.release()) if sys.platform == "linux" else None
    return SystemFacts(
        name=platform.system(),
        release=platform.release(),
        machine=platform.machine(),
        python=sys.version_info[:3],
        wsl=wsl,
        hags=_hags(wsl),
    )


def wsl_version(kernel_release: str) -> int | None:
    """WSL's generation by its kernel: "4.4.0-19041-Microsoft" is 1, "...-microsoft-standard-WSL2"
    is 2; None for any other kernel."""
    if "microsoft" not in kernel_release.lower():
        return None
    return 1 if kernel_release.endswith("-Microsoft") else 2


def _hags(wsl: int | None) -> bool | None:
    if sys.platform == "win32":
        return _hags_from_registry()
    return _hags_from_wsl() if wsl else None


def _hags_from_registry() -> bool | None:
    import winreg

    registry: Any = winreg  # its contents exist on Windows alone
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, _GRAPHICS_KEY) as key:
            return hags_on(registry.QueryValueEx(key, "HwSchMode")[0])
    except OSError:
        return None


def _hags_from_wsl() -> bool | None:
    if not _REG_FROM_WSL.exists():
        return None
    said = _output([str(_REG_FROM_WSL), "query", rf"HKLM\{_GRAPHICS_KEY}", "/v", "HwSchMode"])
    found = re.search(r"HwSchMode\s+REG_DWORD\s+(0x[0-9a-fA-F]+)", said or "")
    return hags_on(int(found.group(1), 16)) if found else None


def hags_on(mode: int) -> bool | None:
    """What HwSchMode says; None for a value of which nothing is known."""
    return {_HAGS_ON: True, _HAGS_OFF: False}.get(mode)


def read_cpu() -> CpuFacts:
    load = getattr(os, "getloadavg", None)
    return CpuFacts(
        model=cpu_model(),
        cores=usable_cores(),
        policy=_windows_plan() if sys.platform == "win32" else _line("scaling_governor"),
        driver=_line("scaling_driver"),
        preference=_line("energy_performance_preference"),
        busy_cores=load()[0] if load else None,
    )


def _line(name: str) -> str | None:
    path = _CPUFREQ / name
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _windows_plan() -> str | None:
    """E.g. "Power saver": the name in brackets that `powercfg` prints."""
    found = re.search(r"\(([^)]+)\)\s*$", _output(["powercfg", "/getactivescheme"]) or "")
    return found.group(1) if found else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TOOL_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout


def read_engines() -> tuple[EngineProcess, ...] | None:
    """Python processes that run qwencli, apart from this one and those it belongs to or started.

    None where the system does not list processes.
    """
    import psutil

    try:
        running = {p.pid: p.info for p in psutil.process_iter(["ppid", "name", "cmdline"])}
    except OSError:
        return None
    parents = {pid: info["ppid"] for pid, info in running.items()}
    family = _line_of(os.getpid(), parents)
    first = running.get(_INIT, {}).get("name") or ""
    adopts = not _STARTS_OTHERS.fullmatch(first)
    found = []
    for pid, info in sorted(running.items()):
        # What may not be read, or has ended meanwhile, is None.
        what = _qwencli(info["cmdline"] or [])
        ours = pid in family or os.getpid() in _line_of(pid, parents)
        if what and not ours:
            stays = what.startswith(_MEANT_TO_STAY)
            orphaned = adopts and parents[pid] == _INIT and not stays
            named = _KEPT_MODEL if what.startswith(_RESIDENT) else what
            found.append(EngineProcess(pid, named, orphaned=orphaned))
    return tuple(found)


def _line_of(pid: int | None, parents: dict[int, int | None]) -> set[int]:
    """The process and all its ancestors."""
    line: set[int] = set()
    while pid and pid not in line:
        line.add(pid)
        pid = parents.get(pid)
    return line


def _qwencli(words: list[str]) -> str | None:
    """What of qwencli a command line runs, with its first argument; None for other programs.

    A word of it that happens to be "qwencli" (`pytest qwencli`) says nothing.
    """
    what, *arguments = _program(words) or [""]
    if what != "qwencli" and not what.startswith("qwencli."):
        return None
    return " ".join([what, *arguments[:1]]).strip()


def _program(words: list[str]) -> list[str]:
    """The module or script that a command line runs, without its folder, and its arguments."""
    if not words:
        return []
    if not _file_name(words[0]).startswith("python"):
        return [_file_name(words[0]), *words[1:]]
    rest = words[1:]
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in _WITH_VALUE:
            del rest[:1]
        elif not option.startswith("--") and (found := re.match(r"-[A-Za-z]*?([cm])(.*)", option)):
            if found[1] == "c":
                return []
            return [found[2], *rest] if found[2] else rest
    return [_file_name(rest[0]), *rest[1:]] if rest else []


def _file_name(word: str) -> str:
    return Path(word).name.removesuffix(".exe")
