"""What drafts of the model's own head give and cost, against plain steps, with random weights.

    python benchmarks/mtp.py --out mtp.json [--model qwen3.5-9b] [--quantization none,4bit]
        [--drafts 1,2,3,5] [--tokens 256] [--repeats 5]

One greedy request at a time, in engines that are loaded one after the other. Tokens a second of:

- `plain`: `--speculate off`.
- `wrong`: `--speculate mtp` as it is. A random head is hardly ever right: this is what the policy
  loses by finding that out.
- `right_N`: steps of N drafts that are right. The head and the model run as ever; then the tokens
  of a given answer take the place of the head's guesses, and are made the likeliest of the
  model's: with random weights its own choice hangs on how sums are rounded.

`gain` is the median over that of `plain`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwencli.config import (
    EngineConfig,
    EngineName,
    LoadFormat,
    Quantization,
    SamplingOptions,
    Speculate,
)
from qwencli.engine.layers.decoder import Decoder
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.spec_decode import mtp
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

LIKELIEST = 1e4


class Known:
    """An answer's tokens by slot, which are what the head guesses and what the model chooses."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self._wanted: torch.Tensor | None = None

    def tell(self, tokens: list[int]) -> None:
        self.ids[: len(tokens)].copy_(torch.tensor(tokens))

    def replace_guesses(self) -> None:
        """Of the head, and of the steps that check them: nothing is left out, some small operations
        are added."""
        guess, score = mtp.HeadInputs.draft, Decoder.logits

        def draft(
            head: Any, model: Any, cache: Any, rows: Any, drafts: Any, tables: Any, longest: int,
            num_drafts: int, choose: Any,
        ) -> None:  # fmt: skip
            guess(head, model, cache, rows, drafts, tables, longest, num_drafts, choose)
            ahead = torch.arange(1, num_drafts + 2, device=self.ids.device)
            behind = self.ids[(rows.slot[:, None] + ahead).clamp(max=len(self.ids) - 1)]
            drafts.input_ids[:, 1 : 1 + num_drafts].copy_(behind[:, :-1])
            self._wanted = behind.flatten()[:, None]

        def logits(decoder: Any, hidden: torch.Tensor, ops: Any) -> torch.Tensor:
            found = score(decoder, hidden, ops)
            wanted, self._wanted = self._wanted, None
            return found if wanted is None else found.scatter_(1, wanted, LIKELIEST)

        mtp.HeadInputs.draft = draft  # type: ignore[method-assign]
        Decoder.logits = logits  # type: ignore[method-assign]


def always(size: int) -> None:
    """Every step checks `size` tokens."""
    BatchDraftPolicy.next = lambda *_: size  # type: ignore[method-assign]
    BatchDraftPolicy.learn = lambda *_: None  # type: ignore[method-assign]


def request(tokens: int) -> GenerationRequest:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
    message = user_message("Tell me about the sea. " * 40)
    return GenerationRequest((message,), sampling, ignore_eos=True, bypass_caches=True)


def rates(engine: NativeEngine, asked: GenerationRequest, repeats: int) -> list[float]:
    found = [engine.generate(asked).timings.decode_tok_per_s for _ in range(repeats + 1)]
    return [each for each in found[1:] if each is not None]


def row(name: str, values: list[float], plain: list[float], **more: Any) -> dict[str, Any]:
    median = statistics.median(values)
    gain = median / statistics.median(plain)
    return {"name": name, "tok_per_s": values, "median": median, "gain": gain, **more}


def measure(args: argparse.Namespace, quantization: Quantization) -> Iterator[dict[str, Any]]:
    def loaded(speculate: Speculate) -> NativeEngine:
        return NativeEngine(
            EngineConfig(
                resolve_model(args.model),
                engine=EngineName.NATIVE,
                quantization=quantization,
                device=args.device,
                load_format=LoadFormat.DUMMY,
                max_seq_len=4096,
                speculate=speculate,
            )
        )

    asked = request(args.tokens)
    with loaded(Speculate.OFF) as engine:
        plain = rates(engine, asked, args.repeats)
    yield row("plain", plain, plain)
    with loaded(Speculate.MTP) as engine:
        wrong = rates(engine, asked, args.repeats)
        accepted = engine.generate(asked).speculation
        percent = None if accepted is None else accepted.accept_percent
        yield row("wrong", wrong, plain, accept_percent=percent)
    policy = BatchDraftPolicy.next, BatchDraftPolicy.learn
    guess, score = mtp.HeadInputs.draft, Decoder.logits
    for count in args.drafts:
        with loaded(Speculate.MTP) as engine:
            known = Known(4096 + 64, torch.device(args.device))
            known.replace_guesses()
            always(1 + count)
            prompt = list(engine._built(asked, None).input_ids)
            known.tell(prompt + [7 + number % 500 for number in range(args.tokens)])
            right = rates(engine, asked, args.repeats)
            result = engine.generate(asked)
            assert result.speculation is not None, "the engine drafts"
            percent = result.speculation.accept_percent
            yield row(f"right_{count}", right, plain, accept_percent=percent)
        BatchDraftPolicy.next, BatchDraftPolicy.learn = policy  # type: ignore[method-assign]
        mtp.HeadInputs.draft, Decoder.logits = guess, score  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3.5-9b")
    parser.add_argument("--quantization", default="none", help="comma list")
    parser.add_argument("--drafts", default="1,2,3,5", help="comma list")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.drafts = [int(each) for each in args.drafts.split(",")]
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    rows: list[dict[str, Any]] = []
    for mode in args.quantization.split(","):
        for each in measure(args, Quantization(mode)):
            rows.append({"quantization": mode, **each})
            print(f"{mode:>5} {each['name']:>8} {each['median']:8.1f} tok/s  x{each['gain']:.3f}")
            text = json.dumps({"gpu": gpu, "model": args.model, "rows": rows}, indent=2)
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
