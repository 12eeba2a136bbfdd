"""Assembles the result of one request from its tokens and the marks of its phases.

An answer is one round of decoding, or two where its thoughts have a budget: the first ends with
`</think>`, or where the budget does; the second goes on behind that, as if all of it had been the
prompt. So a budget costs no step anything, and drafts, schemas and stop strings know nothing of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwencli.config import SamplingParams
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.frontend.detokenizer import StopStringBuffer, ThoughtSplitter
from qwencli.engine.frontend.model_files import ModelFiles
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.frontend.tokenizer import THOUGHT_END
from qwencli.results import (
    EffectiveConfig,
    FinishReason,
    GenerationChunk,
    GenerationResult,
    Speculation,
    Timings,
    TokenLogprob,
    TokenLogprobs,
)
from qwencli.tracing import span

if TYPE_CHECKING:
    from qwencli.engine.constrained import TokenMatcher

# Log-probabilities of a token and of the likeliest in its place, and the ids of those.
StepLogprobs = tuple[list[float], list[int]]


@dataclass
class ResponseBuilder:
    """The answer so far.

    Args:
        started_s: when the request arrived, on `time.perf_counter`.
        num_cached_tokens: of the prompt, what was in the cache already.
        matcher: what the answer is held to; None while it thinks. Tokens that it forces at the
            beginning stand at the prompt's end already; they are part of the text.
        logprobs, bypass_caches: see `GenerationRequest`.
        stream: whether somebody reads what each token says.

    Of the round that runs: `current_prompt` is the prompt, of which rounds before have written the
    first `num_written` tokens, `settings` how tokens are chosen, `stop_ids` what ends it.
    """

    files: ModelFiles
    prompt: Prompt
    sampling: SamplingParams
    started_s: float
    num_cached_tokens: int = 0
    matcher: TokenMatcher | None = None
    logprobs: int | None = None
    bypass_caches: bool = False
    stream: bool = True
    token_ids: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        asked_to_stop = not self.sampling.ignore_eos
        self.stop_ids = frozenset(self.files.stop_token_ids if asked_to_stop else ())
        self.current_prompt, self.settings = self.prompt, self.sampling
        self._held_later: TokenMatcher | None = None
        self._budget = self.prompt.budget
        if self._budget is not None:
            self._held_later, self.matcher = self.matcher, None
            self.settings = replace(
                self.sampling, max_new_tokens=min(self._budget.tokens, self.sampling.max_new_tokens)
            )
            self._answer_ids, self.stop_ids = self.stop_ids, self.stop_ids | {self._budget.end_id}
        self._num_before = self.num_written = 0
        self.num_thinking_tokens = 0
        self._stops = StopStringBuffer(self.sampling.stop if asked_to_stop else ())
        self._detokenizer = self.files.detokenizer()
        self._splitter = ThoughtSplitter(inside=self.prompt.opens_thought)
        self._step_logprobs: list[StepLogprobs | None] = []
        # The text, and what of it no chunk has told. Of `token_ids`, how many are in it and told.
        self._thoughts: list[str] = []
        self._text: list[str] = []
        self._untold_thoughts = self._untold_text = ""
        self._num_spoken = self._num_told = 0
        # The text of tokens that were put at the prompt's end, until a token follows them.
        self._begun = self._detokenizer.push(self.prompt.forced_ids)
        self._begin_round()

    def _begin_round(self) -> None:
        """Note what `append` asks at each token."""
        self._full_at = self._num_before + self.settings.max_new_tokens
        # Whether nothing but a stop token and its length can end the round.
        self._plain = (
            self.matcher is None
            and self.logprobs is None
            and self._budget is None
            and not self._stops.any
        )

    @property
    def stopped(self) -> bool:
        """Whether a stop token or a stop string has ended the answer."""
        return self._at_stop_token or self._stops.stopped

    @property
    def round_over(self) -> bool:
        """Whether no token follows in this round."""
        count = len(self.token_ids) - self._num_before
        return self.stopped or self._has_thought or count == self.settings.max_new_tokens

    @property
    def round_ids(self) -> list[int]:
        """The tokens that this round has chosen."""
        return self.token_ids[self._num_before :]

    @property
    def _has_thought(self) -> bool:
        budget = self._budget
        return budget is not None and self.token_ids[-1:] == [budget.end_id]

    @property
    def _at_stop_token(self) -> bool:
        if not self.token_ids or self._has_thought:
            return False
        return self.token_ids[-1] in self.stop_ids

    def next_round(self) -> GenerationChunk | None:
        """Go on behind thoughts that are over, or that are ended by this call: a piece with what
        was put behind them. None where the answer is over."""
        budget, left = self._budget, self.sampling.max_new_tokens - len(self.token_ids)
        if budget is None or self.stopped:
            return None
        self._speak()
        forced = budget.closing_ids
        if self._has_thought or not self._splitter.thinking:
            # Also where the tag was spelled in several tokens.
            forced = () if self._held_later is None else budget.gap_ids
        begun = [] if self._held_later is None else self._held_later.forced()
        left -= len(forced) + len(begun)
        if left < 1:
            return None
        self._budget = None
        # The last token of a round is not fed by it.
        self.num_written = len(self.prompt.input_ids) + len(self.token_ids) - 1
        self.stop_ids, self.matcher = self._answer_ids, self._held_later
        self._put(forced)
        self._begun += self._detokenizer.push(begun)
        seed = self.sampling.seed
        self.settings = replace(
            self.sampling,
            max_new_tokens=left,
            # Numbers of its own: it would draw those of the thoughts again.
            seed=seed if seed < 0 else (seed + 1) & 0xFFFFFFFF,
        )
        self.current_prompt = replace(
            self.prompt, input_ids=[*self.prompt.input_ids, *self.token_ids, *begun], budget=None
        )
        self._num_before = len(self.token_ids)
        self._begin_round()
        return self._chunk()

    def _put(self, forced: Sequence[int]) -> None:
        """Append tokens that nothing chose, as if the last step had chosen them as well."""
        self.token_ids += forced
        self.marks += [self.marks[-1]] * len(forced)
        if self.logprobs is not None:
            self._step_logprobs += [None] * len(forced)
        self.num_thinking_tokens += len(forced)
        self._num_spoken += len(forced)
        self._say(*self._splitter.push(self._detokenizer.push(forced)))

    def add(
        self, token_id: int, mark: Mark, logprobs: StepLogprobs | None = None
    ) -> GenerationChunk:
        """`append` a token; what it says."""
        self.append(token_id, mark, logprobs)
        return self.chunk()

    def append(self, token_id: int, mark: Mark, logprobs: StepLogprobs | None = None) -> bool:
        """Append a token; a stop token ends the answer and is not part of its text. Text is made
        when somebody asks for it.

        Tokens that were chosen together come with the same mark.

        Args:
            logprobs: where a step told them.

        Returns:
            `round_over`.
        """
        ids = self.token_ids
        ids.append(token_id)
        self.marks.append(mark)
        if self._plain:  # as of most: the engine's thread does this for every row of every step
            return len(ids) == self._full_at or token_id in self.stop_ids
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self.logprobs is not None:
            self._step_logprobs.append(logprobs)
        if self._stops.any and not self._at_stop_token:
            self._speak()
        return self.round_over

    def chunk(self) -> GenerationChunk:
        """What the tokens since the last chunk say."""
        with span("detokenize"):
            self._speak()
            return self._chunk()

    def _chunk(self, result: GenerationResult | None = None) -> GenerationChunk:
        first, self._num_told = self._num_told, len(self.token_ids)
        thoughts, self._untold_thoughts = self._untold_thoughts, ""
        text, self._untold_text = self._untold_text, ""
        logprobs = () if self.logprobs is None else self._logprobs(first)
        return GenerationChunk(text, tuple(self.token_ids[first:]), result, thoughts, logprobs)

    def _speak(self) -> None:
        """Make text of the tokens that have none yet."""
        ids = self.token_ids[self._num_spoken : len(self.token_ids) - self._at_stop_token]
        self._num_spoken += len(ids)
        at = 0
        while at < len(ids):
            # One by one until the answer begins, so that what is thought is counted.
            split = self.matcher is None and not self._splitter.answering
            several = ids[at : at + 1] if split else ids[at:]
            at += len(several)
            thoughts, text = "", self._detokenizer.push(several)
            if self.matcher is None:
                # Data is no thought, whatever it spells.
                self.num_thinking_tokens += self._splitter.thinking
                thoughts, text = self._splitter.push(text)
            self._begun, text = "", self._begun + text
            self._say(thoughts, self._stops.push(text))

    def _say(self, thoughts: str, text: str) -> None:
        self._thoughts.append(thoughts)
        self._text.append(text)
        self._untold_thoughts += thoughts
        self._untold_text += text

    def _logprobs(self, first: int) -> tuple[TokenLogprobs, ...]:
        tokenizer, told = self.files.prompts.tokenizer, []
        spoken = slice(first, self._num_spoken)
        for id_, logprobs in zip(self.token_ids[spoken], self._step_logprobs[spoken], strict=True):
            if logprobs is not None:
                likely = zip(logprobs[0], [id_, *logprobs[1][: self.logprobs]], strict=False)
                tokens = [
                    TokenLogprob(each, tokenizer.token_bytes(each, skip_special=False), logprob)
                    for logprob, each in likely
                ]
                told.append(TokenLogprobs(tokens[0], tuple(tokens[1:])))
        return tuple(told)

    def finish(
        self,
        clock: EventTimer,
        vision: Sequence[tuple[Mark, Mark]],
        effective: EffectiveConfig,
        load_s: float,
        speculation: Speculation | None = None,
        began: Mark | None = None,
    ) -> GenerationChunk:
        """The last chunk, with the result. The device must have passed every mark.

        Args:
            vision: start and end of each run of the vision tower.
            began: when the device began with this answer; None = where the clock did.
        """
        self._speak()
        thoughts, tail = self._splitter.push(self._detokenizer.finish())
        more_thoughts, rest = self._splitter.finish()
        tail = self._stops.push(self._begun + tail + rest) + self._stops.finish()
        self._say(thoughts + more_thoughts, tail)
        all_thoughts, text = self._whole_answer()
        finish: FinishReason = "stop" if self.stopped else "length"
        step_s, token_t_s = self._times(clock, clock.origin if began is None else began)
        result = GenerationResult(
            text=text,
            token_ids=tuple(self.token_ids),
            finish_reason=finish,
            num_prompt_tokens=len(self.prompt.input_ids),
            num_image_tokens=self.prompt.num_image_tokens,
            num_cached_tokens=self.num_cached_tokens,
            notes=(*self.prompt.notes, *self.notes),
            timings=self._timings(clock, vision, step_s, token_t_s[0], load_s),
            effective=effective,
            token_t_s=tuple(token_t_s),
            token_gpu_ms=tuple(s * 1e3 for s in step_s)
            if effective.device.startswith("cuda")
            else None,
            speculation=speculation,
            thoughts=all_thoughts or None,
            num_thinking_tokens=self.num_thinking_tokens,
            image_sizes=self.prompt.image_sizes,
            resized_sizes=self.prompt.resized_sizes,
        )
        return self._chunk(result)

    def _whole_answer(self) -> tuple[str, str]:
        """(thoughts, answer), whole."""
        thoughts, text = "".join(self._thoughts).strip(), "".join(self._text)
        if self.matcher is None and self.files.prompts.tokenizer.has_token(THOUGHT_END):
            # A template that opens no thought for a model that thinks all the same.
            missed, found, after = text.rpartition(THOUGHT_END)
            if found:
                return "\n".join(filter(None, (thoughts, missed.strip()))), after.lstrip()
        return thoughts, text

    def _times(self, clock: EventTimer, before: Mark) -> tuple[list[float], list[float]]:
        """Seconds of each token from the one before, and when it was ready."""
        step_s: list[float] = []
        ready_s: list[float] = []
        marks, first, between = self.marks, 0, clock.seconds
        if len(set(map(id, marks))) == len(marks):  # as of steps of one token: a third of the time
            step_s = list(map(between, [before, *marks], marks))
            return step_s, [
                clock.origin_s + seconds
                for seconds in map(between, itertools.repeat(clock.origin), marks)
            ]
        for after, mark in enumerate(marks, 1):
            if after < len(marks) and marks[after] is mark:
                continue
            count, seconds = after - first, between(before, mark)
            end = clock.origin_s + between(clock.origin, mark)
            for left in reversed(range(count)):
                step_s.append(seconds / count)
                ready_s.append(end - left * seconds / count)
            before, first = mark, after
        return step_s, ready_s

    def _timings(
        self,
        clock: EventTimer,
        vision: Sequence[tuple[Mark, Mark]],
        step_s: list[float],
        first_token_s: float,
        load_s: float,
    ) -> Timings:
        # Without a cache of keys and values the tower runs at every step; this is the first's.
        first_s = clock.host_s(self.marks[0])
        spans = [clock.seconds(*span) for span in vision if clock.host_s(span[1]) <= first_s]
        vision_s = sum(spans) if spans else None
        decode_s = sum(step_s[1:])
        return Timings(
            load_s=load_s,
            preprocess_s=self.prompt.preprocess_s,
            vision_encode_s=vision_s,
            prefill_s=step_s[0] - (vision_s or 0.0),
            ttft_s=first_token_s - self.started_s,
            decode_s=decode_s,
            e2e_s=time.perf_counter() - self.started_s,
            decode_tok_per_s=len(step_s[1:]) / decode_s if decode_s > 0 else None,
        )
