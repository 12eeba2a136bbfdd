from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from qwencli.bench.plan import environment
from qwencli.engine.machine import device
from qwencli.engine.machine.device import CudaDevice, TorchFacts
from qwencli.errors import BenchError, DeviceError

CARDS = (
    CudaDevice(0, "RTX 5090", (12, 0), "GPU-a", 32_000_000_000),
    CudaDevice(1, "GTX 1080", (6, 1), "GPU-b", 8_000_000_000),
)
CPU_TORCH = TorchFacts("2.13.0+cpu", None, None, None, (), (), False, {})
CUDA_TORCH = dataclasses.replace(CPU_TORCH, version="2.11.0", cuda_build="13.0", devices=CARDS)


@pytest.fixture
def facts(monkeypatch):
    def ask(torch, name="auto"):
        monkeypatch.setattr(device, "torch_facts", lambda: torch)
        return device.device_facts(name)

    return ask


@pytest.mark.parametrize(
    ("torch", "asked", "concrete"),
    [
        (CPU_TORCH, "auto", "cpu"),
        (dataclasses.replace(CPU_TORCH, mps=True), "auto", "mps"),
        (CUDA_TORCH, "auto", "cuda:0"),
        (CUDA_TORCH, "cuda", "cuda:0"),
        (CUDA_TORCH, "cuda:1", "cuda:1"),
        (CUDA_TORCH, "cpu", "cpu"),
    ],
)
def test_devices_become_concrete(facts, torch, asked, concrete):
    found = facts(torch, asked)
    assert found.device == concrete
    assert found.kind == concrete.partition(":")[0]
    assert found.name == (CARDS[int(concrete[-1])].name if found.kind == "cuda" else None)


@pytest.mark.parametrize("asked", ["cuda:2", "cuda:x", "cuda:-1", "mps", "gpu", ""])
def test_devices_that_are_not_there(facts, asked):
    with pytest.raises(DeviceError) as caught:
        facts(CUDA_TORCH, asked)
    assert caught.value.hint


def test_cuda_without_cuda_says_where_to_look(facts):
    with pytest.raises(DeviceError, match="finds no CUDA device") as caught:
        facts(CPU_TORCH, "cuda")
    assert "qwencli diagnose" in caught.value.hint


def test_an_old_card_cannot_run_flash_attention(facts):
    assert "needs compute capability 8.0" in (facts(CUDA_TORCH, "cuda:1").flash_attn_blocker or "")
    assert "not installed" in (facts(CUDA_TORCH, "cuda:0").flash_attn_blocker or "")


def test_memory_columns_are_none_off_cuda():
    assert device.memory_stats("cpu") is None


def test_memory_columns_come_from_the_allocator(monkeypatch):
    import torch

    stats = {
        "allocated_bytes.all.current": 1,
        "allocated_bytes.all.peak": 4,
        "reserved_bytes.all.current": 8,
        "inactive_split_bytes.all.current": 2,
        "num_alloc_retries": 3,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda name: stats)
    assert device.memory_stats("cuda:0") == device.MemoryStats(1, 8, 4, 2, 25.0, 3)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda name: {})
    assert device.memory_stats("cuda:0") == device.MemoryStats(0, 0, 0, 0, None, 0)


def test_this_machine():
    facts = device.torch_facts()
    assert set(facts.sdpa_backends) == set(device.SDPA_BACKENDS)
    assert device.run_small_work("cpu") > 0.0


def test_facts_cross_the_process_border(monkeypatch):
    answer = {"facts": dataclasses.asdict(device.device_facts("cpu"))}
    answer["facts"]["capability"] = [12, 0]
    script = f"print('noise'); print({json.dumps(answer)!r})"
    monkeypatch.setattr(environment, "python_command", lambda *_: [sys.executable, "-c", script])
    assert environment.read_device_facts("cpu").capability == (12, 0)


def test_errors_cross_the_process_border(monkeypatch):
    monkeypatch.setattr(environment, "device_without_torch", lambda device: None)
    with pytest.raises(DeviceError, match="gpu is not available here"):
        environment.read_device_facts("gpu")


def test_torch_that_does_not_load_is_told_by_its_last_line(monkeypatch):
    script = "raise ImportError('libcudart.so.13: cannot open')"
    monkeypatch.setattr(environment, "python_command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(BenchError, match=r"does not load: ImportError: libcudart.so.13"):
        environment.read_device_facts("cpu")


def test_importing_the_module_does_not_import_torch():
    script = "import sys; sys.modules['torch'] = None; import qwencli.engine.machine.device"
    subprocess.run([sys.executable, "-c", script], check=True)
