"""One set, several worker processes: each picture captioned once, whatever becomes of a worker."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from qwencli.commands.caption_options import CaptionOptions, build_caption_config
from qwencli.commands.options import RunOptions
from qwencli.config import EngineConfig, SamplingOptions
from qwencli.dataset.caption_processor import CaptionProcessor
from qwencli.dataset.caption_worker import WorkerConfig
from qwencli.dataset.devices import as_named, named_devices
from qwencli.dataset.sources import Listing
from qwencli.errors import DeviceError, ModelError, UsageError
from qwencli.models.resolve import resolve_model
from tests.dataset.conftest import captions, failures
from tests.dataset.fake_engine import ENOUGH
from tests.dataset.test_killed import done_of, start, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture
def undisturbed(pictures, caption):
    """What one engine says of so many pictures."""

    def made(count):
        folder = pictures(*(f"{number}.png" for number in range(count)), folder="alone")
        assert caption(folder, "--seed", "1") == 0
        return captions(folder)

    return made


@pytest.fixture
def log(tmp_path):
    """A folder in which each process keeps count of its answers."""
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def workers_of(process):
    """Its worker processes, once both are there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [
            child
            for child in psutil.Process(process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        if len(found) == 2:
            return found
        time.sleep(0.02)
    raise AssertionError("no workers")


def test_a_slow_worker_makes_fewer(pictures, tmp_path, log):
    folder = pictures(*(f"{number}.png" for number in range(240)))
    process = start(
        *(folder, "--devices", "cpu,cpu", "--json"),
        FAKE_LOG=str(log),
        FAKE_SLOW=str(tmp_path / "slow"),
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count('"event": "caption"') == len(captions(folder)) == 240
    made = sorted(path.stat().st_size for path in log.iterdir())
    assert len(made) == 2 and sum(made) == 240
    assert made[0] <= 240 - ENOUGH < made[1]


def test_a_worker_that_is_killed_loses_nothing(pictures, log, undisturbed):
    folder = pictures(*(f"{number}.png" for number in range(150)))
    options = "--devices", "cpu,cpu", "--json"
    process = start(folder, *options, step_s=0.03, FAKE_LOG=str(log))
    with process:
        first, _ = workers_of(process)
        wait_for("*.log", log, 2)
        first.kill()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"the worker on cpu (process {first.pid}): it died of SIGKILL" in err
    assert err.count("go to the others") == 1
    assert captions(folder) == undisturbed(150)
    assert out.count('"event": "caption"') == 150


def test_with_no_worker_left_the_same_command_goes_on(pictures, log, undisturbed, finish):
    folder = pictures(*(f"{number}.png" for number in range(150)))
    process = start(folder, "--devices", "cpu,cpu", step_s=0.1, FAKE_LOG=str(log))
    with process:
        workers = workers_of(process)
        wait_for("*.log", log, 2)
        wait_for("*.txt", folder)
        for each in workers:
            each.kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no other is left" in err and "the same command goes on" in err
    assert "Traceback" not in err
    written = captions(folder)
    assert 0 < len(written) < 150 and len(done_of(folder)) == len(written)
    finish(folder)
    assert captions(folder) == undisturbed(150)


@pytest.mark.parametrize(
    ("devices", "deadly", "death"), [("cpu", 2, signal.SIGSEGV), ("cpu,cpu", 1, signal.SIGKILL)]
)
def test_a_picture_that_ends_its_worker_is_listed_as_failed(pictures, devices, deadly, death):
    folder = pictures(*(f"{number}.png" for number in range(40)))
    names = [f"{number}.png" for number in (3, 30)[:deadly]]
    for name in names:
        Image.new("RGB", (13, 13)).save(folder / name)
    options = folder, "--devices", devices
    process = start(*options, FAKE_DEATH=str(int(death)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert [row["path"] for row in failures(folder)] == names
    assert "two workers ended while they captioned it" in failures(folder)[0]["reason"]
    assert len(captions(folder)) == 40 - deadly and "Traceback" not in err
    again = start(*options, FAKE_DEATH=str(int(death)))
    _, err = again.communicate(timeout=120)
    assert again.returncode == 1 and "0 to caption" in err and "died" not in err


def test_ctrl_c_reaches_all_and_what_runs_is_written(pictures):
    folder = pictures(*(f"{number}.png" for number in range(200)))
    process = start(folder, "--devices", "cpu,cpu", step_s=0.1, own_group=True)
    with process:
        workers = workers_of(process)
        wait_for("*.txt", folder)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err and "Traceback" not in err and "died" not in err
    assert not any(worker.is_running() for worker in workers)
    written = captions(folder)
    assert 0 < len(written) < 200 and len(done_of(folder)) == len(written)


def test_workers_end_with_the_process_that_started_them(pictures):
    folder = pictures(*(f"{number}.png" for number in range(200)))
    process = start(folder, "--devices", "cpu,cpu", step_s=0.1)
    with process:
        workers = workers_of(process)
        wait_for("*.txt", folder)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize("schema", [None, "boxes"])
def test_orders_are_the_same_in_another_process(schema):
    caption_options = CaptionOptions(schema=schema)
    if schema is None:
        words = {"starts_with": "A", "prefix": "sks {dir}", "ban": ["cat"], "replace": ["a=b"]}
        caption_options = CaptionOptions(**words, language="en", max_caption_tokens=20)
    where = Listing(Path())
    caption_config = build_caption_config(caption_options, RunOptions(), None, None)
    processor = CaptionProcessor(
        caption_config, where, SamplingOptions(), functools.partial(where.open, frames=4)
    )
    sent = WorkerConfig(EngineConfig(model=resolve_model("scenes", offline=True)), processor, 3)
    got = pickle.loads(pickle.dumps(sent))
    assert got.config == sent.config
    assert got.processor.config.settings() == caption_config.settings()


def test_device_and_devices(pictures, caption, capsys):
    folder = pictures("a.png")
    assert caption(folder, "--devices", "cpu") == 2
    assert "--device and --devices exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["", "gpu", "cuda:0,", "cuda:x", "cpu cpu"])
def test_devices_that_are_none(named):
    with pytest.raises(UsageError, match="is not a device"):
        named_devices(named)


def test_names_of_devices(monkeypatch):
    assert named_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert named_devices("cuda,cpu") == ("cuda:0", "cpu")
    monkeypatch.setattr("qwencli.engine.machine.host._from_driver", lambda ask: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert named_devices("all") == ("cuda:0", "cuda:1", "cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,-1,1")
    assert named_devices("all") == ("cuda:0", "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        named_devices("all")


def test_a_device_that_is_not_there_is_told_of_by_the_option_that_named_it():
    told = as_named(DeviceError("--device cuda: no driver", "use --device cpu, or --devices cpu"))
    assert isinstance(told, DeviceError)
    assert told.message == "--devices cuda: no driver"
    assert told.hint == "use --devices cpu, or --devices cpu"
    other = ModelError("--device is not its matter")
    assert as_named(other) is other
