"""What a large set costs on this machine: finding its work, memory, being killed.

    python benchmarks/large_sets.py listing [--files 100000] [--repeats 3]
    python benchmarks/large_sets.py memory [--pictures 20000] [--tokens 12]
    python benchmarks/large_sets.py killed [--pictures 400] [--times 30] [--devices cpu,cpu]
    python benchmarks/large_sets.py sheet [--pictures 10000] [--browser chromium]

All with the bundled model, where one runs at all, and with pictures drawn here. Lines of JSON.

- listing: `caption FOLDER --dry-run` over a set of which every caption is in the manifest and on
  disk, so that all is checked and nothing is to do; best with the machine quiet. `listing_s` and
  `resume_check_s` are parts of the command, `command_s` is the whole of a new process.
- memory: resident memory of `caption FOLDER` by captions done, and its slope over the second half.
- killed: one set is captioned while `kill -9` ends the command at random moments. After each, what
  the manifest calls done is compared with the files; at the end all with an undisturbed set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

CAPTION = [sys.executable, "-m", "qwencli", "caption", "--keep-loaded", "0"]
QUICK = ["--model", "scenes", "--device", "cpu", "--greedy", "--guards", "none", "--retries", "0"]


def draw(folder: Path, count: int, side: int = 32) -> None:
    """Pictures in folders of a thousand, each its own."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 255, (4, 4, 3)).astype("uint8")
        Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST).save(path, quality=80)


def told(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The events that a command with --json writes."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def memory(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        draw(folder, given.pictures)
        command = [*CAPTION, name, "-r", "--json", "-q", *QUICK]
        command += ["--max-new-tokens", str(given.tokens), "--min-pixels", "1024"]
        samples: list[tuple[int, float]] = []
        done, started = 0, time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            watched = psutil.Process(process.pid)
            for event in told(process):
                if event["event"] == "end":
                    print(
                        json.dumps({"captioned": event["captioned"], "seconds": event["seconds"]})
                    )
                done += event["event"] == "caption"
                if event["event"] == "caption" and done % 250 == 0:
                    tree = [watched, *watched.children(recursive=True)]
                    samples.append((done, sum(each.memory_info().rss for each in tree) / 2**20))
                    if done % 1000 == 0:
                        row = {"captions": done, "rss_mib": round(samples[-1][1], 1)}
                        row["seconds"] = round(time.perf_counter() - started)
                        print(json.dumps(row), flush=True)
        late = np.array(samples[len(samples) // 2 :])
        slope, _ = np.polyfit(late[:, 0], late[:, 1], 1)
        summary = {
            "pictures": done,
            "rss_mib_at_half": float(late[0, 1]),
            "rss_mib_at_end": float(late[-1, 1]),
            "rss_mib_most": max(rss for _, rss in samples),
            "slope_kib_per_1000_captions": float(slope * 1024 * 1000),
        }
        print(json.dumps(summary))


def finished_set(folder: Path, files: int) -> None:
    """A set of pictures, empty ones, that the manifest and caption files know as done."""
    from qwencli.dataset.manifest import Manifest, job_hash

    names = [f"{number // 1000:03d}/{number:06d}" for number in range(files)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jpg").touch()
        (folder / f"{name}.txt").write_text("A picture.\n")
    (folder / ".qwencli").mkdir()
    manifest = Manifest(folder / ".qwencli" / "manifest.sqlite")
    manifest.begin(job_hash({}), {}, None)
    manifest.close()
    with contextlib.closing(sqlite3.connect(manifest.path)) as db, db:
        rows = (
            (f"{name}.txt", f"{name}.jpg", (folder / f"{name}.jpg").stat().st_mtime_ns)
            for name in names
        )
        db.executemany(
            "INSERT INTO captions "
            "(place, key, field, sample, status, caption, size, mtime_ns, run, time) "
            "VALUES (?, ?, 'caption', 0, 'done', 'A picture.', 0, ?, 1, '2026-01-01T00:00:00Z')",
            rows,
        )


def listing(given: argparse.Namespace) -> None:
    from qwencli.dataset.caption_set import open_set
    from qwencli.dataset.set_folder import output_place
    from qwencli.dataset.sources import Selection, list_inputs
    from qwencli.dataset.worklist import WorklistOptions

    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        finished_set(folder, given.files)
        rows: list[dict[str, float]] = []
        for _ in range(given.repeats):
            times = [time.perf_counter(), time.process_time()]
            found = list_inputs([name], Selection(recursive=True))
            listed_s = time.perf_counter() - times[0]
            place = output_place(found, None, ".txt")
            with open_set(found, place, WorklistOptions(), {}, look_only=True) as whole:
                assert (whole.work.num_existing, len(whole.work.tasks)) == (given.files, 0)
            checked_s = time.perf_counter() - times[0]
            cpu_s = time.process_time() - times[1]
            del found, whole
            started = time.perf_counter()
            subprocess.run([*CAPTION, name, "-r", "--dry-run", "-q", *QUICK], check=True)
            command_s = time.perf_counter() - started
            row = {"listing_s": listed_s, "resume_check_s": checked_s - listed_s}
            row |= {"both_s": checked_s, "both_cpu_s": cpu_s, "command_s": command_s}
            rows.append(row)
            print(json.dumps({"files": given.files, **row}), flush=True)
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(json.dumps({"files": given.files, "medians": medians}))


def caption_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.txt")
    }


def called_done(folder: Path) -> dict[str, str]:
    """Caption files and their texts, as the manifest has them."""
    path = folder / ".qwencli" / "manifest.sqlite"
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as db:
        try:
            rows = db.execute("SELECT key, caption FROM captions WHERE status = 'done'").fetchall()
        except sqlite3.OperationalError:  # killed before there was a table
            return {}
    return {f"{Path(key).with_suffix('.txt').as_posix()}": f"{text}\n" for key, text in rows}


def killed(given: argparse.Namespace) -> None:
    rng = random.Random(0)
    options = ["-r", "-q", *QUICK, "--max-new-tokens", "8", "--min-pixels", "1024"]
    if given.devices:
        options = [each for each in options if each not in ("--device", "cpu")]
        options += ["--devices", given.devices]
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        alone, folder = Path(name) / "alone", Path(name) / "set"
        draw(alone, given.pictures)
        shutil.copytree(alone, folder)
        subprocess.run([*CAPTION, str(alone), *options], check=True)
        undisturbed = caption_files(alone)
        faults: list[str] = []
        kills = 0
        while kills < given.times:
            done = called_done(folder)
            # Each time a part of what is left, so that the last kill finds something to do too.
            share = (given.pictures - len(done)) / (given.times - kills + 1)
            until = len(done) + rng.uniform(0, 1.5 * share)
            with subprocess.Popen([*CAPTION, str(folder), *options]) as process:
                while process.poll() is None and len(called_done(folder)) <= until:
                    time.sleep(rng.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
            kills += process.returncode == -signal.SIGKILL
            files, done = caption_files(folder), called_done(folder)
            faults += [f"lost: {key}" for key in done.keys() - files.keys()]
            faults += [
                f"other than called done: {key}"
                for key in done
                if files.get(key, done[key]) != done[key]
            ]
            faults += [
                f"half-written: {key}" for key, text in files.items() if text != undisturbed[key]
            ]
            row = {"kills": kills, "done": len(done), "files": len(files), "faults": len(faults)}
            print(json.dumps(row), flush=True)
            if process.returncode == 0:
                break
        subprocess.run([*CAPTION, str(folder), *options], check=True)
        files = caption_files(folder)
        summary: dict[str, Any] = {"pictures": given.pictures, "kills": kills, "faults": faults}
        summary["equals_undisturbed"] = files == undisturbed == called_done(folder)
        summary["left_over"] = [str(path) for path in folder.rglob("*.partial")]
        print(json.dumps(summary))


def sheet(given: argparse.Namespace) -> None:
    from benchmarks.report_speed import open_s

    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        draw(folder, given.pictures, side=given.side)
        words = [f"{first}{last}" for first in SYLLABLES for last in SYLLABLES]
        rng = random.Random(0)
        for path in folder.glob("*/*.jpg"):
            path.with_suffix(".txt").write_text(" ".join(rng.choices(words, k=60)) + ".\n")
        page = folder / "report.html"
        started = time.perf_counter()
        command = [sys.executable, "-m", "qwencli", "-q", "dataset", "report", name]
        with subprocess.Popen([*command, "-o", str(page)], text=True) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        row = {
            "pictures": given.pictures,
            "side": given.side,
            "made_s": round(time.perf_counter() - started, 2),
            "made_cpu_s": round(used.ru_utime + used.ru_stime, 2),
            "peak_mib": used.ru_maxrss >> 10,
            "page_mib": round(page.stat().st_size / 2**20, 2),
            "open_s": open_s(given.browser, page),
        }
        print(json.dumps(row))


SYLLABLES = (
    "ba",
    "co",
    "di",
    "fu",
    "ge",
    "ki",
    "lo",
    "mu",
    "pa",
    "qui",
    "ro",
    "su",
    "te",
    "wo",
    "xa",
    "zu",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="Where sets are made. Default: as tempfile does.")
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("memory")
    one.add_argument("--pictures", type=int, default=20_000)
    one.add_argument("--tokens", type=int, default=4)
    one.set_defaults(measure=memory)
    one = kinds.add_parser("listing")
    one.add_argument("--files", type=int, default=100_000)
    one.add_argument("--repeats", type=int, default=3)
    one.set_defaults(measure=listing)
    one = kinds.add_parser("killed")
    one.add_argument("--pictures", type=int, default=400)
    one.add_argument("--times", type=int, default=30)
    one.add_argument("--devices", help="As of caption: workers whose parent is killed.")
    one.set_defaults(measure=killed)
    one = kinds.add_parser("sheet")
    one.add_argument("--pictures", type=int, default=10_000)
    one.add_argument("--side", type=int, default=512)
    one.add_argument("--browser", default="chromium")
    one.set_defaults(measure=sheet)
    given = parser.parse_args(arguments)
    given.measure(given)


if __name__ == "__main__":
    main()
