"""A small valid campaign with every file that there can be, and ways to break one of them."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwencli.bench.inject.confusion import TRUTH_COLUMNS as TRUTH
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from tests.bench.synthetic_campaign import ENVIRONMENT, campaign

WORDS = (
    "", "0", "-0", "-1", "1", "nan", "inf", "-inf", "1e308", "1e-308", "-1e-300", "fast", "1,5",
    "1_0", " 7 ", "\u0663", "99999999999999999999999", "0x10", "\u202e", "<script>", "[/x]", "ok",
    "warmup", "skipped", "gc", "gap", "none", "\x00", "\x1b[2J", '"', "a" * 200_000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 1e308, 10**400, -0.5, "", "x", "\ud800", "[/x]", [], [1], [None],
    {}, {"a": []}, [[]], "\x00", "5", 1.5,
)  # fmt: skip
RAW = (b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b",", b'"', b"{", b"[" * 100_000)


def write_campaign(folder: Path, seed: int = 0) -> Path:
    """Three cells, one of them skipped; six runs of 24 tokens."""
    chance = random.Random(seed)
    made = campaign(3, 6, 24, skipped=1, seed=seed)
    folder.mkdir(parents=True)
    host, probes, roofline, quality, truth = [], [], [], [], []
    for token in made.tokens:
        if token["run"] == "3" and int(token["token_index"]) >= 12:  # one token comes late
            token["t_s"] = f"{float(token['t_s']) + 0.4:.9f}"
            if token["token_index"] == "12":
                token["itl_ms"] = f"{float(token['itl_ms']) + 400:.9f}"
        if token["itl_ms"] and chance.random() < 0.2:
            host.append(_host(token, "token", float(token["itl_ms"]), chance))
        if token["token_index"] == "0":
            host.append(_host(token, "prefill", 80.0, chance))
        if token["token_index"] == "23":
            host.append(_host(token, "decode", 500.0, chance))
    for run in made.runs:
        if run["status"] == "ok":
            run |= {"load_s": "1.5", "temperature_c_max": "70", "power_w_mean": "400"}
            run |= {"main_thread_cpu_percent": "95", "cpu_loop_us": "4", "pointer_chase_us": "200"}
            run |= {"gc_pause_ms": "1", "stall_count": "1", "process": "1"}
            span = {"t_s": 200.0, "span_ms": 80.0} if run["run"] == "2" else {}
            truth.append({"run": run["run"], "cause": "gc" if span else "none", **span})
    for sample in made.gpu:
        sample |= {"pstate": "0", "temperature_c": "60", "utilization_percent": "90"}
        sample |= {"compute_processes": "1", "memory_used_bytes": str(8 << 30)}
    for cell in made.plan["cells"][:2]:
        key = {"cell_id": cell["cell_id"]}
        for pair in range(12):
            times = {"itl_probe_on_ms": 5.1, "itl_probe_off_ms": 5.0}
            sampler = "on" if pair % 2 else "off"
            probes.append({**key, "run": 1 + pair % 4, "sampler": sampler, "pair": pair, **times})
        limits = dict.fromkeys(columns.ROOFLINE[3:], 1e6) | {"gpu_busy_ms_per_token": 4.0}
        roofline.append({**key, "process": 1, **limits})
        quality.append({**key, "process": 1, "sample": "a", "exact": 1, "expected": "b"})
        quality.append({**key, "process": 1, "sample": "p", "positions": 9, "mean_kl": 0.1})
    files = {
        "runs": (columns.RUNS, made.runs), "tokens": (columns.TOKENS, made.tokens),
        "gpu": (columns.GPU, made.gpu), "host": (columns.HOST, host),
        "probes": (columns.PROBES, probes), "roofline": (columns.ROOFLINE, roofline),
        "quality": (columns.QUALITY, quality), "truth": (TRUTH, truth),
    }  # fmt: skip
    for name, (known, rows) in files.items():
        write_rows(folder / f"{name}.csv", known, rows)
    stop = {"min_runs": 6, "max_noise_percent": None, "max_time_s": None, "processes": 1}
    for name, document in (("plan", {**made.plan, "stop": stop}), ("environment", ENVIRONMENT)):
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def _host(token, event, span_ms, chance):
    names = columns.HOST[columns.HOST.index("main_cpu_ms") :]
    figures = {name: chance.choice((0, 1, 3, span_ms)) for name in names}
    key = {name: token[name] for name in ("cell_id", "run", "t_s")}
    return {**key, "event": event, "span_ms": span_ms, "tokens": 1, **figures}


def mutate(path: Path, chance: random.Random) -> str:
    """Break one file in one way; returns what was done."""
    if chance.random() < 0.25:
        way = chance.choice(_ANY)
    else:
        way = chance.choice(_JSON if path.suffix == ".json" else _CSV)
    way(path, chance)
    return f"{path.name}: {way.__name__}"


def _truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content) + 1)])


def _insert(path: Path, chance: random.Random) -> None:
    content, at = path.read_bytes(), 0
    at = chance.randrange(len(content) + 1)
    path.write_bytes(content[:at] + chance.choice(RAW) + content[at:])


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def _folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _replace(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.choice((*RAW, b"[]", b"null", b"1\n")))


def _packed(path: Path, chance: random.Random) -> None:
    path.unlink()
    content = chance.choice((b"", b"no gzip", b"\x1f\x8b\x08\x00"))
    path.with_name(path.name + ".gz").write_bytes(content)


def _table(path: Path, change: Callable[[list[list[str]]], None]) -> None:
    table = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if len(table) < 2:
        return
    change(table)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    path.write_bytes(text.getvalue().encode())


def _field(path: Path, chance: random.Random) -> None:
    def change(table):
        row = chance.choice(table[1:])
        row[chance.randrange(len(row))] = chance.choice(WORDS)

    _table(path, change)


def _column(path: Path, chance: random.Random) -> None:
    def change(table):
        at, word = chance.randrange(len(table[0])), chance.choice(WORDS[:-1])
        for row in table[1:]:
            row[at] = word

    _table(path, change)


def _fields(path: Path, chance: random.Random) -> None:
    def change(table):
        at, low = chance.randrange(len(table[0])), chance.randrange(1, len(table))
        for row in table[low:]:
            row[at] = chance.choice(("", "0", "1", "1000000", "0.000001"))

    _table(path, change)


def _drop_column(path: Path, chance: random.Random) -> None:
    def change(table):
        at = chance.randrange(len(table[0]))
        for row in table:
            del row[at]

    _table(path, change)


def _head(path: Path, chance: random.Random) -> None:
    def change(table):
        at = chance.randrange(len(table[0]))
        table[0][at] = chance.choice((*table[0], "", "x"))

    _table(path, change)


def _short_row(path: Path, chance: random.Random) -> None:
    def change(table):
        row = chance.choice(table)
        del row[chance.randrange(len(row)) :]

    _table(path, change)


def _long_row(path: Path, chance: random.Random) -> None:
    _table(path, lambda table: chance.choice(table).append("1"))


def _drop_rows(path: Path, chance: random.Random) -> None:
    def change(table):
        share = chance.choice((0.02, 0.5, 0.98))
        table[1:] = [row for row in table[1:] if chance.random() > share]

    _table(path, change)


def _copy_row(path: Path, chance: random.Random) -> None:
    def change(table):
        table.insert(chance.randrange(1, len(table)), chance.choice(table))

    _table(path, change)


def _swap_rows(path: Path, chance: random.Random) -> None:
    def change(table):
        a, b = (chance.randrange(1, len(table)) for _ in range(2))
        table[a], table[b] = table[b], table[a]

    _table(path, change)


def _shuffle_rows(path: Path, chance: random.Random) -> None:
    def change(table):
        rows = table[1:]
        chance.shuffle(rows)
        table[1:] = rows

    _table(path, change)


def _nodes(value, found):
    for key in range(len(value)) if isinstance(value, list) else list(value):
        found.append((value, key))
        if isinstance(value[key], list | dict):
            _nodes(value[key], found)
    return found


def _node(path: Path, chance: random.Random) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    parent, key = chance.choice(_nodes(value, []))
    parent[key] = chance.choice(VALUES)
    path.write_text(json.dumps(value), encoding="utf-8")


def _drop_node(path: Path, chance: random.Random) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    parent, key = chance.choice(_nodes(value, []))
    del parent[key]
    path.write_text(json.dumps(value), encoding="utf-8")


def _copy_node(path: Path, chance: random.Random) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    nodes = _nodes(value, [])
    (parent, key), (other, name) = chance.choice(nodes), chance.choice(nodes)
    parent[key] = json.loads(json.dumps(other[name]))
    path.write_text(json.dumps(value), encoding="utf-8")


_ANY = (_truncate, _insert, _flip, _remove, _folder, _replace, _packed)
_CSV = (
    _field, _field, _field, _column, _column, _fields, _fields, _drop_column, _head, _short_row,
    _long_row, _drop_rows, _copy_row, _swap_rows, _shuffle_rows,
)  # fmt: skip
_JSON = (_node, _node, _drop_node, _copy_node)
