"""What masks of constrained decoding cost on the host: llguidance and xgrammar (decision 0023).

    python benchmarks/constrained_masks.py TOKENIZER_FOLDER [--vocab-size 151936] [--out masks.json]

Each library runs in a process of its own and walks the same answers: for each token the masks of
1, 32 and 128 rows are filled, then the token is taken. A line of JSON for each library and schema:
milliseconds of processor time to read the tokenizer and to compile a schema that is new,
microseconds to fill (rows at different places of the answer; of the clock for a step, and of
processor time for a row of it, which other programs change less), tokens that the schema forces,
and what the process grew by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

ROWS = (1, 32, 128)
WORD = {"type": "string"}
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "fields": (
        {
            "type": "object",
            "properties": {
                "caption": WORD,
                "style": {"enum": ["photo", "drawing", "painting", "render"]},
                "people": {"type": "integer", "minimum": 0, "maximum": 99},
                "tags": {"type": "array", "items": WORD, "maxItems": 20},
            },
            "required": ["caption", "style", "people", "tags"],
            "additionalProperties": False,
        },
        {
            "caption": "A woman in a red coat crosses a wet street at night, neon signs behind.",
            "style": "photo",
            "people": 1,
            "tags": ["woman", "red coat", "street", "night", "neon", "rain"],
        },
    ),
    "boxes": (
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "bbox_2d": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 99999},
                        "minItems": 4,
                        "maxItems": 4,
                    },
                    "label": WORD,
                },
                "required": ["bbox_2d", "label"],
                "additionalProperties": False,
            },
        },
        [{"bbox_2d": [12 * n, 40, 300 + n, 420], "label": "a parked car"} for n in range(6)],
    ),
    "long strings": (
        {
            "type": "object",
            "properties": {
                "scene": {"type": "string", "minLength": 20, "maxLength": 400},
                "camera": {"type": "string", "maxLength": 80},
            },
            "required": ["scene", "camera"],
            "additionalProperties": False,
        },
        {"scene": "Low sun over a harbour, " * 12, "camera": "wide angle, eye level"},
    ),
}


class LlGuidance:
    def __init__(self, tokenizer: str, vocab_size: int, stop: int) -> None:
        import llguidance

        self._lib = llguidance
        slices = llguidance.LLTokenizer.json_slices()
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=stop, slices=slices
        )
        self._executor = llguidance.LLExecutor()

    def compile(self, schema: str) -> Callable[[], Any]:
        strict = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = self._lib.LLMatcher.grammar_from_json_schema(schema, overrides=strict)
        first = self._lib.LLMatcher(self._tokenizer, grammar)
        return first.deep_copy

    def fill(self, matchers: list[Any], masks: torch.Tensor) -> None:
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(masks.data_ptr(), masks.shape[1] * 4)
            return
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            rows, masks.data_ptr(), masks.shape[1] * 4, len(rows)
        )

    def take(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def forced(self, matcher: Any) -> list[int]:
        return list(matcher.compute_ff_tokens())


class XGrammar:
    def __init__(self, tokenizer: str, vocab_size: int, stop: int) -> None:
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer))
        info = xgrammar.TokenizerInfo.from_huggingface(
            fast, vocab_size=vocab_size, stop_token_ids=[stop]
        )
        self._lib = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=8)
        self._batch = xgrammar.BatchGrammarMatcher()
        self._fast = Tokenizer.from_str(tokenizer)

    def compile(self, schema: str) -> Callable[[], Any]:
        compiled = self._compiler.compile_json_schema(
            schema, any_whitespace=False, separators=(", ", ": ")
        )
        return lambda: self._lib.GrammarMatcher(compiled)

    def fill(self, matchers: list[Any], masks: torch.Tensor) -> None:
        if len(matchers) == 1:
            matchers[0].fill_next_token_bitmask(masks, 0)
        else:
            self._batch.batch_fill_next_token_bitmask(matchers, masks)

    def take(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def forced(self, matcher: Any) -> list[int]:
        text = matcher.find_jump_forward_string()
        return self._fast.encode(text, add_special_tokens=False).ids if text else []


LIBRARIES = {"llguidance": LlGuidance, "xgrammar": XGrammar}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, folder: Path, vocab_size: int) -> list[dict[str, Any]]:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    fast = Tokenizer.from_str(text)
    stop = fast.token_to_id("<|im_end|>")
    before = resident_mib()
    started = time.process_time()
    library = LIBRARIES[name](text, vocab_size, stop)
    ready_ms = 1e3 * (time.process_time() - started)
    loaded_mib = resident_mib() - before
    found = []
    for schema, (written, answer) in SCHEMAS.items():
        ids = fast.encode(json.dumps(answer), add_special_tokens=False).ids
        started = time.process_time()
        make = library.compile(json.dumps(written))
        compile_ms = 1e3 * (time.process_time() - started)
        line: dict[str, Any] = {"library": name, "schema": schema, "tokens": len(ids)}
        line |= {"tokenizer_ms": ready_ms, "tokenizer_mib": loaded_mib, "compile_ms": compile_ms}
        line["forced_tokens"] = forced_tokens(library, make(), ids)
        for rows in ROWS:
            wall, used = walk(library, make, ids, rows, vocab_size)
            line |= {
                f"fill_{rows}_us": 1e6 * statistics.median(wall),
                f"fill_{rows}_cpu_us_a_row": 1e6 * statistics.mean(used) / rows,
            }
        line["process_grew_mib"] = resident_mib() - before
        found.append(line)
    return found


def walk(
    library: Any, make: Callable[[], Any], ids: list[int], rows: int, vocab_size: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step's fill, by the clock and of processors; rows begin a token apart, and
    over again at their end."""
    masks = torch.full((rows, -(-vocab_size // 32)), -1, dtype=torch.int32)
    matchers, places = [make() for _ in range(rows)], [0] * rows
    for row in range(rows):
        for token in ids[: row % len(ids)]:
            library.take(matchers[row], token)
        places[row] = row % len(ids)
    wall, used = [], []
    for _ in range(max(len(ids), 30)):
        started, busy = time.perf_counter(), time.process_time()
        library.fill(matchers, masks)
        wall.append(time.perf_counter() - started)
        used.append(time.process_time() - busy)
        for row in range(rows):
            token = ids[places[row]]
            assert masks[row, token // 32] >> (token % 32) & 1, "the answer is allowed"
            assert library.take(matchers[row], token)
            places[row] = (places[row] + 1) % len(ids)
            if not places[row]:
                matchers[row] = make()
    return wall[2:], used[2:]


def forced_tokens(library: Any, matcher: Any, ids: list[int]) -> int:
    """Tokens of the answer that the schema leaves no choice about, runs of them at once."""
    count = place = 0
    while place < len(ids):
        forced = library.forced(matcher)
        run = 0
        while run < len(forced) and ids[place + run : place + run + 1] == [forced[run]]:
            run += 1
        count += run
        for token in ids[place : place + max(run, 1)]:
            assert library.take(matcher, token)
        place += max(run, 1)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--library", choices=LIBRARIES, help="in this process")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.library:
        for line in measure(given.library, given.tokenizer, given.vocab_size):
            print(json.dumps(line), flush=True)
        return
    lines = []
    for name in LIBRARIES:
        own = [sys.executable, __file__, str(given.tokenizer), "--library", name]
        own += ["--vocab-size", str(given.vocab_size)]
        ran = subprocess.run(own, check=True, capture_output=True, text=True)
        lines += [json.loads(line) for line in ran.stdout.splitlines()]
    for line in lines:
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}))
    if given.out:
        about = {"cores": os.cpu_count(), "lines": lines}
        given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
