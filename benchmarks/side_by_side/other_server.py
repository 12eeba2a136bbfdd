"""The same pictures by an engine of this process's kind and by a server that somebody else wrote.

    transformers serve FOLDER --device cpu --dtype float32 --port 8701
    python benchmarks/side_by_side/other_server.py --endpoint http://127.0.0.1:8701/v1 \\
        --served NAME --pictures examples --out FOLDER

NAME is what the server calls the bundled model. `qwencli caption` of each picture and of the
folder, `chat` through a pipe and `bench` run as commands, once here and once with `--endpoint`;
greedy answers have to be equal. Prints one JSON object and writes it to OUT/other-server.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = ["--model", "scenes", "--device", "cpu", "--keep-loaded", "0"]


def run(arguments: list[str], said: str | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "qwencli", *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.returncode}, {done.stderr[-2000:]!r}")
    return done.stdout


def captions(pictures: list[Path], where: list[str]) -> dict[str, str]:
    """Each picture's, by a command of its own."""
    return {
        each.name: run(["caption", str(each), *where, "--temperature", "0"]).strip()
        for each in pictures
    }


def of_folder(pictures: list[Path], where: list[str]) -> dict[str, str]:
    """All of them as a folder, which has text files beside its pictures then."""
    with tempfile.TemporaryDirectory() as made:
        for each in pictures:
            (Path(made) / each.name).write_bytes(each.read_bytes())
        run(["caption", made, *where, "--temperature", "0"])
        found = {each.name: (Path(made) / each.name).with_suffix(".txt") for each in pictures}
        return {name: file.read_text(encoding="utf-8").strip() for name, file in found.items()}


def talked(picture: Path, where: list[str]) -> list[str]:
    """Two turns of a chat, through a pipe."""
    turns = f"@{picture} Describe the scene.\nHow many objects are there?\n"
    return run(["chat", *where, "--temperature", "0"], turns).split("\n")


def benched(out: Path, where: list[str]) -> dict[str, Any]:
    """The cell of a small campaign, or why there is none: not every server can hold an answer to a
    length."""
    bench = ["bench", *where, "--runs", "3", "--max-new-tokens", "16", "--out", str(out)]
    try:
        run(bench)
    except RuntimeError as error:
        return {"refused": next(line for line in str(error).split("\\n") if "failed: " in line)}
    with (out / "cells.csv").open(encoding="utf-8", newline="") as file:
        (cell,) = csv.DictReader(file)
    return {name: cell[name] for name in ("engine", "status", "decode_tok_per_s_median")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--served", required=True)
    parser.add_argument("--pictures", type=Path, default=Path("examples"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    there = ["--endpoint", given.endpoint, "--model", given.served]
    pictures = sorted(given.pictures.glob("*.png"))
    told: dict[str, Any] = {}
    for name, ask in (("caption", captions), ("folder", of_folder)):
        own, other = ask(pictures, HERE), ask(pictures, there)
        equal = sum(own[each.name] == other[each.name] for each in pictures)
        told[name] = {"pictures": len(pictures), "equal": equal, "here": own, "there": other}
    told["chat"] = {"here": talked(pictures[0], HERE), "there": talked(pictures[0], there)}
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        told["bench"] = benched(Path(made) / "campaign", there)
    text = json.dumps(told, indent=1, ensure_ascii=False)
    print(text)
    (given.out / "other-server.json").write_text(text + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
