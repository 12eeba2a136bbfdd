"""Where the control groups with a processor limit lie that this process is in (Linux).

`/proc/self/cgroup` names the group of each hierarchy, `/proc/self/mountinfo` where a hierarchy is
mounted and from which group on: a container's mount begins at its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")


def cpu_groups(proc: Path = PROC) -> Iterator[Path]:
    """Folders of the groups with a processor limit that this process is in, its own first."""
    try:
        memberships = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "self" / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    # Hierarchy, controllers, path: version 2 has no controllers.
    groups = {c: path for _, c, path in (line.split(":", 2) for line in memberships)}
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        root, point = fields.split()[3:5]
        name, _, options = kind.split()[:3]
        if name == "cgroup2":
            path = groups.get("")
        elif name == "cgroup" and "cpu" in options.split(","):
            path = next((p for c, p in groups.items() if "cpu" in c.split(",")), None)
        else:
            continue
        if path is None:
            continue
        # A container's mount begins at its own group.
        inside = PurePosixPath(path)
        below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        for part in (below, *below.parents) if below.parts else (below,):
            yield Path(point) / part
