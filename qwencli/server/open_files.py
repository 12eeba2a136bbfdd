"""How many files this process may open: each connection is one."""

from __future__ import annotations

import contextlib
import sys

if sys.platform != "win32":  # where sockets are no files
    import resource

# Connections at once, where the system lets a process have as many files.
MOST_CONNECTIONS = 2048
# Connections that are accepted before one looks at how many there are, and those that hear why they
# are refused.
ACCEPTED_AT_ONCE, REFUSED_AT_ONCE = 64, 128
# The engine's files and all others.
_OTHER_FILES = 256
_SPARE_FILES = _OTHER_FILES + REFUSED_AT_ONCE + 2 * ACCEPTED_AT_ONCE


def most_connections() -> int:
    """How many connections there may be at once: each is a file of this process."""
    if sys.platform != "win32":
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            return min(MOST_CONNECTIONS, max(files - _SPARE_FILES, files // 2))
    return MOST_CONNECTIONS


def allow_files() -> None:
    """Have this process open as many files as `MOST_CONNECTIONS` need, or as many as it may."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinity, wanted = resource.RLIM_INFINITY, MOST_CONNECTIONS + _SPARE_FILES
        wanted = wanted if hard == infinity else min(wanted, hard)
        if soft != infinity and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a limit below the hard one
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
