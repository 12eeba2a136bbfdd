"""Which sequences run in the next step: waiting -> prefilling -> running -> finished.

A step runs prompts of at most `max_prefill_tokens` tokens and then one token of every running row,
so a running row waits for no more than that many prompt tokens, however long prompts are. Requests
start in the order they came: one whose pages are not free yet is not overtaken by a smaller one.
A sequence gets the pages of its whole answer when it starts, so nothing that runs ever has to be
stopped for want of a page; a pool that is full makes requests wait. Pages of its beginning that
others have computed are shared and not run again (prefix cache).

Where nobody reads along, as of a folder's captions, no row minds how long it waits: steps hold more
prompt tokens, and prompts start when several can, as passes over few make less of the device.

The host knows when a row has taken all tokens it may take. That a stop token ended an answer it
learns later, from what it reads; the row idles until then.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwencli.engine.cache.paged_kv import PAGE_SIZE, PagePool, pages_for
from qwencli.engine.cache.prefix_cache import page_keys
from qwencli.engine.request import Batch, Key, Limits, PromptChunk, RequestId, Sequence

if TYPE_CHECKING:
    from qwencli.engine.cache.recurrent_state import SnapshotPool

# Up to which the ends of prompts are kept where sequences keep states: each copy is read by few.
FEW_SEQUENCES = 3
# Tokens at a prompt's end that open the answer, and that its next turn may be without: templates
# leave thoughts out that are over, empty ones among them.
OPENING = 8
# Ends of answers that are looked for; what is kept of them may be gone before.
ENDS_KNOWN = 64


@dataclass(frozen=True)
class _End:
    """What is kept of an answer's end: its page, of which `tokens` are written, and its state."""

    key: bytes
    tokens: int
    page: int
    state: int


class Scheduler:
    """Holds every sequence from `add` until `finish`.

    Args:
        states: slots for what sequences keep beside pages, one a row at least; None = nothing.
    """

    def __init__(self, limits: Limits, pool: PagePool, states: SnapshotPool | None = None) -> None:
        self.limits, self.pool, self.states = limits, pool, states
        self.waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._prefill_tokens = limits.max_prefill_tokens
        self._running: list[Sequence] = []
        self._rows: list[Sequence | None] = [None] * limits.max_rows
        # Of which only so many first ones are run while memory is short; sequences in others wait
        # until one of these is free. See `run_fewer`.
        self.step_rows = limits.max_rows
        self._released: set[int] = set()
        # Whose row has to forget where it was: it idles until its prompt is through.
        self._between: list[Sequence] = []
        self._restored: list[tuple[int, int]] = []
        # What answers end with behind the last whole page, by the key of that page.
        self._ends: OrderedDict[bytes, list[Key]] = OrderedDict()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self._prefilling or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that have a row, prefilled or not."""
        return (*self._running, *self._prefilling)

    def fits(self, num_tokens: int) -> bool:
        """Whether the whole pool could hold a sequence of this many tokens."""
        return pages_for(num_tokens) <= self.pool.capacity

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence.max_tokens), "the caller refuses what can never start"
        if not self.has_unfinished:
            self.step_rows = self.limits.max_rows  # what took the memory may be gone
        self.waiting.append(sequence)

    def schedule(self, *, streamed: bool = True, coming: int = 0) -> Batch | None:
        """The next step; None if nothing can be done but wait for what is being read.

        Args:
            streamed: whether somebody reads along.
            coming: requests that are about to be added.
        """
        moves = self._compact()
        limits = self.limits
        self._prefill_tokens = limits.max_prefill_tokens if streamed else limits.most_prefill_tokens
        if streamed or self._room_for_several(coming):
            self._admit()
        prefill, encode = self._chunks()
        begun = {chunk.sequence for chunk in prefill}
        decode = tuple(
            each
            for each in self._running
            if each.num_scheduled < each.max_new_tokens
            and not (each.constrained and each in begun)
            and self._has_turn(each)
        )
        if not prefill and not decode and encode is None:
            return None
        for sequence in decode:
            sequence.num_scheduled += 1
        # A row taken again forgets as well: the steps until its prompt is through run it idle.
        forgetful = {each.row for each in self._between if each.row is not None}
        released = tuple(sorted(self._released - {place for _, place in moves} | forgetful))
        self._released.clear()
        self._between.clear()
        restored, self._restored = tuple(self._restored), []
        return Batch(moves, prefill, decode, released, encode, restored, self._kept(prefill))

    def _kept(self, prefill: tuple[PromptChunk, ...]) -> tuple[tuple[int, int], ...]:
        """States to keep once these prompts have run, (from, to)."""
        copies = []
        for chunk in prefill:
            sequence = chunk.sequence
            if self.states is None or sequence.state is None or chunk.stop != sequence.keep_at:
                continue
            slot = self.states.keep(sequence.page_keys[chunk.stop // PAGE_SIZE - 1])
            if slot is not None:
                copies.append((sequence.state, slot))
        return tuple(copies)

    def unkept(self, sequence: Sequence, stop: int) -> None:
        """The chunk of a sequence up to `stop` has failed: so has what was to be kept of it."""
        if self.states is not None and stop == sequence.keep_at and stop:
            self.states.forget(sequence.page_keys[stop // PAGE_SIZE - 1])

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, at whatever stage it is; its row and pages are free from the next
        step on."""
        for holder in (self._running, self._prefilling, self.waiting):
            if sequence in holder:
                holder.remove(sequence)
        if sequence.row is not None:
            self._rows[sequence.row] = None
            self._released.add(sequence.row)
            sequence.row = None
        self.pool.free(sequence.pages)
        sequence.pages = []
        if sequence.state is not None and self.states is not None:
            self.states.free(sequence.state)
            sequence.state = None

    def go_on(self, running: Sequence, after: Sequence, num_computed: int) -> None:
        """Let a sequence whose round is over go on as `after`, in its row, its pages and its state:
        of that one's prompt the first `num_computed` tokens are there.

        Steps that are on their way still run the old one, in vain.
        """
        assert running.row is not None, "it has given tokens"
        after.row, after.pages, after.state = running.row, running.pages, running.state
        after.num_cached, after.num_computed = running.num_cached, num_computed
        self._rows[running.row] = after
        self._running.remove(running)
        running.row, running.pages, running.state = None, [], None
        self._prefilling.append(after)
        self._between.append(after)

    def run_fewer(self, sequences: Iterable[Sequence], step_rows: int) -> None:
        """A step of these could not be run: they take it again, no more than so many at a time."""
        self.step_rows = step_rows
        for sequence in sequences:
            sequence.num_scheduled -= 1

    def release_all(self) -> None:
        """Have all rows forget what they ran: nobody knows what a step that failed left of them."""
        self._released.update(range(len(self._rows)))

    def requeue(self, sequence: Sequence) -> None:
        """Put a sequence whose prefill failed back in front of those that wait."""
        self.finish(sequence)
        sequence.num_cached = sequence.num_computed = sequence.num_scheduled = 0
        self.waiting.appendleft(sequence)

    def written(self, sequence: Sequence, num_tokens: int) -> None:
        """The first tokens of a sequence are in its pages, or on the way there: its whole pages
        that have keys are there for others from now on."""
        whole = min(num_tokens // PAGE_SIZE, len(sequence.page_keys))
        first = sequence.num_cached // PAGE_SIZE
        self.pool.publish(sequence.pages[first:whole], sequence.page_keys[first:whole])

    def keep_end(self, sequence: Sequence, rest: list[Key]) -> None:
        """An answer is over: leave its state, and the page that it has begun, to the next turn of
        its chat, while few sequences run.

        Args:
            rest: keys of the tokens in that page; those of whole pages are `sequence.page_keys`.
        """
        if self.states is None or sequence.state is None or not self._few():
            return
        whole = sequence.page_keys
        before = whole[-1] if whole else b""
        if rest:
            self._ends[before] = rest
            self._ends.move_to_end(before)
            if len(self._ends) > ENDS_KNOWN:
                self._ends.popitem(last=False)
            (end,) = page_keys(rest, len(rest), before)
            self.pool.publish([sequence.pages[len(whole)]], [end])
        else:
            end = before
        self.states.give(end, sequence.state)
        sequence.state = None

    def _few(self) -> bool:
        count = len(self._running) + len(self._prefilling) + len(self.waiting)
        return count <= FEW_SEQUENCES

    def _end_before(self, sequence: Sequence, pages: int) -> tuple[bytes, int]:
        """Whether a sequence begins with a whole answer that is over, with so many whole pages: the
        key of its end, and how many tokens that has in the next page; 0 = it does not."""
        before = sequence.page_keys[pages - 1] if pages else b""
        rest, start = self._ends.get(before, []), pages * PAGE_SIZE
        there = list(sequence.keys[start : start + len(rest)]) == rest
        # Its last token is run in any case.
        if not rest or not there or start + len(rest) >= sequence.num_prompt_tokens:
            return b"", 0
        return page_keys(rest, len(rest), before)[0], len(rest)

    def find(self, request: RequestId) -> Sequence | None:
        for sequence in (*self.running, *self.waiting):
            if sequence.request == request:
                return sequence
        return None

    def _room_for_several(self, coming: int) -> bool:
        """Whether as many prompts can start as shall together, or all there are; rows that end make
        room."""
        wanted = min(
            self.limits.unstreamed_prompts, len(self._running) // 8, len(self.waiting) + coming
        )
        if not self.waiting or wanted < 2:
            return True
        first = self.waiting[0]
        pages = pages_for(first.max_tokens)
        # Of large ones a step holds few, and the pool: rows would wait for a crowd that cannot be.
        in_step = self._prefill_tokens // first.num_prompt_tokens
        wanted = min(wanted, in_step, self.pool.capacity // pages // 8)
        free = self._rows[: self.step_rows].count(None)
        return min(free, self.pool.num_free // pages) >= wanted

    def _admit(self) -> None:
        """Give waiting sequences a row and pages, in order, as far as this step's tokens go."""
        tokens = sum(each.num_prompt_tokens - each.num_computed for each in self._prefilling)
        while (
            self.waiting
            and None in self._rows[: self.step_rows]
            and tokens < self._prefill_tokens
            and len(self._prefilling) < self.limits.max_prompts
        ):
            first = self.waiting[0]
            if self._prefilling and (first.alone or self._prefilling[-1].alone):
                break
            # The last token is run in any case: its logits are wanted.
            keys = first.page_keys[: (first.num_prompt_tokens - 1) // PAGE_SIZE]
            shared = self.pool.share(keys)
            there, source = len(shared), None
            end = self._claim_end(first, there)
            if self.states is not None and end is None:
                count, source = self.states.find(keys[:there])
                self.pool.free(shared[count:])
                shared = shared[:count]
            cached = len(shared) * PAGE_SIZE
            if end is not None:
                cached += end.tokens
                shared = [*shared, end.page]
            left = first.num_prompt_tokens - cached
            # A prompt is cut only if it would be cut in a step of its own too.
            whole = left <= self._prefill_tokens - tokens
            own = None
            if whole or not self._prefilling:
                own = self.pool.allocate(pages_for(first.max_tokens) - len(shared))
            if own is None:
                if end is not None and self.states is not None:
                    self.pool.publish([end.page], [end.key])
                    self.states.give(end.key, end.state)
                self.pool.free(shared)
                break
            self.waiting.popleft()
            first.pages = shared + own
            first.num_cached = first.num_computed = cached
            if self.states is not None:
                first.state = self.states.allocate() if end is None else end.state
                assert first.state is not None, "there are as many as rows"
                if source is not None:
                    self._restored.append((source, first.state))
                first.keep_at = self._keep_at(first, there, cached // PAGE_SIZE)
            first.row = self._rows.index(None)
            self._rows[first.row] = first
            self._prefilling.append(first)
            tokens += left
        self._leave_odd()

    def _claim_end(self, sequence: Sequence, pages: int) -> _End | None:
        """What is kept of the end of an answer that a sequence begins with, see `_end_before`; it
        is the sequence's from now on."""
        key, tokens = self._end_before(sequence, pages)
        if not tokens or self.states is None:
            return None
        page = self.pool.claim(key)
        if page is None:
            return None
        state = self.states.claim(key)
        if state is None:
            self.pool.free([page])
            return None
        return _End(key, tokens, page, state)

    def _keep_at(self, sequence: Sequence, there: int, used: int) -> int:
        """After how many tokens the state of a sequence that starts is worth keeping, see
        `Sequence`: where its beginning parts from one that was here before, or at the end of its
        prompt while few run, as in a chat. A chunk of a prompt must end there.

        Args:
            there: pages of its beginning that others have computed. used: those it goes on from.
        """
        if there > used:
            return there * PAGE_SIZE
        whole = max(0, sequence.num_prompt_tokens - 1 - OPENING) // PAGE_SIZE
        whole = min(whole, len(sequence.page_keys))
        return whole * PAGE_SIZE if self._few() and whole > used else 0

    def _leave_odd(self) -> None:
        """Let the last of some equal prompts start a step later, see `Limits`."""
        alike = {(each.num_prompt_tokens, each.num_computed) for each in self._prefilling}
        count = len(self._prefilling)
        new = all(each.num_computed == each.num_cached for each in self._prefilling)
        if self.limits.powers_of_two and self._running and len(alike) == 1 and new:
            for sequence in self._prefilling[: (1 << (count.bit_length() - 1)) - 1 : -1]:
                self.requeue(sequence)

    def _chunks(self) -> tuple[tuple[PromptChunk, ...], Sequence | None]:
        """Parts of prompts that run in this step, or whose large picture does."""
        left: float = self._prefill_tokens
        chunks: list[PromptChunk] = []
        for sequence in tuple(self._prefilling):
            start = sequence.num_computed
            stop = min(sequence.num_prompt_tokens, start + self.limits.tokens_within(start, left))
            if start < sequence.keep_at < stop:
                stop = sequence.keep_at
            if stop == start:
                break
            if sequence.visual_before(stop) is not None:
                if chunks:
                    break
                return (), sequence
            chunks.append(PromptChunk(sequence, start, stop))
            left -= self.limits.cost(start, stop)
            sequence.num_computed = stop
            if sequence.is_prefilled:
                sequence.num_scheduled = 1
                self._prefilling.remove(sequence)
                self._running.append(sequence)
        return tuple(chunks), None

    def _has_turn(self, sequence: Sequence) -> bool:
        return sequence.row is not None and sequence.row < self.step_rows

    def _compact(self) -> tuple[tuple[int, int], ...]:
        """Move the last rows to free places in front, once half of the rows in use are idle: a step
        runs all rows up to the last one. Rows that wait for a turn get one."""
        taken = [row for row, sequence in enumerate(self._rows) if sequence is not None]
        if not taken or (2 * len(taken) > taken[-1] + 1 and taken[-1] < self.step_rows):
            return ()
        moves = []
        last = min(len(taken), self.step_rows)
        places = [row for row in range(last) if self._rows[row] is None]
        for place, row in zip(places, reversed(taken), strict=False):
            sequence = self._rows[row]
            if row < last or sequence is None:
                break
            self._rows[place], self._rows[row] = sequence, None
            sequence.row = place
            self._released.add(row)
            moves.append((row, place))
        return tuple(moves)
