"""Checks of where models are kept, of the hub, and of what earlier runs left behind."""

from __future__ import annotations

from qwencli.diagnostics.finding import Confidence, Finding, passed, skipped, warned
from qwencli.diagnostics.machine import Machine

# The recommended 4B model is 9 GB in bf16.
LOW_DISK_BYTES = 10e9
# Slower than a hard disk's outer tracks: a 4B model then loads for longer than a minute.
SLOW_DISK_BYTES_PER_S = 150e6
# Windows' drives inside WSL, and network filesystems.
FAR_FILESYSTEMS = ("9p", "drvfs", "nfs", "nfs4", "cifs", "smb3", "fuse.sshfs")


def disk(machine: Machine) -> Finding:
    """A download that runs out of room fails at its end."""
    cache = machine.section("cache")
    evidence = f"{cache.free_bytes / 1e9:.1f} GB free where models are stored"
    if cache.filesystem:
        evidence += f" ({cache.filesystem})"
    move = "set HF_HOME to a folder on a larger disk of this machine"
    if cache.free_bytes < LOW_DISK_BYTES:
        return warned("little room for models", evidence, f"free some, or {move}")
    if cache.filesystem in FAR_FILESYSTEMS:
        return warned(
            "models are stored on a filesystem that is slow to read from here",
            evidence,
            "in WSL keep them below your Linux home, not below /mnt; elsewhere set HF_HOME to a "
            "disk of this machine",
            Confidence.MEDIUM,
        )
    return passed("room for models", evidence)


def disk_speed(machine: Machine) -> Finding:
    """The disk bounds how fast a model loads for the first time."""
    speed = machine.section("disk_speed")
    seconds = machine.work.decoder_bytes / speed.read_bytes_per_s
    evidence = (
        f"{speed.read_bytes_per_s / 1e6:.0f} MB/s over {speed.read_bytes / 1e6:.0f} MB: "
        f"{machine.section('model')} in {seconds:.0f} s"
    )
    if speed.read_bytes_per_s < SLOW_DISK_BYTES_PER_S:
        return warned(
            "the disk with the models is slow",
            evidence,
            "set HF_HOME to a folder on an SSD",
            Confidence.MEDIUM,
        )
    return passed("the disk with the models is fast enough", evidence)


def hub(machine: Machine) -> Finding:
    """The hub is needed to download a model, and for nothing else."""
    found = machine.section("hub")
    if not found.asked:
        return skipped("not asked: an environment variable switches downloads off")
    if found.problem:
        return skipped(f"the hub does not answer ({found.problem}); models on disk work without it")
    return passed("the hub answers", f"in {found.seconds:.2f} s")


def downloads(machine: Machine) -> Finding:
    """A download that was interrupted keeps its model from being found."""
    found = machine.section("downloads")
    if not found:
        return passed("no unfinished downloads", "every model in the cache is whole")
    running = [download.repo_id for download in found if download.running]
    stale = [download.repo_id for download in found if not download.running]
    if not stale:
        return passed("a download is running", ", ".join(running))
    return warned(
        "downloads were interrupted",
        ", ".join(
            f"{d.repo_id} ({d.missing_files} files begun{', running' * d.running})" for d in found
        ),
        "name the model again to finish, e.g. qwencli caption picture.png --model " + stale[0],
    )


def resident_engines(machine: Machine) -> Finding:
    """An engine that a run left behind holds its GPU memory until it is ended."""
    found = machine.section("engines")
    if found is None:
        return skipped("the system does not list processes")
    stale = [process for process in found if process.orphaned]
    evidence = ", ".join(
        f"pid {process.pid}: {process.what}{' (its parent has ended)' * process.orphaned}"
        for process in found
    )
    if stale:
        return warned(
            "qwencli processes outlived what started them",
            evidence,
            f"kill {' '.join(str(process.pid) for process in stale)}",
            Confidence.MEDIUM,
        )
    if found:
        count = f"{len(found)} other qwencli process{'es' * (len(found) > 1)}"
        return passed(f"{count}, none of them left behind by its parent", evidence)
    return passed("no other qwencli process", "none found")
