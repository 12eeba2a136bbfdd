"""Many requests in flight: schedules, runs steps, hands out what they gave.

A step is enqueued before the one in front of it is read, so the device works while the host makes
text of tokens and chooses who runs next. What fails, fails alone: a prompt that cannot be prepared,
one that does not fit, an answer that cannot be put into words.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from qwencli.config import SamplingParams
from qwencli.engine.cache.paged_kv import PAGE_SIZE
from qwencli.engine.cache.prefix_cache import page_keys
from qwencli.engine.constrained import TokenMatcher
from qwencli.engine.device_memory import (
    is_device_lost,
    is_out_of_memory,
    out_of_memory_error,
    release,
)
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.frontend.model_files import ModelFiles
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.input_processor import InputProcessor
from qwencli.engine.machine.python_runtime import PASS_TURN_S, STEP_TURN_S, undisturbed
from qwencli.engine.native.batch_plan import captions_that_fit
from qwencli.engine.request import (
    Batch,
    Key,
    PromptChunk,
    RequestId,
    RequestSource,
    Sequence,
    StepOutput,
)
from qwencli.engine.response import ResponseBuilder, StepLogprobs
from qwencli.engine.runner import ModelRunner, TokenCopy, Unsampled, VerifyCopy
from qwencli.engine.runner_prompt import RunnerPrompt
from qwencli.engine.scheduler import Scheduler
from qwencli.engine.spec_decode.policy import Acceptance, BatchDraftPolicy
from qwencli.errors import OutOfMemoryError, PromptTooLongError, QwenCliError, RequestError
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, Speculation
from qwencli.tracing import span

# What a device that is short of memory is given at least.
FEWEST_PREFILL_TOKENS = 256
# Of a step's time, how much a piece of a stream may take: its text here, and its event in a server,
# whose thread has the interpreter meanwhile. Where streams are more than fit, each is told several
# tokens at once, those that wait for longest first.
PIECE_S = 0.0002
# From so many streams on, writing them takes as much of the interpreter as a step. 32 of them gain
# nothing from longer turns.
MANY_STREAMS = 64


@dataclass
class _Active:
    """A request that the scheduler knows.

    Args:
        rest: see `PreparedInput`.
        began: when the device began with it.
        acceptance: of its drafts. num_drafted, num_accepted: see `Speculation`.
    """

    sequence: Sequence
    answer: ResponseBuilder
    prompt: RunnerPrompt
    rest: list[Key] | None
    began: Mark = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass
class _Step:
    """A step on its way: what to read when it is through.

    Args:
        unsampled: its half that waits until the step in front is read: some rows may choose only
            what suits their token before.
        alone: whether nothing but a token or more of each row runs in it.
    """

    copies: list[TokenCopy | VerifyCopy] = field(default_factory=list)
    alone: bool = True
    unsampled: Unsampled | None = None


class EngineCore:
    """Implements `add`, `step`, `abort` and `has_unfinished` of an engine that runs batches.

    Args:
        prepare: see `InputProcessor`.
        drafts: how many drafts steps of greedy rows check; None = nothing is drafted.
    """

    def __init__(
        self,
        files: ModelFiles,
        runner: ModelRunner,
        scheduler: Scheduler,
        effective: EffectiveConfig,
        load_s: float,
        prepare: Callable[[GenerationRequest], tuple[Prompt, SamplingParams, TokenMatcher | None]],
        drafts: BatchDraftPolicy | None = None,
    ) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._effective, self._load_s = effective, load_s
        self._inputs = InputProcessor(files, runner.model.shape, str(effective.device), prepare)
        self._ids = itertools.count()
        self._active: dict[RequestId, _Active] = {}
        self._failed: list[StepOutput] = []
        self._num_streams = 0
        # Those with tokens that no piece has told, and when pieces were told.
        self._untold: dict[RequestId, _Active] = {}
        self._told_s = float("-inf")
        self._step: _Step | None = None
        self._drafts = drafts
        # When the last step that was read had ended.
        self._read_mark: Mark = None
        self._said_short = False
        self._clock: EventTimer | None = None

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
        """Take a request; everything that is wrong with it comes back from `step`.

        Args:
            stream: see `Engine`. Making text and outputs of each token takes as long as a step of
                many rows; an answer's text made at its end takes a fraction.
        """
        number = next(self._ids)
        self._inputs.add(number, request, stream)
        self._inputs.begin(len(self._scheduler.waiting))
        return number

    @property
    def max_rows(self) -> int:
        return self._scheduler.limits.max_rows

    @property
    def kv_pages(self) -> tuple[int, int]:
        """Pages in use, and all there are."""
        pool = self._scheduler.pool
        return pool.capacity - pool.num_free, pool.capacity

    @property
    def has_unfinished(self) -> bool:
        return bool(self._inputs or self._active or self._failed)

    def abort(self, request: RequestId) -> None:
        """Forget a request; nothing more comes of it. An id that is over already is fine."""
        self._inputs.abort(request)
        active = self._active.get(request)
        if active is not None:
            self._forget(active)
        self._failed = [output for output in self._failed if output.request != request]

    def step(self) -> list[StepOutput]:
        """Enqueue a step, read the one in front; returns what that gave."""
        # Where nobody reads along the other threads prepare pictures, which can wait.
        writes_many = self._num_streams >= MANY_STREAMS
        with undisturbed(STEP_TURN_S if writes_many else PASS_TURN_S):
            return self._run_ahead()

    def _run_ahead(self) -> list[StepOutput]:
        self._take_prepared()
        num_ready = len(self._scheduler.waiting)
        self._inputs.begin(num_ready)
        self._inputs.share_lock(num_ready)
        with span("schedule"):
            batch = self._scheduler.schedule(
                streamed=self._num_streams > 0, coming=len(self._inputs)
            )
        outputs: list[StepOutput] = []
        try:
            step = None if batch is None else self._run(batch)
            if self._step is not None:
                with span("read step"):
                    self._read(self._step, outputs)
            if step is not None and step.unsampled is not None:
                with span("sample"):
                    self._sample(step, step.unsampled)
        except Exception as error:
            if is_device_lost(error):
                raise  # for all of them
            step = None
            self._fail_running(error)
        self._step = step
        outputs += self._failed
        self._failed = []
        if step is None and not outputs:
            self._inputs.wait()
        return outputs

    def close(self) -> None:
        self._inputs.close()

    def _take_prepared(self) -> None:
        """Hand prompts that are ready to the scheduler, in the order they came."""
        for request, ready in self._inputs.take():
            if isinstance(ready, Exception):
                self._failed.append(StepOutput(request, error=self._typed(ready, "preparing it")))
                continue
            sequence = Sequence(
                request,
                len(ready.prompt.ids),
                ready.prompt.sampling.max_new_tokens,
                ready.page_keys,
                large_visuals=ready.prompt.large_visuals,
                reserved=ready.answer.sampling.max_new_tokens
                - ready.prompt.sampling.max_new_tokens,
                constrained=ready.answer.matcher is not None,
                keys=ready.keys,
            )
            if not self._scheduler.fits(sequence.max_tokens):
                self._failed.append(StepOutput(request, error=self._too_long(sequence)))
                continue
            active = _Active(sequence, ready.answer, ready.prompt, ready.rest)
            if self._drafts is not None:
                active.acceptance = self._drafts.new_text()
            self._active[request] = active
            self._num_streams += active.answer.stream
            self._scheduler.add(sequence)

    def _run(self, batch: Batch) -> _Step:
        if self._clock is None:
            self._clock = EventTimer(self._effective.device)
        step = _Step(alone=not batch.prefill and batch.encode is None)
        self._rearrange(batch)
        if batch.encode is not None:
            with span("vision"), undisturbed():
                self._encode(batch.encode, self._clock)
        if batch.prefill:
            with span("prefill", prompts=len(batch.prefill)), undisturbed():
                self._prefill(batch.prefill, self._clock, step)
            self._runner.keep(batch.kept)
        decode = [each for each in batch.decode if each.row is not None]
        if decode:
            with span("decode step", rows=len(decode)):
                self._decode(decode, self._clock, step)
        return step

    def _encode(self, sequence: Sequence, clock: EventTimer) -> None:
        """Bring a sequence's next large picture some way through the vision tower."""
        active, limits = self._active[sequence.request], self._scheduler.limits
        index = sequence.visual_before(sequence.num_prompt_tokens)
        assert index is not None, "the scheduler has one in mind"
        active.began = clock.mark() if active.began is None else active.began
        try:
            done = self._runner.vision.encode_some(
                active.prompt, index, limits.max_prefill_tokens, clock
            )
        except Exception as error:
            if is_device_lost(error):
                raise  # for all of them
            failure = self._typed(error.with_traceback(None), "encoding its pictures")
        else:
            if done:
                sequence.large_visuals = [
                    each for each in sequence.large_visuals if each[2] != index
                ]
            return
        # Outside the handler: until it ends, the traceback holds the tensors that must go.
        active.prompt.visuals[index].encoding = None
        self._release()
        if isinstance(failure, OutOfMemoryError) and not sequence.alone:
            sequence.alone = True  # once more, with what was given back
            self._scheduler.requeue(sequence)
        else:
            self._fail(active, failure)

    def _rearrange(self, batch: Batch) -> None:
        """Rows take their places; once more, with what was given back, where memory is short."""
        for last_try in (False, True):
            try:
                self._runner.rearrange(batch.moves, batch.released, batch.restored)
            except (RuntimeError, MemoryError) as error:
                if last_try or not is_out_of_memory(error):
                    raise
            else:
                return
            self._release()

    def _decode(self, decode: list[Sequence], clock: EventTimer, step: _Step) -> None:
        """Run a token of each; where memory does not suffice even when what is free has been given
        back, fewer rows from the next step on."""
        self._runner.most_rows = self._scheduler.step_rows
        waiting = len(self._scheduler.waiting) + len(self._inputs)
        for _ in range(2):
            prompts = [self._active[each.request].prompt for each in decode]
            size, self._runner.may_have_advanced = 0, False
            try:
                if any(each.constrained for each in decode):
                    step.unsampled = self._runner.decode_logits(decode, prompts, waiting)
                elif size := self._draft_size(decode, prompts):
                    for each in decode:
                        each.num_ahead += size - 1
                    step.copies.append(self._runner.verify(decode, prompts, size, waiting, clock))
                else:
                    step.copies.append(self._runner.decode(decode, prompts, waiting, clock))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = self._no_memory_for(decode, error)
            else:
                return
            # Outside the handler: until it ends, the traceback holds the tensors that must go.
            self._release()
            self._drafts = None  # steps of several tokens need graphs of their own
            for each in decode:
                each.num_ahead -= max(0, size - 1)
            if self._runner.may_have_advanced:
                break
            waiting = 0
        self._run_fewer(decode, failure, advanced=self._runner.may_have_advanced)

    def _no_memory_for(
        self, sequences: SequenceOf[Sequence], error: BaseException
    ) -> OutOfMemoryError:
        doing = f"running {len(sequences)} answers at once"
        return out_of_memory_error(self._effective.device, doing, error)

    def _run_fewer(
        self, sequences: list[Sequence], failure: OutOfMemoryError, *, advanced: bool
    ) -> None:
        """A step of these has found no memory: half of its rows take it again, and the others when
        there is a row free. One that finds none alone has failed, and so have all where nobody
        knows whose token was chosen."""
        active = [self._active[each.request] for each in sequences]
        rows = self._runner.rows_of(sequences)
        if advanced or rows == 1:
            for each in active:
                self._fail(each, failure)
            return
        fewer = rows // 2
        self._scheduler.run_fewer(sequences, fewer)
        self._say_short(active[0], "one answer runs" if fewer == 1 else f"{fewer} answers run")

    def _say_short(self, active: _Active, what: str) -> None:
        """Tell one of them, once, that memory is short."""
        if not self._said_short:
            self._said_short = True
            active.answer.notes.append(f"memory is short: {what} at a time from here on")

    def _draft_size(self, decode: list[Sequence], prompts: list[RunnerPrompt]) -> int:
        """How many tokens of each row the next step checks; 0 = it is an ordinary one."""
        may_draft = self._runner.may_draft
        drafted = (may_draft(prompt.sampling) and not prompt.with_logprobs for prompt in prompts)
        if self._drafts is None or not all(drafted):
            return 0
        texts = [self._active[each.request].acceptance for each in decode]
        return self._drafts.next(self._runner.rows_of(decode), texts)

    def _sample(self, step: _Step, unsampled: Unsampled) -> None:
        """Choose the tokens of a step whose logits the device works on meanwhile; where memory is
        short as `_decode`."""
        assert self._clock is not None, "steps have run"
        for _ in range(2):
            matchers = [
                (active.answer.matcher, row)
                for sequence, row in zip(unsampled.sequences, unsampled.rows, strict=True)
                if (active := self._still(sequence)) and active.answer.matcher is not None
            ]
            self._runner.may_have_advanced = False
            try:
                step.copies.append(self._runner.sample(unsampled, matchers, self._clock))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = self._no_memory_for(unsampled.sequences, error)
            else:
                return
            # Outside the handler: until it ends, the traceback holds the tensors that must go.
            self._release()
            if self._runner.may_have_advanced:
                break
        left = [each for each in unsampled.sequences if self._still(each)]
        if left:
            # States went on with the logits.
            advanced = self._runner.may_have_advanced or self._runner.states is not None
            self._run_fewer(left, failure, advanced=advanced)

    def _prefill(self, chunks: tuple[PromptChunk, ...], clock: EventTimer, step: _Step) -> None:
        """Run prompts; where memory does not suffice, fewer of them, and one that does not fit
        even alone, tried twice, fails. So does one of which the pass fails in another way."""
        active = [self._active[chunk.sequence.request] for chunk in chunks]
        start = clock.mark()
        for each in active:
            each.began = start if each.began is None else each.began
        try:
            copy = self._runner.prefill(chunks, [each.prompt for each in active], clock)
        except Exception as error:
            if is_device_lost(error):
                raise  # for all of them
            failure = self._typed(error.with_traceback(None), "running its prompt")
            tokens = sum(chunk.stop - chunk.start for chunk in chunks)
            if is_out_of_memory(error):
                failure = out_of_memory_error(
                    self._effective.device,
                    f"running {tokens} tokens of prompts",
                    error,
                    num_image_tokens=max(each.answer.prompt.num_image_tokens for each in active),
                )
        else:
            for chunk in chunks:
                self._scheduler.written(chunk.sequence, chunk.stop)
            if copy is not None:
                step.copies.append(copy)
            return
        # Outside the handler: until it ends, the traceback holds the tensors that must go.
        self._release()
        for chunk in chunks:
            self._scheduler.unkept(chunk.sequence, chunk.stop)
        again = len(active) > 1
        if isinstance(failure, OutOfMemoryError):
            said = self._back_off(chunks)
            if said is not None:
                self._say_short(active[0], said)
            # What nothing can be cut of may have enough in what was given back: once more, alone.
            once_more = said is None and not active[0].sequence.alone
            active[0].sequence.alone |= once_more
            again = said is not None or once_more
        elif again:
            for each in active:
                each.sequence.alone = True
        if not again:
            self._fail(active[0], failure)
            return
        for each in reversed(active):
            if each.sequence.goes_on:
                # What it began with is in pages that it would give back.
                self._fail(each, failure)
            else:
                self._scheduler.requeue(each.sequence)

    def _release(self) -> None:
        self._runner.forget_shapes()
        release(self._effective.device)

    def _back_off(self, chunks: tuple[PromptChunk, ...]) -> str | None:
        """Run less at a time from now on; says what, or None where nothing can be cut further."""
        scheduler = self._scheduler
        tokens = sum(chunk.stop - chunk.start for chunk in chunks)
        if len(chunks) > 1:
            fewer = len(chunks) // 2
            scheduler.limits = replace(scheduler.limits, max_prompts=fewer)
            return f"{fewer} prompts run"
        if tokens > FEWEST_PREFILL_TOKENS:
            # What was too long may be three times as long as steps are where somebody reads along.
            fewer = max(tokens // 2, FEWEST_PREFILL_TOKENS)
            fewer = min(fewer, scheduler.limits.max_prefill_tokens)
            scheduler.limits = replace(
                scheduler.limits, max_prefill_tokens=fewer, unstreamed_prefill_tokens=None
            )
            return f"{fewer} tokens of prompts run"
        return None

    def _read(self, step: _Step, outputs: list[StepOutput]) -> None:
        """What a step gave goes to `outputs`."""
        for copy in step.copies:
            before, self._read_mark = self._read_mark, copy.mark
            if isinstance(copy, VerifyCopy):
                given = self._verified(copy, before if step.alone else None)
                told: list[StepLogprobs | None] = [None] * len(given)
            else:
                given = [[token] for token in copy.read()]
                told = copy.read_logprobs()
            for sequence, tokens, logprobs in zip(copy.sequences, given, told, strict=True):
                active = self._still(sequence)
                if active is not None:  # else it ended before, and this step ran it in vain
                    try:
                        for token in tokens:
                            if not self._take(active, token, copy.mark, logprobs, outputs):
                                break
                    except Exception as error:  # noqa: BLE001  others go on
                        outputs.append(self._unread(active, error))
        outputs += self._pieces()

    def _pieces(self) -> list[StepOutput]:
        """What some streams say since they were told last."""
        now = time.perf_counter()
        count = max(1.0, (now - self._told_s) / PIECE_S)
        self._told_s = now
        outputs: list[StepOutput] = []
        while self._untold and len(outputs) < count:
            request = next(iter(self._untold))
            active = self._untold.pop(request)
            try:
                outputs.append(StepOutput(request, active.answer.chunk()))
            except Exception as error:  # noqa: BLE001  others go on
                outputs.append(self._unread(active, error))
        return outputs

    def _unread(self, active: _Active, error: Exception) -> StepOutput:
        self._forget(active)
        failure = self._typed(error, "reading its answer")
        return StepOutput(active.sequence.request, error=failure)

    def _verified(self, copy: VerifyCopy, before: Mark) -> list[list[int]]:
        """The tokens of each sequence of a step that checked drafts, and what is learned of it.

        Args:
            before: when the step in front of it ended; None where other work ran in between.
        """
        given = copy.read()
        counts = []
        for sequence, (num_matched, tokens) in zip(copy.sequences, given, strict=True):
            sequence.num_ahead -= copy.size - 1
            active = self._still(sequence)
            if active is None or not tokens:
                continue
            sequence.num_scheduled += len(tokens) - 1
            active.acceptance.learn(copy.size, num_matched)
            active.num_drafted += copy.size - 1
            active.num_accepted += len(tokens) - 1
            counts.append(len(tokens))
        if self._drafts is not None:
            assert self._clock is not None, "steps have run"
            seconds = None if before is None else self._clock.seconds(before, copy.mark)
            mean = sum(counts) / max(len(counts), 1)
            self._drafts.learn(copy.num_rows, copy.size, mean, seconds)
        return [tokens for _, tokens in given]

    def _still(self, sequence: Sequence) -> _Active | None:
        """The request of a sequence, unless that is over, or has gone on to another round."""
        active = self._active.get(sequence.request)
        return active if active is not None and active.sequence is sequence else None

    def _take(
        self,
        active: _Active,
        token: int,
        mark: Mark,
        logprobs: StepLogprobs | None,
        outputs: list[StepOutput],
    ) -> bool:
        """Add a token to its answer, and end the answer where that is the last one; returns whether
        the round goes on.

        Args:
            outputs: what is there to be told goes here.
        """
        answer, request = active.answer, active.sequence.request
        over = answer.append(token, mark, logprobs)
        if len(answer.token_ids) == 1:
            outputs.append(StepOutput(request, answer.chunk()))
        elif answer.stream:
            self._untold[request] = active
        if not over:
            return True
        between = answer.next_round()
        if between is not None:
            outputs.append(StepOutput(request, between))
            self._go_on(active)
        else:
            assert self._clock is not None, "steps have run"
            answer.num_cached_tokens = active.sequence.num_cached
            speculation, effective = None, self._effective
            if self._drafts is not None:
                off = self._why_not_drafted(answer)
                if off is None:
                    speculation = Speculation(active.num_drafted, active.num_accepted, None)
                else:
                    effective = replace(effective, speculate=f"off: {off}")
            last = answer.finish(
                self._clock,
                active.prompt.vision,
                effective,
                self._load_s,
                speculation,
                began=active.began,
            )
            outputs.append(StepOutput(request, last))
            self._share_answer(active)
            self._forget(active)
        return False

    def _go_on(self, active: _Active) -> None:
        """Begin an answer's next round, behind what it has said and what was put there."""
        answer, before = active.answer, active.sequence
        active.prompt = self._inputs.next_round(active.prompt, answer)
        if active.rest is not None:
            active.rest = [
                *active.rest,
                *answer.current_prompt.input_ids[before.num_prompt_tokens :],
            ]
        active.sequence = Sequence(
            before.request,
            len(active.prompt.ids),
            answer.settings.max_new_tokens,
            before.page_keys,
            goes_on=True,
            constrained=answer.matcher is not None,
        )
        self._scheduler.go_on(before, active.sequence, answer.num_written)

    def _why_not_drafted(self, answer: ResponseBuilder) -> str | None:
        if answer.logprobs is not None:
            return "logprobs"
        if not self._runner.may_draft(answer.sampling):
            return "sampling" if answer.sampling.do_sample else "repetition penalty"
        return None if answer.matcher is None else "schema"

    def _share_answer(self, active: _Active) -> None:
        """Leave the pages of an answer to the next turn of its chat, whose prompt it becomes."""
        if active.rest is None:
            return
        sequence = active.sequence
        before = sequence.page_keys[-1] if sequence.page_keys else b""
        # The last token is never fed.
        answer = active.answer
        keys = [*active.rest, *answer.round_ids[:-1]]
        new = page_keys(keys, PAGE_SIZE, before)
        sequence.page_keys += new
        self._scheduler.written(sequence, sequence.num_prompt_tokens + len(keys) - len(active.rest))
        whole = len(answer.round_ids) == answer.settings.max_new_tokens
        if whole or answer.round_ids[-1] in answer.stop_ids:
            # Else the device knows of no end, and went on behind it.
            self._scheduler.keep_end(sequence, keys[len(new) * PAGE_SIZE :])

    def _fail(self, active: _Active, error: QwenCliError) -> None:
        self._failed.append(StepOutput(active.sequence.request, error=error))
        self._forget(active)

    def _fail_running(self, error: Exception) -> None:
        """A step has failed in a way that is no request's in particular: so have all in it."""
        failure = self._typed(error.with_traceback(None), "running it beside others")
        for active in [self._active[each.request] for each in self._scheduler.running]:
            self._fail(active, failure)
        self._scheduler.release_all()
        self._release()

    def _forget(self, active: _Active) -> None:
        del self._active[active.sequence.request]
        self._num_streams -= active.answer.stream
        self._untold.pop(active.sequence.request, None)
        self._scheduler.finish(active.sequence)

    def _typed(self, error: Exception, doing: str) -> QwenCliError:
        """What went wrong with one request while `doing` something for it."""
        if isinstance(error, QwenCliError):
            return error
        if is_out_of_memory(error):
            return out_of_memory_error(self._effective.device, doing, error, num_image_tokens=1)
        return RequestError.of(error, doing)

    def _too_long(self, sequence: Sequence) -> PromptTooLongError:
        pool, rows = self._scheduler.pool, self._scheduler.limits.max_rows
        captions = captions_that_fit(self._runner.model.shape, pool.num_pages, rows)
        return PromptTooLongError(
            f"the prompt has {sequence.num_prompt_tokens} tokens and {sequence.max_new_tokens} new "
            f"ones are asked for, but the cache has room for {pool.capacity * PAGE_SIZE} "
            f"(captions: {captions})",
            "lower --max-new-tokens or --max-pixels, or free memory on the device",
        )
