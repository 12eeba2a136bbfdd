from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwencli.bench.plan.campaign_plan import Plan, Settings
from qwencli.bench.plan.matrix import Matrix, expand
from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.run import worker_process
from qwencli.config import ModelSource, ModelSpec
from qwencli.engine.machine.device import DeviceFacts

CPU = DeviceFacts(
    device="cpu",
    name=None,
    capability=None,
    uuid=None,
    total_memory_bytes=None,
    torch_version="2.13.0+cpu",
    cuda_build=None,
    bitsandbytes_version="0.50.2",
    flash_attn_blocker="flash_attention_2 needs a CUDA device",
    compile_blocker=None,
)
GPU = DeviceFacts(
    device="cuda:0",
    name="NVIDIA GeForce RTX 5090",
    capability=(12, 0),
    uuid="GPU-1",
    total_memory_bytes=32 << 30,
    torch_version="2.11.0+cu130",
    cuda_build="13.0",
    bitsandbytes_version="0.50.2",
    flash_attn_blocker=None,
    compile_blocker=None,
)

FAKE_WORKER = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
MakePlan = Callable[..., Plan]


@pytest.fixture(autouse=True)
def workers_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of campaigns within a test; campaigns in processes of their own start theirs."""
    if sys.platform != "win32":
        from tests.bench.forked_workers import INSTEAD_OF_SUBPROCESS

        monkeypatch.setattr(worker_process, "subprocess", INSTEAD_OF_SUBPROCESS)


@pytest.fixture
def cpu() -> DeviceFacts:
    return CPU


@pytest.fixture
def gpu() -> DeviceFacts:
    return GPU


@pytest.fixture
def fake_worker() -> list[str]:
    return FAKE_WORKER


@pytest.fixture
def make_plan() -> MakePlan:
    """A plan over fake models: `make_plan("steady", "oom", runs=2, load_mode=("keep",))`."""

    def make(
        *models: str,
        runs: int = 2,
        tokens: int = 5,
        seed: int = 1,
        stop: StopRule | None = None,
        **axes: tuple[str, ...],
    ) -> Plan:
        matrix = Matrix("test", {"model": models, **axes})
        settings = Settings(stop or StopRule(runs, runs), tokens, "Say something.", (), seed, "cpu")
        specs = {name: ModelSpec(name, ModelSource.LOCAL, hub_config={}) for name in models}
        return Plan(tuple(expand(matrix, models[0], CPU)), settings, specs)

    return make
