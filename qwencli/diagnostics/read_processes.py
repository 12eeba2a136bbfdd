"""Finds other processes of this program: engines that were left behind hold GPU memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwencli.diagnostics.facts import EngineProcess

_PROC = Path("/proc")
_INIT = 1
# Options of Python that another word belongs to.
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
# In a container the first process is often one of these, and the parent of what it started.
_STARTS_OTHERS = re.compile(r"(ba|da|z|fi|k|c|tc)?sh|python.*|node|supervisord")


def read_engines(proc: Path = _PROC) -> tuple[EngineProcess, ...] | None:
    """Python processes that run qwencli, apart from this one and those it belongs to or started.

    None where the system has no /proc.
    """
    if not (proc / "self").exists():
        return None
    parents = {int(p.name): _parent(p) for p in proc.iterdir() if p.name.isdigit()}
    family = _line_of(os.getpid(), parents)
    adopts = not _STARTS_OTHERS.fullmatch(_name(proc / str(_INIT)))
    found = []
    for pid, parent in sorted(parents.items()):
        what = _qwencli(proc / str(pid))
        ours = pid in family or os.getpid() in _line_of(pid, parents)
        if what and parent is not None and not ours:
            found.append(EngineProcess(pid, what, orphaned=adopts and parent == _INIT))
    return tuple(found)


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _parent(process: Path) -> int | None:
    try:
        # "pid (name) state parent ...": the name may hold spaces and brackets.
        return int((process / "stat").read_text("utf-8").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None  # it has ended meanwhile


def _line_of(pid: int | None, parents: dict[int, int | None]) -> set[int]:
    """The process and all its ancestors."""
    line: set[int] = set()
    while pid and pid not in line:
        line.add(pid)
        pid = parents.get(pid)
    return line


def _qwencli(process: Path) -> str | None:
    """What of qwencli the process runs, with its first argument; None for other programs.

    A word of a command line that happens to be "qwencli" (`pytest qwencli`) says nothing.
    """
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    what, *arguments = _program(words) or [""]
    if what != "qwencli" and not what.startswith("qwencli."):
        return None
    return " ".join([what, *arguments[:1]]).strip()


def _program(words: list[str]) -> list[str]:
    """The module or script that a command line runs, without its folder, and its arguments."""
    if not Path(words[0]).name.startswith("python"):
        return [Path(words[0]).name, *words[1:]]
    rest = words[1:]
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in _WITH_VALUE:
            del rest[:1]
        elif not option.startswith("--") and (found := re.match(r"-[A-Za-z]*?([cm])(.*)", option)):
            if found[1] == "c":
                return []
            return [found[2], *rest] if found[2] else rest
    return [Path(rest[0]).name, *rest[1:]] if rest else []
