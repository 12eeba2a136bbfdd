"""Finds other processes of this program: engines that were left behind hold GPU memory."""

from __future__ import annotations

import os
from pathlib import Path

from qwencli.diagnostics.facts import EngineProcess

_PROC = Path("/proc")
_INIT = 1


def read_engines(proc: Path = _PROC) -> tuple[EngineProcess, ...] | None:
    """Python processes that run qwencli, apart from this one and those it belongs to or started.

    None where the system has no /proc.
    """
    if not (proc / "self").exists():
        return None
    parents = {int(p.name): _parent(p) for p in proc.iterdir() if p.name.isdigit()}
    family = _line_of(os.getpid(), parents)
    found = []
    for pid, parent in sorted(parents.items()):
        what = _qwencli(proc / str(pid))
        ours = pid in family or os.getpid() in _line_of(pid, parents)
        if what and parent is not None and not ours:
            found.append(EngineProcess(pid, what, orphaned=parent == _INIT))
    return tuple(found)


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
    """The part of the command line after the interpreter, where it starts qwencli."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    for at, word in enumerate(words):
        if word.startswith("qwencli.") or Path(word).name == "qwencli" or word == "qwencli":
            before = Path(words[0]).name
            if before.startswith("python") or at == 0:
                return " ".join([Path(word).name, *words[at + 1 : at + 2]]).strip()
    return None
