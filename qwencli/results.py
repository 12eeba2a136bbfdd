"""What an engine answers: chunks while it runs, one result with its timings at the end."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
Size = tuple[int, int]


@dataclass(frozen=True)
class EffectiveConfig:
    """The modes that really ran, read back from the loaded model, never copied from the request.

    Those of a server are its own affair: None.

    Args:
        quantization: the concrete scheme: "none", "bnb-nf4", "int8", ...; "int8-w8a8" where decode
            steps round the vectors too, see `models.memory`.
        attention: of decode steps; "triton" where it is part of our own kernels, "numpy+sdpa" where
            short contexts on the CPU are numpy's and long ones torch's.
        kernels: "triton" where decode steps run our fused kernels, else "torch".
        device: concrete, e.g. "cuda:0"; the address of a server. dtype: of the weights that are
            not quantized.
        kv_dtype: of stored keys and values: "bfloat16", "int8", "fp8-e4m3", ...; None where an
            engine does not say.
        threads: that compute where the CPU is the device; None elsewhere.
        speculate: "auto", "mtp" where the model's own head drafted, or how many tokens each step
            drafted; "off", and why where it was asked for.
    """

    engine: str
    quantization: str | None
    attention: str | None
    cache: str | None
    device: str
    dtype: str | None
    kernels: str | None = "torch"
    kv_dtype: str | None = None
    speculate: str | None = "off"
    threads: int | None = None


@dataclass(frozen=True)
class Speculation:
    """What drafted tokens did for one answer.

    Args:
        num_drafted: tokens that steps checked beside the one they would have chosen anyway.
        num_accepted: those of them that became part of the answer.
        net_gain: the time that plain steps would have taken over the time that these steps take:
            below 1 speculation cost more than it gave. Both by what steps of each size take at
            least on this engine, so that what else disturbed this answer does not count. None
            where no plain step ran, or steps were those of other answers too.
    """

    num_drafted: int
    num_accepted: int
    net_gain: float | None

    @property
    def accept_percent(self) -> float | None:
        """None where nothing was drafted."""
        return 100 * self.num_accepted / self.num_drafted if self.num_drafted else None


@dataclass(frozen=True)
class Timings:
    """Seconds by phase. On CUDA the phases are GPU time between events in stream order.

    `ttft_s` runs from the request to the first token, preprocessing, vision and prefill included.
    `decode_s` runs from the first token to the last. `vision_encode_s` is None where the vision
    tower did not run: without images, and where all of them were kept from earlier requests.
    `decode_tok_per_s` is None for fewer than two tokens. Of a server's phases TTFT and decode are
    seen in its stream, where it sends one; the others are None.
    """

    load_s: float | None
    preprocess_s: float | None
    vision_encode_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    decode_s: float | None
    e2e_s: float
    decode_tok_per_s: float | None


@dataclass(frozen=True)
class GenerationResult:
    """One finished answer.

    Args:
        text: the answer alone.
        num_prompt_tokens, num_image_tokens: None where a server does not say.
        num_cached_tokens: of the prompt, those whose keys and values were in the cache already
            and were not run again.
        notes: a line each of what was done otherwise than asked for, as it had to be.
        thoughts: what the model thought before it answered; None where it did not.
        num_thinking_tokens: of them, `</think>` and what was put in front of it included.
        token_ids: generated tokens, those of the thoughts too, and the stop token or those of the
            stop string where one ended the answer. None of a server's.
        token_t_s: when each token was ready, on the host's `time.perf_counter` clock; of a server,
            when each piece of its stream came.
        num_counted_tokens: of a server's answer, as it counts them itself.
        token_gpu_ms: GPU time from the previous token to this one (None off CUDA);
            the first entry is the time from the start of the prefill.
        speculation: None where nothing was drafted.
        image_sizes, resized_sizes: (width, height) of each picture or video frame of the request,
            in order: as it came, and as the model saw it.

    Tokens that one step chose together share its time in equal parts, in both lists: what counts
    is how long a token took, and all of them are ready when the step ends.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int | None
    num_image_tokens: int | None
    timings: Timings
    effective: EffectiveConfig
    token_t_s: tuple[float, ...]
    token_gpu_ms: tuple[float, ...] | None
    speculation: Speculation | None = None
    num_cached_tokens: int = 0
    notes: tuple[str, ...] = ()
    thoughts: str | None = None
    image_sizes: tuple[Size, ...] = ()
    resized_sizes: tuple[Size, ...] = ()
    num_counted_tokens: int | None = None
    num_thinking_tokens: int = 0

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids) if self.num_counted_tokens is None else self.num_counted_tokens

    @property
    def itl_ms(self) -> tuple[float, ...]:
        """Inter-token latencies in ms, one fewer than there are tokens."""
        times = self.token_t_s
        return tuple((b - a) * 1e3 for a, b in itertools.pairwise(times))

    @property
    def text_sha256(self) -> str:
        """A digest of all that was said, thoughts included: equal for equal work."""
        return hashlib.sha256(((self.thoughts or "") + self.text).encode()).hexdigest()


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model alone: before temperature, penalty and schema.

    Args:
        text: its bytes, which may be part of a character.
    """

    token_id: int
    text: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The token that was chosen, and the likeliest ones in its place, in order."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the answer as it is produced.

    `text` is a piece of the answer and may be empty (a token that ends inside a character);
    `thoughts` is a piece of what the model thinks before it. `logprobs` are of `token_ids`, where
    the request asks for them. The last chunk of a stream carries
    `result`; it is None on all others.
    """

    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None
    thoughts: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
