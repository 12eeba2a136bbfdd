"""Runs batches on the device: prompts side by side, then one token of every running row.

The state of a row lives on the device and a step asks the host nothing, so steps of all row counts
can be CUDA graphs and the host can enqueue a step before it has read the one in front. A graph
serves a bucket of rows; rows that nothing uses run along, writing to a page that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from qwencli.config import SamplingParams
from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    DecodePages,
    pages_for,
)
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.constrained import TokenMatcher, fill_masks
from qwencli.engine.device_memory import upload
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.graphs import GraphRunner, Pass, RepeatedShapes
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import (
    LIKELIEST,
    SamplerKind,
    is_greedy,
    kind_of,
    masked,
    widest_kind,
)
from qwencli.engine.prompt_batch import PromptPasses, state_of
from qwencli.engine.request import PromptChunk
from qwencli.engine.request import Sequence as ScheduledSequence
from qwencli.engine.response import StepLogprobs
from qwencli.engine.row_state import RowState
from qwencli.engine.runner_prompt import RunnerPrompt
from qwencli.engine.spec_decode import ngram
from qwencli.engine.spec_decode.mtp import DrawnDrafts, HeadInputs, likeliest
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.policy import MOST_VERIFIED
from qwencli.engine.vision_batch import BatchVision

Tensor = torch.Tensor

# Rows that a step is made for. A bucket is at most a third more than what the one below it holds,
# from 16 on: in products on matrix units the rows in between cost next to nothing.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Making a graph takes as long as some tens of steps: one for more rows will do meanwhile.
WIDEST_STAND_IN = 4


@dataclass
class TokenCopy:
    """Tokens of some rows on their way to the host, and when they are there.

    Args:
        logprobs: see `LogprobBuffers`; None where no row asks for them.
    """

    sequences: tuple[ScheduledSequence, ...]
    rows: tuple[int, ...]
    tokens: Tensor | list[int]
    mark: Mark
    logprobs: tuple[Tensor, Tensor] | None = None

    def read(self) -> list[int]:
        """One token for each of `sequences`; waits for them."""
        if isinstance(self.tokens, list):
            values = self.tokens
        else:
            self.mark.synchronize()
            values = self.tokens.tolist()
        return [values[row] for row in self.rows]

    def read_logprobs(self) -> list[StepLogprobs | None]:
        """After `read`, for each of `sequences`: log-probabilities of its token and of the
        likeliest ones, and the ids of those."""
        if self.logprobs is None:
            return [None] * len(self.rows)
        logprobs, ids = (each.tolist() for each in self.logprobs)
        return [(logprobs[row], ids[row]) for row in self.rows]


@dataclass
class VerifyCopy:
    """What a step that checked `size` tokens a row chose, on its way to the host.

    Args:
        num_rows: that the step ran. outputs: see `Drafts.verify_output`, a row a row.
    """

    sequences: tuple[ScheduledSequence, ...]
    rows: tuple[int, ...]
    size: int
    num_rows: int
    outputs: Tensor
    mark: Mark

    def read(self) -> list[tuple[int, list[int]]]:
        """For each of `sequences` how many drafts in a row were right, and its tokens, none if it
        was over; waits for them."""
        if self.outputs.is_pinned():
            self.mark.synchronize()
        values = self.outputs.tolist()
        return [(values[row][1], values[row][2 : 2 + values[row][0]]) for row in self.rows]


# Of a step: what is chosen, rows, slots that operators read, the tokens of a row that are checked
# (0 = it takes one, and nothing is drafted), and whether it tells how likely tokens were. A step
# with masks has two graphs: its logits, and what is chosen from them.
GraphKey = tuple[SamplerKind, int, int, int, bool]


@dataclass(frozen=True)
class Unsampled:
    """A step whose logits are computed or on the way, and whose tokens are not chosen yet.

    Args:
        key: of what computes the logits. kind: how tokens are chosen. with_logprobs: whether it is
            told how likely they were.
    """

    sequences: tuple[ScheduledSequence, ...]
    rows: tuple[int, ...]
    key: GraphKey
    kind: SamplerKind
    with_logprobs: bool


class ModelRunner:
    """One model with a pool of pages and the state of its rows.

    Args:
        graphs: whether steps run as CUDA graphs.
        vision_cache: features of pictures that came before.
        num_states: slots of states, where the model keeps such; one for each row and slot 0 at
            least.
        with_drafts: whether steps may check drafted tokens too (`verify`).
    """

    def __init__(
        self,
        model: QwenModel,
        num_pages: int,
        max_rows: int,
        max_seq_len: int,
        graphs: bool,
        vision_cache: VisionCache,
        num_states: int = 0,
        with_drafts: bool = False,
    ) -> None:
        self.model, self.max_rows = model, max_rows
        self.cache = model.paged_cache(num_pages)
        tokens = MAX_VERIFY_TOKENS if with_drafts else 1
        checked = MOST_VERIFIED if with_drafts else 0
        self.states = model.recurrent_states(num_states, tokens, checked)
        vocab_size = model.shape.text.vocab_size
        # Drafts that are wrong have a place behind the last token, which is no sequence's page.
        self._pages = pages_for(max_seq_len + (MAX_VERIFY_TOKENS if with_drafts else 0))
        self.state = RowState(
            max_rows, self._pages, vocab_size, max_seq_len, model.device, with_drafts
        )
        self.state.sampler.by_row = model.batch_invariant
        # Drafts are those of the model's own head where it has one.
        self._head: HeadInputs | None = None
        if with_drafts and model.draft_head is not None:
            self._head = HeadInputs(max_rows, model)
        self._graphs = GraphRunner(model.device) if graphs else None
        # Of prompts and pictures.
        self._shapes: RepeatedShapes | None = None
        if self._graphs is not None:
            self._shapes = RepeatedShapes(
                self._graphs, lambda: torch.cuda.mem_get_info(model.device)[0]
            )
        self.vision = BatchVision(model, vision_cache, self._pass, graphs)
        has_head = self._head is not None
        self.prompts = PromptPasses(
            model, self.cache, self.states, self._pass, has_head=has_head, graphs=graphs
        )
        self._captured: list[GraphKey] = []
        # What steps of kind LOGITS computed, by key: [rows, V].
        self._logits: dict[GraphKey, Tensor] = {}
        # Whose masks are not all ones.
        self._masked_rows: set[int] = set()
        # Rows of the widest step that may be run.
        self.most_rows = max_rows
        # Whether rows of the step that is run may be a token further, or parts of them; callers
        # unset it before each.
        self.may_have_advanced = False
        model.rope.reach(max_seq_len)

    @torch.inference_mode()
    def rearrange(
        self,
        moves: Sequence[tuple[int, int]],
        released: Sequence[int],
        restored: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Begin a step: rows take their places, and states those that they go on from."""
        self.state.resume()
        self.keep(restored)
        if moves:
            self.state.move(moves)
            if self._head is not None:
                self._head.move(moves)
        if released:
            self.state.release(released)

    @torch.inference_mode()
    def prefill(
        self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt], clock: EventTimer
    ) -> TokenCopy | None:
        """Run chunks of prompts; returns the first tokens of those that are through, if any."""
        if self._shapes is not None:
            self._shapes.at_once = len(prompts) == 1 and prompts[0].measured
        self.vision.encode(chunks, prompts, clock)
        through = [index for index, chunk in enumerate(chunks) if chunk.is_last]
        ends = self.prompts.run(chunks, prompts)
        logits = ends.logits
        if not through:
            return None
        first_masks = [prompts[index].first_mask for index in through]
        if any(mask is not None for mask in first_masks):
            free = torch.full_like(next(mask for mask in first_masks if mask is not None), -1)
            rows_of = [free if mask is None else mask for mask in first_masks]
            (sent,) = upload([torch.cat(rows_of)], self.model.device)
            logits = masked(logits, sent)
        sequences = [chunks[index].sequence for index in through]
        rows = [_row(sequence) for sequence in sequences]
        begun = [prompts[index] for index in through]
        pages = [sequence.pages for sequence in sequences]
        ids = [
            prompt.ids.to(self.model.device) if _penalised(prompt) else prompt.ids
            for prompt in begun
        ]
        states = [state_of(sequence) for sequence in sequences]
        places = self.state.begin(rows, begun, pages, states, ids)
        if self._head is not None:
            assert ends.hidden is not None, "passes for a head hand it over"
            self._head.begin(places, self.state.slot.index_select(0, places) - 1, ends.hidden)
        kinds = [kind_of(prompt.sampling) for prompt in begun]
        self.state.sample_first(logits, rows, places, kinds)
        held = [row for row, mask in zip(rows, first_masks, strict=True) if mask is not None]
        if held:
            # The host must read their first token before they choose a second one.
            self.state.hold(held)
        with_logprobs = _with_logprobs(begun)
        if with_logprobs:
            self.state.logprobs.note(logits, self.state.token.index_select(0, places), places)
        copy = self._copy(sequences, max(rows) + 1, clock, with_logprobs=with_logprobs)
        # Last of all: a prompt that failed is run again.
        for prompt in begun:
            prompt.visuals = ()
        return copy

    def _pass(
        self, key: Hashable, inputs: Sequence[Tensor], make: Callable[[], Pass]
    ) -> Sequence[Tensor]:
        return make()(inputs) if self._shapes is None else self._shapes.run(key, inputs, make)

    @torch.inference_mode()
    def keep(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states from slot to slot, in this order."""
        if copies and self.states is not None:
            self.states.copy(copies)

    def forget_shapes(self) -> None:
        """Give back the memory that passes of prompts and pictures hold as graphs."""
        if self._shapes is not None:
            self._shapes.clear()

    @torch.inference_mode()
    def decode(
        self,
        sequences: Sequence[ScheduledSequence],
        prompts: Sequence[RunnerPrompt],
        waiting: int,
        clock: EventTimer,
    ) -> TokenCopy:
        """One token of each of `sequences`.

        Args:
            waiting: requests that are about to join: a graph that is made now is made for them too.
        """
        kind = self._kind_of(prompts)
        rows = max(_row(sequence) for sequence in sequences) + 1
        with_logprobs = _with_logprobs(prompts)
        self._step(kind, rows, _longest(sequences), waiting, with_logprobs=with_logprobs)
        return self._copy(sequences, rows, clock, with_logprobs=with_logprobs)

    @torch.inference_mode()
    def verify(
        self,
        sequences: Sequence[ScheduledSequence],
        prompts: Sequence[RunnerPrompt],
        size: int,
        waiting: int,
        clock: EventTimer,
    ) -> VerifyCopy:
        """One to `size` tokens of each of `sequences`, which `may_draft`: drafts that are right,
        and one more. Text from earlier is drafted behind a step, for
        the next one; a head drafts in front of it, as many as the step checks.

        `num_ahead` of each counts this step already.
        """
        rows = self.rows_of(sequences)
        self._step(self._kind_of(prompts), rows, _longest(sequences), waiting, size)
        outputs = self.state.narrow_drafts(rows).verify_output[:, : 2 + size]
        if self.model.device.type == "cuda":
            pinned = torch.empty(outputs.shape, dtype=torch.int64, pin_memory=True)
            outputs = pinned.copy_(outputs, non_blocking=True)
        else:
            outputs = outputs.clone()
        places = tuple(map(_row, sequences))
        return VerifyCopy(tuple(sequences), places, size, rows, outputs, clock.mark())

    def may_draft(self, sampling: SamplingParams) -> bool:
        """Whether steps with such a request may check drafts: those of a head also where tokens are
        drawn, or had a penalty."""
        return self._head is not None or is_greedy(sampling)

    def rows_of(self, sequences: Sequence[ScheduledSequence]) -> int:
        """How many rows a step of these runs."""
        return max(map(_row, sequences)) + 1

    @torch.inference_mode()
    def decode_logits(
        self, sequences: Sequence[ScheduledSequence], prompts: Sequence[RunnerPrompt], waiting: int
    ) -> Unsampled:
        """The half of `decode` that needs no masks; `sample` is the other one."""
        rows = max(_row(sequence) for sequence in sequences) + 1
        key = self._step(SamplerKind.LOGITS, rows, _longest(sequences), waiting)
        kind = self._kind_of(prompts)
        places = tuple(map(_row, sequences))
        return Unsampled(tuple(sequences), places, key, kind, _with_logprobs(prompts))

    @torch.inference_mode()
    def sample(
        self, step: Unsampled, matchers: Sequence[tuple[TokenMatcher, int]], clock: EventTimer
    ) -> TokenCopy:
        """Choose the tokens of a step: of rows with a matcher, among those that it allows.

        All tokens before must have been read and accepted.
        """
        masks, count = self.state.masks, step.key[1]
        rows = {row for _, row in matchers}
        for row in self._masked_rows - rows:
            masks.host[row].fill_(-1)
        self._masked_rows = rows
        fill_masks(matchers, masks.host)
        allowed = masks.sent(count)

        def choose() -> None:
            self._choose(self._logits[step.key], step.kind, step.with_logprobs, allowed)

        if self._graphs is None:
            choose()
        else:
            self._replay((step.kind, step.key, step.with_logprobs), choose)
        rows_end = max(step.rows) + 1
        return self._copy(
            step.sequences, rows_end, clock, step.rows, with_logprobs=step.with_logprobs
        )

    def _kind_of(self, prompts: Sequence[RunnerPrompt]) -> SamplerKind:
        """What a step of these rows must be able to express."""
        kind = widest_kind(kind_of(prompt.sampling) for prompt in prompts)
        # Among how many a token is drawn must not depend on what other rows need.
        drawn = kind not in LIKELIEST and self.model.batch_invariant
        return SamplerKind.FULL if drawn else kind

    def _step(
        self,
        kind: SamplerKind,
        rows: int,
        longest: int,
        waiting: int,
        size: int = 0,
        with_logprobs: bool = False,
    ) -> GraphKey:
        # A kernel reads lengths on the device; operators read those in use, or a bucket.
        reach = self._pages * PAGE_SIZE
        if self._graphs is None:
            reach = reach if self.reads_lengths else longest
            self._advance(kind, rows, reach, size, with_logprobs)
            return kind, rows, reach, size, with_logprobs
        if not self.reads_lengths:
            reach = min(reach, 1 << max(longest - 1, 255).bit_length())
        key = self._graph_for(kind, rows, reach, waiting, size, with_logprobs)
        known = key in self._graphs
        self._replay(key, lambda: self._advance(*key))
        if not known:
            self._captured.append(key)  # not before: another may find the memory
        return key

    def _replay(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work` as a graph; the first time it is captured."""
        assert self._graphs is not None, "callers looked"
        if key not in self._graphs:
            # It runs what it captures, and rows must not take that step twice: all are over
            # meanwhile, and what was written for them is written again.
            done, seen = self.state.done, self.state.sampler.seen
            kept = done.clone(), seen.clone()
            done.fill_(True)
            try:
                self._graphs.capture(key, work)
            finally:
                done.copy_(kept[0])
                seen.copy_(kept[1])
                self.may_have_advanced = False
        self._graphs.replay(key)
        self.may_have_advanced = True

    @property
    def reads_lengths(self) -> bool:
        """Whether attention of steps is a kernel's, which knows of lengths what the device does."""
        return self.model.reads_lengths

    def _graph_for(
        self,
        kind: SamplerKind,
        rows: int,
        reach: int,
        waiting: int,
        size: int,
        with_logprobs: bool,
    ) -> GraphKey:
        able = [
            key
            for key in self._captured
            if (key[0], *key[3:]) == (kind, size, with_logprobs)
            and key[1] >= rows
            and key[2] >= reach
            and key[2] <= 2 * reach
            and key[1] <= self.most_rows
        ]
        found = min(able, key=lambda key: key[1:], default=None)
        if found is not None and found[1] <= max(WIDEST_STAND_IN * rows, rows + waiting):
            return found
        most = min(self.most_rows, MOST_VERIFIED // size if size else self.most_rows)
        wanted = min(rows + waiting, most)
        bucket = next((each for each in ROW_BUCKETS if each >= wanted), most)
        return kind, min(bucket, most), reach, size, with_logprobs

    def _advance(
        self, kind: SamplerKind, rows: int, longest: int, size: int = 0, with_logprobs: bool = False
    ) -> None:
        """One step of the first rows: feed their tokens, choose the next; those that are over
        stay. With a `size` the drafts behind them too."""
        if size > 0:
            self._verify(kind, rows, longest, size)
            return
        model, state = self.model, self.state
        buffers, ops = state.buffers(rows), model.row_ops(rows)
        pages = DecodePages(
            state.tables[:rows], buffers.slot, longest, state.states[:rows], buffers.done
        )
        # Keys and values are written again to where they are; states are moved on in place.
        self.may_have_advanced = self.states is not None
        hidden = model.decode_rows(buffers.token, buffers.position, self.cache, pages, self.states)
        if self._head is not None:
            self._head.note(hidden, buffers.slot)
        if kind in LIKELIEST and not with_logprobs:
            model.decoder.next_tokens(hidden, ops, buffers, kind is SamplerKind.GREEDY)
            self.may_have_advanced = True
            state.remember(rows)
            return
        logits = model.decoder.logits(hidden, ops)
        if kind is SamplerKind.LOGITS:
            # Kept, so that a graph's memory for them is used for nothing else.
            self._logits[kind, rows, longest, size, with_logprobs] = logits
        else:
            self._choose(logits, kind, with_logprobs)

    def _choose(
        self, logits: Tensor, kind: SamplerKind, with_logprobs: bool, masks: Tensor | None = None
    ) -> None:
        """The next tokens of the first rows from logits [n, V], of those that `masks` allow."""
        rows = len(logits)
        buffers = self.state.buffers(rows)
        chosen = self.state.sampler.narrow(0, rows).sample(logits, buffers.step, kind, masks)
        self.may_have_advanced = True
        self.model.row_ops(rows).advance_rows(chosen, buffers)
        if with_logprobs:
            self.state.logprobs.note(logits, chosen)
        self.state.remember(rows)

    def _verify(self, kind: SamplerKind, rows: int, longest: int, size: int) -> None:
        model, state = self.model, self.state
        buffers, drafts = state.buffers(rows), state.narrow_drafts(rows)
        pages = DecodePages(
            state.tables[:rows], buffers.slot, longest, state.states[:rows], buffers.done
        )
        head, sampler = self._head, state.sampler.narrow(0, rows)
        drawn = None if kind is SamplerKind.ARGMAX else DrawnDrafts(sampler, buffers.step)
        if head is not None and size > 1:
            tables, choose = state.tables[:rows], likeliest if drawn is None else drawn
            head.draft(model, self.cache, buffers, drafts, tables, longest, size - 1, choose)
        fed = drafts.input_ids[:, :size].flatten()
        hidden = model.decode_rows(fed, buffers.position, self.cache, pages, self.states)
        if head is not None:
            head.note(hidden, buffers.slot)
        ops = model.row_ops(rows * size)
        logits = model.decoder.logits(hidden, ops)
        if drawn is None and ops.verify_rows is not None:
            ops.verify_rows(logits, buffers, drafts)
            self.may_have_advanced = True
        else:
            input_ids = drafts.input_ids[:, :size]
            proposal = None if drawn is None else drawn.proposal
            chosen = sampler.check(logits, input_ids, buffers.step, kind, proposal)
            self.may_have_advanced = True
            ngram.accept(chosen, buffers, drafts)
            if head is None:
                ngram.draft(buffers, drafts, longest + 1)
            else:
                drafts.input_ids[:, 0].copy_(buffers.token)
        if self.states is not None and size > 1:
            model.adopt_accepted(self.states, pages, size, drafts.verify_output[:, 0])

    def _copy(
        self,
        sequences: Sequence[ScheduledSequence],
        rows: int,
        clock: EventTimer,
        places: tuple[int, ...] | None = None,
        *,
        with_logprobs: bool = False,
    ) -> TokenCopy:
        """Start copying the rows' last tokens to the host.

        Args:
            places: the rows of sequences of which some may be over since.
        """
        tokens: Tensor | list[int]
        logprobs = self.state.logprobs.copied(rows) if with_logprobs else None
        if self.model.device.type == "cuda":
            pinned = torch.empty(rows, dtype=torch.int64, pin_memory=True)
            tokens = pinned.copy_(self.state.token[:rows], non_blocking=True)
        else:
            tokens = self.state.token[:rows].tolist()
        if places is None:
            places = tuple(_row(sequence) for sequence in sequences)
        return TokenCopy(tuple(sequences), places, tokens, clock.mark(), logprobs)


def _row(sequence: ScheduledSequence) -> int:
    assert sequence.row is not None, "only sequences that run are given to the runner"
    return sequence.row


def _longest(sequences: Sequence[ScheduledSequence]) -> int:
    """Tokens of the longest of them at most, those that a step feeds included."""
    return max(
        each.num_prompt_tokens + each.num_scheduled + each.num_ahead - 1 for each in sequences
    )


def _with_logprobs(prompts: Sequence[RunnerPrompt]) -> bool:
    return any(prompt.with_logprobs for prompt in prompts)


def _penalised(prompt: RunnerPrompt) -> bool:
    return prompt.sampling.repetition_penalty != 1.0
