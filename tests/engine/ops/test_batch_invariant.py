"""Every token of a random mix gives the same bits as in its prompt alone, run in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Quantization
from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages, PackedPrompts, pages_for
from qwencli.engine.loading import weights
from qwencli.engine.machine.cpu_threads import computing_with
from qwencli.engine.native.model import QwenModel
from qwencli.engine.ops.batch_invariant import BATCH_INVARIANT_OPS
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.models.shape_reader import read_shape
from tests.engine.native.tiny import CASES, FAMILIES, configs

Tensor = torch.Tensor
CPU = torch.device("cpu")
SLOTS = 4 * PAGE_SIZE
# Of a step: of each request how many more tokens run, and whether as a prompt or a token each.
Runs = list[tuple[int, int]]


def model_of(
    config: dict[str, Any],
    quantization: Quantization = Quantization.NONE,
    kv: Scheme | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **operations: Any,
) -> QwenModel:
    shape = read_shape(config)
    loaded = weights.dummy(shape, dtype, device, quantization)
    operations.setdefault("batch_invariant", lambda step: BATCH_INVARIANT_OPS)
    return QwenModel(shape, loaded, SLOTS, kv=kv, **operations)


class Rows:
    """Texts that run over one pool of pages, as the runner would have them run."""

    def __init__(self, model: QwenModel, texts: list[Tensor]) -> None:
        self.model, self.texts = model, texts
        each = pages_for(SLOTS)
        # Pages of one row lie apart from each other.
        self.tables = 1 + torch.arange(each * len(texts), dtype=torch.int32).view(each, -1).t()
        self.tables = self.tables.contiguous().to(model.device)
        self.cache = model.paged_cache(1 + each * len(texts))
        self.done = [0] * len(texts)
        self.logits: list[list[Tensor]] = [[] for _ in texts]

    def prompts(self, runs: Runs) -> None:
        """Run some more tokens of some rows side by side."""
        model, device = self.model, self.model.device
        runs = [(row, min(count, len(self.texts[row]) - self.done[row])) for row, count in runs]
        runs = [(row, count) for row, count in runs if count > 0]
        if not runs:
            return
        contexts, lengths = [self.done[row] for row, _ in runs], [count for _, count in runs]
        places = [torch.arange(at, at + n) for at, n in zip(contexts, lengths, strict=True)]
        ends = [at + n for at, n in zip(contexts, lengths, strict=True)]
        rows = torch.tensor([row for row, _ in runs])
        of = rows.repeat_interleave(torch.tensor(lengths))
        positions = torch.cat(places).to(device)
        packed = PackedPrompts(
            lengths=lengths,
            contexts=contexts,
            starts=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
            context_starts=torch.tensor([0, *ends]).cumsum(0).to(device, torch.int32),
            slots=None,
            flash=False,
            tables=self.tables[rows.to(device)],
        )
        ids = torch.cat([self.texts[row][p] for (row, _), p in zip(runs, places, strict=True)])
        pages = self.tables[of.to(device), positions // PAGE_SIZE].long()
        hidden = model.prefill_packed(
            model.decoder.embed(ids.to(device)),
            positions.expand(3, -1),
            pages * PAGE_SIZE + positions % PAGE_SIZE,
            self.cache,
            packed,
            None,
        )
        self._keep(rows.tolist(), lengths, hidden)

    def step(self, rows: list[int]) -> None:
        """One token of each of some rows."""
        rows = [row for row in rows if self.done[row] < len(self.texts[row])]
        if not rows:
            return
        device = self.model.device
        places = torch.tensor([self.done[row] for row in rows], device=device)
        tokens = torch.stack([self.texts[row][self.done[row]] for row in rows]).to(device)
        tables = self.tables[torch.tensor(rows, device=device)]
        pages = DecodePages(tables, places, SLOTS)
        hidden = self.model.decode_rows(tokens, places, self.cache, pages)
        self._keep(rows, [1] * len(rows), hidden)

    def _keep(self, rows: list[int], lengths: list[int], hidden: Tensor) -> None:
        logits = self.model.prompt_logits(hidden)
        for row, count, part in zip(rows, lengths, logits.split(lengths), strict=True):
            self.done[row] += count
            self.logits[row].append(part)

    def finish(self) -> list[Tensor]:
        self.prompts([(row, SLOTS) for row in range(len(self.texts))])
        return [torch.cat(parts) for parts in self.logits]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Beside other tests a team of threads waits longer than it computes."""
    with computing_with(1):
        yield


def texts_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(0, 280, (length,), generator=generator) for length in lengths]


@torch.inference_mode()
def run_mix(model: QwenModel, texts: list[Tensor], steps: list[tuple[bool, Runs]]) -> None:
    """Hold every token's logits in these steps to those of its text alone."""
    rows = Rows(model, texts)
    for as_prompts, runs in steps:
        rows.prompts(runs) if as_prompts else rows.step([row for row, _ in runs])
    for text, found in zip(texts, rows.finish(), strict=True):
        (alone,) = Rows(model, [text]).finish()
        assert alone.isfinite().all() and alone.std() > 0
        assert torch.equal(found, alone)


def mixes(count: int, most: int) -> st.SearchStrategy[list[tuple[bool, Runs]]]:
    """Steps of prompts, and of single tokens, each of some rows in any order."""
    order = st.permutations(range(count)).flatmap(
        lambda rows: st.integers(1, count).map(lambda n: rows[:n])
    )
    runs = order.flatmap(
        lambda rows: st.tuples(
            *(st.integers(1, most).map(lambda n, row=row: (row, n)) for row in rows)
        )
    )
    return st.lists(st.tuples(st.booleans(), runs.map(list)), max_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_token_gives_the_same_bits_in_any_mix(family: str, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    model = model_of(data.draw(configs(family, case)))
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=3))
    run_mix(model, texts_of(lengths), data.draw(mixes(len(lengths), 40)))


WIDE = (True, [(2, 3), (0, 20), (1, 60)]), (False, [(1, 1), (2, 1)]), (False, [(0, 1)])


@pytest.mark.parametrize("quantization", [q for q in Quantization if q is not Quantization.NONE])
def test_quantized_weights_too(quantization: Quantization) -> None:
    run_mix(model_of(QUANTIZED, quantization), texts_of([30, 66, 9]), list(WIDE))


@pytest.mark.parametrize("kv", [Scheme.INT8, Scheme.FP8])
def test_a_quantized_cache_too(kv: Scheme) -> None:
    run_mix(model_of(QUANTIZED, kv=kv), texts_of([30, 66, 9]), list(WIDE))


@torch.inference_mode()
def test_the_logits_are_those_of_the_plain_operators() -> None:
    texts = texts_of([30, 66, 9])
    plain = Rows(model_of(QUANTIZED, batch_invariant=None), texts)
    own = Rows(model_of(QUANTIZED), texts)
    for found, expected in zip(own.finish(), plain.finish(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


QUANTIZED: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 301,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
