"""What reads this machine, and other machines' files."""

from __future__ import annotations

import json
import os
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest

from qwencli.config import ModelSource, ModelSpec
from qwencli.diagnostics import read_storage, read_system
from qwencli.diagnostics.check_table import run_check, select
from qwencli.diagnostics.finding import Level, Status
from qwencli.diagnostics.live import LiveMachine
from qwencli.diagnostics.machine import SECTIONS
from qwencli.diagnostics.record import RecordedMachine, record
from qwencli.engine.instruments.gpu_clock_sampler import summary
from qwencli.engine.machine.gpu_sensors import ClockSample, read_all
from qwencli.models import hub
from qwencli.models.resolve import resolve_model


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.8.0-48-generic", None),
        ("5.15.167.4-microsoft-standard-WSL2", 2),
        ("4.4.0-19041-Microsoft", 1),
    ],
)
def test_wsl_by_its_kernel(release, version):
    assert read_system.wsl_version(release) == version


def test_hags_from_within_wsl(monkeypatch, tmp_path):
    monkeypatch.setattr(read_system, "_REG_FROM_WSL", tmp_path)
    said = "\r\nHKEY_LOCAL_MACHINE\\SYSTEM\r\n    HwSchMode    REG_DWORD    0x2\r\n"
    monkeypatch.setattr(read_system, "_output", lambda command: said)
    assert read_system._hags_from_wsl() is True
    monkeypatch.setattr(read_system, "_output", lambda command: None)
    assert read_system._hags_from_wsl() is None
    assert read_system.hags_on(1) is False
    assert read_system.hags_on(7) is None


def test_a_windows_power_plan(monkeypatch):
    said = "Power Scheme GUID: a1841308-3541-4fab-bc81-f71556f20b4a  (Power saver)\n"
    monkeypatch.setattr(read_system, "_output", lambda command: said)
    assert read_system._windows_plan() == "Power saver"


def test_a_tool_that_is_not_there_or_hangs():
    assert read_system._output(["no-such-program-anywhere"]) is None


def test_the_filesystem_of_a_folder(tmp_path, monkeypatch):
    mounted = [("/", "ext4"), (tmp_path, "ext4"), (tmp_path, "9p"), (f"{tmp_path}x", "nfs")]
    disks = [SimpleNamespace(mountpoint=str(place), fstype=kind) for place, kind in mounted]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: disks)
    assert read_storage.filesystem_of(tmp_path / "models") == "9p"
    assert read_storage.filesystem_of(tmp_path.parent) == "ext4"
    disks.clear()
    assert read_storage.filesystem_of(tmp_path) is None


def test_a_system_that_does_not_name_its_filesystems(tmp_path, monkeypatch):
    def refused(all):
        raise FileNotFoundError(2, "No such file or directory", "/proc/filesystems")

    monkeypatch.setattr(psutil, "disk_partitions", refused)
    assert read_storage.filesystem_of(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="it is not measured there")
def test_disk_speed_reads_a_file_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(read_storage, "cache_root", lambda: tmp_path / "not" / "yet")
    monkeypatch.setattr(read_storage, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(read_storage, "_BLOCK_BYTES", 1 << 18)
    speed = read_storage.read_disk_speed()
    assert speed.read_bytes == 1 << 20
    assert speed.read_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_not_asked_when_switched_off_and_its_silence_is_no_error(monkeypatch):
    assert read_storage.read_hub({"HF_HUB_OFFLINE": "1"}).asked is False

    def unreachable(request, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(read_storage.urllib.request, "urlopen", unreachable)
    assert read_storage.read_hub({}).problem == "name or service not known"


def test_a_name_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(read_storage, "_ask_hub", lambda: threading.Event().wait())
    monkeypatch.setattr(read_storage, "_HUB_TIMEOUT_S", 0.05)
    assert read_storage.read_hub({}).problem == "no answer after 0.05 s"


def test_a_disk_that_can_only_be_read_through_memory_is_not_measured(monkeypatch):
    monkeypatch.delattr(read_storage.os, "posix_fadvise", raising=False)
    with pytest.raises(OSError, match="past its memory"):
        read_storage.read_disk_speed()


@pytest.mark.skipif(sys.platform == "win32", reason="locks there are not those of Unix")
def test_unfinished_downloads(monkeypatch, tmp_path):
    import fcntl

    monkeypatch.setattr(hub, "cache_root", lambda: tmp_path)
    folder = tmp_path / "models--Qwen--X"
    (folder / "blobs").mkdir(parents=True)
    assert list(hub.unfinished_downloads()) == []
    (folder / "blobs" / "abc.incomplete").touch()
    lock = tmp_path / ".locks" / "models--Qwen--X" / "abc.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert list(hub.unfinished_downloads()) == [("Qwen/X", 1, False)]
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert list(hub.unfinished_downloads()) == [("Qwen/X", 1, True)]
    assert lock.exists()


@pytest.fixture
def runs(monkeypatch):
    """Lets other processes run: their id, their parent's, their name and command line."""
    running = []

    def process(pid, parent, name, *words):
        info = {"ppid": parent, "name": name, "cmdline": list(words) or None}
        running.append(SimpleNamespace(pid=pid, info=info))

    monkeypatch.setattr(psutil, "process_iter", lambda attributes: running)
    return process


def test_processes_of_this_program_by_their_command_line(runs):
    me = os.getpid()
    runs(1, 0, "init", "init")
    runs(2, 0, "kthreadd")
    runs(me, 1, "python", "python", "-m", "qwencli", "diagnose")
    runs(900001, me, "python", "python", "-m", "qwencli.engine.instruments.probes.child")
    runs(900002, 1, "python", "/usr/bin/python3.12", "-m", "qwencli.bench.run.worker")
    runs(900003, 900004, "qwencli", "/venv/bin/qwencli", "chat")
    runs(900004, 1, "bash", "bash", "-c", "qwencli chat")
    found = read_system.read_engines()
    assert [(p.pid, p.what, p.orphaned) for p in found] == [
        (900002, "qwencli.bench.run.worker", True),
        (900003, "qwencli chat", False),
    ]


def test_a_system_that_lists_no_processes(monkeypatch):
    def refused(attributes):
        raise FileNotFoundError(2, "No such file or directory", "/proc")

    monkeypatch.setattr(psutil, "process_iter", refused)
    assert read_system.read_engines() is None


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("python", "-m", "qwencli", "chat"), "qwencli chat"),
        (
            ("python3.12", "-X", "utf8", "-Wd", "-Im", "qwencli.bench.run.worker"),
            "qwencli.bench.run.worker",
        ),
        (("/v/bin/python", "-u", "/v/bin/qwencli", "caption", "a.png"), "qwencli caption"),
        (("python", "-mqwencli", "diagnose"), "qwencli diagnose"),
        (("python", "-m", "pytest", "qwencli"), None),
        (("python", "-m", "mypy", "qwencli", "-q"), None),
        (("python", "-c", "import qwencli", "qwencli"), None),
        (("python", "tool.py", "/home/ann/qwencli"), None),
        (("vim", "qwencli"), None),
        (("python.exe", "qwencli.exe", "serve"), "qwencli serve"),
        (("",), None),
        ((), None),
    ],
)
def test_what_runs_is_told_from_what_is_an_argument(words, what):
    assert read_system._qwencli(list(words)) == what


@pytest.mark.parametrize(
    ("first", "orphaned"), [("systemd", True), ("tini", True), ("bash", False), ("sh", False)]
)
def test_what_the_shell_of_a_container_started_is_not_left_behind(runs, first, orphaned):
    runs(1, 0, first, first)
    runs(900001, 1, "python", "qwencli", "chat")
    assert [p.orphaned for p in read_system.read_engines()] == [orphaned]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("python", "-m", "qwencli.server.resident_process", "/state/resident-box", "0.1.0"),
            "the model that is kept loaded (qwencli stop ends it)",
        ),
        (("python", "/venv/bin/qwencli", "serve", "--port", "8000"), "qwencli serve"),
    ],
)
def test_what_is_meant_to_stay_is_not_left_behind(runs, words, named):
    runs(1, 0, "systemd", "systemd")
    runs(900001, 1, "python", *words)
    assert [(p.what, p.orphaned) for p in read_system.read_engines()] == [(named, False)]


class FakeNvml:
    """A card that offers some things and refuses others."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def __getattr__(self, name):
        answers = {
            "nvmlSystemGetCudaDriverVersion_v2": 12080,
            "nvmlSystemGetDriverVersion": "572.60",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "card",
            "nvmlDeviceGetName": "NVIDIA GeForce RTX 5090",
            "nvmlDeviceGetUUID": b"GPU-1",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=34, free=30),
            "nvmlDeviceGetBAR1MemoryInfo": SimpleNamespace(bar1Total=256),
            "nvmlDeviceGetDriverModel": [0, 0],
            "nvmlDeviceGetEnforcedPowerLimit": 575_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 4_294_967_295,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x44,
            "nvmlDeviceGetPowerUsage": 21_300,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=5, usedGpuMemory=None)],
            "nvmlDeviceGetGraphicsRunningProcesses": [
                SimpleNamespace(pid=5, usedGpuMemory=None),
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=1),
            ],
            "nvmlSystemGetProcessName": b"C:\\Users\\x\\python.exe",
        }
        if name not in answers:
            if name == "nvmlDeviceGetMigMode":
                raise AttributeError(name)
            return self._refuse
        return lambda *arguments: answers[name]

    def _refuse(self, *arguments):
        raise self.NVMLError


def test_nvml_answers_become_a_reading_and_refusals_are_none():
    driver = read_all(FakeNvml())
    assert (driver.version, driver.cuda) == ("572.60", "12.8")
    (gpu,) = driver.gpus
    assert (gpu.uuid, gpu.driver_model, gpu.power_limit_w) == ("GPU-1", "WDDM", 575.0)
    assert gpu.default_power_limit_w is None, "nonsense is no limit"
    assert gpu.max_pcie_gen is None
    assert gpu.mig is None
    assert gpu.now.throttle_reasons == ("sw_power_cap", "hw_thermal")
    assert gpu.now.sm_clock_mhz is None
    assert [(p.name, p.compute) for p in gpu.processes] == [("python.exe", True)]


def test_samples_at_the_edges_of_the_work_do_not_count():
    idle = ClockSample(sm_clock_mhz=210, pstate=8, power_w=20.0, throttle_reasons=("idle",))
    busy = ClockSample(sm_clock_mhz=2800, pstate=1, power_w=400.0, throttle_reasons=(), pcie_gen=5)
    reading = summary([idle, idle, busy, busy, busy])
    assert (reading.sm_clock_mhz, reading.pstate, reading.pcie_gen) == (2800, 1, 5)
    assert reading.throttle_reasons == ()
    assert summary([]) is None
    assert summary([ClockSample(sm_clock_mhz=5)]).sm_clock_mhz == 5


def test_this_machine_can_be_looked_at_and_recorded(monkeypatch):
    """A quick look at what is really here: no check may raise, and the record replays the same."""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with LiveMachine(resolve_model("scenes"), None) as box:
        results = {c.id: run_check(c, box) for c in select(Level.QUICK)}
        written = json.loads(json.dumps(record(box)))
    broken = [f.what for f in results.values() if "Error" in f.what]
    assert not broken
    assert results["torch-loads"].status is Status.PASS
    assert results["variables"].status is Status.WARN
    assert set(SECTIONS) < set(written)
    again = RecordedMachine(written)
    assert {c.id: run_check(c, again) for c in select(Level.QUICK)} == results


def test_a_model_of_unknown_shape_is_a_skip_with_the_reason():
    spec = ModelSpec("x", ModelSource.HUB, repo_id="a/b")
    with LiveMachine(spec, None) as box:
        (check,) = select(Level.QUICK, only=["memory-spill"])
        assert run_check(check, box).status is Status.SKIP
