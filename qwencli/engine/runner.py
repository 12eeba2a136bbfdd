"""Runs batches on the device: prompts side by side, then one token of every running row.

The state of a row lives on the device and a step asks the host nothing, so steps of all row counts
can be CUDA graphs and the host can enqueue a step before it has read the one in front. A graph
serves a bucket of rows; rows that nothing uses run along, writing to a page that nothing reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from qwencli.config import SamplingParams
from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    SCRATCH_PAGE,
    DecodePages,
    PackedPrompts,
    pages_for,
)
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.constrained import TokenMatcher, fill_masks
from qwencli.engine.device_memory import upload
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.frontend.model_files import MAX_STOP_TOKENS
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.graphs import GraphRunner, Pass, RepeatedShapes
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.vision_tower import PIECE, VisionFeatures, VisionPass, join_features
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import Prompt as ModelPrompt
from qwencli.engine.native.prompt_inputs import PromptPositions, lay_out
from qwencli.engine.native.sampler import (
    LIKELIEST,
    Sampler,
    SamplerKind,
    TokenMasks,
    kind_of,
    masked,
    widest_kind,
)
from qwencli.engine.ops.decoder_ops import Drafts
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.request import PromptChunk
from qwencli.engine.request import Sequence as ScheduledSequence
from qwencli.engine.spec_decode import ngram
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.errors import InputError
from qwencli.models.shapes import ModelShape

Tensor = torch.Tensor

# Rows that a step is made for. A bucket is at most a third more than what the one below it holds,
# from 16 on: in products on matrix units the rows in between cost next to nothing.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Making a graph takes as long as some tens of steps: one for more rows will do meanwhile.
WIDEST_STAND_IN = 4
# Layouts of prompts that are kept, and the longest of those.
LAYOUTS_KEPT, LAYOUT_TOKENS = 32, 4096


@dataclass
class PromptVisual:
    """A picture or video of a prompt.

    Args:
        digest: of its content. first: which of the prompt's image tokens is its first.
        patches: dropped once it is encoded. ready: when they are there, where another stream than
            the model's makes them. features: from the first chunk on that needs them.
        encoding: of a large one, as far as steps have brought it.
    """

    grid: tuple[int, int, int]
    digest: bytes
    first: int
    num_tokens: int
    patches: Tensor | None
    ready: torch.cuda.Event | None = None
    features: VisionFeatures | None = None
    encoding: VisionPass | None = None

    def features_of(self, low: int, high: int) -> VisionFeatures:
        """Those of the prompt's image tokens from `low` to `high` that are its own."""
        assert self.features is not None, "encoded with the first chunk that needs it"
        own = slice(max(low - self.first, 0), high - self.first)
        layers = self.features.deepstack
        return VisionFeatures(self.features.embeds[own], tuple(layer[own] for layer in layers))


@dataclass
class RunnerPrompt:
    """A request's prompt as the runner needs it, on the host but for pictures.

    Args:
        ids: int64 [S]. visuals: in the order of their tokens; none once the prompt is through.
        vision: start and end of each run of the vision tower that its pictures were in.
        first_mask: the tokens that the answer may begin with, int32 [1, ceil(V/32)]; None = all.
    """

    ids: Tensor
    layout: PromptPositions
    visuals: Sequence[PromptVisual]
    sampling: SamplingParams
    stop_ids: Sequence[int]
    vision: list[tuple[Mark, Mark]] = field(default_factory=list)
    first_mask: Tensor | None = None

    @property
    def next_position(self) -> int:
        return len(self.ids) + self.layout.delta

    def image_tokens(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the prompt's image tokens are among its tokens from `start` to `stop`."""
        low, high = torch.searchsorted(
            self.layout.visual_places, torch.tensor([start, stop])
        ).tolist()
        return low, high

    @property
    def large_visuals(self) -> list[tuple[int, int, int]]:
        """See `Sequence`."""
        places = self.layout.visual_places
        return [
            (int(places[each.first]), int(places[each.first + each.num_tokens - 1]) + 1, index)
            for index, each in enumerate(self.visuals)
            if math.prod(each.grid) > PIECE
        ]

    def visuals_of(self, low: int, high: int) -> list[PromptVisual]:
        """Those that have image tokens from `low` to `high`."""
        return [
            visual
            for visual in self.visuals
            if visual.first < high and visual.first + visual.num_tokens > low
        ]


@dataclass
class TokenCopy:
    """Tokens of some rows on their way to the host, and when they are there."""

    sequences: tuple[ScheduledSequence, ...]
    rows: tuple[int, ...]
    tokens: Tensor | list[int]
    mark: Mark

    def read(self) -> list[int]:
        """One token for each of `sequences`; waits for them."""
        if isinstance(self.tokens, list):
            values = self.tokens
        else:
            self.mark.synchronize()
            values = self.tokens.tolist()
        return [values[row] for row in self.rows]


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


# Of a step: what is chosen, rows, slots that operators read, and the tokens of a row that are
# checked; 0 = it takes one, and nothing is drafted. A step with masks has two graphs: its logits,
# and what is chosen from them.
GraphKey = tuple[SamplerKind, int, int, int]


@dataclass(frozen=True)
class Unsampled:
    """A step whose logits are computed or on the way, and whose tokens are not chosen yet.

    Args:
        key: of what computes the logits. kind: how tokens are chosen.
    """

    sequences: tuple[ScheduledSequence, ...]
    rows: tuple[int, ...]
    key: GraphKey
    kind: SamplerKind


class RowState:
    """Buffers of R rows on the device.

    `token` is the last token chosen, `slot` its place in its sequence, `position` its rotary
    position, `step` how many tokens the row has chosen and `limit` how many it may, int64 [R] all;
    `done` [R] whether it is over. `stop_ids` int64 [R, MAX_STOP_TOKENS], -1 where unused. `tables`
    int32 [R, pages]: the pages of each row.

    Args:
        with_drafts: whether steps may check drafted tokens too.
    """

    def __init__(
        self,
        rows: int,
        pages: int,
        vocab_size: int,
        max_steps: int,
        device: torch.device,
        with_drafts: bool = False,
    ) -> None:
        def column() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        self.token, self.slot, self.position, self.step, self.limit = (column() for _ in range(5))
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.stop_ids = torch.full((rows, MAX_STOP_TOKENS), -1, dtype=torch.int64, device=device)
        self.tables = torch.full((rows, pages), SCRATCH_PAGE, dtype=torch.int32, device=device)
        self.sampler = Sampler(vocab_size, max_steps, device, rows)
        self.drafts: Drafts | None = None
        if with_drafts:
            # Those that were wrong are written behind the last token too.
            self.drafts = ngram.empty_drafts(max_steps + 1 + MAX_VERIFY_TOKENS, device, rows)
        self._masks: TokenMasks | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def masks(self) -> TokenMasks:
        """What rows may choose where some are held to a schema; made when it is first asked for."""
        if self._masks is None:
            rows, vocab_size = self.sampler.seen.shape
            self._masks = TokenMasks(rows, vocab_size, self.slot.device)
        return self._masks

    def begin(
        self,
        rows: Sequence[int],
        prompts: Sequence[RunnerPrompt],
        pages: Sequence[Sequence[int]],
        ids: Sequence[Tensor],
    ) -> Tensor:
        """Set up rows whose prompts were just run; returns them on the device.

        Args:
            ids: each prompt's tokens, on the device where there is a repetition penalty.
        """
        table = torch.full((len(rows), 4 + MAX_STOP_TOKENS), -1)
        width = max(len(each) for each in pages)
        page_table = torch.full((len(rows), width), SCRATCH_PAGE)
        for line, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            limit = prompt.sampling.max_new_tokens
            table[line, :4] = torch.tensor([row, len(prompt.ids), prompt.next_position, limit])
            table[line, 4 : 4 + len(prompt.stop_ids)] = torch.tensor(prompt.stop_ids)
            page_table[line, : len(pages[line])] = torch.tensor(pages[line])
        sent, sent_pages = upload([table, page_table], self.slot.device)
        places, slot, position, limits = sent[:, :4].unbind(1)
        self.slot.index_copy_(0, places, slot)
        self.position.index_copy_(0, places, position)
        self.limit.index_copy_(0, places, limits)
        self.step.index_fill_(0, places, 0)
        self.stop_ids.index_copy_(0, places, sent[:, 4:])
        self.tables.index_fill_(0, places, SCRATCH_PAGE)
        self.tables[:, :width].index_copy_(0, places, sent_pages.to(torch.int32))
        self.sampler.begin_rows(rows, [prompt.sampling for prompt in prompts], ids)
        if self.drafts is not None:
            self.drafts.last_slot.index_copy_(0, places, slot + limits - 1)
            for row, text in zip(
                rows, upload([prompt.ids for prompt in prompts], self.slot.device), strict=True
            ):
                self.drafts.ids[row, : len(text)].copy_(text)
        return places

    def sample_first(
        self, logits: Tensor, rows: Sequence[int], places: Tensor, kinds: Sequence[SamplerKind]
    ) -> None:
        """Choose the first tokens of rows from the prompts' logits [n, V]."""
        if widest_kind(kinds) is SamplerKind.ARGMAX:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = torch.cat(
                [
                    self.sampler.narrow(row, 1).sample(
                        logits[line : line + 1], self.step[row : row + 1], kinds[line]
                    )
                    for line, row in enumerate(rows)
                ]
            )
        self.token.index_copy_(0, places, chosen)
        ended = (chosen[:, None] == self.stop_ids.index_select(0, places)).any(dim=1)
        self.step.index_fill_(0, places, 1)
        self.done.index_copy_(0, places, ended | (self.limit.index_select(0, places) <= 1))
        self.remember(self.max_rows)

    @property
    def max_rows(self) -> int:
        return len(self.token)

    def remember(self, count: int) -> None:
        """Add the last tokens of the first rows to the texts that drafts come from, if any do."""
        if self.drafts is not None:
            token, drafts = self.token[:count, None], self.narrow_drafts(count)
            drafts.ids.scatter_(1, self.slot[:count, None], token.to(torch.int32))
            drafts.input_ids[:, :1].copy_(token)

    def narrow_drafts(self, count: int) -> Drafts:
        """The drafts of the first rows, in the same memory."""
        assert self.drafts is not None, "the engine made room for them"
        return Drafts(*(getattr(self.drafts, each.name)[:count] for each in fields(self.drafts)))

    def hold(self, rows: Sequence[int]) -> None:
        """Keep rows where they are until `resume`: they are run beside others, and must not choose
        a token yet."""
        (places,) = upload([torch.tensor(rows)], self.slot.device)
        self._held = places, self.done.index_select(0, places)
        self.done.index_fill_(0, places, True)

    def resume(self) -> None:
        if self._held is not None:
            self.done.index_copy_(0, *self._held)
            self._held = None

    def release(self, rows: Sequence[int]) -> None:
        """Make rows harmless whose pages belong to others from now on."""
        (places,) = upload([torch.tensor(rows)], self.slot.device)
        self.tables.index_fill_(0, places, SCRATCH_PAGE)
        self.slot.index_fill_(0, places, 0)
        self.position.index_fill_(0, places, 0)
        self.done.index_fill_(0, places, True)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows to others, (from, to)."""
        sources, places = upload(
            [torch.tensor(side) for side in zip(*moves, strict=True)], self.slot.device
        )
        for state in (
            self.token,
            self.slot,
            self.position,
            self.step,
            self.limit,
            self.done,
            self.stop_ids,
            self.tables,
        ):
            state.index_copy_(0, places, state.index_select(0, sources))
        self.sampler.move(sources, places)
        if self.drafts is not None:
            for each in fields(self.drafts):
                state = getattr(self.drafts, each.name)
                state.index_copy_(0, places, state.index_select(0, sources))

    def buffers(self, count: int) -> RowBuffers:
        """What the end of a step reads and writes of the first rows, in the same memory."""
        return RowBuffers(
            token=self.token[:count],
            slot=self.slot[:count],
            position=self.position[:count],
            step=self.step[:count],
            limit=self.limit[:count],
            done=self.done[:count],
            stop_ids=self.stop_ids[:count],
            seen=self.sampler.seen[:count],
            penalty=self.sampler.penalty[:count],
        )


@dataclass
class _Packed:
    """The tensors of some prompt chunks side by side, on the device."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    places: Tensor
    prompts: PackedPrompts
    features: VisionFeatures | None
    last: Tensor = field(repr=False)


class ModelRunner:
    """One model with a pool of pages and the state of its rows.

    Args:
        graphs: whether steps run as CUDA graphs.
        vision_cache: features of pictures that came before.
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
        with_drafts: bool = False,
    ) -> None:
        self.model, self.max_rows, self._vision_cache = model, max_rows, vision_cache
        self.cache = model.paged_cache(num_pages)
        vocab_size = model.shape.text.vocab_size
        # Drafts that are wrong have a place behind the last token, which is no sequence's page.
        self._pages = pages_for(max_seq_len + (MAX_VERIFY_TOKENS if with_drafts else 0))
        self.state = RowState(
            max_rows, self._pages, vocab_size, max_seq_len, model.device, with_drafts
        )
        self.state.sampler.by_row = model.batch_invariant
        self._graphs = GraphRunner(model.device) if graphs else None
        # Of prompts and pictures.
        self._shapes: RepeatedShapes | None = None
        if self._graphs is not None:
            self._shapes = RepeatedShapes(
                self._graphs, lambda: torch.cuda.mem_get_info(model.device)[0]
            )
        self._captured: list[GraphKey] = []
        # What steps of kind LOGITS computed, by key: [rows, V].
        self._logits: dict[GraphKey, Tensor] = {}
        # Whose masks are not all ones.
        self._masked_rows: set[int] = set()
        # By ids and pictures; nothing writes to what is in here.
        self._layouts: dict[
            tuple[tuple[int, ...], tuple[Visual, ...]], tuple[Tensor, PromptPositions]
        ] = {}
        model.rope.reach(max_seq_len)

    def prepare(
        self,
        prompt: Prompt,
        digests: Sequence[bytes],
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        matcher: TokenMatcher | None = None,
    ) -> RunnerPrompt:
        """Lay a prompt out on the host, in the thread and on the stream that made its patches.

        Args:
            digests: of its pictures and videos.
            matcher: what the answer is held to, at its beginning.

        Raises:
            InputError: see `lay_out`; also pictures for a text model.
        """
        ids, layout = self._laid_out(prompt)
        expected = prompt.num_image_tokens
        if len(layout.visual_places) != expected:
            raise InputError(
                f"the prompt has {len(layout.visual_places)} image tokens, its pictures {expected}",
                "give as many images as the prompt has places for",
            )
        visuals: list[PromptVisual] = []
        if prompt.inputs is not None:
            made = zip(digests, prompt.inputs.num_tokens, prompt.inputs.patches, strict=True)
            firsts = itertools.accumulate(prompt.inputs.num_tokens, initial=0)
            for grid, first, (digest, count, patches) in zip(
                prompt.grid_thw, firsts, made, strict=False
            ):
                made_here = torch.as_tensor(patches)
                ready = None
                if made_here.is_cuda:
                    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    ready.record(torch.cuda.current_stream(made_here.device))
                visuals.append(PromptVisual(grid, digest, first, count, made_here, ready))
        first_mask = None
        if matcher is not None:
            words = -(-self.model.shape.text.vocab_size // 32)
            first_mask = torch.full((1, words), -1, dtype=torch.int32)
            fill_masks([(matcher, 0)], first_mask)
        return RunnerPrompt(
            ids=ids,
            layout=layout,
            visuals=visuals,
            sampling=sampling,
            stop_ids=stop_ids,
            first_mask=first_mask,
        )

    def _laid_out(self, prompt: Prompt) -> tuple[Tensor, PromptPositions]:
        """Ids and layout; pictures of one size that are asked about in the same words share them.
        Raises as `lay_out`."""
        key = tuple(prompt.input_ids), prompt.visuals
        found = self._layouts.get(key)
        if found is None:
            layout = lay_out(self.model.shape, ModelPrompt(prompt.input_ids, prompt.visuals))
            found = torch.tensor(prompt.input_ids), layout
            if len(key[0]) <= LAYOUT_TOKENS:
                if len(self._layouts) >= LAYOUTS_KEPT:
                    self._layouts.clear()
                self._layouts[key] = found
        return found

    @torch.inference_mode()
    def rearrange(self, moves: Sequence[tuple[int, int]], released: Sequence[int]) -> None:
        """Begin a step: rows take their places."""
        self.state.resume()
        if moves:
            self.state.move(moves)
        if released:
            self.state.release(released)

    @torch.inference_mode()
    def prefill(
        self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt], clock: EventTimer
    ) -> TokenCopy | None:
        """Run chunks of prompts; returns the first tokens of those that are through, if any."""
        self._encode(chunks, prompts, clock)
        packed = self._pack(chunks, prompts)
        through = [index for index, chunk in enumerate(chunks) if chunk.is_last]
        logits = self._run_packed(packed)
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
        places = self.state.begin(rows, begun, pages, ids)
        kinds = [kind_of(prompt.sampling) for prompt in begun]
        self.state.sample_first(logits, rows, places, kinds)
        held = [row for row, mask in zip(rows, first_masks, strict=True) if mask is not None]
        if held:
            # The host must read their first token before they choose a second one.
            self.state.hold(held)
        for prompt in begun:
            prompt.visuals = ()
        return self._copy(sequences, max(rows) + 1, clock)

    def _run_packed(self, packed: _Packed) -> Tensor:
        """All layers over packed prompts; logits [n, V] of the last tokens of those that end."""
        # What stays with a graph: nothing of these prompts but their lengths.
        like, features, behind = packed.prompts, packed.features, packed.prompts.slots
        has_pictures, has_context = features is not None, behind is not None
        inputs = [packed.ids, packed.positions, packed.slots, packed.last]
        inputs += [packed.prompts.starts, packed.prompts.context_starts]
        inputs += [] if behind is None else [behind]
        inputs += [] if like.tables is None else [like.tables]
        before = len(inputs)
        if features is not None:
            inputs += [packed.places, features.embeds, *features.deepstack]

        def work(given: Sequence[Tensor]) -> Sequence[Tensor]:
            ids, positions, slots, last, starts, context_starts = given[:6]
            prompts = replace(
                like,
                starts=starts,
                context_starts=context_starts,
                slots=given[6] if has_context else None,
                tables=None if like.tables is None else given[before - 1],
            )
            hidden, deepstack = self.model.decoder.embed(ids), None
            if has_pictures:
                places, embeds, *layers = given[before:]
                hidden.index_copy_(0, places, embeds)
                deepstack = DeepStack(places, layers)
            hidden = self.model.prefill_packed(
                hidden, positions, slots, self.cache, prompts, deepstack
            )
            if not len(last):
                return (hidden,)
            return (self.model.prompt_logits(hidden.index_select(0, last)),)

        key = tuple(packed.prompts.lengths), tuple(packed.prompts.contexts), len(packed.last)
        pictures = 0 if features is None else len(packed.places)
        return self._pass(("prompts", *key, pictures), inputs, lambda: work)[0]

    def _pass(
        self, key: Hashable, inputs: Sequence[Tensor], make: Callable[[], Pass]
    ) -> Sequence[Tensor]:
        return make()(inputs) if self._shapes is None else self._shapes.run(key, inputs, make)

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
        self._step(kind, rows, _longest(sequences), waiting)
        return self._copy(sequences, rows, clock)

    @torch.inference_mode()
    def verify(
        self, sequences: Sequence[ScheduledSequence], size: int, waiting: int, clock: EventTimer
    ) -> VerifyCopy:
        """One to `size` tokens of each of `sequences`, which are all greedy without a penalty:
        drafts that are right, and one more. Drafts the next ones.

        `num_ahead` of each counts this step already.
        """
        rows = self.rows_of(sequences)
        self._step(SamplerKind.ARGMAX, rows, _longest(sequences), waiting, size)
        outputs = self.state.narrow_drafts(rows).verify_output[:, : 2 + size]
        if self.model.device.type == "cuda":
            pinned = torch.empty(outputs.shape, dtype=torch.int64, pin_memory=True)
            outputs = pinned.copy_(outputs, non_blocking=True)
        else:
            outputs = outputs.clone()
        places = tuple(map(_row, sequences))
        return VerifyCopy(tuple(sequences), places, size, rows, outputs, clock.mark())

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
        return Unsampled(tuple(sequences), tuple(map(_row, sequences)), key, kind)

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
            self._choose(self._logits[step.key], step.kind, allowed)

        if self._graphs is None:
            choose()
        else:
            self._replay((step.kind, step.key), choose)
        return self._copy(step.sequences, max(step.rows) + 1, clock, step.rows)

    def _kind_of(self, prompts: Sequence[RunnerPrompt]) -> SamplerKind:
        """What a step of these rows must be able to express."""
        kind = widest_kind(kind_of(prompt.sampling) for prompt in prompts)
        # Among how many a token is drawn must not depend on what other rows need.
        drawn = kind not in LIKELIEST and self.model.batch_invariant
        return SamplerKind.FULL if drawn else kind

    def _step(
        self, kind: SamplerKind, rows: int, longest: int, waiting: int, size: int = 0
    ) -> GraphKey:
        if self._graphs is None:
            self._advance(kind, rows, longest, size)
            return kind, rows, longest, size
        # A kernel reads lengths on the device; operators read a bucket of slots.
        reach = self._pages * PAGE_SIZE
        if not self.reads_lengths:
            reach = min(reach, 1 << max(longest - 1, 255).bit_length())
        key = self._graph_for(kind, rows, reach, waiting, size)
        if key not in self._graphs:
            self._captured.append(key)
        self._replay(key, lambda: self._advance(*key))
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
            self._graphs.capture(key, work)
            done.copy_(kept[0])
            seen.copy_(kept[1])
        self._graphs.replay(key)

    @property
    def reads_lengths(self) -> bool:
        """Whether attention of steps is a kernel's, which knows of lengths what the device does."""
        return self.model.reads_lengths

    def _graph_for(
        self, kind: SamplerKind, rows: int, reach: int, waiting: int, size: int
    ) -> GraphKey:
        able = [
            key
            for key in self._captured
            if (key[0], key[3]) == (kind, size)
            and key[1] >= rows
            and key[2] >= reach
            and key[2] <= 2 * reach
        ]
        found = min(able, key=lambda key: key[1:], default=None)
        if found is not None and found[1] <= max(WIDEST_STAND_IN * rows, rows + waiting):
            return found
        wanted = min(rows + waiting, self.max_rows)
        bucket = next((each for each in ROW_BUCKETS if each >= wanted), self.max_rows)
        return kind, min(bucket, self.max_rows), reach, size

    def _advance(self, kind: SamplerKind, rows: int, longest: int, size: int) -> None:
        """One step of the first rows: feed their tokens, choose the next; those that are over
        stay. With a `size` the drafts behind them too."""
        if size > 0:
            self._verify(rows, longest, size)
            return
        model, state = self.model, self.state
        buffers, ops = state.buffers(rows), model.row_ops(rows)
        pages = DecodePages(state.tables[:rows], buffers.slot, longest)
        hidden = model.decode_rows(buffers.token, buffers.position, self.cache, pages)
        if kind in LIKELIEST:
            model.decoder.next_tokens(hidden, ops, buffers, kind is SamplerKind.GREEDY)
            state.remember(rows)
            return
        logits = model.decoder.logits(hidden, ops)
        if kind is SamplerKind.LOGITS:
            # Kept, so that a graph's memory for them is used for nothing else.
            self._logits[kind, rows, longest, size] = logits
        else:
            self._choose(logits, kind)

    def _choose(self, logits: Tensor, kind: SamplerKind, masks: Tensor | None = None) -> None:
        """The next tokens of the first rows from logits [n, V], of those that `masks` allow."""
        rows = len(logits)
        buffers = self.state.buffers(rows)
        chosen = self.state.sampler.narrow(0, rows).sample(logits, buffers.step, kind, masks)
        self.model.row_ops(rows).advance_rows(chosen, buffers)
        self.state.remember(rows)

    def _verify(self, rows: int, longest: int, size: int) -> None:
        model, state = self.model, self.state
        buffers, drafts = state.buffers(rows), state.narrow_drafts(rows)
        pages = DecodePages(state.tables[:rows], buffers.slot, longest)
        fed = drafts.input_ids[:, :size].flatten()
        hidden = model.decode_rows(fed, buffers.position, self.cache, pages)
        ops = model.row_ops(rows * size)
        logits = model.decoder.logits(hidden, ops)
        if ops.verify_rows is not None:
            ops.verify_rows(logits, buffers, drafts)
            return
        ngram.accept(logits.argmax(dim=-1).view(rows, size), buffers, drafts)
        ngram.draft(buffers, drafts, longest + 1)

    def _encode(
        self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt], clock: EventTimer
    ) -> None:
        """Have the features of all pictures in these chunks; those that are new are encoded
        together."""
        wanted = [
            (prompt, visual)
            for chunk, prompt in zip(chunks, prompts, strict=True)
            for visual in prompt.visuals_of(*prompt.image_tokens(chunk.start, chunk.stop))
            if visual.features is None
        ]
        if not wanted:
            return
        ran: dict[int, tuple[Mark, Mark]] = {}

        def encode(missing: list[int]) -> list[VisionFeatures]:
            start = clock.mark()
            made = self._encode_together([wanted[index][1] for index in missing])
            span = start, clock.mark()
            ran.update({id(wanted[index][0]): span for index in missing})
            return made

        found = self._vision_cache.features([visual.digest for _, visual in wanted], encode)
        for (prompt, visual), features in zip(wanted, found, strict=True):
            visual.features, visual.patches = features, None
            if id(prompt) in ran:
                prompt.vision.append(ran.pop(id(prompt)))

    @torch.inference_mode()
    def encode_some(self, prompt: RunnerPrompt, index: int, tokens: int, clock: EventTimer) -> bool:
        """Bring a large picture some blocks further, which take about as long as so many tokens of
        a prompt; returns whether its features are there."""
        visual, tower = prompt.visuals[index], self.model.vision
        assert tower is not None and visual.patches is not None, "it is not encoded yet"
        found = self._vision_cache.get(visual.digest)
        if found is None:
            start = clock.mark()
            if visual.encoding is None:
                patches = self._received(visual)
                visual.encoding = tower.begin(patches, tower.prepare(patches, [visual.grid]))
            blocks = blocks_worth(self.model.shape, math.prod(visual.grid), tokens)
            made = visual.encoding.advance(blocks)
            prompt.vision.append((start, clock.mark()))
            if made is None:
                return False
            (found,) = self._vision_cache.features([visual.digest], lambda _: [made])
        visual.features, visual.patches, visual.encoding = found, None, None
        return True

    def _received(self, visual: PromptVisual) -> Tensor:
        """A picture's patches on the device."""
        assert visual.patches is not None, "they are there until it is encoded"
        if visual.ready is not None:  # made on another stream, whose memory it goes back to
            stream = torch.cuda.current_stream(self.model.device)
            stream.wait_event(visual.ready)
            visual.patches.record_stream(stream)
        return visual.patches.to(self.model.device)

    def _encode_together(self, visuals: Sequence[PromptVisual]) -> list[VisionFeatures]:
        """Run the vision tower over pictures of any sizes, packed; one by one where no result may
        depend on what else is there."""
        invariant = self.model.batch_invariant
        if invariant and len(visuals) > 1:
            return [self._encode_together([visual])[0] for visual in visuals]
        patches = []
        for visual in visuals:
            # Libraries look at where in memory a matrix begins: a copy of it begins like any other.
            patches.append(self._received(visual).to(self.model.dtype, copy=invariant))
        together = patches[0] if len(patches) == 1 else torch.cat(patches)
        grids, tower = tuple(each.grid for each in visuals), self.model.vision
        assert tower is not None, "a text model has no pictures"

        def make() -> Pass:
            ready = tower.prepare(together, grids)

            def work(given: Sequence[Tensor]) -> Sequence[Tensor]:
                made = tower.run(given[0], ready)
                return made.embeds, *made.deepstack

            return work

        layers = self._pass(("pictures", grids), [together], make)
        sizes = [visual.num_tokens for visual in visuals]
        if len(visuals) == 1 and self._shapes is None:
            return [VisionFeatures(layers[0], tuple(layers[1:]))]
        # Copies: one picture that is kept must not hold the memory of all, nor a graph's.
        parts = zip(*(layer.split_with_sizes(sizes) for layer in layers), strict=True)
        return [
            VisionFeatures(embeds.clone(), tuple(layer.clone() for layer in deepstack))
            for embeds, *deepstack in parts
        ]

    def _pack(self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt]) -> _Packed:
        ids, positions, slots, places, seen = [], [], [], [], []
        features: list[VisionFeatures] = []
        starts, context_starts, last = [0], [0], []
        behind = any(chunk.start > 0 for chunk in chunks)
        for chunk, prompt in zip(chunks, prompts, strict=True):
            start, stop, first = chunk.start, chunk.stop, starts[-1]
            own = _slots_of(chunk.sequence.pages, stop)
            ids.append(prompt.ids[start:stop])
            positions.append(prompt.layout.positions[:, start:stop])
            slots.append(own[start:])
            if behind:
                seen.append(own)
            low, high = prompt.image_tokens(start, stop)
            if high > low:
                places.append(prompt.layout.visual_places[low:high] - start + first)
                features += [each.features_of(low, high) for each in prompt.visuals_of(low, high)]
            starts.append(first + stop - start)
            context_starts.append(context_starts[-1] + stop)
            if chunk.is_last:
                last.append(starts[-1] - 1)
        none = torch.zeros(0, dtype=torch.int64)
        host = [
            torch.cat(ids),
            torch.cat(positions, 1),
            torch.cat(slots),
            torch.cat(places) if places else none,
            torch.cat(seen) if seen else none,
            torch.tensor(starts),
            torch.tensor(context_starts),
            torch.tensor(last, dtype=torch.int64),
        ]
        if self.model.batch_invariant:
            seen_pages = [chunk.sequence.pages[: pages_for(chunk.stop)] for chunk in chunks]
            tables = [torch.tensor(pages) for pages in seen_pages]
            host.append(pad_sequence(tables, True, SCRATCH_PAGE))
        sent = upload(host, self.model.device)
        return _Packed(
            ids=sent[0],
            positions=sent[1],
            slots=sent[2],
            places=sent[3],
            prompts=PackedPrompts(
                lengths=[chunk.stop - chunk.start for chunk in chunks],
                contexts=[chunk.start for chunk in chunks],
                starts=sent[5].to(torch.int32),
                context_starts=sent[6].to(torch.int32),
                slots=sent[4] if behind else None,
                flash=self.model.flash_decode,
                tables=sent[8].to(torch.int32) if self.model.batch_invariant else None,
            ),
            features=join_features(features) if features else None,
            last=sent[7],
        )

    def _copy(
        self,
        sequences: Sequence[ScheduledSequence],
        rows: int,
        clock: EventTimer,
        places: tuple[int, ...] | None = None,
    ) -> TokenCopy:
        """Start copying the rows' last tokens to the host.

        Args:
            places: the rows of sequences of which some may be over since.
        """
        tokens: Tensor | list[int]
        if self.model.device.type == "cuda":
            pinned = torch.empty(rows, dtype=torch.int64, pin_memory=True)
            tokens = pinned.copy_(self.state.token[:rows], non_blocking=True)
        else:
            tokens = self.state.token[:rows].tolist()
        if places is None:
            places = tuple(_row(sequence) for sequence in sequences)
        return TokenCopy(tuple(sequences), places, tokens, clock.mark())


def blocks_worth(shape: ModelShape, patches: int, tokens: int) -> int:
    """Blocks of the vision tower over one picture that take about as long as the decoder takes for
    so many tokens; one at least. Attention is taken to run at half the speed of products."""
    tower, text = shape.vision, shape.text
    assert tower is not None, "only models with a tower have pictures"
    width = tower.hidden_size
    ups = 3 if tower.gated_mlp else 2
    block = patches * (4 * width**2 + ups * width * tower.intermediate_size)
    block += 2 * 2 * patches**2 * width
    layer = 2 * text.q_size + 2 * text.kv_size + 3 * text.intermediate_size
    worth: int = tokens * text.num_layers * text.hidden_size * layer // block
    return max(1, worth)


def _row(sequence: ScheduledSequence) -> int:
    assert sequence.row is not None, "only sequences that run are given to the runner"
    return sequence.row


def _longest(sequences: Sequence[ScheduledSequence]) -> int:
    """Tokens of the longest of them at most, those that a step feeds included."""
    return max(
        each.num_prompt_tokens + each.num_scheduled + each.num_ahead - 1 for each in sequences
    )


def _penalised(prompt: RunnerPrompt) -> bool:
    return prompt.sampling.repetition_penalty != 1.0


def _slots_of(pages: Sequence[int], count: int) -> Tensor:
    """The pool's slots of the first `count` tokens of a sequence, int64."""
    offsets = torch.arange(PAGE_SIZE)
    used = torch.tensor(pages[: pages_for(count)])
    return (used[:, None] * PAGE_SIZE + offsets).flatten()[:count]
