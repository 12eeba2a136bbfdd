"""Has the kernels of a model in memory when its weights are, and compiles those that are not kept.

They are compiled by a process that touches no GPU: a fork of this one, which has imported all that
it needs, or a new one where a fork would not be whole (`compile_kernels`).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from qwencli.engine.kernels.launches import compile_launch, gpu_of
from qwencli.engine.machine.child_process import python_command
from qwencli.engine.native.compile_kernels import run_in_fork
from qwencli.engine.native.kernel_cache import (
    CompileJob,
    manifest_of,
    note_once,
    read_manifest,
    settle_cache_keys,
    taken_notes,
    use_folder_of,
)
from qwencli.engine.native.kernel_plan import PlannedModel
from qwencli.tracing import span

# How long a load waits for kernels that other processes compile; they are then compiled when they
# are first launched.
COMPILE_TIMEOUT_S = 120.0
# A fork that compiles nothing for so long is stuck.
FORK_TIMEOUT_S = 20.0


def may_fork() -> bool:
    """Whether a fork of this process is whole: no other thread of ours may hold a lock. (Those of
    the driver and of libraries may; what is compiled asks nothing of them.)"""
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and multiprocessing.parent_process() is None
    )


def _fork() -> int:
    if sys.platform == "win32":
        raise NotImplementedError("`may_fork` says so")
    return os.fork()


class Fork:
    """A fork of this process that compiles."""

    def __init__(self, job: CompileJob) -> None:
        self._pipe, pipe = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are not ours
            self._pid = _fork()
        if self._pid == 0:
            run_in_fork(job, pipe)
        os.close(pipe)
        self._ended, self._ending = False, threading.Lock()

    def wait(self) -> str | None:
        """Until it ends: None = all is compiled, "" = it did not get on and was ended, else what
        went wrong."""
        said = b""
        while select.select([self._pipe], [], [], FORK_TIMEOUT_S)[0]:
            more = os.read(self._pipe, 4096)
            if not more:
                return None if self._reaped() == 0 else said.decode(errors="replace").strip(".")
            said += more
        self.kill()
        self._reaped()
        return ""

    def kill(self) -> None:
        """End it where it still runs; of any thread. The one that waits hears of it."""
        with self._ending:
            if sys.platform != "win32" and not self._ended:
                os.kill(self._pid, signal.SIGKILL)

    def _reaped(self) -> int:
        with self._ending:
            self._ended = True
            os.close(self._pipe)
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class KernelLoader:
    """Has the kernels of a model in memory when `wait` returns; works beside the caller.

    Attributes:
        compiles: whether some were not kept. Where all were, other threads may launch kernels from
            the beginning.
    """

    def __init__(self, planned: PlannedModel, device: torch.device) -> None:
        gpu = gpu_of(device)
        assert gpu is not None, "kernels of a GPU"
        self._planned, self._gpu, self._device = planned, gpu, device
        self.num_kernels = self.num_compiled = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._closed, self._closing = threading.Event(), threading.Lock()
        self._folder = use_folder_of(device)
        self._manifest = manifest_of(planned, gpu, self._folder)
        self._fork: Fork | None = None
        self.compiles = not self._manifest.exists()
        if not self.compiles:
            settle_cache_keys(self._folder)
        elif may_fork():
            self._fork = Fork(CompileJob(planned, gpu, str(self._folder), str(self._manifest)))
        self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the kernels are there, or cannot be had ahead of time."""
        self._thread.join(COMPILE_TIMEOUT_S)
        self.close()

    @staticmethod
    def notes() -> tuple[str, ...]:
        """What a user should know of the cache and has not been told."""
        return taken_notes()

    def close(self) -> None:
        """End what is still compiling; nothing is begun after that."""
        with self._closing:
            self._closed.set()
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
        if self._fork is not None:
            self._fork.kill()

    def _run(self) -> None:
        try:
            with span("kernels"):
                self._load()
        except Exception as error:  # noqa: BLE001 - kernels are then compiled when launched
            lines = str(error).strip().splitlines() or [type(error).__name__]
            note_once(f"kernels could not be made ready ahead of time: {lines[-1][:200]}")

    def _load(self) -> None:
        launches = read_manifest(self._manifest)
        if launches is None or self._fork is not None:
            with span("compile"):
                self._compile(self._manifest, self._folder)
            if self._closed.is_set():
                return
            launches = read_manifest(self._manifest)
            settle_cache_keys(self._folder)
        if launches is None:
            return  # compiled when they are first launched
        with torch.cuda.device(self._device):
            for launch in launches:
                if self._closed.is_set():
                    return
                found = compile_launch(launch)
                with suppress(AttributeError):  # a method that later versions may not have
                    found._init_handles()
                self.num_kernels += 1

    def _compile(self, manifest: Path, folder: Path) -> None:
        """In a process that knows of no GPU; a new one where a fork does not get on."""
        failed = None if self._fork is None else self._fork.wait()
        if self._fork is not None and failed is None:
            self.num_compiled = len(read_manifest(manifest) or ())
            return
        if self._closed.is_set():
            return
        if failed:
            note_once(f"kernels were not compiled ahead of time: {failed[:200]}")
            return
        job = CompileJob(self._planned, self._gpu, str(folder), str(manifest))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = python_command("qwencli.engine.native.compile_kernels")
        try:
            with self._closing:
                if self._closed.is_set():
                    return
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, env=environment,
                )  # fmt: skip
            _, said = self._child.communicate(pickle.dumps(job), COMPILE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.close()
            said = str(error).encode()
        if self._child is not None and self._child.returncode == 0:
            self.num_compiled = len(read_manifest(manifest) or ())
        elif lines := said.decode(errors="replace").strip().splitlines():
            note_once(f"kernels were not compiled ahead of time: {lines[-1][:200]}")
