"""Kernels of a list are loaded; those of none are compiled by a fork, or by another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwencli.engine.native import compile_kernels, kernel_cache, kernel_loader
from qwencli.engine.native.kernel_cache import manifest_of, write_manifest
from qwencli.engine.native.kernel_loader import KernelLoader
from qwencli.engine.native.kernel_plan import plan_kernels
from tests.engine.native.test_kernel_cache import GPU, knobs, planned  # noqa: F401


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """What loads kernels of a GPU that is not there, from an empty folder."""
    for module in (kernel_cache, kernel_loader):
        monkeypatch.setattr(module, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(kernel_cache, "kernel_folder", lambda gpu: tmp_path)
    monkeypatch.setattr(kernel_loader, "may_fork", lambda: False)
    made = []
    monkeypatch.setattr(kernel_loader, "compile_launch", made.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return SimpleNamespace(made=made, load=lambda: KernelLoader(planned(), torch.device("cuda")))


def test_kernels_that_cannot_be_compiled_ahead_are_compiled_when_launched(loader, monkeypatch):
    monkeypatch.setattr(
        kernel_loader,
        "python_command",
        lambda module: [sys.executable, "-c", "raise SystemExit('no ptxas here')"],
    )
    loading = loader.load()
    assert loading.compiles
    loading.wait()
    assert loader.made == []
    assert "no ptxas here" in loading.notes()[0]


def test_kernels_of_a_list_are_loaded_without_a_process(loader, tmp_path, monkeypatch):
    launches = plan_kernels(planned(), GPU)
    write_manifest(manifest_of(planned(), GPU, tmp_path), launches)
    monkeypatch.setattr(kernel_loader.subprocess, "Popen", None)
    hashed = []
    monkeypatch.setattr(kernel_loader, "settle_cache_keys", hashed.append)
    loading = loader.load()
    # Other threads may launch kernels now.
    assert not loading.compiles and hashed == [tmp_path]
    loading.wait()
    assert loader.made == launches
    assert loading.notes() == ()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
@pytest.mark.parametrize(
    ("job", "said"),
    [
        (lambda launches, job: write_manifest(Path(job.manifest), launches), None),
        (lambda launches, job: "no room", "no room"),
        (lambda launches, job: 1 / 0, "division by zero"),
        (lambda launches, job: time.sleep(60), "another process did"),
        (lambda launches, job: os._exit(7), "another process did"),
    ],
    ids=["compiles", "fails", "raises", "is stuck", "is killed"],
)
def test_a_fork_compiles_or_another_process_does(loader, monkeypatch, job, said):
    launches = plan_kernels(planned(), GPU)
    command = [sys.executable, "-c", "raise SystemExit('another process did')"]
    monkeypatch.setattr(kernel_loader, "may_fork", lambda: True)
    monkeypatch.setattr(kernel_loader, "FORK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(kernel_loader, "python_command", lambda module: command)
    monkeypatch.setattr(
        compile_kernels, "run", lambda asked, done: (done(), job(launches, asked))[1]
    )
    loading = loader.load()
    loading.wait()
    assert loader.made == (launches if said is None else [])
    notes = loading.notes()
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
@pytest.mark.parametrize("forks", [True, False])
def test_a_load_that_is_given_up_ends_what_compiles_and_begins_nothing(loader, monkeypatch, forks):
    """And closes no file of others: a number that is free again may be theirs by then."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    starting, started = subprocess.Popen, []

    def start(*about, **settings):
        started.append(starting(*about, **settings))
        return started[-1]

    monkeypatch.setattr(kernel_loader, "may_fork", lambda: forks)
    monkeypatch.setattr(kernel_loader, "python_command", lambda module: command)
    monkeypatch.setattr(kernel_loader.subprocess, "Popen", start)
    monkeypatch.setattr(compile_kernels, "run", lambda asked, done: (done(), time.sleep(60)))
    loading = loader.load()
    while not (started or forks):
        time.sleep(0.01)
    time.sleep(0.3)
    loading.close()
    with contextlib.ExitStack() as files:
        others = [files.enter_context(Path(os.devnull).open()) for _ in range(8)]
        loading._thread.join(10)
        assert not loading._thread.is_alive()
        for each in others:
            os.fstat(each.fileno())
    assert loader.made == [] and loading.notes() == ()
    assert [each.wait(10) for each in started] == ([] if forks else [-9])
